"""Puts the engines of a stage together: where its processes live, learner, sampler, and what carries the weights."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from alignment.engines.colocated import Colocated
from alignment.engines.config import Site, Transport, TransportConfig, transports
from alignment.engines.learner_config import Learner
from alignment.sampling import Sampler


@dataclass
class Engines:
    """What trains and what samples in a stage."""

    learner: Learner
    sampler: Sampler
    transport: Transport
    playing: dict[str, Any] = field(default_factory=dict)
    """Every episode in flight, for whoever plays with ``sampler``; see :class:`alignment.rollouts.Player`."""
    published: int | None = None
    """The policy version that the sampler has; None before the first."""

    @property
    def in_process(self) -> bool:
        """Whether the learner computes in this process, so that what it computes can be looked at."""
        return hasattr(self.learner, "module")

    def publish(self, version: int) -> dict[str, float]:
        """Makes the learner's weights the sampler's, as policy ``version``, if they are not; metrics."""
        if self.published == version:
            return {}
        metrics = self.transport.publish(version)
        self.published = version
        return metrics

    def rest(self) -> None:
        """The batch is sampled and the learner comes next: an engine that shares its GPU gives the memory up."""
        if isinstance(self.transport, Colocated):
            self.transport.rest()
            self.published = None  # what it had is gone


@contextmanager
def open_engines(stage: Any, site: Site, seed: int, objectives: Sequence[str] = ()) -> Iterator[Engines]:
    """The engines of ``stage``, closed on leaving, and with them every process they started.

    Args:
        stage: Its ``cluster``, ``learner``, ``sampler`` and ``transport``, and what the learner is built for.
        site: The model and the sizes; its ``cluster`` is filled in here.
        seed: Of the learner.
        objectives: Names of the reward components, of which each may have values of its own.

    Raises:
        UserError: There is not enough of something, or an engine cannot be started.
    """
    with ExitStack() as stack:
        site = replace(site, cluster=stack.enter_context(stage.cluster.open(stage, site)))
        roles = stage.roles(site, tuple(objectives))
        learner = stage.learner.build(site, stage.steps - stage.resting_steps, seed, stage.needs_reference, roles)
        stack.callback(learner.close)
        sampler = stage.sampler.build(replace(site, decoding=stage.decoding(site.folder)), learner)
        stack.callback(sampler.close)
        transport = (stage.transport or _suited(sampler, learner, site)).build(learner, sampler)
        if getattr(sampler, "sleeps", False):
            transport = Colocated(transport, sampler, getattr(learner, "release", lambda: None))  # pyright: ignore[reportArgumentType]
        yield Engines(learner, sampler, transport)


def _suited(sampler: Sampler, learner: Learner, site: Site) -> TransportConfig:
    """The transport of a stage that names none."""
    module = getattr(learner, "module", None)
    if module is not None and getattr(sampler, "module", None) is module:
        return transports.build("shared")
    return transports.build("memory" if site.cluster is None else site.cluster.transport)
