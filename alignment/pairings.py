"""Where a preference stage's pairs come from: ``data.preferences``, or completions that it samples and scores.

A pair is a :class:`~alignment.types.Group` of two rollouts, the preferred one first. A group of one is a completion
that was judged by itself: its row's ``label`` says whether it was wanted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Annotated, ClassVar, Protocol, runtime_checkable

from alignment.algorithms.preference_objective import CHOSEN, GROUND_TRUTH, MISMATCHED, REJECTED
from alignment.registry import Registry, option
from alignment.types import Group, Rollout


@runtime_checkable
class Pairing(Protocol):
    """How pairs are come by."""

    sampled: ClassVar[bool]
    """Whether the stage samples ``prompts_per_step`` prompts, ``group_size`` completions each, for them."""

    def pairs(self, group: Group) -> list[Group]:
        """Pairs of a sampled and scored group; none where nothing is better than anything else."""
        ...


pairings: Registry[Pairing] = Registry("pairings", Pairing, "Where a preference stage's pairs come from")
Every = Annotated[
    int, option("steps that one round of samples serves: 1 is online, more is iterative", unit="steps", ge=1)
]


@pairings.register("given", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Given:
    """The pairs of ``data.preferences``, in an order that is drawn for each epoch."""

    batch_size: Annotated[int, option("pairs of a step, or completions with a label", unit="pairs", ge=1)] = 32
    sampled: ClassVar[bool] = False

    def pairs(self, group: Group) -> list[Group]:
        """It is a pair already."""
        return [group]


@pairings.register("best_worst", source="Online AI Feedback (arXiv 2402.04792), with any reward", evidence="end to end")
@dataclass(frozen=True)
class BestWorst:
    """The completion of each prompt that has the highest reward, and the one that has the lowest."""

    every: Every = 1
    min_gap: Annotated[float, option("least difference of rewards that makes a pair", ge=0)] = 0.0
    sampled: ClassVar[bool] = True

    def pairs(self, group: Group) -> list[Group]:
        """One pair; of equal rewards the completion sampled first counts."""
        rollouts = _scored(group)
        if not rollouts:
            return []
        best = max(rollouts, key=lambda r: r.reward or 0.0)
        worst = min(rollouts, key=lambda r: r.reward or 0.0)
        gap = (best.reward or 0.0) - (worst.reward or 0.0)
        return [replace(group, rollouts=(best, worst))] if gap > 0 and gap >= self.min_gap else []


@pairings.register("all", source="MM-RLHF (arXiv 2502.10391): all pairs of different ranks", evidence="end to end")
@dataclass(frozen=True)
class AllPairs:
    """Every two completions of a prompt whose rewards differ."""

    every: Every = 1
    min_gap: Annotated[float, option("least difference of rewards that makes a pair", ge=0)] = 0.0
    sampled: ClassVar[bool] = True

    def pairs(self, group: Group) -> list[Group]:
        """In the order of sampling."""
        found: list[Group] = []
        for one, other in combinations(_scored(group), 2):
            better, worse = (one, other) if (one.reward or 0.0) >= (other.reward or 0.0) else (other, one)
            gap = (better.reward or 0.0) - (worse.reward or 0.0)
            if gap > 0 and gap >= self.min_gap:
                found.append(replace(group, rollouts=(better, worse)))
        return found


def compared(
    pairs: Sequence[Group], mismatched: bool, ground_truth: Mapping[str, Sequence[Rollout]] | None
) -> tuple[list[Group], list[int]]:
    """The groups of a batch, and which side each of their rows is on.

    Args:
        pairs: Two rollouts each, the preferred first; or one, with a label.
        mismatched: Add, for each row, its prompt with the same side's completion of the nearest pair before it that
            has another prompt, the last pair being before the first; none where all have one prompt. Of one completion
            beside a pair, that one.
        ground_truth: Demonstrations by the key of their prompt: the first of each pair's prompt is added; None: no.

    Returns:
        Groups of pairs first, then those of one row; and a side for every row, in their order.
    """
    groups, sides = list(pairs), [side for pair in pairs for side in _sides(pair)]
    if mismatched:
        odd = [group for pair, other in _with_another(pairs) for group in _swapped(pair, other)]
        groups, sides = groups + odd, sides + [MISMATCHED] * len(odd)
    for pair in pairs if ground_truth is not None else ():
        shown = ground_truth.get(pair.prompt.key, ()) if ground_truth is not None else ()
        groups += [replace(pair, rollouts=(rollout,)) for rollout in shown[:1]]
        sides += [GROUND_TRUTH] * len(shown[:1])
    return groups, sides


def _sides(pair: Group) -> tuple[int, ...]:
    """Which side each completion of a group is on."""
    if len(pair.rollouts) == 1:
        return (CHOSEN if pair.prompt.row["label"] else REJECTED,)
    return CHOSEN, REJECTED


def _with_another(pairs: Sequence[Group]) -> Iterator[tuple[Group, Group]]:
    """Each pair with the nearest one before it that has another prompt, if any has; the last precedes the first."""
    keys = [pair.prompt.key for pair in pairs]
    for i, pair in enumerate(pairs):
        other = next((pairs[i - back] for back in range(1, len(pairs)) if keys[i - back] != keys[i]), None)
        if other is not None:
            yield pair, other


def _swapped(pair: Group, other: Group) -> list[Group]:
    """The prompt of one pair with both completions of the other, in their order."""
    others = [other.rollouts[min(i, len(other.rollouts) - 1)] for i in range(len(pair.rollouts))]
    rows = zip(pair.rollouts, others, strict=True)
    return [
        replace(
            pair,
            rollouts=(
                replace(
                    rollout,
                    id=f"{rollout.id}/mismatched",
                    token_ids=taken.token_ids,
                    loss_mask=taken.loss_mask,
                    behaviour_logp=taken.behaviour_logp,
                ),
            ),
        )
        for rollout, taken in rows
    ]


def _scored(group: Group) -> list[Rollout]:
    return [r for r in group.rollouts if r.scored and r.reward is not None]
