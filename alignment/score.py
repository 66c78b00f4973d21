"""The verdict of one reward component, and what verdicts add up to. Apart from the other records, so that scoring
workers start without torch."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Status = Literal["ok", "wrong", "unparseable", "timeout", "error", "skipped"]
FAILED: frozenset[Status] = frozenset({"timeout", "error"})


@dataclass(frozen=True, slots=True)
class Score:
    """One reward component of one rollout. ``value`` is None when it does not apply or could not be computed."""

    value: float | None
    status: Status = "ok"
    detail: str = ""
    answer: str | None = None
    """What was read as the completion's answer, in canonical form: equal answers are equal texts. None: no answer."""


class Tally(NamedTuple):
    """What an evaluation found of a problem, over the samples to which the first reward gave a value."""

    correct: int
    judged: int
    total: float
    """The sum of those values."""
