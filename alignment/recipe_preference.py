"""The preference stage of a recipe: direct alignment from pairs, given or sampled."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from alignment.algorithms import binary_preferences, masked_preferences  # noqa: F401 - they register losses
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.preference_objective import PreferenceObjective
from alignment.algorithms.preferences import PreferenceLoss, check_losses, preference_losses
from alignment.algorithms.state import needs_of
from alignment.critics import Critic
from alignment.curricula import places
from alignment.engines.config import Site
from alignment.engines.roles import RoleSpec
from alignment.pairings import Pairing, pairings
from alignment.recipe_rollouts import RolloutStage, default
from alignment.recipe_sections import Label
from alignment.references import Reference, references
from alignment.registry import component
from alignment.types import keyed_seed


class PreferenceStage(RolloutStage):
    """Learns from pairs of completions: those of ``data.preferences``, or those that it samples, scores and pairs."""

    stage: Literal["preference"] = "preference"
    name: Label = "preference"
    losses: tuple[Annotated[PreferenceLoss, component(preference_losses)], ...] = Field(
        default_factory=lambda: (preference_losses.build("dpo"),)
    )
    """Summed by their ``weight``: MPO is ``dpo``, ``bco`` and ``nll``."""
    pairs: Annotated[Pairing, component(pairings)] = default(pairings, "given")
    reference: Annotated[Reference, component(references)] = default(references, "copy")

    @field_validator("losses")
    @classmethod
    def _summable(cls, value: tuple[PreferenceLoss, ...]) -> tuple[PreferenceLoss, ...]:
        check_losses(value)
        return value

    @property
    def samples(self) -> bool:
        """Whether it samples completions of ``data.train``."""
        return self.pairs.sampled

    @property
    def updates_per_step(self) -> int:
        """One optimizer step."""
        return 1

    @property
    def credited(self) -> Algorithm:
        """Nothing is credited: a pair says itself what it has to teach."""
        return Algorithm(correction=None)

    @property
    def values(self) -> Critic | None:
        """None."""
        return None

    def policy_rests(self, stage_step: int) -> bool:
        """Never."""
        return False

    @property
    def compares(self) -> bool:
        """Whether any loss compares the policy with a reference."""
        return any("reference" in needs_of(loss) for loss in self.losses)

    @property
    def needs_reference(self) -> bool:
        """Whether the learner has to keep one."""
        return self.compares and self.reference.kept

    def merges(self, stage_step: int) -> bool:
        """Whether the adapter is merged into the model before a step."""
        return self.needs_reference and hasattr(self.reference, "merges") and self.reference.merges(stage_step)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def mismatched(self) -> bool:
        """Whether any loss asks for prompts with other ones' completions."""
        return any(getattr(loss, "mismatched", False) for loss in self.losses)

    @property
    def guided(self) -> bool:
        """Whether any loss is of demonstrations."""
        return any(getattr(loss, "of", None) == "ground_truth" for loss in self.losses)

    def roles(self, site: Site, objectives: tuple[str, ...]) -> dict[str, RoleSpec | str]:
        """Models beside the policy: those of curricula, and what learns masks of tokens."""
        from alignment.engines.token_masks import MASKS, MaskRoleSpec, check_inside

        roles = super().roles(site, objectives)
        for loss in self.losses:
            if (masks := getattr(loss, "token_masks", None)) is not None:
                check_inside(masks, site.model)
            if isinstance(masks, masked_preferences.LearnedMasks):
                assert site.model.origin is not None, "a model of a recipe has an origin"
                roles[MASKS] = MaskRoleSpec(masks, keyed_seed(site.model.origin.seed, MASKS))
        return roles

    def components(self) -> dict[str, Any]:
        """Its components by their place, the key of their state."""
        return {**places(self.curricula), **{f"losses.{i}": loss for i, loss in enumerate(self.losses)}}

    def objective(self, states: Any) -> PreferenceObjective:
        """The sum of the losses with their states."""
        losses = [(loss, states.get(f"losses.{i}")) for i, loss in enumerate(self.losses)]
        return PreferenceObjective(losses, entropies="value" if self.samples else "none")
