"""Sums, differences and products of two whole numbers, and long multiplication."""

import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from alignment.registry import option
from alignment.tasks.task import Problem, characters, tasks

Operator = Literal["+", "-", "*"]
_APPLY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@tasks.register("arithmetic", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Arithmetic:
    """Sums, differences and products of two whole numbers: ``12+3=`` is 15.

    ``a+b`` and ``b+a`` have the same key: otherwise half of the held-out sums could be recalled from their mirror
    image, and accuracy on them would not measure arithmetic. Levels nest: the problems of a smaller size are among
    those of a larger one.
    """

    sizes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=999)], ...],
        option("the largest operand of each level", min_length=1),
    ] = (9, 49, 99)
    operators: Annotated[tuple[Operator, ...], option("which operations occur", min_length=1)] = ("+",)
    reward: ClassVar[str] = "exact_match"

    @property
    def alphabet(self) -> str:
        """Digits, the operators and ``=``."""
        return characters("0123456789", *self.operators, "=")

    def draw(self, size: int, rng: random.Random) -> Problem:
        """Operator and operands are uniform."""
        symbol = rng.choice(self._symbols())
        return _problem(rng.randint(0, size), symbol, rng.randint(0, size))

    def count(self, size: int) -> int:
        """Each operator with each ordered pair of operands."""
        return len(self._symbols()) * (size + 1) ** 2

    def space(self, size: int) -> Iterator[Problem]:
        """By operator, then by the left operand, then by the right one."""
        for symbol in self._symbols():
            for left in range(size + 1):
                for right in range(size + 1):
                    yield _problem(left, symbol, right)

    def _symbols(self) -> tuple[Operator, ...]:
        return tuple(dict.fromkeys(self.operators))


def _problem(left: int, symbol: Operator, right: int) -> Problem:
    answer = str(_APPLY[symbol](left, right))
    a, b = (left, right) if symbol == "-" else sorted((left, right))
    columns = {"operator": symbol, "operands": [left, right]}
    return Problem(f"{left}{symbol}{right}=", answer, answer, (symbol, a, b), columns)


@tasks.register("multiplication", source="this project")
@dataclass(frozen=True)
class Multiplication:
    """Long multiplication with a scratchpad: ``47x36=`` is ``282+1410=1692``, and its last number is judged.

    The scratchpad has the left number times each digit of the right one, units first, and their running sum:
    ``123x456=`` is ``738+6150=6888+49200=56088``. A one-digit factor on the right needs none. No factor is 1: the
    question copied would end with the answer.
    """

    sizes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=9)], ...], option("digits of both factors, by level", min_length=1)
    ] = (1, 2, 3)
    reward: ClassVar[str] = "numeric_match"
    alphabet: ClassVar[str] = "0123456789x+="

    def draw(self, size: int, rng: random.Random) -> Problem:
        """Both factors are uniform."""
        return _long_product(rng.choice(_factors(size)), rng.choice(_factors(size)))

    def count(self, size: int) -> int:
        """Ordered pairs of factors."""
        return len(_factors(size)) ** 2

    def space(self, size: int) -> Iterator[Problem]:
        """By the left factor, then by the right one."""
        return (_long_product(left, right) for left in _factors(size) for right in _factors(size))


def _factors(size: int) -> range:
    """The numbers of so many digits, from 2."""
    return range(max(2, 10 ** (size - 1)), 10**size)


def _long_product(left: int, right: int) -> Problem:
    digits = str(right)[::-1]
    partial = [left * int(digit) * 10**place for place, digit in enumerate(digits)]
    steps = [str(partial[0])]
    steps += [f"+{term}={total}" for term, total in zip(partial[1:], list(accumulate(partial))[1:], strict=True)]
    key = tuple(sorted((left, right)))
    return Problem(f"{left}x{right}=", str(left * right), "".join(steps), key, {"operands": [left, right]})
