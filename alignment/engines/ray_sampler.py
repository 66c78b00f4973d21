"""vLLM on a cluster: engines that are actors behind one queue, watched, and replaced when they are lost.

An engine answers ``take`` all the time, with completions or without. One that does not for ``heartbeat_s``, or whose
one step takes as long, is stuck, and is killed; one that died or failed is noticed at once. What it had goes back into
the queue, and another takes its place, which gets the current weights before its first request: an engine serves only
with the weights of the last update, so one that it missed, or left half way, keeps it out until it has caught up.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from alignment.engines.config import Site
from alignment.engines.ray_process import ending
from alignment.engines.rollout_engine import RolloutEngine, close, sleep, wake
from alignment.engines.routing import Router
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.engines.vllm_spec import EngineSpec
from alignment.errors import EngineFailed, UserError
from alignment.types import Completion, Request

log = logging.getLogger(__name__)
T = TypeVar("T")
POLL_S = 0.1
"""How often waiting looks up from what it waits for."""
THREADS = {"watch": 1}
"""Of an actor, beside the one that takes orders: see :meth:`RolloutEngine.take`."""
TIDY_S = 5.0
"""How long engines may take to remove what they left on disk."""


class EnginePeer:
    """One engine for a transport; see :class:`alignment.engines.transport_ends.Peer`."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor, self.name = actor, name

    def call(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Runs ``function(engine, *args)`` there between two steps, after all that was called before."""
        return self.actor.call.remote(function, *args).future()


@dataclass(eq=False)
class _Engine:
    """One engine in one place. It serves while the router knows it."""

    index: int
    actor: Any
    ready: Any = None
    """While it starts: the reference to wait for."""
    peer: EnginePeer | None = None
    """Once it is ready."""
    take: Any = None
    """Once it is ready: what it answers all the time."""
    heard: float = 0.0
    """When it last gave a sign of life, by the monotonic clock."""
    catching_up: tuple[int, Any, float] | None = None
    """While it gets the weights of a version that others have: that version, the reference to wait for, and since when.
    """
    sleeps: bool = False


class RaySampler:
    """Samples with ``config.engines`` engines that the cluster of ``site`` places.

    Args:
        site: The model, for its shape, the longest row, and the cluster.
        config: Options.

    Raises:
        UserError: vLLM cannot run this model.
        EngineFailed: An engine could not be started.
    """

    name = "vllm"

    def __init__(self, site: Site, config: VllmSamplerConfig) -> None:
        self.site, self.config, self.cluster = site, config, site.cluster
        self.sleeps = config.sleep
        self.spec = EngineSpec.of(site, config)
        self.router = Router((), config.max_num_seqs)
        self.version: int | None = None
        """Of the policy that samples; None before the first update."""
        self.endings: list[str] = []
        """How engines ended that were lost."""
        self.asleep = False
        self._buckets: tuple[Any, ...] = ()
        self._again: Callable[[int], object] | None = None
        self._updating: Sequence[_Engine] = ()
        """Those that :meth:`peers` named last."""
        self._places: list[int] = []
        """Whose engine was lost while all slept: the memory of the GPU is the learner's, so they start later."""
        self._early: list[Completion] = []
        """Completions that were met while looking after something else."""
        actors = self.cluster.engine_actors(RolloutEngine, config.engines, self.spec, threads=THREADS)
        self.engines = {index: _Engine(index, actor) for index, actor in enumerate(actors)}
        for engine in self.engines.values():
            self._listen(engine)

    # Requests

    def add(self, requests: Sequence[Request]) -> None:
        """Takes requests, whose ids differ from all that are pending.

        Raises:
            UserError: One of them cannot be sampled; then none was taken.
        """
        self.spec.check(requests)
        self.router.add(requests)
        self._dispatch()

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """What finished since the last call; waits for the first, at most ``timeout_s``. Empty when nothing is pending.

        Who waits here has nothing else to do, and neither has the learner: then an engine that lacks weights gets them.

        Raises:
            EngineFailed: No engine is left, and none may be started any more; says how each ended.
            FloatingPointError: The model's logits are not finite.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._early or not self.router.pending:
            early, self._early = self._early, []
            return early + self._look(0.0)
        while True:
            left_s = POLL_S if deadline is None else min(POLL_S, max(0.0, deadline - time.monotonic()))
            completions = self._look(left_s)
            over = deadline is not None and time.monotonic() >= deadline
            if completions or not self.router.pending or over:
                return completions
            self._bring_weights()
            self.site.idle()

    def abort(self, ids: Collection[str]) -> None:
        """Forgets requests: no completion comes for them. Unknown ids are ignored."""
        self._early = [completion for completion in self._early if completion.id not in ids]
        for index, running in self.router.abort(ids).items():
            self.engines[index].actor.abort.remote(running)  # pyright: ignore[reportArgumentType]
        self._dispatch()

    def close(self) -> None:
        """Ends all engines, which may tidy up for a moment; may be called twice."""
        tidied = [e.actor.call.remote(close) for e in self.engines.values() if e.peer]
        if tidied:
            ray.wait(tidied, num_returns=len(tidied), timeout=TIDY_S)
        while self.engines:
            self.cluster.kill(self.engines.popitem()[1].actor)

    # As a fleet, for transports

    @property
    def losses(self) -> int:
        """Engines that were lost so far."""
        return len(self.endings)

    def peers(self) -> list[EnginePeer]:
        """The engines that can be updated."""
        self._updating = [engine for engine in self.engines.values() if engine.peer]
        return [engine.peer for engine in self._updating if engine.peer]

    def watch(self) -> None:
        """Looks after engines that died or hang.

        Raises:
            EngineFailed: None is left, and none may be started any more; says how each ended.
        """
        self._early += self._look(0.0)

    def idle(self) -> None:
        """For whoever waits for these engines."""
        self.site.idle()

    def updated(self, version: int, buckets: Sequence[Any] = (), again: Callable[[int], object] | None = None) -> None:
        """All that :meth:`peers` named last have policy ``version``; see :class:`alignment.engines.fleet.Fleet`."""
        self.version, self._buckets, self._again = version, tuple(buckets), again
        for engine in self._updating:
            if engine is self.engines.get(engine.index):
                self._serve(engine)
        self._dispatch()

    def sleep(self) -> None:
        """Every engine gives up the memory of its GPU. One that is starting is waited for: it would take more of it."""
        while any(engine.peer is None for engine in self.engines.values()):
            self.watch()
            self.site.idle()
            time.sleep(POLL_S)
        self.asleep = True
        for engine in self._ask(list(self.engines.values()), sleep):
            engine.sleeps = True

    def wake(self, what: Literal["weights", "cache"]) -> None:
        """Every engine takes it again, for the weights first. What was lost meanwhile is replaced then."""
        self.asleep = False
        while self._places:
            self._start(self._places.pop())
        for engine in self._ask([e for e in self.engines.values() if e.sleeps], wake, what):
            engine.sleeps = what == "weights"

    # Engines that come and go

    def _ask(self, engines: Sequence[_Engine], function: Callable[..., Any], *args: Any) -> list[_Engine]:
        """Runs a function in each; those that did it. The others were lost, and are replaced."""
        refs = {engine.actor.call.remote(function, *args): engine for engine in engines}
        done = []
        while refs := {ref: e for ref, e in refs.items() if e is self.engines.get(e.index)}:
            for ref in ray.wait(list(refs), num_returns=1, timeout=POLL_S)[0]:
                engine = refs.pop(ref)
                try:
                    ray.get(ref)
                    done.append(engine)
                except RayError as error:
                    self._replace(engine, error)
            self.watch()
            self.site.idle()
        return done

    def _dispatch(self) -> None:
        orders: dict[Any, list[Request]] = {}
        for index, requests in self.router.dispatch():
            orders.setdefault(index, []).extend(requests)
        for index, requests in orders.items():
            self.engines[index].actor.submit.remote(requests)

    def _look(self, timeout_s: float) -> list[Completion]:
        """Completions that are there within ``timeout_s``, and a look after engines that are not."""
        if not self.engines and not self._places:
            self._give_up()
        takes = {e.take: e for e in self.engines.values() if e.take is not None}
        others = [r for e in self.engines.values() for r in (e.ready, e.catching_up and e.catching_up[1]) if r]
        awaited = [*takes, *others]
        ready = ray.wait(awaited, num_returns=1, timeout=timeout_s)[0] if awaited else []
        if len(awaited) > 1 and ready:
            ready = ray.wait(awaited, num_returns=len(awaited), timeout=0)[0]
        completions: list[Completion] = []
        for ref in ready:
            if (engine := takes.get(ref)) is not None and engine.take is ref:
                completions += self._took(engine)
        for engine in list(self.engines.values()):
            try:
                self._bring_on(engine)
            except RayError as error:
                self._replace(engine, error)
        self._dispatch()
        return completions

    def _took(self, engine: _Engine) -> list[Completion]:
        try:
            finished = ray.get(engine.take)
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, (UserError, FloatingPointError)):
                raise error.cause from error
            self._replace(engine, error)
            return []
        self._listen(engine)
        return [completion for completion in finished if self.router.finished(completion)]

    def _listen(self, engine: _Engine) -> None:
        if engine.peer is None:
            engine.peer = EnginePeer(engine.actor, self.cluster.name_of(engine.actor))
        engine.heard, heartbeat_s = time.monotonic(), self.config.heartbeat_s
        engine.take = engine.actor.take.remote(min(1.0, heartbeat_s / 4), heartbeat_s)

    def _serve(self, engine: _Engine) -> None:
        engine.catching_up = None
        if engine.index not in self.router.loads:
            self.router.join(engine.index)

    def _bring_on(self, engine: _Engine) -> None:
        """Looks after one engine: one step on its way into service (ready, then with the newest weights), then whether
        it lives."""
        limit_s = self.cluster.config.start_timeout_s
        if engine.ready is not None:
            if _is_there(engine.ready):
                self.cluster.arrived(engine.actor, ray.get(engine.ready))
                engine.ready = None
                self._listen(engine)
            elif time.monotonic() - engine.heard > limit_s:
                self._replace(engine, f"was not ready after {limit_s:g} s")
            return
        if time.monotonic() - engine.heard > self.config.heartbeat_s and not _is_there(engine.take):
            self._replace(engine, f"did not answer for {self.config.heartbeat_s:g} s")
        elif engine.catching_up is not None:
            version, ref, since = engine.catching_up
            if _is_there(ref):
                ray.get(ref)
                engine.catching_up = None
                if version == self.version:
                    self._serve(engine)
            elif time.monotonic() - since > limit_s:
                self._replace(engine, f"did not take the weights within {limit_s:g} s")
        elif engine.index not in self.router.loads and self.version is not None and self._buckets:
            ref = engine.actor.catch_up.remote(self.version, list(self._buckets))
            engine.catching_up = self.version, ref, time.monotonic()

    def _bring_weights(self) -> None:
        """What waits for weights that no buckets hold gets them from the learner, as all others do again."""
        if self._again is None or self.version is None or self.asleep:
            return
        if any(engine.peer and engine.index not in self.router.loads for engine in self.engines.values()):
            self._again(self.version)

    def _replace(self, engine: _Engine, why: RayError | str) -> None:
        """Ends an engine for good and starts another in its place; while all sleep, when they wake.

        Raises:
            EngineFailed: None may be started any more, and no other is left.
        """
        name = self.cluster.name_of(engine.actor)
        self.endings.append(f"{name} {why if isinstance(why, str) else self._reason(why)}")
        self.cluster.kill(engine.actor)
        self.router.leave(engine.index)
        del self.engines[engine.index]
        if len(self.endings) > self.config.max_restarts:
            log.warning("%s; it is not replaced (max_restarts: %d)", self.endings[-1], self.config.max_restarts)
            if not self.engines and not self._places:
                self._give_up()
            return
        log.warning("%s; another one takes its place", self.endings[-1])
        if self.asleep:
            self._places.append(engine.index)
        else:
            self._start(engine.index)

    def _start(self, index: int) -> None:
        actor = self.cluster.engine_actor(index, RolloutEngine, self.spec, threads=THREADS)
        self.engines[index] = _Engine(index, actor, ready=actor.align_place.remote(), heard=time.monotonic())

    def _reason(self, error: RayError) -> str:
        if isinstance(error, RayTaskError):
            return f"failed: {type(error.cause).__name__}: {error.cause}"
        return f"died: {ending(error, self.cluster.session.folder)}"

    def _give_up(self) -> None:
        ends = "; ".join(self.endings)
        raise EngineFailed(f"no rollout engine is left (max_restarts: {self.config.max_restarts}): {ends}")


def _is_there(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])
