"""Ends of a weight update that live in this process: a learner's weights in buckets, and an engine driven by calls."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Literal

from torch import Tensor

from alignment.engines.transport import Tally, done
from alignment.sampling import Received, Receiver

Form = Literal["merged", "adapter"]
MEBI = 1 << 20


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
        if self.buckets is None:
            self.buckets, self.tally = self.learner.weights(self.bucket_bytes, self.form), Tally()
        bucket = next(self.buckets, None)
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
