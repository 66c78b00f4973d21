"""What a stage of supervised fine-tuning makes of demonstrations: which tokens are learned, and what each counts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from alignment.control import control_ids
from alignment.data.load import LoadedData
from alignment.data.rows import shown
from alignment.errors import UserError
from alignment.models import Model
from alignment.positions import max_positions
from alignment.recipe import Recipe, SftStage
from alignment.recipe_stages import Conditional
from alignment.recipe_tree import Place, dotted
from alignment.types import Batch, Prompt, Rollout, keyed_seed


@dataclass(frozen=True)
class Lesson:
    """All demonstrations of a stage, in the order of the data."""

    rollouts: Sequence[Rollout]
    weights: Sequence[float] | None
    """Of each; None where all count 1."""

    def weighted(self, batch: Batch, index: Sequence[int]) -> Batch:
        """The batch of the demonstrations ``index`` with their weights."""
        if self.weights is None:
            return batch
        weight_B = torch.tensor([self.weights[i] for i in index], dtype=torch.float32, device=batch.ids_BT.device)
        return replace(batch, weight_BT=weight_B[:, None] * batch.loss_mask_BT)


def lesson(stage: SftStage, data: LoadedData, place: str, control: Sequence[int], seed: int) -> Lesson:
    """What ``stage`` learns.

    Args:
        stage: What is learned of each demonstration.
        data: The demonstrations.
        place: Of the stage in the recipe, for errors.
        control: :func:`alignment.control.control_ids` of the model.
        seed: The run's.

    Raises:
        UserError: Rows lack the judgement that the objective or ``conditional`` needs, or it is no number, or makes no
            finite weight.
    """
    rollouts = [rollout for group in data.demonstrations.values() for rollout in group]
    rows = [data.demonstrated[rollout.prompt_id] for rollout in rollouts]
    if (conditional := stage.conditional) is not None:
        scores = numbers(rows, conditional.score, f"{place}.conditional")
        cues = [cue(conditional, control, score, seed, row.id) for row, score in zip(rows, scores, strict=True)]
        rollouts = [replace(r, prompt_ids=r.prompt_ids[:-1] + c) for r, c in zip(rollouts, cues, strict=True)]
    weights = None
    if (column := stage.objective.column) is not None:
        judgements = numbers(rows, column, f"{place}.objective")
        weights = stage.objective.weights(judgements, [row.key for row in rows])
        _refuse_endless(rows, weights, judgements, f"{place}.objective")
    return Lesson([whole(rollout) for rollout in rollouts] if stage.loss_on == "all" else rollouts, weights)


def cue(conditional: Conditional, control: Sequence[int], score: float, seed: int, row: str) -> tuple[int, ...]:
    """The control token that stands between prompt and completion, as "Pretraining Language Models with Human
    Preferences" (arXiv 2302.08582) has it in front of each sentence or document that was scored; or none.

    The aligned one at ``score <= threshold``, the misaligned one above it. It is part of the prompt, behind whatever
    the chat template puts there, so that it is not learned with ``loss_on: completion``. Whether it is left out depends
    on ``(seed, row)`` alone: in every epoch it is the same rows.
    """
    aligned, misaligned = control
    if keyed_seed(seed, "control", row) / 2**63 < conditional.drop:
        return ()
    return (aligned if score <= conditional.threshold else misaligned,)


def check_supervised(recipe: Recipe, data: LoadedData, model: Model) -> None:
    """Whether each stage can learn from the demonstrations; before the first step of any.

    Raises:
        UserError: As :func:`lesson`; or rows are too long for the model, or for a pass of the learner.
    """
    for i, stage in enumerate(recipe.stages):
        if not isinstance(stage, SftStage):
            continue
        place, control = dotted(("stages", i)), control_ids(model.tokenizer, model.module)
        taught = lesson(stage, data, place, control, recipe.run.seed)
        limits = {
            f"{place}.learner.micro_batch_tokens": getattr(stage.learner, "micro_batch_tokens", None),
            "the model's positions": max_positions(model.module),
        }
        for name, limit in limits.items():
            if limit is not None:
                _refuse_long(taught.rollouts, data, name, limit)


def judgements_of(recipe: Recipe) -> Iterator[tuple[Place, str]]:
    """Columns of demonstrations that must be numbers, each behind the place in the recipe that asks for it."""
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, SftStage) and stage.conditional is not None:
            yield ("stages", i, "conditional"), stage.conditional.score
        if isinstance(stage, SftStage) and stage.objective.column is not None:
            yield ("stages", i, "objective"), stage.objective.column


def whole(rollout: Rollout) -> Rollout:
    """The rollout with its prompt made part of what is trained on, and everything else; the first token of a row, which
    nothing precedes, is not."""
    ids = (*rollout.prompt_ids, *rollout.token_ids)
    return replace(
        rollout, prompt_ids=(), token_ids=ids, loss_mask=(True,) * len(ids), behaviour_logp=(0.0,) * len(ids), turns=()
    )


def numbers(rows: Sequence[Prompt], column: str, place: str) -> list[float]:
    """The finite numbers in ``column`` of each row.

    Raises:
        UserError: Some have none there; names them and ``place``, which asks for the column.
    """
    faults = [f"{row.origin or row.id}: {fault}" for row in rows if (fault := _fault(row.row, column)) is not None]
    if faults:
        remedy = "mend these rows, or name the right column (field_map may rename one)"
        raise UserError(
            f"{place} reads the column {column!r} of data.demonstrations, and {len(faults)} of {len(rows)} rows have "
            f"no number there; {remedy}:\n{shown(faults)}"
        )
    return [float(row.row[column]) for row in rows]


def _fault(row: Mapping[str, Any], column: str) -> str | None:
    if column not in row:
        return f"has no {column!r}; its columns are {', '.join(row)}"
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return f"{column!r} is {value!r}, not a finite number"
    return None


def _refuse_long(rollouts: Sequence[Rollout], data: LoadedData, limit_name: str, limit: int) -> None:
    lengths = {r.prompt_id: len(r.prompt_ids) + len(r.token_ids) for r in rollouts}
    long = [
        f"{data.demonstrated[name].origin or name}: {tokens:,} tokens, prompt included"
        for name, tokens in lengths.items()
        if tokens > limit
    ]
    if long:
        raise UserError(
            f"data.demonstrations: {len(long)} of {len(rollouts)} rows are longer than {limit_name} ({limit:,}), and a "
            f"demonstration is never cut; raise that if it can be, shorten these rows or take them out:\n{shown(long)}"
        )


def _refuse_endless(rows: Sequence[Prompt], weights: Sequence[float], judgements: Sequence[float], place: str) -> None:
    most = torch.finfo(torch.float32).max
    for row, weight, judgement in zip(rows, weights, judgements, strict=True):
        if not abs(weight) <= most:
            raise UserError(
                f"{place}: the weight of {row.origin or row.id}, whose judgement is {judgement:g}, is too large for a "
                "number: raise beta, or scale the column down"
            )
