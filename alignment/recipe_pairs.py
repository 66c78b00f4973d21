"""Preference stages that cannot work as they are written."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alignment.algorithms.preferences import preference_losses
from alignment.curricula import curricula
from alignment.recipe_tree import Conflict, Place
from alignment.references import references

if TYPE_CHECKING:
    from alignment.recipe import PreferenceStage, Recipe, RewardModelStage


def preference_conflicts(recipe: "Recipe", stage: "PreferenceStage", place: Place) -> Iterator[Conflict]:
    """Pairs that come from nowhere, and references that cannot be had."""
    if not stage.samples:
        if recipe.data.preferences is None:
            message = "a stage 'preference' needs data.preferences, or pairs that it samples: pairs: best_worst"
            yield Conflict(place, message, (("data", "preferences"), (*place, "pairs")))
        plain = type(stage)(steps=1)  # a run's own copy of its recipe says every default
        for name in ("prompts_per_step", "group_size", "sampling", "curricula", "environment", "prompt_value"):
            if getattr(stage, name) == getattr(plain, name):
                continue
            message = "says how completions are sampled, and this stage takes the pairs of data.preferences"
            yield Conflict((*place, name), f"{message}: leave it out, or set pairs to best_worst", ((*place, "pairs"),))
    else:
        if stage.group_size < 2:
            yield Conflict((*place, "group_size"), "1 makes no pair: sample at least 2 completions of each prompt")
        budget = getattr(stage.learner, "micro_batch_tokens", None)
        need = 2 * (recipe.data.max_prompt_tokens + stage.sampling.max_tokens)
        if budget is not None and budget < need:
            message = (
                f"{budget} does not hold the two sides of the longest pair: twice data.max_prompt_tokens "
                f"({recipe.data.max_prompt_tokens}) + sampling.max_tokens ({stage.sampling.max_tokens}) is {need}"
            )
            because = (("data", "max_prompt_tokens"), (*place, "sampling"), (*place, "learner"))
            yield Conflict((*place, "learner", "micro_batch_tokens"), message, because)
    if stage.max_staleness:
        message = "a preference stage waits for its pairs, so none is stale: leave it out"
        yield Conflict((*place, "max_staleness"), message)
    for index, curriculum in enumerate(stage.curricula) if stage.samples else ():
        if hasattr(curriculum, "replay"):
            message = f"'{curricula.name_of(curriculum)}' picks what to replay by advantages, and pairs have none"
            yield Conflict((*place, "curricula", index), f"{message}: leave it out")
    yield from _reference_conflicts(recipe, stage, place)
    if stage.mismatched and (stage.prompts_per_step if stage.samples else getattr(stage.pairs, "batch_size", 1)) < 2:
        where = ("prompts_per_step",) if stage.samples else ("pairs", "batch_size")
        message = (
            "1 gives 'kto' no completion of another prompt, from which it estimates the divergence (z would always "
            "be 0): take at least 2"
        )
        yield Conflict((*place, *where), message, ((*place, "losses"),))
    if stage.guided and recipe.data.demonstrations is None:
        message = "'nll' of ground_truth needs data.demonstrations"
        yield Conflict((*place, "losses"), message, (("data", "demonstrations"),))


def _reference_conflicts(recipe: "Recipe", stage: "PreferenceStage", place: Place) -> Iterator[Conflict]:
    """References that the pairs, the losses or the engines do not go with."""
    reference = references.name_of(stage.reference)
    here: Place = (*place, "reference")
    merges = stage.merges(0)
    moves = any(map(stage.reference.share, range(1, stage.steps + 1))) or merges
    if moves and any(preference_losses.name_of(loss) == "bco" for loss in stage.losses):
        message = "'bco' compares rewards with earlier ones, which were against another reference: take 'copy'"
        yield Conflict(here, message, ((*place, "losses"),))
    if reference == "cached" and stage.samples:
        message = "'cached' is computed once over pairs that are there before: take 'copy', whose pairs may be new"
        yield Conflict(here, message, ((*place, "pairs"),))
    if reference == "cached" and stage.mismatched:
        message = "'cached' has nothing of prompts with other ones' completions, which 'kto' asks for: take 'copy'"
        yield Conflict(here, message, ((*place, "losses"),))
    masked = [loss for loss in stage.losses if getattr(loss, "token_masks", None) is not None]
    if masked and reference == "cached":
        message = f"'cached' has no distributions, which '{preference_losses.name_of(masked[0])}' compares: take 'copy'"
        yield Conflict(here, message, ((*place, "losses"),))
    if not stage.compares and reference != "copy":
        names = ", ".join(preference_losses.name_of(loss) for loss in stage.losses)
        yield Conflict(here, f"is not looked at by {names}: leave it out", ((*place, "losses"),))
    if merges:
        yield from _merging_conflicts(recipe, here)


def _merging_conflicts(recipe: "Recipe", here: Place) -> Iterator[Conflict]:
    """What cannot be, in this stage and in those after it, once adapters are merged into the model."""
    if recipe.model.lora is None:
        message = "merge adds a LoRA adapter to the model: give model.lora, or leave it out for a copy of all weights"
        yield Conflict(here, message, (("model", "lora"),))
    for index in range(int(here[1]), len(recipe.stages)):
        stage, place = recipe.stages[index], ("stages", index)
        for name, key in (("sampler", "lora"), ("transport", "form")):
            if getattr(getattr(stage, name), key, None) == "adapter":
                message = "'adapter' leaves the model below as it was, and merging changes it (merge): use 'merged'"
                yield Conflict((*place, name, key), message, (here,))


def reward_model_conflicts(recipe: "Recipe", stage: "RewardModelStage", place: Place) -> Iterator[Conflict]:
    """Reward models that have nothing to learn from, or nothing to be."""
    if recipe.data.preferences is None:
        yield Conflict(place, "a stage 'reward_model' needs data.preferences", (("data", "preferences"),))
    if stage.model is not None and stage.start is not None:
        yield Conflict((*place, "start"), "goes with the model that it was saved with: leave 'model' out")
    if stage.start is not None and stage.members > 1:
        message = f"{stage.members} would all begin with the head of 'start', so only the order of data would differ"
        yield Conflict((*place, "members"), f"{message}: give 'model' in its place", ((*place, "start"),))


def slow_rewards(recipe: "Recipe") -> Iterator[Conflict]:
    """Rewards that may take longer than scoring allows, by their own account (``needs_s``)."""
    for index, spec in enumerate(recipe.reward_specs):
        needs = getattr(spec.function, "needs_s", 0.0)
        if needs > recipe.scoring.timeout_s:
            message = (
                f"'{spec.column}' may take {needs:g} s for a completion, retries included, and scoring.timeout_s is "
                f"{recipe.scoring.timeout_s:g}: raise that to {needs:g}, or lower its timeout_s, max_retries or samples"
            )
            yield Conflict(("rewards", index), message, (("scoring", "timeout_s"),))
