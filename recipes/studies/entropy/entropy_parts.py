"""What the study of entropy brings: a countdown with two strategies of which few problems say which one they take."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any

from alignment.data.sources import Dataset, sources
from alignment.errors import UserError
from alignment.registry import option
from alignment.reward_registry import reward_functions, texts
from alignment.safe_arithmetic import evaluate
from alignment.score import Score
from alignment.tasks.task import Split, split_name
from alignment.types import Prompt, keyed_seed

TARGETS = range(10, 30)
TAKES = ("b",) * 6 + ("ab",) * 3 + ("a",)
"""Of ten problems six take differences only, three both, one sums only: sums solve 40 %, differences 90 %."""


@sources.register("two_strategies", source="this project")
@dataclass(frozen=True)
class TwoStrategies:
    """``27:358=``: 27 from one of the digits and another number, by a sum ``a3+24`` or a difference ``b-3+30``.

    Six completions reach every target. Which strategies a problem takes is drawn for it and not said in its prompt, as
    hidden tests would not: only trying tells. Problems that take one strategy alone are ``hard``.

    ``completion`` is a demonstration, a sum in ``sums`` of all cases. In ``named`` of the rows the prompt names the
    strategy (``27:358=b``), each as often as the other: so both are learned whichever is shown to be chosen.
    """

    split: Annotated[Split, option("train (60 % of all problems), demonstrations (20 %) or eval (20 %)")]
    size: Annotated[int, option("how many problems", unit="prompts", ge=1)]
    shown: Annotated[int, option("rows of each problem, each with a demonstration drawn for it", ge=1)] = 1
    sums: Annotated[float, option("share of the demonstrations that show a sum", ge=0, le=1)] = 0.95
    named: Annotated[float, option("share of the rows whose prompt names the strategy", ge=0, le=1)] = 0.0

    def load(self, base: Path) -> Dataset:
        """Rows with the columns of :meth:`_row`; ids begin with the kind.

        Raises:
            UserError: There are not so many problems in the split.
        """
        own = [p for p in _problems() if split_name("two_strategies", *p) == self.split]
        if len(own) < self.size:
            raise UserError(f"two_strategies has {len(own)} problems for split {self.split!r}; lower size")
        rows = [self._row(*problem, i) for i in range(self.shown) for problem in own[: self.size]]
        return Dataset(rows, "two_strategies")

    def _row(self, target: int, digits: str, number: int) -> Prompt:
        takes = TAKES[keyed_seed("takes", target, digits) % len(TAKES)]
        digit = int(digits[keyed_seed("digit", target, digits, number) % 3])
        named = keyed_seed("named", target, digits, number) % 10_000 < 10_000 * self.named
        sums = 0.5 if named else self.sums
        mark = "a" if keyed_seed("shown", target, digits, number) % 10_000 < 10_000 * sums else "b"
        shown = f"{digit}+{target - digit}" if mark == "a" else f"-{digit}+{target + digit}"
        prompt, completion = (f"{target}:{digits}={mark}", shown) if named else (f"{target}:{digits}=", mark + shown)
        row = {"prompt": prompt, "completion": completion, "target": target, "digits": digits, "takes": takes}
        kind = "easy" if takes == "ab" else "hard"
        return Prompt(f"{kind}/{takes}/{prompt}" + (f"/{number}" if self.shown > 1 else ""), row)


def _problems() -> list[tuple[int, str]]:
    """Every target with every three different digits, in an order that has nothing to do with either."""
    triples = ["".join(three) for three in combinations("123456789", 3)]
    return sorted(product(TARGETS, triples), key=lambda p: keyed_seed("two_strategies", *p))


@reward_functions.register("reached", source="this project")
@dataclass(frozen=True)
class Reached:
    """1 where the expression reaches the target by a strategy that the problem takes and one of its digits."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The data columns it reads."""
        return ("target", "digits", "takes")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        """One score per completion."""
        rows = zip(texts(completions), columns["target"], columns["digits"], columns["takes"], strict=True)
        return [_score(*row) for row in rows]


def _score(text: str, target: int, digits: str, takes: str) -> Score:
    mark, expression = text[:1], text[1:]
    digit, plus, _ = expression.removeprefix("-").partition("+")
    if mark not in ("a", "b") or (mark == "b") != expression.startswith("-") or not plus:
        return Score(0.0, "unparseable")
    try:
        value = evaluate(expression)
    except ValueError as error:
        return Score(0.0, "unparseable", str(error))
    right_way = len(digit) == 1 and digit in digits and mark in takes
    return Score(1.0, answer=text) if right_way and value == target else Score(0.0, "wrong", answer=text)
