"""Worker processes that can be killed, and the order in which calls go to them.

Each call has a deadline. When one is missed, or the worker dies, its whole process group is killed and replaced, and
the completions of the call are tried one by one, so that only the one at fault is lost. Those single calls get
processes of their own beside the regular ones: a step waits for the timeout once, not once per culprit.
"""

import selectors
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.errors import UserError
from alignment.scoring_process import Call, Worker
from alignment.scoring_worker import Verdict, failure

START_TIMEOUT_S = 180.0
"""A worker that has not imported everything by then never will."""
CUT = 0.25
"""Share of the timeout after which a call of several completions is cut and they are tried one by one."""
SPARES = 8
"""Single completions that may be tried beside the regular workers at a time."""
GIVE_UP_ROWS, GIVE_UP_GROUPS = 8, 3
"""A reward is given up once this many completions, over this many groups, were lost with no success between them."""
CHUNK = 64
"""Most calls in one message to a worker."""


@dataclass(slots=True)
class Streak:
    """What a reward lost since it last answered."""

    rows: int = 0
    groups: set[int] = field(default_factory=set)


class Pool:
    """The regular workers, and the spare ones while completions are tried one by one.

    Args:
        setup: What a worker is told first: plugins and rewards.
        sys_path: Folders that join the end of the workers' module path.
        workers: Regular processes.
        timeout_s: For a call, in seconds.
    """

    def __init__(self, setup: Mapping[str, Any], sys_path: Sequence[str], workers: int, timeout_s: float) -> None:
        self.setup, self.sys_path, self.size, self.timeout_s = setup, sys_path, workers, timeout_s
        self.needs: list[list[str]] = []
        """Columns of the data set that each reward needs, known once a worker is ready."""
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._slow: set[int] = set()
        """Rewards whose calls of several completions are not cut short: single ones took as long."""
        self._pending: deque[Call] = deque()
        self._single: deque[Call] = deque()
        self._streaks: dict[int, Streak] = {}
        self._deliver: Callable[[Call, Sequence[Verdict]], None] = lambda call, answer: None
        self._interrupted = False

    def start(self) -> None:
        """Starts the regular workers that are missing, without waiting for them."""
        while len(self._workers) < self.size:
            self._launch()

    def restart(self) -> None:
        """Ends all workers, between two runs, and waits for others that begin anew.

        Raises:
            UserError: One cannot be started.
        """
        for worker in list(self._workers):
            self._drop(worker)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Waits until every worker has imported what it needs.

        Raises:
            UserError: One could not; says what was being imported and why it failed.
        """
        self.start()
        while any(w.needs is None for w in self._workers):
            self._poll()
            self._expire()

    def run(self, calls: Sequence[Call], deliver: Callable[[Call, Sequence[Verdict]], None]) -> None:
        """Makes all calls and hands each answer, or failure, to ``deliver`` as it comes, in any order.

        Raises:
            UserError: A worker could not be started, or :meth:`interrupt` was called.
        """
        self._pending, self._deliver = deque(calls), deliver
        try:
            self._poll(0.0)  # a worker may have died since the last run
            while not self._interrupted and (self._pending or self._single or any(w.calls for w in self._workers)):
                self._dispatch()
                self._poll()
                self._expire()
            if self._interrupted:  # then the answers of workers that were ended are none
                raise UserError("scoring was stopped")
        finally:
            self._pending, self._single, self._streaks = deque(), deque(), {}
            for worker in list(self._workers):
                if worker.calls or len(self._workers) > self.size:
                    self._drop(worker)

    def interrupt(self) -> None:
        """Ends a :meth:`run` of another thread soon: it wakes up when its workers die. There is no run after it."""
        self._interrupted = True
        for worker in list(self._workers):
            worker.end()

    def close(self) -> None:
        """Kills every worker."""
        for worker in list(self._workers):
            self._drop(worker)
        self._selector.close()

    def _launch(self) -> None:
        worker = Worker(self.setup, self.sys_path)
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def _drop(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        worker.kill()

    def _dispatch(self) -> None:
        """Gives idle workers work, and starts one more worker, one at a time, where work waits for want of them."""
        busy = [w for w in self._workers if w.calls]
        alone = sum(w.alone for w in busy)
        regular = len(busy) - alone
        for worker in [w for w in self._workers if w.needs is not None and not w.calls]:
            if self._single and alone < SPARES:
                worker.alone, alone = True, alone + 1
                worker.send([self._single.popleft()])
            elif self._pending and regular < self.size:
                worker.alone, regular = False, regular + 1
                # Ever smaller pieces, so that the workers finish together.
                count = min(CHUNK, max(1, len(self._pending) // (2 * self.size)))
                worker.send([self._pending.popleft() for _ in range(count)])
        waiting = (self._single and alone < SPARES) or (self._pending and regular < self.size)
        if waiting and all(w.needs is not None for w in self._workers):
            self._launch()

    def _poll(self, wait_s: float | None = None) -> None:
        """Handles what workers say, waiting for it until the next deadline or for ``wait_s`` seconds."""
        if wait_s is None:
            waited_for = [self._deadline(w) for w in self._workers if w.calls or w.needs is None]
            wait_s = max(0.0, min(waited_for) - time.monotonic()) if waited_for else 0.0
        for key, _ in self._selector.select(wait_s):
            worker: Worker = key.data
            if worker not in self._workers:  # dropped a moment ago, with the reward that it worked on
                continue
            messages = worker.receive()
            for message in messages or ():
                self._handle(worker, message)
            if messages is None:
                self._ended(worker)

    def _handle(self, worker: Worker, message: Any) -> None:
        now = time.monotonic()
        if isinstance(message, dict):
            if "failed" in message:
                raise UserError(message["failed"])
            worker.loading = message.get("loading", worker.loading)
            worker.needs = message.get("ready")
            if worker.needs is not None:
                self.needs = worker.needs
            return
        call = worker.calls.popleft()
        took_s, worker.since = now - worker.since, now
        reward, n = call.reward, len(call.rows)
        self._streaks.pop(reward, None)
        if took_s * call.split_from > CUT * self.timeout_s:
            self._slow.add(reward)
        if isinstance(message, str) and n > 1 and not call.whole:  # it raised: for which completion?
            self._pending.extendleft(reversed(call.split()))
        else:
            self._deliver(call, [failure("error", message)] * n if isinstance(message, str) else message)

    def _deadline(self, worker: Worker) -> float:
        return worker.since + (self._limit_s(worker.calls[0]) if worker.calls else START_TIMEOUT_S)

    def _limit_s(self, call: Call) -> float:
        cut = len(call.rows) > 1 and not call.whole and call.reward not in self._slow
        return self.timeout_s * (CUT if cut else 1.0)

    def _expire(self) -> None:
        """Kills workers whose time is up."""
        now = time.monotonic()
        for worker in list(self._workers):
            if worker not in self._workers or now < self._deadline(worker):
                continue
            if worker.needs is None:
                raise UserError(f"{worker.loading} did not load within {START_TIMEOUT_S:g} s")
            if worker.calls:
                self._lost(worker, "timeout", f"no answer within {self._limit_s(worker.calls[0]):g} s")

    def _ended(self, worker: Worker) -> None:
        ending = worker.ending()
        if worker.needs is None:
            self._drop(worker)
            raise UserError(f"{worker.loading} cannot be loaded: the process {ending}")
        if worker.calls:
            self._lost(worker, "error", f"the process {ending}")
        else:
            self._drop(worker)

    def _lost(self, worker: Worker, status: str, detail: str) -> None:
        """The call that a worker was on took it down: replace it, and find out which completion it was."""
        call, *rest = worker.calls
        self._drop(worker)
        self._pending.extendleft(reversed(rest))
        streak = self._streaks.setdefault(call.reward, Streak())
        streak.groups.add(call.group)
        if len(call.rows) > 1 and not call.whole:
            self._single.extend(call.split())
            return
        streak.rows += len(call.rows)
        self._deliver(call, [failure(status, detail)] * len(call.rows))
        if streak.rows >= GIVE_UP_ROWS and len(streak.groups) >= GIVE_UP_GROUPS:
            self._give_up(call.reward, status, detail)

    def _give_up(self, reward: int, status: str, detail: str) -> None:
        """Fails what is left of a reward that nothing comes back from; a step would wait for every completion of it."""
        streak = self._streaks[reward]
        why = f"not tried after {streak.rows} completions of {len(streak.groups)} prompts were lost in a row: {detail}"
        hopeless: list[Call] = []
        for worker in [w for w in self._workers if w.calls and w.calls[0].reward == reward]:
            self._pending.extendleft(reversed(worker.calls))
            self._drop(worker)
        for queue in (self._pending, self._single):
            hopeless += [call for call in queue if call.reward == reward]
            kept = [call for call in queue if call.reward != reward]
            queue.clear()
            queue.extend(kept)
        for call in hopeless:
            self._deliver(call, [failure(status, why)] * len(call.rows))
