"""Weights over NCCL: the learner's first rank broadcasts, and vLLM's own transfer engine receives in every worker.

Member 0 of the group is the learner's first rank, then come the workers of all engines, one after another. The other
ranks of the learner take part in gathering only. The group is made by the first update, and anew when an engine was
replaced or an update failed: a broadcast that one member left half way cannot be taken up again.

On either side a broadcast knows no deadline of its own, so each is watched, and the group is given up when it lasts
longer than a third of what the whole update may take: no process is left waiting on its GPU, and when that was because
a member died, there is time for another attempt.
"""

import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from alignment.engines.fleet import fleet_of, publish_to
from alignment.engines.transport import Patience, Published, done, update_weights
from alignment.engines.transport_config import NcclTransportConfig
from alignment.engines.transport_ends import MEBI, Peer, WeightStream, first_of, learner_peers, together
from alignment.engines.vllm_transfer import (
    EngineTarget,
    by_alignment,
    described,
    engine_gpus,
    own_device,
    rank_gpu,
    watched,
)
from alignment.errors import UserError
from alignment.sampling import Received

BUFFERS = 2
"""vLLM packs a bucket into chunks, of which so many are under way at once."""


class _Rank:
    """The end of one rank of the learner, in its process."""

    stream: WeightStream | None = None
    """Of the update under way; only then does anything here hold the learner itself."""
    bucket: dict[str, Tensor] | None = None
    """What was gathered last and is not yet sent."""
    group: Any = None
    """vLLM's communicator."""


_ranks: "WeakKeyDictionary[Any, _Rank]" = WeakKeyDictionary()
"""By the learner that lives in this process."""


# In the processes of the learner


def rank_gather(learner: Any, first: bool, bucket_mb: float) -> dict[str, Any] | None:
    """The next bucket stays here; the first rank says what the engines have to expect. None after the last."""
    rank = _ranks.setdefault(learner, _Rank())
    rank.stream = rank.stream or WeightStream(learner, bucket_mb)
    bucket = rank.stream.gather(count=first)
    rank.bucket = by_alignment(bucket) if first and bucket is not None else None
    return None if rank.bucket is None else described(rank.bucket)


def rank_address(learner: Any) -> tuple[str, int]:
    """Where the first rank can be reached, and a port that is free there."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def rank_join(learner: Any, init_info: dict[str, Any]) -> None:
    """Opens the group and waits for the engines; vLLM gives up after five minutes.

    Raises:
        RuntimeError: NCCL cannot be loaded.
    """
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    rank = _ranks.setdefault(learner, _Rank())
    if rank.group is not None:
        rank.group.destroy()
    rank.group = trainer_init(init_info)
    if rank.group.disabled:  # it would send nothing and say nothing
        raise RuntimeError("vLLM found no NCCL library, or VLLM_DISABLE_PYNCCL is set")


def rank_send(learner: Any, bucket_mb: float, timeout_s: float) -> None:
    """Broadcasts the bucket that was gathered last.

    Raises:
        TimeoutError: The engines did not take it in time. The group is gone then.
    """
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    rank = _ranks[learner]
    assert rank.bucket is not None and rank.group is not None
    bucket, rank.bucket = rank.bucket, None
    device = own_device()
    tensors = [(name, tensor.detach().to(device)) for name, tensor in bucket.items()]
    # vLLM packs on streams of its own, which know nothing of what gathers on this one.
    torch.cuda.current_stream().synchronize()
    with watched(rank.group.destroy, timeout_s, "sending weights"):
        packed_nccl_broadcast_producer(
            iter(tensors), rank.group, 0, lambda item: item[1], int(bucket_mb * MEBI), BUFFERS
        )


def rank_finish(learner: Any, version: int) -> Received:
    """What was gathered."""
    stream, _ranks[learner].stream = _ranks[learner].stream, None
    assert stream is not None, "something was gathered"
    return stream.finish(version)


def rank_abort(learner: Any) -> None:
    """Forgets a pass over the weights."""
    if learner in _ranks:
        _ranks[learner].stream = _ranks[learner].bucket = None


# In the driver


@dataclass(frozen=True)
class Rendezvous:
    """How a group meets."""

    address: str
    port: int
    sizes: tuple[int, ...]
    """Workers of each engine."""

    def init_info(self, engine: int, bucket_mb: float) -> dict[str, Any]:
        """What vLLM's transfer engine must know to join, in engine number ``engine``."""
        return self.learner_info | {
            "rank_offset": 1 + sum(self.sizes[:engine]),
            "packed": True,
            "packed_buffer_size_bytes": int(bucket_mb * MEBI),
            "packed_num_buffers": BUFFERS,
        }

    @property
    def learner_info(self) -> dict[str, Any]:
        """What the learner's first rank must know."""
        return {"master_address": self.address, "master_port": self.port, "world_size": 1 + sum(self.sizes)}


