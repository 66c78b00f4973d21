"""What a recipe says of weightings that cannot work, or that changes nothing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from alignment.recipe_tree import Conflict, Place

if TYPE_CHECKING:
    from alignment.recipe import OnlineStage, Recipe


def weighting_conflicts(recipe: "Recipe", stage: "OnlineStage", place: Place) -> Iterator[Conflict]:
    """Names of rewards that there are not, thresholds on all of them, and gradients of components where advantages are
    not their own."""
    here: Place = (*place, "algorithm", "weighting")
    columns = [spec.column for spec in recipe.reward_specs]
    if "gram" in stage.credited.needs and "values" in stage.credited.needs:
        message = (
            "compares advantages of each reward alone, and a critic predicts their sum: take an algorithm.advantage "
            "without values, such as grpo"
        )
        yield Conflict(here, message, ((*place, "algorithm"),))
    unknown = [name for name in getattr(stage.credited.weighting, "names", ()) if name not in columns]
    if unknown and columns:
        message = f"names {', '.join(unknown)}, which is no reward of this recipe; there are {', '.join(columns)}"
        yield Conflict(here, message, (here, ("rewards",)))
    if unlisted := [name for name in getattr(stage.credited.weighting, "unlisted", ()) if name not in columns]:
        message = (
            f"'minimise' and 'scales' name {', '.join(unlisted)}, and without 'objectives' there are only the rewards: "
            f"list all of them, objectives: [{', '.join([*columns, *unlisted])}]"
        )
        yield Conflict(here, message, (here, ("rewards",)))
    yield from _without_objective(stage, columns, here)


def _without_objective(stage: "OnlineStage", columns: Sequence[str], here: Place) -> Iterator[Conflict]:
    """Thresholds on all rewards, so that there is nothing left to maximise."""
    thresholds = getattr(stage.credited.weighting, "thresholds", None)
    if isinstance(thresholds, Mapping) and columns and set(columns) <= set(thresholds):
        message = (
            f"every reward has a threshold ({', '.join(columns)}), and one must be left to maximise: take a threshold "
            "away, or add a reward"
        )
        yield Conflict((*here, "thresholds"), message, (here, ("rewards",)))


def cautions(recipe: "Recipe") -> Iterator[str]:
    """Combinations that work and do not do what they seem to."""
    for index, stage in enumerate(recipe.stages):
        if stage.stage != "online":
            continue
        weighting, advantage = stage.algorithm.weighting, stage.algorithm.advantage
        where = f"stages.{index}.algorithm.weighting"
        apply_to, scale_free = getattr(weighting, "apply_to", None), getattr(advantage, "scale_free", False)
        if apply_to == "reward" and scale_free:
            yield (
                f"{where}: apply_to 'reward' has no effect here: algorithm.advantage divides by the rewards' own "
                "deviation, and a factor on all of them cancels; use apply_to: lr"
            )
        elif apply_to in ("reward", "advantage"):
            yield (
                f"{where}: apply_to '{apply_to}' multiplies all advantages alike, and AdamW divides by the size of the "
                "gradient: a factor that stays has no effect, one that changes acts until the moments have followed; "
                "use apply_to: lr to make the step itself larger"
            )
        if getattr(weighting, "wants_scale_free", False) and not scale_free:
            yield (
                f"{where}: sums advantages that algorithm.advantage has not normalised, so the component with the "
                "largest spread decides; use algorithm.advantage: grpo"
            )
