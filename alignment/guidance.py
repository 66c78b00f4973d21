"""Rollouts that a value model helped to find, among a group's own: trained on with importance weights, or imitated.

Some rollouts of each group are sampled with value-augmented decoding (Value Augmented Sampling for Language Model
Alignment and Personalization, arXiv 2405.06639). They are not the policy's own. With ``mixed_group`` they count in
the group's baseline like the others, and the correction weighs each of their tokens by ``min(pi / mu, cap)``, where
``mu`` is the tilted distribution that they were recorded with; a critic, whose values are the policy's own, is not
fitted to them. With ``demonstrations`` they are left out, except where the policy's own rollouts of a prompt all
failed: there the correct ones are imitated, and nothing else of the group is trained on. Both are this project's
design.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from alignment.algorithms.decodings import Decoding, ValueAugmented, decodings
from alignment.recipe_sections import Count, Section, folder_beside
from alignment.registry import component
from alignment.types import Group, Rollout, SamplingParams


class Guidance(Section):
    """Which rollouts of a group are steered, how, and what becomes of them."""

    decoding: Annotated[Decoding, component(decodings)]
    """``value_augmented``."""
    rollouts: Count = 1
    """Of each group; the others are the policy's own."""
    use: Literal["mixed_group", "demonstrations"] = "mixed_group"

    def located(self, folder: Path) -> Decoding:
        """The decoding with its models' folders in full: beside the recipe, or else in the working directory.

        Raises:
            UserError: A folder is in neither.
        """
        assert isinstance(self.decoding, ValueAugmented), "recipe checks see to it"
        return replace(
            self.decoding, models=tuple(str(folder_beside(path, folder)) for path in self.decoding.addresses)
        )

    def params(self, plain: SamplingParams, group_size: int) -> list[SamplingParams]:
        """The parameters of each rollout of a group: the steered ones come last."""
        steered = replace(plain, tilt=self.decoding.tilt)
        return [plain] * (group_size - self.rollouts) + [steered] * self.rollouts

    def trained(self, groups: Sequence[Group]) -> list[Group]:
        """What of each group is trained on; groups of which nothing is left are left out."""
        if self.use == "mixed_group":
            return list(groups)
        kept = [replace(group, rollouts=_own_or_found(group)) for group in groups]
        return [group for group in kept if group.rollouts]


def guided_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """``guided/reward`` and ``guided/accuracy`` of steered rollouts and ``unguided/...`` of the policy's own.

    Empty where none is steered; what failed to be scored is left out.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not any(is_guided(rollout) for rollout in rollouts):
        return {}
    found: dict[str, float] = {}
    for name, wanted in (("guided", True), ("unguided", False)):
        own = [r for r in rollouts if is_guided(r) == wanted and r.reward is not None]
        if own:
            found[f"{name}/reward"] = sum(r.reward or 0.0 for r in own) / len(own)
            found[f"{name}/accuracy"] = sum(bool(r.correct) for r in own) / len(own)
    return found


def is_guided(rollout: Rollout) -> bool:
    """Whether its tokens were drawn from a steered distribution."""
    return rollout.source == "steered"


def _own_or_found(group: Group) -> tuple[Rollout, ...]:
    own = tuple(r for r in group.rollouts if not is_guided(r))
    if any(r.correct or r.correct is None for r in own):
        return own
    found: list[Any] = [r for r in group.rollouts if is_guided(r) and r.correct]
    return tuple(replace(r, source="demonstration", ratio_base="self") for r in found) or own
