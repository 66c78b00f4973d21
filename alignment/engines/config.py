"""What a recipe says of samplers and clusters. Light on purpose: an engine is imported when it is built, not before."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from alignment.registry import Registry, option

if TYPE_CHECKING:
    from torch import nn

    from alignment.engines.transformers_sampler import TransformersSampler


@runtime_checkable
class SamplerConfig(Protocol):
    """Options of a sampler, and how to build it."""

    def build(self, module: "nn.Module") -> Any:
        """The sampler over ``module``."""
        ...


@runtime_checkable
class Cluster(Protocol):
    """Where the processes of a run live."""

    @property
    def ranks(self) -> int:
        """Learner processes that share a batch: its rows must be divisible among them."""
        ...


samplers: Registry[SamplerConfig] = Registry("samplers", SamplerConfig, "What generates completions")
clusters: Registry[Cluster] = Registry("clusters", Cluster, "Where the processes of a run live")


@samplers.register("transformers", source="this project", evidence="end to end")
@dataclass(frozen=True)
class TransformersSamplerConfig:
    """Samples in this process from the very weights that are trained: batched, with a key-value cache."""

    batch_rows: Annotated[int, option("completions decoded together; bounds the cache's memory", unit="rows", ge=1)] = (
        256
    )
    autocast: Annotated[
        Literal["none", "bfloat16"], option("arithmetic of the forward pass; log-probabilities are float32 always")
    ] = "none"

    def build(self, module: "nn.Module") -> "TransformersSampler":
        """The sampler over ``module``, which it shares with the learner: it always sees the newest weights."""
        from alignment.engines.transformers_sampler import TransformersSampler

        return TransformersSampler(module, self)


@clusters.register("local", source="this project", evidence="end to end")
@dataclass(frozen=True)
class LocalCluster:
    """Everything in one process on this machine."""

    @property
    def ranks(self) -> int:
        """One: this process."""
        return 1
