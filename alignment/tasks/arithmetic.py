"""Sums, differences and products of two whole numbers, as text: ``12+3=``."""

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from alignment.types import keyed_seed

Split = Literal["train", "demonstrations", "eval"]
Operator = Literal["+", "-", "*"]
_APPLY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True, slots=True)
class Problem:
    """``left symbol right =``."""

    left: int
    symbol: Operator
    right: int

    @property
    def text(self) -> str:
        """What the model reads."""
        return f"{self.left}{self.symbol}{self.right}="

    @property
    def answer(self) -> str:
        """What it should write."""
        return str(_APPLY[self.symbol](self.left, self.right))

    @property
    def split(self) -> Split:
        """Of all problems 60 % are for training, 20 % for demonstrations and 20 % for evaluation.

        The split hangs on the problem's content alone, so no choice of sizes, seeds or ranges makes two splits share
        one. ``a+b`` and ``b+a`` go together: otherwise half of the held-out sums could be recalled from their mirror
        image, and accuracy on them would not measure arithmetic.
        """
        a, b = (self.left, self.right) if self.symbol == "-" else sorted((self.left, self.right))
        bucket = keyed_seed("arithmetic", self.symbol, a, b) % 5
        return "eval" if bucket == 0 else "demonstrations" if bucket == 1 else "train"


def problems(operators: Sequence[Operator], max_operand: int, split: Split, seed: int) -> list[Problem]:
    """Every problem of ``split`` with operands ``0..max_operand``, each once, in an order that ``seed`` determines."""
    found = [p for p in _all(operators, max_operand) if p.split == split]
    random.Random(keyed_seed("arithmetic", seed)).shuffle(found)
    return found


def _all(operators: Sequence[Operator], max_operand: int) -> Iterator[Problem]:
    for symbol in dict.fromkeys(operators):
        for left in range(max_operand + 1):
            for right in range(max_operand + 1):
                yield Problem(left, symbol, right)
