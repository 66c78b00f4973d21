"""What stages that may sample completions of ``data.train`` and score them have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.decodings import Decoding
from alignment.critics import Circumstances, Critic, critics
from alignment.curricula import Curriculum, places, with_selector
from alignment.curricula import curricula as curriculum_registry
from alignment.engines import deepspeed_config, ray_config, transport_config, vllm_config  # noqa: F401 - they register engines
from alignment.engines.config import Cluster, SamplerConfig, Site, TransportConfig, clusters, samplers, transports
from alignment.engines.learner_config import LearnerConfig, learners
from alignment.engines.roles import RoleSpec
from alignment.environments import Environment, environments
from alignment.recipe_sections import Count, Label, Sampling, Section
from alignment.recipe_tree import Place
from alignment.registry import Registry, component
from alignment.types import Group, SamplingParams


def default(registry: Registry[Any], name: str) -> Any:
    """A field whose default is the component ``name``."""
    return Field(default_factory=lambda: registry.build(name))


class RolloutStage(Section, ABC):
    """What stages that sample completions of ``data.train`` and score them have in common."""

    stage: str
    name: Label
    steps: Count
    prompts_per_step: Count = 32
    group_size: Count = 8
    """Completions of each prompt."""
    sampling: Sampling = Sampling()
    environment: Annotated[Environment, component(environments)] = default(environments, "single_turn")
    curricula: tuple[Annotated[Curriculum, component(curriculum_registry)], ...] = Field(
        default_factory=lambda: (curriculum_registry.build("uniform"),)
    )
    prompt_value: Annotated[Critic, component(critics)] | None = None
    """Predicts what comes of a prompt, for curricula that ask: a ``model``, or the critic's ``read_out``."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Policy versions that a rollout may be behind the policy it trains."""
    sampler: Annotated[SamplerConfig, component(samplers)] = default(samplers, "transformers")
    learner: Annotated[LearnerConfig, component(learners)] = default(learners, "torch")
    cluster: Annotated[Cluster, component(clusters)] = default(clusters, "local")
    transport: Annotated[TransportConfig, component(transports)] | None = None
    """How new weights reach the sampler; None: as suits the two."""

    @field_validator("curricula")
    @classmethod
    def _select_first(cls, value: tuple[Curriculum, ...]) -> tuple[Curriculum, ...]:
        return with_selector(value)

    @property
    def samples(self) -> bool:
        """Whether it samples completions of ``data.train``."""
        return True

    @property
    @abstractmethod
    def credited(self) -> Algorithm:
        """What makes returns, and, for a policy that is trained, the loss."""
        ...

    @property
    @abstractmethod
    def values(self) -> Critic | None:
        """The value model that learns from each batch."""
        ...

    @abstractmethod
    def policy_rests(self, stage_step: int) -> bool:
        """Whether the step trains models beside the policy alone."""
        ...

    def decoding(self, folder: Path) -> Decoding | None:
        """How rollouts that ask for it are steered; ``folder`` is where relative paths start."""
        return None

    def params(self, plain: SamplingParams) -> Sequence[SamplingParams]:
        """The sampling parameters of each rollout of a group."""
        return [plain] * self.group_size

    def trained(self, groups: Sequence[Group]) -> Sequence[Group]:
        """What of the accepted groups is trained on."""
        return groups

    @property
    def resting_steps(self) -> int:
        """First steps in which a policy that learns afterwards rests: its schedule is shorter by them."""
        return 0

    @property
    def needs_reference(self) -> bool:
        """Whether any component compares the policy with a reference."""
        return "reference" in self.credited.needs

    @property
    def streams(self) -> bool:
        """Whether its critic has a value for each reward component."""
        return bool(getattr(self.credited.weighting, "streams", False))

    def folders(self) -> Iterator[tuple[Place, str]]:
        """Folders of models that are there before it begins, by their place in the stage."""
        own = "value_model" if self.stage == "value" else "critic"
        for name, critic in {own: self.values, "prompt_value": self.prompt_value}.items():
            if (start := getattr(critic, "start", None)) is not None:
                yield (name, "start"), start

    def components(self) -> dict[str, Any]:
        """Its components by their place, the key of their state."""
        return {**places(self.curricula), **self.credited.components()}

    def roles(self, site: Site, objectives: tuple[str, ...]) -> dict[str, RoleSpec | str]:
        """Models beside the policy, by name.

        Args:
            site: The policy, and where relative paths start.
            objectives: Names of the reward components.
        """
        algorithm, roles = self.credited, dict[str, RoleSpec | str]()
        streams = objectives if self.streams else ()
        for name, critic in {"critic": self.values, "prompt_value": self.prompt_value}.items():
            if critic is not None:
                assert site.model.origin is not None, "a model of a recipe has an origin"
                own = streams if name == "critic" else ()
                here = Circumstances(
                    site.model.origin,
                    site.folder,
                    name,
                    own,
                    algorithm.epochs,
                    algorithm.minibatches,
                    ahead=self.resting_steps,
                )
                role = critic.role(here)
                if not isinstance(role, str):
                    role.check(site.model)
                roles[name] = role
        return roles
