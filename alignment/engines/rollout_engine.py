"""One vLLM engine as an actor: a thread steps it while it has work, others take orders and hand completions out.

Ray runs the orders one after another, in the order in which they were given; ``take`` has a thread of its own.
"""

import queue
import threading
import time
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
        self._began: float | None = None
        """When the step that is under way began, by the monotonic clock."""
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Takes requests, which were checked. Nobody waits for an answer: what goes wrong is told by :meth:`take`."""
        try:
            self.call(_add, requests)
        except Exception as error:
            self._fail(error)

    def abort(self, ids: Collection[str]) -> None:
        """Forgets requests; completions of theirs that nobody took are dropped."""
        self.call(_abort, ids)
        with self._news:
            self._finished = [c for c in self._finished if c.id not in ids]

    @ray.method(concurrency_group="watch")
    def take(self, timeout_s: float, step_s: float) -> list[Completion]:
        """What finished since the last call; waits at most ``timeout_s`` for the first. An answer is a sign of life.

        Args:
            timeout_s: How long it waits.
            step_s: A step that takes longer hangs.

        Raises:
            TimeoutError: A step hangs.
            Exception: The engine failed; it will not work again.
        """
        with self._news:
            if not self._finished and self._failure is None:
                self._news.wait(timeout_s)
            if self._began is not None and time.monotonic() - self._began > step_s:
                raise TimeoutError(f"one step of the engine has taken more than {step_s:g} s")
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
            self._began = time.monotonic()
            try:
                finished = self.engine.step()
            except Exception as error:
                self._fail(error)
                continue
            finally:
                self._began = None
            if finished:
                with self._news:
                    self._finished += finished
                    self._news.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._news:
            self._failure = error
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


def sleep(engine: Any) -> None:
    """The memory of the GPU is given up."""
    engine.sleep()


def wake(engine: Any, what: str) -> None:
    """It is taken again, for ``weights`` first, then for the ``cache``."""
    engine.wake(what)


def close(engine: Any) -> None:
    """Nothing is left on disk."""
    engine.close()


__all__ = ["RolloutEngine", "begin", "close", "end", "load_packed", "sleep", "wake"]
