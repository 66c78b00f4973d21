"""The verdict of one reward component. Apart from the other records, so that scoring workers start without torch."""

from dataclasses import dataclass
from typing import Literal

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
