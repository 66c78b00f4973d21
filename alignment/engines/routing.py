"""Which engine samples which requests, and when: a queue that keeps several engines equally busy.

Requests of one prompt stay together, so that an engine computes their prompt once. An engine is given as many as it can
decode together and no more; the rest waits here, where whichever engine has room first takes it. Among what was asked
for at the same time the longest goes first (longest processing time first, Graham 1969), to the engine with the least
expected work. How long completions will be is guessed from those so far. Every operation costs ``O(log n)``.
"""

import heapq
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from alignment.types import Completion, Request


@dataclass(order=True, slots=True)
class _Waiting:
    """Requests of one prompt that no engine has."""

    wave: int
    """They were asked for with the others of this number."""
    shortness: float
    order: int
    requests: list[Request] = field(compare=False)


@dataclass(slots=True)
class _Load:
    """What an engine has to do."""

    running: dict[str, tuple[Request, float]] = field(default_factory=dict)
    """Its requests by id, each with the tokens that it was expected to take."""
    tokens: float = 0.0


class Router:
    """Assigns requests to engines.

    Args:
        engines: Names of the engines.
        capacity: Requests that an engine decodes together. It is given a whole prompt while it has fewer.
    """

    def __init__(self, engines: Iterable[Hashable], capacity: int) -> None:
        self.capacity = capacity
        self.loads: dict[Hashable, _Load] = {}
        self.where: dict[str, Hashable | None] = {}
        """The engine of every request that is pending, by the request's id; None while it waits."""
        self._queue: list[_Waiting] = []
        self._free: list[tuple[float, int, Hashable]] = []
        """Engines by expected work. Entries that are no longer true are passed over."""
        self._wave = self._order = self._finished = self._tokens = 0
        for engine in engines:
            self.join(engine)

    @property
    def pending(self) -> int:
        """Requests without a completion."""
        return len(self.where)

    def add(self, requests: Sequence[Request]) -> None:
        """Takes requests into the queue. Those of a prompt that stand side by side stay together."""
        self._wave += 1
        self._enqueue(requests, self._wave)

    def join(self, engine: Hashable) -> None:
        """An engine that has nothing to do is there from now on."""
        self.loads[engine] = _Load()
        self._offer(engine)

    def leave(self, engine: Hashable) -> None:
        """An engine is gone. What it had waits again, before everything else."""
        load = self.loads.pop(engine, _Load())
        self._enqueue([request for request, _ in load.running.values()], 0)

    def dispatch(self) -> list[tuple[Hashable, list[Request]]]:
        """What is to be given to which engine now."""
        given: list[tuple[Hashable, list[Request]]] = []
        while self._queue and (engine := self._freest()) is not None:
            requests = [r for r in heapq.heappop(self._queue).requests if self.where.get(r.id, r) is None]
            if not requests:
                continue
            load = self.loads[engine]
            for request in requests:
                work = self._expected(request)
                load.running[request.id] = request, work
                load.tokens += work
                self.where[request.id] = engine
            self._offer(engine)
            given.append((engine, requests))
        return given

    def finished(self, completion: Completion) -> bool:
        """Takes note of a completion; False where nobody waits for it any more."""
        if completion.id not in self.where:
            return False
        self._release(completion.id)
        self._finished += 1
        self._tokens += len(completion.token_ids)
        return True

    def abort(self, ids: Collection[str]) -> dict[Hashable, list[str]]:
        """Forgets requests; those that an engine has, by engine."""
        running: dict[Hashable, list[str]] = {}
        for id_ in ids:
            engine = self._release(id_) if id_ in self.where else None
            if engine is not None:
                running.setdefault(engine, []).append(id_)
        return running

    def _release(self, id_: str) -> Hashable | None:
        """Forgets a request; the engine that has it."""
        engine = self.where.pop(id_)
        if engine is not None:
            load = self.loads[engine]
            load.tokens -= load.running.pop(id_)[1]
            self._offer(engine)
        return engine

    def _enqueue(self, requests: Sequence[Request], wave: int) -> None:
        groups: list[list[Request]] = []
        for request in requests:
            self.where[request.id] = None
            if groups and groups[-1][0].prompt_ids == request.prompt_ids:
                groups[-1].append(request)
            else:
                groups.append([request])
        for group in groups:
            self._order += 1
            work = sum(map(self._expected, group))
            heapq.heappush(self._queue, _Waiting(wave, -work, self._order, group))

    def _expected(self, request: Request) -> float:
        """Tokens that a request will take, by the mean of the completions so far."""
        most = request.params.max_tokens
        return min(most, self._tokens / self._finished) if self._finished else float(most)

    def _offer(self, engine: Hashable) -> None:
        self._order += 1
        heapq.heappush(self._free, (self.loads[engine].tokens, self._order, engine))

    def _freest(self) -> Hashable | None:
        """The engine with room that has the least to do; None when all are full."""
        while self._free:
            tokens, _, engine = self._free[0]
            load = self.loads.get(engine)
            if load is not None and load.tokens == tokens and len(load.running) < self.capacity:
                return engine
            heapq.heappop(self._free)  # it left, its work changed since, or it is full: another entry follows
        return None
