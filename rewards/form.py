"""Whether a completion has the form that was asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from alignment.errors import UserError
from alignment.registry import option
from alignment.reward_registry import reward_functions, texts
from alignment.score import Score


@reward_functions.register(
    "format", source="DeepSeek-R1, section 2.2 (arXiv 2501.12948): the tags; patterns: this project"
)
@dataclass(frozen=True)
class Format:
    """1 when the completion consists of the tagged parts in order, or matches ``pattern`` if that is given; else 0.

    With ``tags: [think, answer]`` the form is ``<think>...</think> <answer>...</answer>``: each tag opens and closes
    exactly once, and only white space stands between the parts and around them. ``.`` in a pattern matches line ends
    too. A pattern that takes for ever on some text costs that text its score (``timeout``), not the run.
    """

    tags: Annotated[tuple[str, ...], option("parts of the completion, in order", min_length=1)] = ("think", "answer")
    pattern: Annotated[str | None, option("regular expression that takes the place of the tags")] = None
    match: Annotated[Literal["full", "contains"], option("how much of the completion the pattern must match")] = "full"

    def __post_init__(self) -> None:
        bad = [tag for tag in self.tags if not re.fullmatch(r"[\w-]+", tag)]
        if bad or len(set(self.tags)) < len(self.tags):
            raise UserError(f"tags {list(self.tags)} must be different names of letters, digits, '-' and '_'")
        if self.pattern is None:
            return
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"pattern {self.pattern!r} is not a regular expression: {error}") from error

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        """One score per completion, ``wrong`` where the form is not met."""
        return [Score(1.0) if self._fits(text) else Score(0.0, "wrong") for text in texts(completions)]

    def _fits(self, text: str) -> bool:
        if self.pattern is not None:
            find = re.fullmatch if self.match == "full" else re.search
            return find(self.pattern, text, re.DOTALL) is not None
        # Counted first: with each tag there once, the expression has one way to match and cannot backtrack.
        once = all(text.count(mark) == 1 for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>"))
        parts = r"\s*".join(f"<{t}>(.*?)</{t}>" for t in self.tags)
        return once and re.fullmatch(rf"\s*{parts}\s*", text, re.DOTALL) is not None
