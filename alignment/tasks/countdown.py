"""Reach a number with given numbers, as in the television game Countdown."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from alignment.errors import UserError
from alignment.registry import option
from alignment.tasks.task import Problem, characters, tasks

Operator = Literal["+", "-", "*", "/"]
_BINDS: dict[str, int] = {"+": 1, "-": 1, "*": 2, "/": 2}
_ATOM = 3
_TRIES = 10_000


class _Term(NamedTuple):
    value: int
    text: str
    binds: int
    """How strongly its outermost operator binds."""


@tasks.register("countdown", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Countdown:
    """Reach a target with all of the given numbers: ``29:4 7 9=`` is ``4*9-7``; any right expression counts.

    A problem is made from its solution, so each has one: numbers are drawn and combined at random, two at a time, until
    one value is left, which becomes the target. Every intermediate value is a whole number from 1 to ``limit``, and the
    target is none of the given numbers. The reward ``countdown`` judges; ``answer`` and ``completion`` are the solution
    that the problem was made from.
    """

    sizes: Annotated[
        tuple[Annotated[int, Field(ge=2, le=8)], ...], option("how many numbers, by level", min_length=1)
    ] = (2, 3, 4)
    largest: Annotated[int, option("the largest given number; the smallest is 1", ge=2)] = 9
    limit: Annotated[int, option("the largest target and intermediate value", ge=3)] = 99
    operators: Annotated[tuple[Operator, ...], option("which operations solutions use", min_length=1)] = (
        *("+", "-", "*", "/"),
    )
    reward: ClassVar[str] = "countdown"
    alphabet: ClassVar[str] = characters("0123456789", "+-*/()", ": =")

    def draw(self, size: int, rng: random.Random) -> Problem:
        """Numbers are uniform; each step combines a uniform pair by a uniform operator among those that it admits.

        Raises:
            UserError: The options admit no problem, or hardly any.
        """
        for _ in range(_TRIES):
            numbers = [rng.randint(1, self.largest) for _ in range(size)]
            solution = self._combined(numbers, rng)
            if solution is not None and solution.value not in numbers:
                prompt = f"{solution.value}:{' '.join(map(str, numbers))}="
                key = (solution.value, *sorted(numbers))
                columns = {"target": solution.value, "numbers": numbers}
                return Problem(prompt, solution.text, solution.text, key, columns)
        raise UserError(
            f"countdown: no problem with {size} numbers up to {self.largest}, operators {' '.join(self.operators)} and "
            f"values up to {self.limit} was found in {_TRIES} tries; raise limit or allow more operators"
        )

    def count(self, size: int) -> None:
        """Not known."""
        return None

    def _combined(self, numbers: list[int], rng: random.Random) -> _Term | None:
        """One expression of all numbers, or None where no operator was left to go on with."""
        terms = [_Term(number, str(number), _ATOM) for number in numbers]
        while len(terms) > 1:
            left, right = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
            choices = list(self._admitted(left.value, right.value))
            if not choices:
                return None
            symbol, value = rng.choice(choices)
            terms.append(_written(left, symbol, right, value))
        return terms[0]

    def _admitted(self, left: int, right: int) -> Iterator[tuple[Operator, int]]:
        for symbol in dict.fromkeys(self.operators):
            if symbol == "/":
                value = left // right if left % right == 0 else 0
            else:
                value = left + right if symbol == "+" else left - right if symbol == "-" else left * right
            if 1 <= value <= self.limit:
                yield symbol, value


def _written(left: _Term, symbol: Operator, right: _Term, value: int) -> _Term:
    """With the brackets that are needed and no others."""
    binds = _BINDS[symbol]
    first = f"({left.text})" if left.binds < binds else left.text
    strict = symbol in "-/"  # a-(b-c) is not a-b-c
    second = f"({right.text})" if right.binds < binds or (strict and right.binds == binds) else right.text
    return _Term(value, f"{first}{symbol}{second}", binds)