def bucket_s(config: NcclTransportConfig) -> float:
    """How long one broadcast may take."""
    return config.timeout_s / 3


class NcclSender:
    """The learner's end: all ranks gather, the first sends."""

    def __init__(self, ranks: Sequence[Peer], config: NcclTransportConfig, meeting: Rendezvous | None) -> None:
        self.ranks, self.config, self.meeting = ranks, config, meeting
        self.name = ranks[0].name

    def connect(self) -> Future[None]:
        if self.meeting is None:
            return done(lambda: None)
        return self.ranks[0].call(rank_join, self.meeting.learner_info)

    def gather(self) -> Future[Any]:
        calls = [(r.name, r.call(rank_gather, i == 0, self.config.bucket_mb)) for i, r in enumerate(self.ranks)]
        return first_of(together(calls))

    def send(self, bucket: Any) -> Future[None]:
        return self.ranks[0].call(rank_send, self.config.bucket_mb, bucket_s(self.config))

    def finish(self, version: int) -> Future[Received]:
        return first_of(together([(rank.name, rank.call(rank_finish, version)) for rank in self.ranks]))

    def abort(self) -> None:
        for rank in self.ranks:
            rank.call(rank_abort)


class NcclTransport:
    """From the ranks of a learner to vLLM engines on other GPUs.

    Args:
        learner: In this process, or with ``peers()``, one per rank.
        sampler: A :class:`~alignment.engines.fleet.Fleet`.
        config: Options.

    Raises:
        UserError: The engines live in this process.
    """

    def __init__(self, learner: Any, sampler: Any, config: NcclTransportConfig) -> None:
        self.fleet, self.config, self.ranks = fleet_of(sampler, "nccl"), config, learner_peers(learner)
        self.joined: list[Peer] = []
        self.last: Received | None = None

    def publish(self, version: int) -> dict[str, float]:
        """Makes the learner's weights of now the engines', as policy ``version``.

        Raises:
            EngineFailed: See :func:`alignment.engines.fleet.publish_to`; the next attempt makes a new group.
            UserError: A GPU is to hold two members of the group.
        """
        published = publish_to(self.fleet, version, self.config.timeout_s, partial(self._update, version))
        self.last = published.sent
        self.fleet.updated(version, again=self.publish)
        return published.metrics

    def _update(self, version: int, peers: Sequence[Peer], patience: Patience) -> Published:
        meeting = None if list(peers) == self.joined else self._meeting(peers, patience)
        timeout_s, bucket_mb = bucket_s(self.config), self.config.bucket_mb
        infos = [None if meeting is None else meeting.init_info(i, bucket_mb) for i in range(len(peers))]
        targets = [EngineTarget(p, "nccl", timeout_s, info) for p, info in zip(peers, infos, strict=True)]
        self.joined = []
        sender = NcclSender(self.ranks, self.config, meeting)
        published = update_weights(sender, targets, version, patience, self.last)
        self.joined = list(peers)
        return published

    def _meeting(self, peers: Sequence[Peer], patience: Patience) -> Rendezvous:
        gpus = patience.wait("name its GPUs", [(p.name, p.call(engine_gpus)) for p in peers])
        first = self.ranks[0]
        [own] = patience.wait("name its GPU", [(first.name, first.call(rank_gpu))])
        holders = {own: first.name}
        for peer, of_engine in zip(peers, gpus, strict=True):
            for gpu in of_engine:
                if gpu in holders:
                    raise UserError(
                        f"transport nccl: {peer.name} and {holders[gpu]} have the same GPU, and NCCL takes one member"
                        " of a group on each; use transport: ipc there, or other GPUs for the engines"
                    )
                holders[gpu] = peer.name
        [(address, port)] = patience.wait("open a port", [(first.name, first.call(rank_address))])
        return Rendezvous(address, port, tuple(map(len, gpus)))
