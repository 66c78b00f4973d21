"""Curricula that do not go together or not with the mixer, and controls that do nothing or not what was meant: what a
recipe may not do, and what it may do and hardly should."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from alignment.algorithms.advantages import advantages
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.covariance import ClipCov
from alignment.algorithms.entropy_controls import entropy_controls
from alignment.algorithms.experimental_mixers import Amft
from alignment.algorithms.mixers import Hpt, mixers
from alignment.algorithms.policy_losses import Clip
from alignment.algorithms.shuffled import Shuffled
from alignment.algorithms.tokens import share_down
from alignment.curricula import Curriculum, curricula, remarks
from alignment.recipe_checks import Conflict
from alignment.recipe_control import control_conflicts
from alignment.recipe_tree import Place

if TYPE_CHECKING:
    from alignment.recipe import OnlineStage, Recipe


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
            yield from _without_exploration(stage.curricula, stage.prompts_per_step, place)
        if stage.stage == "online":
            here: Place = ("stages", index, "algorithm")
            yield from _starved(stage, here)
            yield from _one_sided(stage, here)
            yield from _asleep(stage.credited, here)
            yield from _other_clips(stage.credited, here)
            yield from _other_scales(stage.credited, here)


def _without_exploration(chosen: Sequence[Curriculum], wanted: int, place: Place) -> Iterator[Conflict]:
    """A share of prompts to explore with that is less than one prompt of those that a step chooses."""
    for curriculum in reversed([c for c in chosen if hasattr(c, "select")]):
        share = getattr(curriculum, "explore_frac", 0.0)
        if share > 0 and not share_down(share, wanted):
            message = (
                f"explore_frac {share:g} of '{curricula.name_of(curriculum)}' is less than one of the {wanted} prompts "
                f"that it chooses, so none explores: set it to {math.ceil(1000 / wanted) / 1000:g} or more"
            )
            yield Conflict(place, message)
        wanted = getattr(curriculum, "candidates", int)(wanted)


def _starved(stage: "OnlineStage", place: Place) -> Iterator[Conflict]:
    """A mixer whose demonstrations are for prompts that nobody solves, which a filter drops before it sees them."""
    mixer, size = stage.credited.mixer, stage.group_size
    teaches = getattr(mixer, "teaches", None)
    if teaches is None or not teaches(0, size):
        return
    filters = [c for c in stage.curricula if hasattr(c, "keeps_rate")]
    dropping = [c for c in filters if not c.keeps_rate(0.0)]  # pyright: ignore[reportAttributeAccessIssue]
    if not dropping:
        return
    left = [n for n in range(size + 1) if teaches(n, size) and all(c.keeps_rate(n / size) for c in filters)]  # pyright: ignore[reportAttributeAccessIssue]
    lost = "so their demonstrations are never learned from" if left else "and of no other would it show a demonstration"
    message = (
        f"'{curricula.name_of(dropping[0])}' drops the groups that all rollouts failed before "
        f"'{mixers.name_of(mixer)}' sees them, {lost}: leave the filter out, let these groups pass "
        "(low: 0, high: 0.99, inclusive: true drops only what is always solved), or take 'relift', which sees all "
        "sampled groups"
    )
    yield Conflict((*place, "mixer"), message)


def _one_sided(stage: "OnlineStage", place: Place) -> Iterator[Conflict]:
    """A gate that no group passes, and a rate of something that runs do not compute."""
    mixer, size = stage.credited.mixer, stage.group_size
    if isinstance(mixer, Hpt) and not any(mixer.weights(n, size)[0] for n in range(size + 1)):
        message = (
            f"'hpt' imitates every prompt, however many of its {size} rollouts are solved, and learns nothing from "
            "rewards: set gate below group_size, gate_share below 1, or a weight of rollouts above 0 in soft"
        )
        yield Conflict((*place, "mixer"), message)
    if isinstance(mixer, Amft) and mixer.meta_rate != Amft.meta_rate:
        message = (
            "has no effect: no learner computes the gradient of a validation loss, so mu follows the entropy alone; "
            "leave it out"
        )
        yield Conflict((*place, "mixer", "meta_rate"), message)


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


def _other_clips(algorithm: Algorithm, place: Place) -> Iterator[Conflict]:
    """Clip-Cov beside a loss that clips tokens at other ratios. With one update per batch all ratios are 1."""
    loss = algorithm.policy_loss
    if not isinstance(loss, Clip) or algorithm.epochs * algorithm.minibatches == 1:
        return
    for number, listed in enumerate(algorithm.entropy_controls):
        control = listed.of if isinstance(listed, Shuffled) else listed
        if isinstance(control, ClipCov) and (control.clip_low, control.clip_high) != (loss.clip_low, loss.clip_high):
            low, high = f"{loss.clip_low:g}", f"{loss.clip_high:g}"
            message = (
                f"'clip_cov' takes tokens as clipped at distances {control.clip_low:g} and {control.clip_high:g}, and "
                f"algorithm.policy_loss clips at {low} and {high}, so it picks among others than the tokens that have "
                f"a gradient: set clip_low: {low}, clip_high: {high} here"
            )
            yield Conflict((*place, "entropy_controls", number), message)


def _other_scales(algorithm: Algorithm, place: Place) -> Iterator[Conflict]:
    """Controls with values for advantages of unit scale, where nothing brings advantages to it."""
    advantage = algorithm.advantage
    scaled = any(getattr(part, "unit_scale", False) for part in (advantage, algorithm.weighting))
    if scaled or getattr(advantage, "scale_free", False) or hasattr(algorithm.mixer, "advantages"):
        return
    for number, control in enumerate(algorithm.entropy_controls):
        if options := getattr(control, "unit_scale", ()):
            message = (
                f"'{entropy_controls.name_of(control)}' has its {' and '.join(options)} for advantages of about unit "
                f"scale, and '{advantages.name_of(advantage)}' leaves them on that of the rewards: take an "
                f"algorithm.advantage that normalises, such as grpo, or set {' and '.join(options)} for that scale"
            )
            yield Conflict((*place, "entropy_controls", number), message)
