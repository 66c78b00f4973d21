"""Whether an arithmetic expression reaches a target with given numbers. It is parsed and evaluated, never executed."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from alignment.registry import option
from alignment.reward_registry import reward_functions, texts
from alignment.safe_arithmetic import evaluate, show
from alignment.score import Score

_SPELLINGS = {"×": "*", "·": "*", "÷": "/", "\N{MINUS SIGN}": "-"}
_SPELLINGS |= {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\(": " ", r"\)": " "}
_RUN = re.compile(r"[0-9+\-*/()= ]+")
_BEFORE, _AFTER = re.compile(r"[\w!^√]$"), re.compile(r"\w|\s*[!^%]")
"""What touches arithmetic and is part of its meaning: a letter, a digit of another script, an unknown operator."""
_LINE_MAX = 2000
"""Characters of the last line; a longer one is no answer."""


@reward_functions.register(
    "countdown",
    source="the task of TinyZero (github.com/Jiayi-Pan/TinyZero); rules: this project",
    evidence="end to end",
)
@dataclass(frozen=True)
class Countdown:
    """1 when the completion's last line gives an expression that reaches the target with the given numbers, else 0.

    The line may have text around the expression, and ``= target`` after it, but no second expression and no other
    number: whoever offers several has not answered. Nor may a letter, ``!`` or ``^`` touch it. Allowed are whole
    numbers, ``+ - * /``, a leading minus and brackets; division is exact. With ``use: all`` each given number is used
    exactly once, with ``any`` at most once.
    """

    use: Annotated[Literal["all", "any"], option("all: each number exactly once; any: at most once")] = "all"
    numbers: Annotated[str, option("column of the data set with the given numbers", min_length=1)] = "numbers"
    target: Annotated[str, option("column of the data set with the target", min_length=1)] = "target"

    @property
    def columns(self) -> tuple[str, ...]:
        """The data columns it reads."""
        return (self.numbers, self.target)

    def check(self, rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """What makes a row useless to it: no list of whole numbers, or no whole number as a target."""
        return [self._fault(row.get(self.numbers), row.get(self.target)) for row in rows]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        """One score per completion.

        ``unparseable`` where the last line has no expression or several, ``wrong`` where it has one that does not do,
        ``skipped`` where the row has no numbers or no target. ``answer`` is the value of an expression that keeps to
        the numbers, such as ``24`` or ``7/2``, so that equal answers are equally right; None for any other.
        """
        given = zip(texts(completions), columns[self.numbers], columns[self.target], strict=True)
        return [self._score(text, numbers, target) for text, numbers, target in given]

    def _fault(self, numbers: Any, target: Any) -> str | None:
        if not isinstance(numbers, (list, tuple)) or not numbers or not all(map(_is_whole, numbers)):
            return f"{self.numbers!r} must be a list of whole numbers from 0, not {str(numbers)[:80]!r}"
        if not _is_whole(target):
            return f"{self.target!r} must be a whole number from 0, not {str(target)[:80]!r}"
        return None

    def _score(self, text: str, numbers: Any, target: Any) -> Score:
        fault = self._fault(numbers, target)
        if fault is not None:
            return Score(None, "skipped", fault)
        line = text.rstrip().rpartition("\n")[2]
        found = list(_expressions(line)) if len(line) <= _LINE_MAX else []
        if len(found) != 1:
            return Score(0.0, "unparseable", f"the last line has {len(found)} expressions, not one")
        if found[0] is None:
            return Score(0.0, "unparseable", "a letter or another sign touches the expression")
        expression, equals, claimed = (part.strip() for part in found[0].partition("="))
        try:
            value = evaluate(expression)
        except ValueError as error:
            return Score(0.0, "unparseable", str(error))
        if "**" in expression or "//" in expression:
            return Score(0.0, "wrong", "only + - * / are allowed")
        used, there = Counter(map(int, re.findall("[0-9]+", expression))), Counter(map(int, numbers))
        if not (used == there if self.use == "all" else used <= there):
            return Score(0.0, "wrong", "the numbers are not the given ones")
        if equals and claimed != str(target):
            return Score(0.0, "wrong", "it claims to be another number")
        if value != target:
            return Score(0.0, "wrong", f"the value is {show(value)}", show(value))
        return Score(1.0, answer=show(value))


def _expressions(line: str) -> Iterator[str | None]:
    """What in the line looks like arithmetic: runs of its characters that hold a digit; None for a touched one."""
    for spelling, plain in _SPELLINGS.items():
        line = line.replace(spelling, plain)
    for found in _RUN.finditer(line):
        if re.search("[0-9]", found[0]):
            start = found.end() - len(found[0].lstrip(" )="))
            end = found.start() + len(found[0].rstrip())
            touched = _BEFORE.search(line[:start]) or _AFTER.match(line, end)
            yield None if touched else line[start:end]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
