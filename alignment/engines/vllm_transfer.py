"""The engine's end of NCCL and CUDA IPC: vLLM's own weight transfer engines receive, and hand on what has arrived.

What a transfer engine receives it would load into the model itself. Here it is given, in the model's place, the
worker's own :class:`~alignment.engines.vllm_worker.WeightReceiver`, which loads, counts and checks buckets alike,
however they came. So an update begins and ends as with every other transport.

Functions with ``worker`` run in every worker of an engine (one per GPU), those with ``engine`` in the process that
holds the :class:`~alignment.engines.vllm_engine.VllmEngine`. The names are those of vLLM 0.32, whose interface for this
has changed with every few releases; nothing else in the project knows it.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from alignment.engines.transport import done
from alignment.engines.transport_ends import Peer
from alignment.errors import UserError
from alignment.sampling import Received

Backend = Literal["nccl", "ipc"]


@contextmanager
def watched(release: Callable[[], None], timeout_s: float, what: str) -> Iterator[None]:
    """Calls ``release`` from another thread when the block lasts longer than ``timeout_s``, so that it ends.

    For what waits on a GPU for another process and knows no deadline, as NCCL.

    Raises:
        TimeoutError: It did last longer; instead of whatever it raised when it was released.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        release()

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if not late.is_set():
            raise
        raise TimeoutError(f"{what} took longer than {timeout_s:g} s") from error
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError(f"{what} took longer than {timeout_s:g} s")


# In a rank of the learner


def own_device() -> torch.device:
    """The GPU that this process works on."""
    return torch.device("cuda", torch.cuda.current_device())


def rank_gpu(learner: Any) -> str:
    """The UUID of the GPU that this rank works on."""
    return str(torch.cuda.get_device_properties(own_device()).uuid)


def by_alignment(bucket: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Types with the longest elements first.

    vLLM packs tensors one right after another and views each piece as its type, which PyTorch refuses where the piece
    does not begin at a multiple of an element. In this order each does.
    """
    return dict(sorted(bucket.items(), key=lambda item: -item[1].element_size()))


def described(bucket: dict[str, Tensor]) -> dict[str, Any]:
    """A bucket's contents as vLLM's transfer engines are told."""
    return {
        "names": list(bucket),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
        "shapes": [list(tensor.shape) for tensor in bucket.values()],
    }


# In a worker


class _Arriving:
    """Stands where a transfer engine expects the model."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads them by the worker's own method."""
        self.worker.load_bucket(dict(weights))


def worker_gpu(worker: Any) -> str:
    """The UUID of its GPU: the same in every process, whatever ``CUDA_VISIBLE_DEVICES`` says."""
    return str(torch.cuda.get_device_properties(worker.device).uuid)


def worker_join(worker: Any, backend: Backend, init_info: Mapping[str, Any]) -> None:
    """Makes the worker's transfer engine, as ``weight_transfer_config`` would have, and connects it.

    Under NCCL this waits for the learner; vLLM gives up after five minutes.
    """
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    # Some of vLLM's executors hand on a wrapper, which passes reading to the worker but not writing.
    worker = getattr(worker, "worker", worker)
    transfer = worker.weight_transfer_engine
    if transfer is not None:  # of an earlier group, of which some member is gone, or of another transport
        transfer.shutdown()
    if transfer is None or transfer.config.backend != backend:
        worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend), worker.vllm_config, worker.device, worker.model_runner.get_model()
        )
    worker.init_weight_transfer_engine(dict(init_info))


def worker_receive(worker: Any, update_info: Mapping[str, Any], timeout_s: float) -> None:
    """Receives one bucket and loads it.

    Raises:
        TimeoutError: The learner did not send it in time. The NCCL group is gone then.
    """
    from vllm.config import set_current_vllm_config

    transfer = worker.weight_transfer_engine
    group = getattr(transfer, "model_update_group", None)
    release = group.destroy if group is not None else lambda: None
    transfer.set_weight_update_target(_Arriving(worker), worker.model_runner.model_config)
    try:
        with watched(release, timeout_s, "receiving weights"), set_current_vllm_config(worker.vllm_config):
            transfer.update_weights(dict(update_info))
    finally:
        transfer.reset_weight_update_target()


# Where the engine lives


def in_workers(engine: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(worker, *args)`` in each worker; results in the order of their ranks."""
    return engine.entrance.engine.collective_rpc(function, args=args)


def engine_gpus(engine: Any) -> list[str]:
    """Its workers' GPUs, in the order of their ranks.

    Raises:
        UserError: It takes adapters alone.
    """
    if engine.spec.lora is not None:
        raise UserError(
            "transports nccl and ipc bring whole weights, and sampler.lora is 'adapter'; set it to 'merged', or use"
            " transport: object_store with form: adapter"
        )
    return in_workers(engine, worker_gpu)


def engine_join(engine: Any, backend: Backend, init_info: Mapping[str, Any]) -> None:
    """Connects all workers."""
    in_workers(engine, worker_join, backend, init_info)


def engine_begin(engine: Any, version: int) -> None:
    """The engine takes no step until :func:`engine_end`."""
    engine.begin_update(version)


def engine_receive(engine: Any, update_info: Mapping[str, Any], timeout_s: float) -> None:
    """One bucket, in all workers."""
    in_workers(engine, worker_receive, update_info, timeout_s)


def engine_end(engine: Any) -> Received:
    """The record of what arrived."""
    return engine.end_update()


# In the driver


class EngineTarget:
    """An engine's end of an update by a transfer engine of vLLM.

    Args:
        peer: The process of the engine.
        backend: vLLM's name of the transfer engine.
        timeout_s: For one bucket.
        init_info: What connecting takes; None when it is connected.
    """

    def __init__(self, peer: Peer, backend: Backend, timeout_s: float, init_info: Mapping[str, Any] | None) -> None:
        self.peer, self.name, self.backend = peer, peer.name, backend
        self.timeout_s, self.init_info = timeout_s, init_info

    def connect(self) -> Future[None]:
        if self.init_info is None:
            return done(lambda: None)
        return self.peer.call(engine_join, self.backend, self.init_info)

    def pause(self) -> Future[None]:
        """Nothing to do: a peer runs functions between two steps, and :meth:`begin` holds it there."""
        return done(lambda: None)

    def begin(self, version: int) -> Future[None]:
        return self.peer.call(engine_begin, version)

    def load(self, bucket: Mapping[str, Any]) -> Future[None]:
        return self.peer.call(engine_receive, bucket, self.timeout_s)

    def end(self) -> Future[Received]:
        return self.peer.call(engine_end)

    def resume(self) -> Future[None]:
        """Nothing to do: :meth:`end` let it go."""
        return done(lambda: None)

    def abort(self) -> None:
        """Nothing to do: an engine whose update has not ended takes no step, and the next one begins anew."""
