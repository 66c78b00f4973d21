"""What a GPU does for NCCL and CUDA IPC, on a CPU: vLLM's own engines run as they are, over a wire that is a queue."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

T = TypeVar("T")


class Wire:
    """Carries broadcasts from one sender to one receiver, and knows no deadline, as NCCL."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Tensor | None] = queue.Queue()
        self.cut = False
        """Nothing arrives any more."""
        self.spoil = False
        """The next broadcast arrives with another byte in it."""

    def end(self, sends: bool) -> "End":
        return End(self, sends)


class End:
    """One member of a group."""

    disabled = False

    def __init__(self, wire: Wire, sends: bool) -> None:
        self.wire, self.sends, self.destroyed = wire, sends, False

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        assert src == 0 and tensor.dtype == torch.uint8 and not self.destroyed
        if self.sends:
            if not self.wire.cut:
                self.wire.queue.put(tensor.clone())
            return
        arrived = self.wire.queue.get()
        if arrived is None:
            raise RuntimeError("the communicator was aborted")
        if self.wire.spoil:
            self.wire.spoil = False
            arrived[3] ^= 1
        tensor.copy_(arrived)

    def destroy(self) -> None:
        self.destroyed = True
        if not self.sends:
            self.wire.queue.put(None)


class Machine:
    """Stands for CUDA: GPU 0 is the learner's, GPU 1 the engine's, unless ``same`` says otherwise."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from vllm.distributed.weight_transfer import nccl_common, nccl_engine, packed_tensor

        self.same = False
        self.wire = Wire()
        self.meeting: queue.Queue[Wire] = queue.Queue()
        self.joins: list[tuple[str, dict[str, Any]]] = []
        self.lent: dict[int, Tensor] = {}
        self.collected = 0
        stream = SimpleNamespace(synchronize=lambda: None)
        patch.setattr(packed_tensor, "_get_streams", lambda device, count: (stream,) * count)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda: stream)
        patch.setattr(torch.cuda, "ipc_collect", self._collect)
        patch.setattr(torch.cuda, "get_device_properties", self._properties)
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patch.setattr(torch.accelerator, "synchronize", lambda: None)
        for module in ("nccl_transport", "ipc_transport", "vllm_transfer"):
            patch.setattr(f"alignment.engines.{module}.own_device", lambda: torch.device("cpu", 0))
        patch.setattr(nccl_common, "trainer_init", self._learner_joins)
        patch.setattr(nccl_engine, "worker_init_process_group", self._worker_joins)
        patch.setattr("torch.multiprocessing.reductions.reduce_tensor", self._lend)
        patch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", lambda *args: self.lent[args[0]])

    def _properties(self, device: torch.device | None) -> Any:
        # The learner's device is "cpu:0" here, the worker's "cpu" or, by its index, None.
        learners = isinstance(device, torch.device) and device.index == 0
        return SimpleNamespace(uuid="GPU-0" if learners or self.same else "GPU-1")

    def _learner_joins(self, info: dict[str, Any]) -> End:
        wire = self.meeting.get(timeout=60)  # members meet, whoever comes first
        self.joins.append(("learner", info))
        return wire.end(sends=True)

    def _worker_joins(self, info: Any, parallel: Any) -> End:
        self.joins.append(("worker", {"rank": info.rank_offset + parallel.rank, "world_size": info.world_size}))
        self.wire = Wire()
        self.meeting.put(self.wire)
        return self.wire.end(sends=False)

    def _lend(self, buffer: Tensor) -> tuple[Any, tuple[Any, ...]]:
        key = len(self.lent)
        self.lent[key] = buffer  # the very memory: what is written to it too early is seen
        return None, (key, *[None] * 6)

    def _collect(self) -> None:
        self.collected += 1


class ThreadPeer:
    """A peer whose calls run one after another, while others do something else: a process, but for the memory."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.pool = owner, name, ThreadPoolExecutor(1)

    def call(self, function: Callable[..., T], *args: Any) -> Future[T]:
        return self.pool.submit(function, self.owner, *args)


class Ranks:
    """Some ranks of a learner."""

    def __init__(self, *learners: Any) -> None:
        self.ranks = [ThreadPeer(learner, f"learner rank {i}") for i, learner in enumerate(learners)]

    def peers(self) -> list[ThreadPeer]:
        return self.ranks


class Fleet:
    """Engines behind peers."""

    name = "vllm"

    def __init__(self, *engines: Any) -> None:
        self.engines = [ThreadPeer(engine, f"vllm engine {i}") for i, engine in enumerate(engines)]
        self.version: int | None = None
        self.losses = 0

    def peers(self) -> list[ThreadPeer]:
        return list(self.engines)

    def watch(self) -> None: ...

    def idle(self) -> None: ...

    def updated(self, version: int, buckets: Sequence[Any] = (), again: Any = None) -> None:
        self.version, self.again = version, again

    def restart(self) -> None:
        """The same engines, as if in new processes."""
        self.engines = [ThreadPeer(peer.owner, peer.name) for peer in self.engines]
