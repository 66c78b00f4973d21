"""Completions that somebody wrote: demonstrations, and the two sides of a preference."""

from collections.abc import Mapping
from dataclasses import replace

from alignment.data.demonstrations import Shown, Tokens
from alignment.types import Group, Prompt, Rollout, SamplingParams

PAIRED = ("chosen", "rejected")
"""Columns of a preference."""


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
    """The two sides of a preference; their rewards are the row's ``chosen_score`` and ``rejected_score``, if given."""
    rollouts = [
        replace(
            demonstration(prompt, prompt_ids, sides[column][prompt.id], column),
            reward=prompt.row.get(f"{column}_score"),
        )
        for column in PAIRED
    ]
    return Group(uid, prompt, tuple(rollouts))


def too_long(prompt: Prompt, sides: Mapping[str, Mapping[str, Shown]], limit: int | None) -> str | None:
    """Which completion of a row is too long, and what to do about it; the end-of-sequence token counts."""
    for column, shown in sides.items():
        length = len(shown[prompt.id].token_ids)
        if limit is not None and length > limit:
            return (
                f"{column!r} has {length:,} tokens, more than data.max_completion_tokens ({limit:,}), and one that is "
                "cut off is not what was judged: raise that number or shorten the row"
            )
    return None


def side_fault(prompt: Prompt, column: str) -> str | None:
    """Why a completion, or the score of one, cannot be used."""
    score = prompt.row.get(f"{column}_score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or score != score):
        return f"'{column}_score' must be a number, not {score!r}"
    if column in PAIRED and not isinstance(prompt.row[column], str):
        return f"{column!r} has several messages; give the answer as text, and the turns before it in 'prompt'"
    return None
