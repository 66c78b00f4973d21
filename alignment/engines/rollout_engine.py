"""One vLLM engine as an actor: a thread steps it while it has work, others take orders and hand completions out."""

import queue
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import ray

from alignment.engines.packed import unpack
from alignment.engines.vllm_spec import EngineSpec
from alignment.sampling import Received
from alignment.types import Completion, Request

T = TypeVar("T")


class RolloutEngine:
    """Holds a :class:`alignment.engines.vllm_engine.VllmEngine`, which only its own thread touches, between two steps.

    Args:
        spec: What to build.
    """

    def __init__(self, spec: EngineSpec) -> None:
        from alignment.engines.vllm_engine import VllmEngine

        self.engine = VllmEngine(spec)
        self._orders: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], Future[Any]]] = queue.SimpleQueue()
        self._news = threading.Condition()
        self._finished: list[Completion] = []
        self._failure: Exception | None = None
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Takes requests, which were checked."""
        self.call(_add, requests)

    def abort(self, ids: Collection[str]) -> None:
        """Forgets requests; completions of theirs that nobody took are dropped."""
        self.call(_abort, ids)
        with self._news:
            self._finished = [c for c in self._finished if c.id not in ids]

    def take(self, timeout_s: float) -> list[Completion]:
        """What finished since the last call; waits at most ``timeout_s`` for the first. An answer is a sign of life.

        Raises:
            Exception: The engine failed; it will not work again.
        """
        with self._news:
            if not self._finished and self._failure is None:
                self._news.wait(timeout_s)
            if self._failure is not None:
                raise self._failure
            finished, self._finished = self._finished, []
            return finished

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """``function(engine, *args)`` between two steps, after all that was called before."""
        answer: Future[T] = Future()
        self._orders.put((function, args, answer))
        return answer.result()

    def catch_up(self, version: int, buckets: Sequence[Any]) -> Received:
        """Takes the weights of an update that this engine missed: references to packed buckets."""
        self.call(begin, version)
        for bucket in buckets:
            self.call(load_packed, ray.get(bucket))
        return self.call(end)

    def _work(self) -> None:
        """Orders first; then a step, if there is something to do and weights to do it with."""
        while True:
            with suppress(queue.Empty):
                while True:
                    function, args, answer = self._orders.get(block=not self._has_work())
                    _carry_out(function, self.engine, args, answer)
            try:
                finished = self.engine.step()
            except Exception as error:
                with self._news:
                    self._failure = error
                    self._news.notify_all()
                continue
            if finished:
                with self._news:
                    self._finished += finished
                    self._news.notify_all()

    def _has_work(self) -> bool:
        engine = self.engine
        able = engine.version is not None and not engine.asleep and self._failure is None
        return able and bool(engine.pending or engine.finished)


def _carry_out(function: Callable[..., Any], engine: Any, args: tuple[Any, ...], answer: Future[Any]) -> None:
    try:
        answer.set_result(function(engine, *args))
    except Exception as error:
        answer.set_exception(error)


def _add(engine: Any, requests: Sequence[Request]) -> None:
    engine.add(requests)


def _abort(engine: Any, ids: Collection[str]) -> None:
    engine.abort(ids)


def begin(engine: Any, version: int) -> None:
    """What :func:`load_packed` brings next is policy ``version``."""
    engine.begin_update(version)


def load_packed(engine: Any, bucket: Any) -> None:
    """Some of the weights, as Ray's object store hands them over."""
    engine.load(unpack(bucket))


def end(engine: Any) -> Received:
    """The new weights are in use."""
    return engine.end_update()


__all__ = ["RolloutEngine", "begin", "end", "load_packed"]
