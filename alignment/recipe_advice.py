"""Curricula that do not go together, and controls that do nothing: what a recipe may not do, and what it may do and
hardly should."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.entropy_controls import entropy_controls
from alignment.curricula import curricula, remarks
from alignment.recipe_checks import Conflict
from alignment.recipe_control import control_conflicts
from alignment.recipe_tree import Place

if TYPE_CHECKING:
    from alignment.recipe import Recipe


def refusals(recipe: "Recipe") -> Iterator[Conflict]:
    """Curricula that cannot be in one list, replay that nothing corrects, and control tokens that cannot work."""
    yield from control_conflicts(recipe)
    for index, stage in enumerate(recipe.stages):
        if stage.stage == "sft" or stage.stage == "reward_model" or not stage.samples:
            continue
        here: Place = ("stages", index, "curricula")
        yield from (Conflict(here, text) for verdict, text in remarks(stage.curricula) if verdict == "refused")
        replays = [curricula.name_of(c) for c in stage.curricula if hasattr(c, "replay")]
        if replays and stage.stage == "online" and stage.credited.correction is None:
            message = f"'{replays[0]}' trains on rollouts of an earlier policy, which needs importance weights"
            where: Place = ("stages", index, "algorithm", "correction")
            yield Conflict(here, f"{message}: set algorithm.correction to 'tis'", (here, where))


def advice(recipe: "Recipe") -> Iterator[Conflict]:
    """What is told when a run starts or a recipe is checked, and is no reason to refuse it."""
    for index, stage in enumerate(recipe.stages):
        if stage.stage != "sft" and stage.stage != "reward_model" and stage.samples:
            place: Place = ("stages", index, "curricula")
            yield from (Conflict(place, text) for verdict, text in remarks(stage.curricula) if verdict == "warns")
        if stage.stage == "online":
            yield from _asleep(stage.credited, ("stages", index, "algorithm"))


def _asleep(algorithm: Algorithm, place: Place) -> Iterator[Conflict]:
    """Controls that look at how far the policy is from the one before the batch, where every batch has one update."""
    if algorithm.epochs * algorithm.minibatches > 1:
        return
    for number, control in enumerate(algorithm.entropy_controls):
        if getattr(control, "several_updates", False):
            message = (
                f"'{entropy_controls.name_of(control)}' does nothing here: it holds the policy to the one before the "
                "batch, and with one update per batch the two are the same; set algorithm.minibatches or epochs above 1"
            )
            yield Conflict((*place, "entropy_controls", number), message)
