"""Which curricula go together. ``docs/curricula.md`` shows this as a table, and loading a recipe asks it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Literal

from alignment.curricula.contract import Curriculum, curricula
from alignment.curricula.shuffled import Shuffled

Verdict = Literal["works", "warns", "refused"]
DRAWERS = ("level_schedule", "self_evolving", "uniform")
"""They draw from the whole data set and keep count of it, so a list has one of them, first."""
REFINERS = ("prompt_curriculum", "thompson")
"""They choose among the candidates that another one drew."""


@dataclass(frozen=True)
class Pair:
    """What becomes of two curricula in one list, in either order."""

    verdict: Verdict
    why: str = ""


_WASTED = Pair(
    "warns",
    "both look for prompts of middling difficulty, and what the one chose the other throws away after it was sampled: "
    "leave one of them out",
)
_SHARES = Pair(
    "warns",
    "the filter drops more of some arms than of others, so a batch has other shares of arms than were drawn (the "
    "bandit itself learns from all groups)",
)
_LEANS = Pair("warns", "the arms learn from prompts that were chosen near a target, so they come to look alike")
_NEVER = Pair("warns", "the level is judged by prompts chosen near a target, and may never reach its threshold")
_TWO_DRAWERS = Pair("refused", "both draw from the whole data set, which only the first in a list can")

PAIRS: dict[tuple[str, str], Pair] = {
    ("difficulty_filter", "difficulty_filter"): Pair("works", "a group must lie inside both bands"),
    ("difficulty_filter", "instance_filter"): Pair("works", "prompts are judged by all groups, kept or not"),
    ("difficulty_filter", "level_schedule"): Pair("works", "levels are judged by all groups, kept or not"),
    ("difficulty_filter", "prompt_curriculum"): _WASTED,
    ("difficulty_filter", "sample_buffer"): Pair("works", "the buffer fills what the filter leaves open"),
    ("difficulty_filter", "self_evolving"): _SHARES,
    ("difficulty_filter", "thompson"): _WASTED,
    ("difficulty_filter", "uniform"): Pair("works", "with the band 0 to 1 it is dynamic sampling"),
    ("instance_filter", "instance_filter"): Pair("works", "a prompt must be let in by both"),
    ("instance_filter", "level_schedule"): Pair(
        "warns",
        "the level is judged by the prompts that are let in, so the next one opens sooner than by the whole level; and "
        "where a level is hopeless throughout, nothing is left of it to open the next",
    ),
    ("instance_filter", "prompt_curriculum"): Pair("works", "candidates without the hopeless ones"),
    ("instance_filter", "self_evolving"): Pair("works", "arms are drawn again for prompts that are left out"),
    ("instance_filter", "thompson"): Pair("works", "candidates without the hopeless ones"),
    ("instance_filter", "uniform"): Pair("works", "epochs without the hopeless ones"),
    ("level_schedule", "prompt_curriculum"): _NEVER,
    ("level_schedule", "thompson"): _NEVER,
    ("prompt_curriculum", "prompt_curriculum"): Pair("refused", "one model would be fitted twice in a step"),
    ("prompt_curriculum", "self_evolving"): _LEANS,
    ("prompt_curriculum", "thompson"): Pair("warns", "the second chooses among what the first chose by the same aim"),
    ("prompt_curriculum", "uniform"): Pair("works", "as the paper has it"),
    ("sample_buffer", "sample_buffer"): Pair("refused", "a group could be in a batch twice"),
    ("self_evolving", "thompson"): _LEANS,
    ("thompson", "thompson"): Pair("refused", "the same rollouts would be counted twice"),
    ("thompson", "uniform"): Pair("works", "candidates in epochs"),
    **dict.fromkeys(combinations_with_replacement(DRAWERS, 2), _TWO_DRAWERS),
    **{
        (min(name, "sample_buffer"), max(name, "sample_buffer")): Pair("works", "with a filter beside them")
        for name in (*DRAWERS, *REFINERS, "instance_filter")
    },
}
"""By the names of both, sorted. Every pair of this project's is here."""


def pair(a: str, b: str) -> Pair:
    """What becomes of two curricula by name; a component that the table does not know works with all others."""
    return PAIRS.get((min(a, b), max(a, b)), Pair("works"))


def remarks(chosen: Sequence[Curriculum]) -> Iterator[tuple[Verdict, str]]:
    """What is to be said of a list: of each pair that does not just work, of a buffer with nothing to fill, and of
    an ``on_exhausted`` that another one overrules."""
    names = [curricula.name_of(c.of if isinstance(c, Shuffled) else c) for c in chosen]
    for a, b in dict.fromkeys(combinations(names, 2)):
        found = pair(a, b)
        if found.verdict != "works":
            yield found.verdict, f"'{a}' with '{b}': {found.why}"
    if "sample_buffer" in names and not any(hasattr(c, "keep") for c in chosen):
        yield "warns", "'sample_buffer' does nothing where no filter leaves a batch short: add difficulty_filter"
    short = [curricula.name_of(c) for c in chosen if getattr(c, "on_exhausted", None) == "short"]
    stops = [curricula.name_of(c) for c in chosen if getattr(c, "on_exhausted", None) == "error"]
    if short and stops:
        yield (
            "warns",
            f"'{stops[0]}' has on_exhausted 'error', which has no effect beside '{short[0]}': that one lets short "
            "batches be trained on; set on_exhausted: short here too",
        )
