"""What ends of a weight update are made of: a learner's weights in buckets, processes that run functions, and the two
ends of an update within one process."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from alignment.engines.transport import Tally, done
from alignment.errors import EngineFailed
from alignment.sampling import Received, Receiver

T = TypeVar("T")

Form = Literal["merged", "adapter"]
MEBI = 1 << 20


class Peer(Protocol):
    """A process that holds a rank of the learner, or an engine.

    ``learner.peers()`` gives one per rank, in their order, and ``sampler.peers()`` one per engine that is alive; an
    engine that was started again has another ``Peer``. Whoever watches for heartbeats must expect that a peer is busy
    for as long as an update may take.
    """

    name: str
    """For messages: ``learner rank 1``, ``vllm engine 2 on node1``."""

    def call(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Runs ``function(owner, *args)`` there, after all that was called before; for an engine between two steps.

        ``owner`` is the learner's rank (what has ``weights``) or the ``VllmEngine``. The function is one of a module.
        """
        ...


class LocalPeer:
    """This process."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def call(self, function: Callable[..., T], *args: Any) -> Future[T]:
        return done(function, self.owner, *args)


def learner_peers(learner: Any) -> list[Peer]:
    """The processes of a learner, rank by rank; one in this process has no ``peers``."""
    return list(learner.peers()) if hasattr(learner, "peers") else [LocalPeer(learner, "the learner")]


def together(pending: Sequence[tuple[str, Future[Any]]]) -> Future[list[Any]]:
    """One future of several: all results, or the first error, which it names, without waiting for the others."""
    combined: Future[list[Any]] = Future()
    lock, left = threading.Lock(), len(pending)

    def finished(name: str, future: Future[Any]) -> None:
        nonlocal left
        error = future.exception()
        with lock:
            left -= 1
            if combined.done():
                return
            if error is not None:
                failure = EngineFailed(f"{name}: {type(error).__name__}: {error}")
                failure.__cause__ = error
                combined.set_exception(failure)
            elif left == 0:
                combined.set_result([f.result() for _, f in pending])

    for name, future in pending:
        future.add_done_callback(lambda f, name=name: finished(name, f))
    return combined


def first_of(combined: Future[list[Any]], of: Callable[[list[Any]], Any] = lambda results: results[0]) -> Future[Any]:
    """A future of something made of the results of ``combined``, the first of them unless said otherwise."""
    chosen: Future[Any] = Future()

    def pass_on(future: Future[list[Any]]) -> None:
        error = future.exception()
        if error is not None:
            chosen.set_exception(error)
            return
        result = done(of, future.result())
        chosen.set_exception(result.exception()) if result.exception() else chosen.set_result(result.result())

    combined.add_done_callback(pass_on)
    return chosen


class WeightStream:
    """A learner's weights in buckets, counted on their way. It lives where the learner does, on every rank.

    Args:
        learner: Has ``weights(bucket_bytes, form)``; under ZeRO-3 all ranks must call :meth:`gather` together.
        bucket_mb: Most weights of a bucket, in MiB.
        form: Whole weights with an adapter added, or the adapter alone.
    """

    def __init__(self, learner: Any, bucket_mb: float, form: Form = "merged") -> None:
        self.learner, self.bucket_bytes, self.form = learner, int(bucket_mb * MEBI), form
        self.buckets: Iterator[dict[str, Tensor]] | None = None
        self.tally = Tally()

    def gather(self, count: bool = True) -> dict[str, Tensor] | None:
        """The next bucket; None after the last. ``count`` is for the rank whose bucket is sent."""
        buckets = self.buckets
        if buckets is None:
            buckets = self.buckets = iter(self.learner.weights(self.bucket_bytes, self.form))
            self.tally = Tally()
        bucket = next(buckets, None)
        if bucket is not None and count:
            self.tally.add(bucket)
        return bucket

    def finish(self, version: int) -> Received:
        """What was gathered since the first call; the next :meth:`gather` starts anew."""
        self.buckets = None
        return self.tally.received(version)

    def abort(self) -> None:
        """Lets go of an unfinished pass over the weights."""
        self.buckets = None


class LocalSender:
    """The end of a learner in this process, whose buckets are handed over as they are."""

    def __init__(self, learner: Any, bucket_mb: float, form: Form = "merged", name: str = "the learner") -> None:
        self.stream, self.name = WeightStream(learner, bucket_mb, form), name

    def connect(self) -> Future[None]:
        """Nothing to do."""
        return done(lambda: None)

    def gather(self) -> Future[dict[str, Tensor] | None]:
        return done(self.stream.gather)

    def send(self, bucket: Any) -> Future[None]:
        """Nothing to do: the bucket itself is handed over."""
        return done(lambda: None)

    def finish(self, version: int) -> Future[Received]:
        return done(self.stream.finish, version)

    def abort(self) -> None:
        self.stream.abort()


class LocalTarget:
    """The end of an engine in this process. It is between two steps whenever something else runs, so never paused."""

    def __init__(self, receiver: Receiver, name: str) -> None:
        self.receiver, self.name = receiver, name

    def connect(self) -> Future[None]:
        """Nothing to do."""
        return done(lambda: None)

    def pause(self) -> Future[None]:
        """Nothing to do."""
        return done(lambda: None)

    def begin(self, version: int) -> Future[None]:
        return done(self.receiver.begin_update, version)

    def load(self, bucket: Mapping[str, Tensor]) -> Future[None]:
        return done(self.receiver.load, bucket)

    def end(self) -> Future[Received]:
        return done(self.receiver.end_update)

    def resume(self) -> Future[None]:
        """Nothing to do."""
        return done(lambda: None)

    def abort(self) -> None:
        """Nothing to do: an engine whose update has begun and not ended refuses to work."""
