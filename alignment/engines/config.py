"""What a recipe says of samplers, clusters and transports. Light on purpose: an engine is imported when it is built."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from alignment.models import Model
from alignment.registry import Registry, option
from alignment.sampling import Sampler

if TYPE_CHECKING:
    from alignment.engines.shared_transport import Shared
    from alignment.engines.transformers_sampler import TransformersSampler


def _nothing() -> None:
    """Nothing to do while waiting."""


@dataclass(frozen=True)
class Site:
    """What engines are built for, and where."""

    model: Model
    """Its module is on the ``meta`` device, shapes without weights, where no engine of this process needs weights."""
    row_tokens: int = 0
    """The longest row, prompt and completion."""
    cluster: Any = None
    """What the stage's cluster opened: None where everything lives in this process."""
    plugins: tuple[str, ...] = ()
    """Modules that every process imports first: they register components."""
    folders: tuple[str, ...] = ()
    """Folders that every process joins to the end of ``sys.path``."""
    idle: Callable[[], None] = _nothing
    """Called about ten times a second by whatever waits for another process; may raise to give the wait up."""
    decoding: Any = None
    """A component of :data:`alignment.algorithms.decodings.decodings`; None: the policy's own distribution. Samplers
    take those that steer logits, of requests with a ``tilt``; :func:`alignment.engines.reranking.build_sampler` takes
    all."""

    @property
    def folder(self) -> Path:
        """Where relative paths of a recipe start: its own folder."""
        return Path(self.folders[0]) if self.folders else Path.cwd()


@runtime_checkable
class SamplerConfig(Protocol):
    """Options of a sampler, and how to build it."""

    def build(self, site: Site, learner: Any) -> Sampler:
        """The sampler for ``site``; ``learner`` is what its weights will come from, None for the model's own."""
        ...


@runtime_checkable
class Cluster(Protocol):
    """Where the processes of a run live."""

    def open(self, stage: Any, site: Site) -> AbstractContextManager[Any]:
        """Room for the engines of ``stage``, given back on leaving; what it yields becomes ``site.cluster``.

        Raises:
            UserError: There is not enough of something; the message says what is needed and what is there.
        """
        ...


@runtime_checkable
class Transport(Protocol):
    """Owns both ends of a weight update: from the learner to the sampler."""

    def publish(self, version: int) -> dict[str, float]:
        """Makes the learner's current weights the sampler's, as policy ``version``.

        Returns:
            Metrics, such as ``publish_bytes``.

        Raises:
            EngineFailed: A side did not come in time, or what arrived is not what was sent; says who or what.
        """
        ...


@runtime_checkable
class TransportConfig(Protocol):
    """Options of a transport, and how to build it."""

    def build(self, learner: Any, sampler: Any) -> Transport:
        """The transport between these two."""
        ...


samplers: Registry[SamplerConfig] = Registry("samplers", SamplerConfig, "What generates completions")
clusters: Registry[Cluster] = Registry("clusters", Cluster, "Where the processes of a run live")
transports: Registry[TransportConfig] = Registry("transports", TransportConfig, "How new weights reach the sampler")


@samplers.register("transformers", source="this project", evidence="end to end")
@dataclass(frozen=True)
class TransformersSamplerConfig:
    """Samples in this process from the very weights that are trained: batched, with a key-value cache."""

    bans: ClassVar[bool] = True
    """It heeds ``SamplingParams.banned_ids``."""
    batch_rows: Annotated[int, option("completions decoded together; bounds the cache's memory", unit="rows", ge=1)] = (
        256
    )
    autocast: Annotated[
        Literal["none", "bfloat16"], option("arithmetic of the forward pass; log-probabilities are float32 always")
    ] = "none"

    def build(self, site: Site, learner: Any) -> "TransformersSampler":
        """The sampler over the learner's module, so that it always sees the newest weights; or over the model's.

        Raises:
            UserError: A model of the site's decoding is missing, or does not fit the policy.
        """
        from alignment.engines.steering import SteeringPlan
        from alignment.engines.transformers_sampler import TransformersSampler

        return TransformersSampler(getattr(learner, "module", site.model.module), self, SteeringPlan.of(site))


@clusters.register("local", source="this project", evidence="end to end")
@dataclass(frozen=True)
class LocalCluster:
    """Everything in one process on this machine."""

    def open(self, stage: Any, site: Site) -> AbstractContextManager[None]:
        """Nothing is needed beside this process."""
        return nullcontext()


@transports.register("shared", source="this project", evidence="end to end")
@dataclass(frozen=True)
class SharedTransport:
    """Learner and sampler hold the very same module: nothing moves but the number of the version."""

    def build(self, learner: Any, sampler: Any) -> "Shared":
        """The transport between a learner and a sampler of one process."""
        from alignment.engines.shared_transport import Shared

        return Shared(learner, sampler)
