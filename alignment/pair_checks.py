"""Whether the pairs of a run suit its preference stages: found before the first step."""

from alignment.algorithms.preferences import preference_losses
from alignment.data.load import LoadedData
from alignment.errors import UserError
from alignment.recipe import PreferenceStage, Recipe
from alignment.types import Group


def check_pairs(recipe: Recipe, data: LoadedData, positions: int | None) -> None:
    """Refuses pairs that are too long for the learner or the model, and losses that lack what they learn from.

    Args:
        recipe: Its preference stages say what they need.
        data: Everything that was loaded.
        positions: The longest sequence of the model, in tokens; None: any.

    Raises:
        UserError: The row or the stage, and the remedy.
    """
    for stage in recipe.stages:
        if not isinstance(stage, PreferenceStage):
            continue
        given = [] if stage.samples else data.preferences
        for pair in (*given, *data.held_out_preferences):
            _refuse_long(stage, pair, positions)
        for loss in stage.losses:
            if getattr(loss, "scores", False) and not stage.samples:
                _refuse_unscored(stage, preference_losses.name_of(loss), data)
        if stage.guided:
            _refuse_unguided(stage, data)


def _refuse_long(stage: PreferenceStage, pair: Group, positions: int | None) -> None:
    longest = max(len(r.prompt_ids) + len(r.token_ids) for r in pair.rollouts)
    row = pair.prompt.origin or pair.prompt.id
    if positions is not None and longest > positions:
        raise UserError(
            f"stage {stage.name!r}: the pair {row} has {longest:,} tokens, prompt included, and the model has "
            f"{positions:,} positions: nothing is cut off, so take the row out or lower data.max_completion_tokens"
        )
    budget = getattr(stage.learner, "micro_batch_tokens", None)
    if budget is not None and 2 * longest > budget:
        raise UserError(
            f"stage {stage.name!r}: both sides of the pair {row}, {longest:,} tokens each at most, have to fit "
            f"learner.micro_batch_tokens ({budget:,}) together: raise that to {2 * longest:,} or take the row out"
        )


def _refuse_unscored(stage: PreferenceStage, loss: str, data: LoadedData) -> None:
    for pair in data.preferences:
        if any(rollout.reward is None for rollout in pair.rollouts):
            row = pair.prompt.origin or pair.prompt.id
            raise UserError(
                f"stage {stage.name!r}: '{loss}' needs a score of each side, which the pair {row} lacks: give the rows "
                f"'chosen_score' and 'rejected_score', or sample pairs (pairs: best_worst)"
            )


def _refuse_unguided(stage: PreferenceStage, data: LoadedData) -> None:
    prompts = data.train if stage.samples else [pair.prompt for pair in data.preferences]
    if not any(prompt.key in data.demonstrations for prompt in prompts):
        raise UserError(
            f"stage {stage.name!r}: 'nll' of ground_truth looks for demonstrations of the prompts it trains on, and "
            f"none of the {len(prompts):,} has one in data.demonstrations: give both sections the same prompts"
        )
