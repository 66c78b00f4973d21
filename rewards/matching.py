"""Right or wrong, by comparison with the data set's answer. Nothing that a model wrote is ever evaluated as code."""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from alignment.registry import option
from alignment.reward_registry import reward_functions, texts
from alignment.score import Score

# A sign right after a letter, digit or bracket is an operator: the last number of "5-3" is 3.
_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
_SIGN = r"(?:(?<![\w)\]}])[-+])?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:\\[dt]?frac\{{(?P<above>-?{_UNSIGNED})\}}\{{(?P<below>-?{_UNSIGNED})\}}"
    rf"|(?P<number>{_UNSIGNED})(?: ?/ ?(?P<over>{_UNSIGNED}))?)"
)
_DIGITS_MAX = 1000
"""Longer numbers are no answers, and arithmetic on them takes time."""


def last_number(text: str) -> Fraction | None:
    r"""The exact value of the last number in ``text``; None where there is none or it cannot be read.

    Reads ``-3``, ``1,234.5``, ``.5``, ``2e-3``, ``3/4`` and ``\frac{3}{4}``, with ASCII or Unicode minus signs.
    """
    last = deque(_NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")), maxlen=1)
    match = last.pop() if last else None
    if match is None or len(match[0]) > _DIGITS_MAX:
        return None
    above, below = match["above"] or match["number"], match["below"] or match["over"] or "1"
    divisor = Fraction(below.replace(",", ""))
    if divisor == 0:
        return None
    value = Fraction(above.replace(",", "")) / divisor
    return -value if match["sign"] == "-" else value


@reward_functions.register("exact_match", source="this project", evidence="end to end")
@dataclass(frozen=True)
class ExactMatch:
    """1 when the completion equals the answer, 0 otherwise; white space around either does not count."""

    column: Annotated[str, option("column of the data set that holds the answer", min_length=1)] = "answer"

    @property
    def columns(self) -> tuple[str, ...]:
        """The data columns it reads."""
        return (self.column,)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        """One score per completion; ``skipped`` where the row's answer is null."""
        return [_same(text, answer) for text, answer in zip(texts(completions), columns[self.column], strict=True)]


def _same(text: str, answer: Any) -> Score:
    if answer is None:
        return Score(None, "skipped", "the row has no answer")
    given = text.strip()
    same = given == str(answer).strip()
    return Score(1.0, answer=given) if same else Score(0.0, "wrong", answer=given)


@reward_functions.register("numeric_match", source="this project")
@dataclass(frozen=True)
class NumericMatch:
    r"""1 when the last number of the completion is the last number of the answer, 0 otherwise.

    Numbers are compared as exact fractions: ``a`` and ``b`` agree when ``|a - b| <= max(abs_tol, rel_tol * |b|)``.
    ``1,234.50``, ``2e-3``, ``3/4`` and ``\frac{3}{4}`` are numbers; an answer such as ``... #### 42`` is read as 42.
    """

    column: Annotated[str, option("column of the data set that holds the answer", min_length=1)] = "answer"
    rel_tol: Annotated[float, option("tolerance relative to the answer", ge=0, allow_inf_nan=False)] = 0.0
    abs_tol: Annotated[float, option("tolerance in the answer's own unit", ge=0, allow_inf_nan=False)] = 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """The data columns it reads."""
        return (self.column,)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        """One score per completion; ``unparseable`` (and 0) without a number, ``skipped`` when the answer has none."""
        return [
            self._score(text, answer) for text, answer in zip(texts(completions), columns[self.column], strict=True)
        ]

    def _score(self, text: str, answer: Any) -> Score:
        expected = None if answer is None else last_number(str(answer))
        if expected is None:
            return Score(None, "skipped", f"there is no number in the answer {str(answer)[:80]!r}")
        given = last_number(text)
        if given is None:
            return Score(0.0, "unparseable", "no number")
        near = abs(given - expected) <= max(Fraction(self.abs_tol), Fraction(self.rel_tol) * abs(expected))
        return Score(1.0, answer=str(given)) if near else Score(0.0, "wrong", answer=str(given))
