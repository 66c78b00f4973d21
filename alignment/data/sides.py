"""Completions that somebody wrote: demonstrations, and the two sides of a preference."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alignment.data.demonstrations import Shown, Tokens
from alignment.types import Group, Prompt, Rollout, SamplingParams

PAIRED = ("chosen", "rejected")
"""Columns of a preference."""
LABEL = "label"
"""Of a completion that was judged by itself: whether it was wanted."""


def columns_of(section: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that a row of a section of the data must have beside its prompt, each with what follows that.

    Rows of ``preferences`` have two sides, or, with a ``label``, one completion.
    """
    if section == "preferences" and LABEL in row and not any(column in row for column in PAIRED):
        return ("completion",)
    named = {"demonstrations": ("completion",), "preferences": PAIRED, "eval_preferences": PAIRED}
    return named.get(section, ())


def demonstration(prompt: Prompt, prompt_ids: Tokens, shown: Shown, column: str = "completion") -> Rollout:
    """The rollout that somebody wrote: the row's ``column``, trained on where the assistant speaks."""
    kind, token_ids = "demonstration" if column == "completion" else column, shown.token_ids
    return Rollout(
        id=f"{kind}/{prompt.id}",
        prompt_id=prompt.id,
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        loss_mask=shown.loss_mask,
        behaviour_logp=(0.0,) * len(token_ids),
        text=shown.text,
        finish_reason="stop",
        seed=0,
        sampler="demonstration",
        sampling=SamplingParams(max_tokens=len(token_ids)),
        versions=(),
        source="demonstration",
        ratio_base="self",
        turns=shown.turns,
    )


def pair_of(uid: int, prompt: Prompt, prompt_ids: Tokens, sides: Mapping[str, Mapping[str, Shown]]) -> Group:
    """The two sides of a preference; their rewards are the row's ``chosen_score`` and ``rejected_score``, if given.

    Of a row with a label, its one completion.
    """
    columns = columns_of("preferences", prompt.row)
    rollouts = [
        replace(
            demonstration(prompt, prompt_ids, sides[column][prompt.id], column),
            reward=prompt.row.get(f"{column}_score"),
        )
        for column in columns
    ]
    return Group(uid, prompt, tuple(rollouts))


def too_long(prompt: Prompt, sides: Mapping[str, Mapping[str, Shown]], limit: int | None) -> str | None:
    """Which completion of a row is too long, and what to do about it; the end-of-sequence token counts."""
    for column, shown in sides.items():
        length = len(shown[prompt.id].token_ids) if prompt.id in shown else 0
        if limit is not None and length > limit:
            return (
                f"{column!r} has {length:,} tokens, more than data.max_completion_tokens ({limit:,}), and one that is "
                "cut off is not what was judged: raise that number or shorten the row"
            )
    return None


def side_fault(prompt: Prompt, column: str, judged: bool) -> str | None:
    """Why a completion, or the score or label of one, cannot be used; ``judged``: somebody judged it."""
    score = prompt.row.get(f"{column}_score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or score != score):
        return f"'{column}_score' must be a number, not {score!r}"
    label = prompt.row.get(LABEL)
    if judged and column not in PAIRED and not isinstance(label, bool):
        return f"'{LABEL}' must be true, of a completion that was wanted, or false, not {label!r}"
    if judged and not isinstance(prompt.row[column], str):
        return f"{column!r} has several messages; give the answer as text, and the turns before it in 'prompt'"
    return None
