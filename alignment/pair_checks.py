"""Whether the pairs of a run suit its preference stages: found before the first step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from alignment.algorithms.preferences import preference_losses
from alignment.algorithms.reward_losses import reward_losses
from alignment.data.load import LoadedData
from alignment.data.sides import LABEL
from alignment.engines.steering import positions_of
from alignment.errors import UserError
from alignment.origin import Origin
from alignment.positions import max_positions
from alignment.recipe import PreferenceStage, Recipe, RewardModelStage
from alignment.recipe_sections import folder_beside
from alignment.types import Group, Prompt

Paired = PreferenceStage | RewardModelStage


def check_pairs(recipe: Recipe, data: LoadedData, positions: int | None, done: int = 0) -> None:
    """Refuses pairs that are too long for the learner or the model, and losses that lack what they learn from.

    Args:
        recipe: Its preference stages say what they need.
        data: Everything that was loaded.
        positions: The longest sequence of the policy, in tokens; None: any.
        done: Stages that are done, whose models may be gone.

    Raises:
        UserError: The row or the stage, and the remedy; or a reward model's own body cannot be found.
    """
    for stage in recipe.stages[done:]:
        limits = {"the model": positions}
        if isinstance(stage, RewardModelStage):
            _refuse_single(stage, "a reward model", data)
            if getattr(stage.loss, "scores", False):
                _refuse_unscored(stage, reward_losses.name_of(stage.loss), data)
            limits["the reward model"] = _own_positions(stage, recipe.folder)
        elif not isinstance(stage, PreferenceStage):
            continue
        given = [] if stage.samples else data.preferences
        for pair in (*given, *data.held_out_preferences):
            _refuse_long(stage, pair, limits)
        if isinstance(stage, RewardModelStage):
            continue
        for loss in stage.losses:
            if hasattr(loss, "pair_loss") and not stage.samples:
                _refuse_single(stage, f"'{preference_losses.name_of(loss)}'", data)
            if getattr(loss, "scores", False) and not stage.samples:
                _refuse_unscored(stage, preference_losses.name_of(loss), data)
            if getattr(loss, "of", None) == "chosen" and not stage.samples:
                _refuse_unwanted(stage, preference_losses.name_of(loss), data)
        if stage.guided:
            _refuse_unguided(stage, data)
            for shown in data.demonstrations.values():
                for rollout in shown:
                    _refuse_long(stage, Group(0, Prompt(rollout.prompt_id, {}), (rollout,)), limits)
        if stage.mismatched:
            _refuse_one_prompt(stage, data)
        if stage.mismatched and given:
            _refuse_mismatched(stage, given, positions)


def _refuse_one_prompt(stage: PreferenceStage, data: LoadedData) -> None:
    """Whose completions are nowhere those of another one."""
    section = "train" if stage.samples else "preferences"
    prompts = data.train if stage.samples else [pair.prompt for pair in data.preferences]
    if len({prompt.key for prompt in prompts}) == 1:
        raise UserError(
            f"stage {stage.name!r}: 'kto' estimates the divergence from completions of other prompts, and all rows of "
            f"data.{section} have one prompt, so it would always be 0: give more prompts, or take 'bco'"
        )


def _refuse_mismatched(stage: PreferenceStage, pairs: Sequence[Group], positions: int | None) -> None:
    """The longest prompt may be followed by the longest completion, of another one."""
    rows = [rollout for pair in pairs for rollout in pair.rollouts]
    prompt, completion = max(len(r.prompt_ids) for r in rows), max(len(r.token_ids) for r in rows)
    budget = getattr(stage.learner, "micro_batch_tokens", None)
    limits = {"the model's positions": positions, "learner.micro_batch_tokens": budget}
    for what, limit in limits.items():
        if limit is not None and prompt + completion > limit:
            raise UserError(
                f"stage {stage.name!r}: 'kto' puts other completions behind prompts, and the longest of both, "
                f"{prompt:,} and {completion:,} tokens, exceed {what} ({limit:,}): lower data.max_prompt_tokens or "
                f"data.max_completion_tokens"
            )


def _own_positions(stage: RewardModelStage, beside: Path) -> int | None:
    """The longest sequence of a reward model that has not the policy's body; None where it has, or does not say."""
    if stage.start is not None:
        return positions_of(folder_beside(stage.start, beside))
    if stage.model is None:
        return None
    return max_positions(Origin(stage.model.located(beside), seed=0).make(weights=False).module)


def _refuse_long(stage: Paired, pair: Group, limits: Mapping[str, int | None]) -> None:
    """``limits``: the longest sequence of each model that reads it."""
    longest, sides = max(len(r.prompt_ids) + len(r.token_ids) for r in pair.rollouts), len(pair.rollouts)
    row = pair.prompt.origin or pair.prompt.id
    for reader, positions in limits.items():
        if positions is not None and longest > positions:
            raise UserError(
                f"stage {stage.name!r}: {'the pair ' if sides > 1 else ''}{row} has {longest:,} tokens, prompt "
                f"included, and {reader} has {positions:,} positions: nothing is cut off, so take the row out or lower "
                "data.max_completion_tokens"
            )
    budget = getattr(stage.learner, "micro_batch_tokens", None)
    if budget is not None and sides * longest > budget:
        what = f"both sides of the pair {row}, {longest:,} tokens each at most, have" if sides > 1 else f"{row} has"
        raise UserError(
            f"stage {stage.name!r}: {what} to fit learner.micro_batch_tokens ({budget:,})"
            f"{' together' if sides > 1 else ''}: raise that to {sides * longest:,} or take the row out"
        )


def _refuse_single(stage: Paired, what: str, data: LoadedData) -> None:
    """Completions that were judged by themselves say nothing to who learns from pairs."""
    for pair in data.preferences:
        if len(pair.rollouts) == 1:
            row = pair.prompt.origin or pair.prompt.id
            raise UserError(
                f"stage {stage.name!r}: {what} learns from pairs, and {row} has one completion and a label: give rows "
                f"with 'chosen' and 'rejected', or take losses that judge each completion by itself: kto, bco"
            )


def _refuse_unscored(stage: Paired, loss: str, data: LoadedData) -> None:
    for pair in data.preferences:
        if any(rollout.reward is None for rollout in pair.rollouts):
            row = pair.prompt.origin or pair.prompt.id
            other = ", or sample pairs (pairs: best_worst)" if isinstance(stage, PreferenceStage) else ""
            raise UserError(
                f"stage {stage.name!r}: '{loss}' needs a score of each side, which the pair {row} lacks: give the rows "
                f"'chosen_score' and 'rejected_score'{other}"
            )


def _refuse_unwanted(stage: PreferenceStage, loss: str, data: LoadedData) -> None:
    if not any(len(pair.rollouts) > 1 or pair.prompt.row[LABEL] for pair in data.preferences):
        raise UserError(
            f"stage {stage.name!r}: '{loss}' raises the likelihood of completions that were wanted, and every row of "
            f"data.preferences has {LABEL}: false: give rows with {LABEL}: true, or take '{loss}' out of losses"
        )


def _refuse_unguided(stage: PreferenceStage, data: LoadedData) -> None:
    prompts = data.train if stage.samples else [pair.prompt for pair in data.preferences]
    if not any(prompt.key in data.demonstrations for prompt in prompts):
        raise UserError(
            f"stage {stage.name!r}: 'nll' of ground_truth looks for demonstrations of the prompts it trains on, and "
            f"none of the {len(prompts):,} has one in data.demonstrations: give both sections the same prompts"
        )
