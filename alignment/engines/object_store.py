"""Weights through Ray's object store: the learner puts each bucket there once, and every engine reads it from there.

The references are kept until the next update, so that an engine that starts meanwhile gets the same weights. The store
has to hold a copy of the weights therefore, and two while an update is under way.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import ray

from alignment.engines.fleet import fleet_of, publish_to
from alignment.engines.packed import pack
from alignment.engines.rollout_engine import begin, end, load_packed
from alignment.engines.transport import Patience, Published, done, update_weights
from alignment.engines.transport_config import ObjectStoreTransportConfig
from alignment.engines.transport_ends import Form, Peer, WeightStream, first_of, learner_peers, together
from alignment.sampling import Received

_streams: "WeakKeyDictionary[Any, WeightStream]" = WeakKeyDictionary()
"""By the learner's rank that lives in this process: the pass over its weights that is under way."""


@dataclass(frozen=True)
class Stored:
    """A bucket in the store. A reference inside a record travels as it is, not as what it refers to."""

    bucket: Any


def put_bucket(learner: Any, first: bool, bucket_mb: float, form: Form) -> Stored | None:
    """In a rank's process: the next bucket, put by the first rank alone; None after the last."""
    stream = _streams.get(learner)
    if stream is None:
        stream = _streams[learner] = WeightStream(learner, bucket_mb, form)
    bucket = stream.gather(count=first)
    return Stored(ray.put(pack(bucket))) if first and bucket is not None else None


def finish_buckets(learner: Any, version: int) -> Received:
    """In a rank's process: what was gathered."""
    return _streams.pop(learner).finish(version)


def forget_buckets(learner: Any) -> None:
    """In a rank's process: the pass is off."""
    _streams.pop(learner, None)


class StoreSender:
    """The learner's end: all ranks gather, the first puts."""

    def __init__(self, ranks: Sequence[Peer], config: ObjectStoreTransportConfig) -> None:
        self.ranks, self.config, self.name = ranks, config, ranks[0].name

    def connect(self) -> Future[None]:
        """Nothing to do."""
        return done(lambda: None)

    def gather(self) -> Future[Stored | None]:
        bucket_mb, form = self.config.bucket_mb, self.config.form
        calls = [(r.name, r.call(put_bucket, i == 0, bucket_mb, form)) for i, r in enumerate(self.ranks)]
        return first_of(together(calls))

    def send(self, bucket: Any) -> Future[None]:
        """Nothing to do: engines read it themselves."""
        return done(lambda: None)

    def finish(self, version: int) -> Future[Received]:
        return first_of(together([(rank.name, rank.call(finish_buckets, version)) for rank in self.ranks]))

    def abort(self) -> None:
        for rank in self.ranks:
            rank.call(forget_buckets)


class StoreTarget:
    """One engine's end. It stops between two steps when the update begins, and goes on when it has ended."""

    def __init__(self, peer: Peer, kept: list[Any]) -> None:
        self.peer, self.name, self.kept = peer, peer.name, kept

    def connect(self) -> Future[None]:
        """Nothing to do."""
        return done(lambda: None)

    def pause(self) -> Future[None]:
        """Nothing to do: it takes no step between ``begin`` and ``end``."""
        return done(lambda: None)

    def begin(self, version: int) -> Future[None]:
        return self.peer.call(begin, version)

    def load(self, bucket: Stored) -> Future[None]:
        if bucket.bucket not in self.kept:
            self.kept.append(bucket.bucket)
        return self.peer.call(load_packed, bucket.bucket)  # as an argument, the reference becomes what it refers to

    def end(self) -> Future[Received]:
        return self.peer.call(end)

    def resume(self) -> Future[None]:
        """Nothing to do."""
        return done(lambda: None)

    def abort(self) -> None:
        """Nothing to do: an engine whose update has begun and not ended refuses to work."""


class ObjectStoreTransport:
    """From a learner, in this process or in ranks, to the engines of a cluster.

    Args:
        learner: In this process, or with ``peers()``, one per rank.
        sampler: A :class:`~alignment.engines.fleet.Fleet` of Ray actors.
        config: Options.

    Raises:
        UserError: The engines live in this process.
    """

    def __init__(self, learner: Any, sampler: Any, config: ObjectStoreTransportConfig) -> None:
        self.fleet, self.config, self.ranks = fleet_of(sampler, "object_store"), config, learner_peers(learner)
        self.last: Received | None = None

    def publish(self, version: int) -> dict[str, float]:
        """Makes the learner's weights of now the engines', as policy ``version``.

        Raises:
            EngineFailed: See :func:`alignment.engines.fleet.publish_to`.
        """
        published, kept = publish_to(self.fleet, version, self.config.timeout_s, partial(self._update, version))
        self.last = published.sent
        self.fleet.updated(version, kept)
        return published.metrics

    def _update(self, version: int, peers: Sequence[Peer], patience: Patience) -> tuple[Published, list[Any]]:
        kept: list[Any] = []
        targets = [StoreTarget(peer, kept) for peer in peers]
        return update_weights(StoreSender(self.ranks, self.config), targets, version, patience, self.last), kept
