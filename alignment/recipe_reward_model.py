"""The reward model stage of a recipe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from alignment.algorithms.reward_losses import RewardLoss, reward_losses
from alignment.algorithms.value_losses import ValueLoss, value_losses
from alignment.engines.config import Cluster, SamplerConfig, Site, TransportConfig, clusters, samplers, transports
from alignment.engines.learner_config import LearnerConfig, learners
from alignment.engines.roles import RoleSpec
from alignment.origin import Origin
from alignment.recipe_rollouts import default
from alignment.recipe_sections import Count, Label, ModelConfig, Section, folder_beside
from alignment.recipe_tree import Place
from alignment.registry import component
from alignment.types import keyed_seed


class RewardModelStage(Section):
    """Fits one or several reward models to ``data.preferences``; the policy stays as it is."""

    stage: Literal["reward_model"] = "reward_model"
    name: Label = "reward_model"
    steps: Count
    batch_size: Count = 32
    """Pairs of a step, for each member."""
    members: Annotated[int, Field(ge=1, le=64)] = 1
    """Reward models that differ in their heads' first weights and the order of their data alone: an ensemble."""
    loss: Annotated[RewardLoss, component(reward_losses)] = default(reward_losses, "bradley_terry")
    head: Annotated[ValueLoss, component(value_losses)] = default(value_losses, "scalar")
    """How a reward is read: one number (``scalar``), or the mean of a distribution (``two_hot``, ``hl_gauss``), whose
    ends are its ``low`` and ``high``."""
    model: ModelConfig | None = None
    """The body; None: the policy's, as the stage finds it."""
    start: str | None = None
    """Folder of a saved value or reward model to go on from; its head comes with it."""
    sampler: Annotated[SamplerConfig, component(samplers)] = default(samplers, "transformers")
    """Evaluates the policy."""
    learner: Annotated[LearnerConfig, component(learners)] = default(learners, "torch")
    cluster: Annotated[Cluster, component(clusters)] = default(clusters, "local")
    transport: Annotated[TransportConfig, component(transports)] | None = None
    """How weights reach the sampler; None: as suits the two."""

    @property
    def samples(self) -> bool:
        """Whether it samples completions of ``data.train``."""
        return False

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of the policy in a step."""
        return 0

    @property
    def needs_reference(self) -> bool:
        """Never."""
        return False

    @property
    def resting_steps(self) -> int:
        """None: the schedule is that of the reward models."""
        return 0

    @property
    def member_names(self) -> tuple[str, ...]:
        """The roles of its members."""
        return tuple(f"reward_model_{i}" for i in range(self.members))

    def policy_rests(self, stage_step: int) -> bool:
        """Always."""
        return True

    def components(self) -> dict[str, Any]:
        """None of its components has a state."""
        return {}

    def decoding(self, folder: Path) -> None:
        """Evaluations sample as they are."""

    def folders(self) -> Iterator[tuple[Place, str]]:
        """Folders of models that are there before it begins, by their place in the stage."""
        if self.start is not None:
            yield ("start",), self.start

    def roles(self, site: Site, objectives: tuple[str, ...]) -> dict[str, RoleSpec | str]:
        """Its members, by name."""
        from alignment.engines.reward_roles import RewardRoleSpec
        from alignment.engines.value_model import ValueShape

        assert site.model.origin is not None, "a model of a recipe has an origin"
        origin = site.model.origin
        start = None if self.start is None else folder_beside(self.start, site.folder)
        found: dict[str, RoleSpec | str] = {}
        for i, name in enumerate(self.member_names):
            body = origin
            if self.model is not None:
                body = Origin(self.model.located(site.folder), keyed_seed(origin.seed, self.name))
            seed = keyed_seed(origin.seed, self.name, "member", i)
            spec = RewardRoleSpec(name, self.loss, ValueShape(self.head), body, seed, start)
            spec.check(site.model)
            found[name] = spec
        return found
