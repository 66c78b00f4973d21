"""Weights by CUDA IPC: a rank of the learner and a vLLM worker, two processes on one GPU, see the same memory.

Each rank gathers the whole bucket, as under ZeRO-3 it does anyway, and packs it into memory that it lends to the worker
on its own GPU; vLLM's own transfer engine opens it there and copies. What is lent is described by handles, which the
ranks give to the driver and the driver to all engines: each worker takes the one of its GPU. Two lent buffers take
turns, so that the next bucket is gathered while one is read.

Handles of memory are opened by other processes only, so a learner and an engine in one process use ``memory``.
``expandable_segments`` of PyTorch's allocator must be off in the learner's ranks: such memory cannot be lent.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignment.engines.fleet import fleet_of, publish_to
from alignment.engines.transport import Patience, Published, done, update_weights
from alignment.engines.transport_config import IpcTransportConfig
from alignment.engines.transport_ends import MEBI, Peer, WeightStream, first_of, learner_peers, together
from alignment.engines.vllm_transfer import EngineTarget, by_alignment, described, engine_gpus, own_device, rank_gpu
from alignment.errors import UserError
from alignment.sampling import Received

BUFFERS = 2
"""Lent in turns: one is filled while the other is read."""


class _Rank:
    """The end of one rank of the learner, in its process."""

    def __init__(self, stream: WeightStream) -> None:
        self.stream = stream
        self.buffers: list[Tensor | None] = [None] * BUFFERS
        self.turn = 0

    def lend(self, bucket: Mapping[str, Tensor], at_least: int) -> tuple[tuple[Any, ...], list[int]]:
        """Copies a bucket to the buffer whose turn it is; its handle, and the bytes of each tensor."""
        from torch.multiprocessing.reductions import reduce_tensor

        sizes = [tensor.numel() * tensor.element_size() for tensor in bucket.values()]
        buffer = self.buffers[self.turn]
        if buffer is None or buffer.numel() < sum(sizes):
            buffer = torch.empty(max(at_least, sum(sizes)), dtype=torch.uint8, device=own_device())
            self.buffers[self.turn] = buffer
        self.turn = (self.turn + 1) % BUFFERS
        for tensor, part in zip(bucket.values(), buffer[: sum(sizes)].split(sizes), strict=True):
            part.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        torch.cuda.current_stream().synchronize()  # the other process does not wait for this one's streams
        # Lent anew for each bucket: PyTorch counts one opening and one closing for each handle.
        return reduce_tensor(buffer)[1], sizes


_ranks: dict[int, _Rank] = {}
"""Of an update under way, by the ``id`` of the learner that lives in this process."""


# In the processes of the learner


def rank_gather(learner: Any, first: bool, bucket_mb: float) -> dict[str, Any] | None:
    """The next bucket, lent: what the engines have to expect, and the handle by its GPU. None after the last."""
    rank = _ranks.setdefault(id(learner), _Rank(WeightStream(learner, bucket_mb)))
    bucket = rank.stream.gather(count=first)
    if bucket is None:
        return None
    bucket = by_alignment(bucket)
    handle, sizes = rank.lend(bucket, int(bucket_mb * MEBI))
    return described(bucket) | {"tensor_sizes": sizes, "ipc_handles": {rank_gpu(learner): handle}}


def rank_finish(learner: Any, version: int) -> Received:
    """What was gathered."""
    return _ranks[id(learner)].stream.finish(version)


def rank_release(learner: Any) -> None:
    """Takes lent memory back, for the learner's own use; a pass over the weights that has not ended is forgotten."""
    rank = _ranks.pop(id(learner), None)
    if rank is not None:
        rank.buffers.clear()
        torch.cuda.ipc_collect()


# In the driver


def merged(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What all ranks say of a bucket, as one: its contents, and the handles of all GPUs. None after the last."""
    first = parts[0]
    if first is None:
        return None
    handles: dict[str, Any] = {}
    for part in parts:
        assert part is not None and part["names"] == first["names"], "all ranks gather the same"
        handles |= part["ipc_handles"]
    return {**first, "ipc_handles": handles}


class IpcSender:
    """The learner's end: all ranks gather and lend."""

    def __init__(self, ranks: Sequence[Peer], config: IpcTransportConfig) -> None:
        self.ranks, self.config, self.name = ranks, config, ranks[0].name

    def connect(self) -> Future[None]:
        """Nothing to do: handles come with each bucket."""
        return done(lambda: None)

    def gather(self) -> Future[Any]:
        calls = [(r.name, r.call(rank_gather, i == 0, self.config.bucket_mb)) for i, r in enumerate(self.ranks)]
        return first_of(together(calls), merged)

    def send(self, bucket: Any) -> Future[None]:
        """Nothing to do: the bucket lies where the engines read it."""
        return done(lambda: None)

    def finish(self, version: int) -> Future[Received]:
        return first_of(together([(rank.name, rank.call(rank_finish, version)) for rank in self.ranks]))

    def abort(self) -> None:
        for rank in self.ranks:
            rank.call(rank_release)


class IpcTransport:
    """From the ranks of a learner to vLLM engines on the same GPUs.

    Args:
        learner: In this process, or with ``peers()``, one per rank.
        sampler: A :class:`~alignment.engines.fleet.Fleet`.
        config: Options.

    Raises:
        UserError: The engines live in this process.
    """

    def __init__(self, learner: Any, sampler: Any, config: IpcTransportConfig) -> None:
        self.fleet, self.config, self.ranks = fleet_of(sampler, "ipc"), config, learner_peers(learner)
        self.joined: list[Peer] = []
        self.last: Received | None = None

    def publish(self, version: int) -> dict[str, float]:
        """Makes the learner's weights of now the engines', as policy ``version``.

        Raises:
            EngineFailed: See :func:`alignment.engines.fleet.publish_to`.
            UserError: An engine has a GPU on which no rank of the learner works.
        """
        published = publish_to(self.fleet, version, self.config.timeout_s, partial(self._update, version))
        self.last = published.sent
        self.fleet.updated(version, again=self.publish)
        return published.metrics

    def _update(self, version: int, peers: Sequence[Peer], patience: Patience) -> Published:
        if list(peers) != self.joined:
            self._check(peers, patience)
        info = [None if peer in self.joined else {"packed": True} for peer in peers]
        targets = [EngineTarget(p, "ipc", self.config.timeout_s, i) for p, i in zip(peers, info, strict=True)]
        published = update_weights(IpcSender(self.ranks, self.config), targets, version, patience, self.last)
        self.joined = list(peers)
        patience.wait("take lent memory back", [(r.name, r.call(rank_release)) for r in self.ranks])
        return published

    def _check(self, peers: Sequence[Peer], patience: Patience) -> None:
        own = patience.wait("name its GPU", [(r.name, r.call(rank_gpu)) for r in self.ranks])
        gpus = patience.wait("name its GPUs", [(p.name, p.call(engine_gpus)) for p in peers])
        readers: dict[str, str] = {}
        for peer, of_engine in zip(peers, gpus, strict=True):
            if away := [gpu for gpu in of_engine if gpu not in own]:
                raise UserError(
                    f"transport ipc: {peer.name} works on {', '.join(away)}, and no rank of the learner does; use"
                    " transport: nccl, or place them together"
                )
            for gpu in of_engine:
                if gpu in readers:
                    raise UserError(
                        f"transport ipc: {peer.name} and {readers[gpu]} have the same GPU, and memory is lent to one"
                        " engine at a time; use transport: object_store, or one engine per GPU"
                    )
                readers[gpu] = peer.name
