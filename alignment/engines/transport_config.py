"""What a recipe says of transports between engines with weights of their own. Light: built when a run starts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from alignment.engines.config import transports
from alignment.registry import option

if TYPE_CHECKING:
    from alignment.engines.ipc_transport import IpcTransport
    from alignment.engines.memory_transport import MemoryTransport
    from alignment.engines.nccl_transport import NcclTransport
    from alignment.engines.object_store import ObjectStoreTransport

BucketMb = Annotated[
    float, option("weights that travel together; two buckets exist at once at each end", unit="MiB", gt=0)
]
TimeoutS = Annotated[float, option("for a whole update; past it the error names who was waited for", unit="s", gt=0)]
Form = Annotated[Literal["merged", "adapter"], option("whole weights with a LoRA adapter added, or the adapter alone")]


@transports.register("memory", source="this project", evidence="end to end")
@dataclass(frozen=True)
class MemoryTransportConfig:
    """Hands tensors from a learner to an engine in the same process."""

    bucket_mb: BucketMb = 512.0
    timeout_s: TimeoutS = 600.0
    form: Form = "merged"

    def build(self, learner: Any, sampler: Any) -> "MemoryTransport":
        """The transport from ``learner`` to the engine of ``sampler``."""
        from alignment.engines.memory_transport import MemoryTransport

        return MemoryTransport(learner, sampler, self)


@transports.register("object_store", source="this project", evidence="end to end")
@dataclass(frozen=True)
class ObjectStoreTransportConfig:
    """Puts buckets into Ray's object store, through the memory of the CPU; between any processes of a cluster."""

    bucket_mb: BucketMb = 512.0
    timeout_s: TimeoutS = 600.0
    form: Form = "merged"

    def build(self, learner: Any, sampler: Any) -> "ObjectStoreTransport":
        """The transport from ``learner`` to the engines of ``sampler``."""
        from alignment.engines.object_store import ObjectStoreTransport

        return ObjectStoreTransport(learner, sampler, self)


@transports.register("nccl", source="this project")
@dataclass(frozen=True)
class NcclTransportConfig:
    """Broadcasts from the learner's first rank to every vLLM worker over NCCL, by vLLM's own engine.

    The learner's GPU and those of the engines must differ. A LoRA adapter is added to the weights before they leave.
    """

    bucket_mb: BucketMb = 1024.0
    timeout_s: TimeoutS = 600.0

    def build(self, learner: Any, sampler: Any) -> "NcclTransport":
        """The transport from the ranks of ``learner`` to the engines of ``sampler``."""
        from alignment.engines.nccl_transport import NcclTransport

        return NcclTransport(learner, sampler, self)


@transports.register("ipc", source="this project")
@dataclass(frozen=True)
class IpcTransportConfig:
    """Shares GPU memory between a learner's rank and the vLLM worker on the same GPU, by vLLM's own engine.

    Every GPU of an engine needs a learner's rank on it, in another process. A LoRA adapter is added to the weights
    before they leave.
    """

    bucket_mb: BucketMb = 512.0
    timeout_s: TimeoutS = 600.0

    def build(self, learner: Any, sampler: Any) -> "IpcTransport":
        """The transport from the ranks of ``learner`` to the engines of ``sampler``."""
        from alignment.engines.ipc_transport import IpcTransport

        return IpcTransport(learner, sampler, self)
