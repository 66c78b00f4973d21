"""The stages of a recipe, as typed, frozen records. ``alignment.recipe`` puts them together."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from alignment.algorithms.advantages import Gae
from alignment.algorithms.aggregations import Aggregation, aggregations
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.decodings import Decoding
from alignment.algorithms.imitations import Imitation, imitations
from alignment.algorithms.objective import Objective
from alignment.algorithms.values import Truncation
from alignment.critics import Critic, critics
from alignment.engines import deepspeed_config, ray_config, transport_config, vllm_config  # noqa: F401 - they register engines
from alignment.engines.config import Cluster, SamplerConfig, Site, TransportConfig, clusters, samplers, transports
from alignment.engines.learner_config import LearnerConfig, learners
from alignment.engines.roles import RoleSpec
from alignment.guidance import Guidance
from alignment.recipe_preference import PreferenceStage
from alignment.recipe_reward_model import RewardModelStage
from alignment.recipe_rollouts import RolloutStage, default
from alignment.recipe_sections import Choice, Count, Label, Section
from alignment.recipe_tree import Place
from alignment.registry import component
from alignment.types import Group, SamplingParams


class Conditional(Section):
    """Each demonstration stands behind a control token of ``model.control``, by its score."""

    score: Annotated[str, Field(min_length=1)]
    """Column of the score; less is better."""
    threshold: float
    """Largest score of a demonstration that stands behind the aligned token."""
    drop: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Probability that one stands behind no token."""


class SftStage(Section):
    """Supervised fine-tuning on ``data.demonstrations``."""

    stage: Literal["sft"] = "sft"
    name: Label = "sft"
    steps: Count
    batch_size: Count = 32
    """Demonstrations in a step."""
    loss_on: Literal["completion", "all"] = "completion"
    """What is learned of each: what the assistant says, or the prompt and everything else as well."""
    objective: Annotated[Imitation, component(imitations)] = default(imitations, "likelihood")
    """What a demonstration counts for: all the same, or by what it was judged to be worth."""
    conditional: Conditional | None = None
    """Conditional training."""
    aggregation: Annotated[Aggregation, component(aggregations)] = default(aggregations, "token_mean")
    sampler: Annotated[SamplerConfig, component(samplers)] = default(samplers, "transformers")
    """Evaluates."""
    learner: Annotated[LearnerConfig, component(learners)] = default(learners, "torch")
    cluster: Annotated[Cluster, component(clusters)] = default(clusters, "local")
    transport: Annotated[TransportConfig, component(transports)] | None = None
    """How new weights reach the sampler; None: as suits the two."""

    @property
    def samples(self) -> bool:
        """Whether it samples completions of ``data.train``."""
        return False

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in a step."""
        return 1

    @property
    def needs_reference(self) -> bool:
        """Never."""
        return False

    def components(self) -> dict[str, Any]:
        """None of its components has a state."""
        return {}

    @property
    def resting_steps(self) -> int:
        """None."""
        return 0

    def policy_rests(self, stage_step: int) -> bool:
        """Never."""
        return False

    def decoding(self, folder: Path) -> None:
        """Evaluations sample as they are."""

    def roles(self, site: Site, objectives: tuple[str, ...]) -> dict[str, RoleSpec | str]:
        """No model beside the policy."""
        return {}

    def supervision(self) -> Objective:
        """What the learner minimises: the objective's loss, which weights of demonstrations multiply."""
        return Objective.supervised(self.aggregation, self.objective.policy_loss)


class OnlineStage(RolloutStage):
    """Online reinforcement learning on ``data.train``."""

    stage: Literal["online"] = "online"
    name: Label = "rl"
    algorithm: Algorithm = Field(default_factory=Algorithm)
    critic: Annotated[Critic, component(critics)] | None = None
    """Predicts returns, for advantages that ask (``gae``): a ``model`` of its own, or a ``head`` on the policy."""
    guidance: Guidance | None = None
    """Some rollouts of each group are found with the help of a value model."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of the policy in a step."""
        return self.algorithm.epochs * self.algorithm.minibatches

    @property
    def credited(self) -> Algorithm:
        """The algorithm."""
        return self.algorithm

    @property
    def values(self) -> Critic | None:
        """The critic."""
        return self.critic

    def folders(self) -> Iterator[tuple[Place, str]]:
        """Those of value models, and of what guides."""
        yield from super().folders()
        if self.guidance is not None:
            yield from ((("guidance", "decoding", "models"), path) for path in self.guidance.decoding.addresses)

    def decoding(self, folder: Path) -> Decoding | None:
        """The guidance's, with its models' folders in full."""
        return None if self.guidance is None else self.guidance.located(folder)

    def params(self, plain: SamplingParams) -> Sequence[SamplingParams]:
        """The last rollouts of a group are steered, if there is guidance."""
        own = super().params(plain)
        return own if self.guidance is None else self.guidance.params(plain, self.group_size)

    def trained(self, groups: Sequence[Group]) -> Sequence[Group]:
        """What the guidance leaves of them."""
        return groups if self.guidance is None else self.guidance.trained(groups)

    @property
    def resting_steps(self) -> int:
        """Those in which the critic is trained ahead."""
        return getattr(self.critic, "pretraining_steps", 0)

    def policy_rests(self, stage_step: int) -> bool:
        """While the critic is trained ahead."""
        return stage_step < self.resting_steps


class ValueStage(RolloutStage):
    """Fits a value model to the rollouts of the policy, which stays as it is."""

    stage: Literal["value"] = "value"
    name: Label = "value"
    value_model: Annotated[Critic, component(critics)] = default(critics, "model")
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per sampled token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Lambda of the targets: 1 is Monte Carlo, below it the value model's own values are part of them."""
    truncation: Truncation = "bootstrap"
    """What a completion that met the length limit was worth: what the state that it reached is (``bootstrap``), or
    the reward that it got as it stands (``end``)."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of the policy in a step."""
        return 0

    @property
    def credited(self) -> Algorithm:
        """What makes targets."""
        targets = Gae(gamma=self.gamma, lam=self.lam, critic_lam=self.lam, truncation=self.truncation, normalise="none")
        return Algorithm(advantage=targets, correction=None)

    @property
    def values(self) -> Critic | None:
        """The value model."""
        return self.value_model

    def policy_rests(self, stage_step: int) -> bool:
        """Always."""
        return True


Stage = SftStage | PreferenceStage | RewardModelStage | OnlineStage | ValueStage
STAGES = Choice(
    "stage",
    "stages",
    {
        "sft": SftStage,
        "preference": PreferenceStage,
        "reward_model": RewardModelStage,
        "online": OnlineStage,
        "value": ValueStage,
    },
)
