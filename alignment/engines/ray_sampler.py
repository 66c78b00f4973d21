"""vLLM on a cluster: engines that are actors behind one queue, watched, and replaced when they die.

An engine answers ``take`` all the time, with completions or without. One that does not for ``heartbeat_s`` is stopped
or stuck, and is killed; one that died is noticed at once. What it had goes back into the queue, and another takes its
place. That one gets the weights of the last update before its first request. An engine never serves with old weights:
an update that it missed, or left half way, keeps it out until it has caught up.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from alignment.engines.config import Site
from alignment.engines.ray_process import ending
from alignment.engines.rollout_engine import RolloutEngine
from alignment.engines.routing import Router
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.engines.vllm_spec import EngineSpec
from alignment.errors import EngineFailed, UserError
from alignment.types import Completion, Request

log = logging.getLogger(__name__)
T = TypeVar("T")
POLL_S = 0.1
"""How often waiting looks up from what it waits for."""
CALLS = 8
"""That an actor serves at once, each in a thread: orders, a ``take``, and room for both to overlap."""

TIDY_S = 5.0
"""How long engines may take to remove what they left on disk."""


@dataclass(eq=False)
class _Engine:
    """One engine in one place. It serves while it has a ``take``."""

    index: int
    actor: Any
    ready: Any = None
    """While it starts: the reference to wait for."""
    catching_up: tuple[int, Any] | None = None
    """While it gets the weights of a version that others have: that version, and the reference to wait for."""
    take: Any = None
    heard: float = 0.0
    """When it last gave a sign of life, by the monotonic clock."""


class EnginePeer:
    """One engine for a transport; see :class:`alignment.engines.transport_ends.Peer`."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor, self.name = actor, name

    def call(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Runs ``function(engine, *args)`` there between two steps."""
        return self.actor.call.remote(function, *args).future()


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
        self.latest: tuple[Any, ...] = ()
        """References to packed buckets of its weights, where the transport keeps them."""
        self._updating: list[_Engine] = []
        """Those that took part in the last update."""
        self.endings: list[str] = []
        """How engines ended that had to be replaced."""
        self._early: list[Completion] = []
        """Completions that were met while looking after something else."""
        actors = self.cluster.engine_actors(RolloutEngine, config.engines, self.spec, concurrency=CALLS)
        self.engines = {index: _Engine(index, actor) for index, actor in enumerate(actors)}
        for engine in self.engines.values():
            self._serve(engine)

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
            self.site.idle()

    def abort(self, ids: Collection[str]) -> None:
        """Forgets requests: no completion comes for them. Unknown ids are ignored."""
        self._early = [completion for completion in self._early if completion.id not in ids]
        for index, running in self.router.abort(ids).items():
            self.engines[index].actor.abort.remote(running)  # pyright: ignore[reportArgumentType]
        self._dispatch()

    def close(self) -> None:
        """Ends all engines, which may tidy up for a moment; may be called twice."""
        tidied = [e.actor.call.remote(_close) for e in self.engines.values() if e.take is not None]
        if tidied:
            ray.wait(tidied, num_returns=len(tidied), timeout=TIDY_S)
        while self.engines:
            self.cluster.kill(self.engines.popitem()[1].actor)

    def idle(self) -> None:
        """For whoever waits for these engines."""
        self.site.idle()

    # For transports

    def peers(self) -> list[EnginePeer]:
        """The engines that can be updated, for a transport."""
        self._updating = [engine for engine in self.engines.values() if engine.take is not None]
        return [EnginePeer(e.actor, self.cluster.name_of(e.actor)) for e in self._updating]

    def check(self) -> bool:
        """Looks after engines that died or are stuck; whether all that served still do."""
        before = len(self.endings)
        self._early += self._look(0.0)
        return len(self.endings) == before

    def updated(self, version: int, buckets: Sequence[Any] = ()) -> None:
        """All that :meth:`peers` named last have policy ``version`` now. Those that waited for weights serve.

        Args:
            version: Of the policy.
            buckets: References to packed buckets of all its weights, with which an engine that starts later catches
                up. Without them such an engine waits for the next update.
        """
        self.version, self.latest = version, tuple(buckets)
        for engine in self._updating:
            if engine is self.engines.get(engine.index) and engine.index not in self.router.loads:
                self.router.join(engine.index)
        self._dispatch()

    def sleep(self) -> None:
        """Every engine gives up the memory of its GPU."""
        self._all(_sleep)

    def wake(self, what: Literal["weights", "cache"]) -> None:
        """Every engine takes it again, for the weights first."""
        self._all(_wake, what)

    def _all(self, function: Callable[..., Any], *args: Any) -> None:
        peers = self.peers()
        refs = [peer.actor.call.remote(function, *args) for peer in peers]
        self.cluster.wait(refs, "the engines to change sides", self.cluster.config.start_timeout_s)

    # Engines that come and go

    def _dispatch(self) -> None:
        for index, requests in self.router.dispatch():
            self.engines[index].actor.submit.remote(requests)  # pyright: ignore[reportArgumentType]

    def _look(self, timeout_s: float) -> list[Completion]:
        """Completions that are there within ``timeout_s``, and a look after engines that are not."""
        takes = {e.take: e for e in self.engines.values() if e.take is not None}
        others = [r for e in self.engines.values() for r in (e.ready, e.catching_up and e.catching_up[1]) if r]
        if not others and self.router.pending and not self.router.loads:
            self._give_up()
        ready, _ = ray.wait([*takes, *others], num_returns=1, timeout=timeout_s)
        if len(takes) > 1 and ready:
            ready, _ = ray.wait([*takes, *others], num_returns=len(takes) + len(others), timeout=0)
        completions: list[Completion] = []
        for ref in ready:
            if (engine := takes.get(ref)) is not None and engine.take is ref:
                completions += self._took(engine)
        self._watch()
        self._dispatch()
        return completions

    def _took(self, engine: _Engine) -> list[Completion]:
        try:
            finished = ray.get(engine.take)
        except RayActorError as death:
            self._replace(engine, death)
            return []
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, (UserError, FloatingPointError)) else error) from error
        self._listen(engine)
        return [completion for completion in finished if self.router.finished(completion)]

    def _serve(self, engine: _Engine) -> None:
        engine.ready = engine.catching_up = None
        self.router.join(engine.index)
        self._listen(engine)

    def _listen(self, engine: _Engine) -> None:
        engine.heard = time.monotonic()
        engine.take = engine.actor.take.remote(min(1.0, self.config.heartbeat_s / 4))

    def _watch(self) -> None:
        """Replaces what is stuck, and helps what starts on."""
        for engine in list(self.engines.values()):
            try:
                if engine.take is not None:
                    self._expect_life(engine)
                else:
                    self._bring_on(engine)
            except RayError as error:
                self._replace(engine, error)

    def _expect_life(self, engine: _Engine) -> None:
        if time.monotonic() - engine.heard <= self.config.heartbeat_s:
            return
        if ray.wait([engine.take], timeout=0)[0]:  # it answered, and nobody has looked
            return
        self._replace(engine, f"did not answer for {self.config.heartbeat_s:g} s")

    def _bring_on(self, engine: _Engine) -> None:
        """One step of an engine's way into service: ready, then with the newest weights."""
        late = time.monotonic() - engine.heard > self.cluster.config.start_timeout_s
        if late:
            self._replace(engine, f"was not ready after {self.cluster.config.start_timeout_s:g} s")
            return
        if engine.ready is not None:
            if not ray.wait([engine.ready], timeout=0)[0]:
                return
            try:
                self.cluster.await_ready([engine.actor], "an engine to take the place of another")
            except EngineFailed as error:
                self._replace(engine, f"could not start: {error}")
                return
            engine.ready = None
        elif engine.catching_up is not None:
            version, ref = engine.catching_up
            if not ray.wait([ref], timeout=0)[0]:
                return
            ray.get(ref)
            if self.version == version:
                self._serve(engine)
                return
        if self.version is None:  # nothing was published yet
            self._serve(engine)
        elif not self.latest:
            self._listen(engine)  # the transport keeps no weights: it gets those of the next update
        else:
            engine.catching_up = self.version, engine.actor.catch_up.remote(self.version, list(self.latest))

    def _replace(self, engine: _Engine, why: RayError | str) -> None:
        """Ends an engine for good and starts another in its place.

        Raises:
            EngineFailed: None may be started any more, and no other is left.
        """
        name = self.cluster.name_of(engine.actor)
        reason = why if isinstance(why, str) else f"died: {ending(why, self.cluster.session.folder)}"
        self.endings.append(f"{name} {reason}")
        self.cluster.kill(engine.actor)
        self.router.leave(engine.index)
        del self.engines[engine.index]
        if len(self.endings) > self.config.max_restarts:
            log.warning("%s; it is not replaced (max_restarts: %d)", self.endings[-1], self.config.max_restarts)
            if not self.engines:
                self._give_up()
            return
        log.warning("%s; another one takes its place", self.endings[-1])
        actor = self.cluster.engine_actor(engine.index, RolloutEngine, self.spec, concurrency=CALLS)
        again = _Engine(engine.index, actor, ready=actor.align_place.remote(), heard=time.monotonic())
        self.engines[engine.index] = again

    def _give_up(self) -> None:
        ends = "; ".join(self.endings)
        if self.engines:
            left = "no rollout engine has weights to go on with, and this transport brings them with the next update"
        else:
            left = f"no rollout engine is left (max_restarts: {self.config.max_restarts})"
        raise EngineFailed(f"{left}: {ends}")


def _sleep(engine: Any) -> None:
    engine.sleep()


def _close(engine: Any) -> None:
    engine.close()


def _wake(engine: Any, what: Literal["weights", "cache"]) -> None:
    engine.wake(what)
