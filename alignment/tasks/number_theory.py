"""Greatest common divisors, and modular sums whose difficulty does not show."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd, isqrt
from types import MappingProxyType
from typing import Annotated, ClassVar

from pydantic import Field

from alignment.registry import option
from alignment.tasks.task import Problem, characters, tasks

MODULI: Mapping[int, tuple[int, ...]] = MappingProxyType({1: (10,), 2: (11, 20, 50, 99), 3: (13, 17, 19)})
"""Moduli by what finding a remainder takes: 1 the last digit, 2 the last two digits or a sum over pairs of digits,
3 long division."""


@tasks.register("gcd", source="this project")
@dataclass(frozen=True)
class Gcd:
    """The greatest common divisor of two whole numbers: ``gcd 12 18=`` is 6.

    The divisor is drawn first, uniformly from 1 to the root of the size, and coprime cofactors after it. Of two uniform
    numbers, 61 % are coprime, and always answering 1 would score as much. Levels nest.
    """

    sizes: Annotated[
        tuple[Annotated[int, Field(ge=2, le=99_999)], ...], option("the largest number of each level", min_length=1)
    ] = (30, 99, 999)
    reward: ClassVar[str] = "exact_match"
    alphabet: ClassVar[str] = characters("0123456789", "gcd =")

    def draw(self, size: int, rng: random.Random) -> Problem:
        """The divisor is uniform, the pair of cofactors is uniform among the coprime ones."""
        divisor = rng.randint(1, isqrt(size))
        while True:
            a, b = rng.randint(1, size // divisor), rng.randint(1, size // divisor)
            if gcd(a, b) == 1:
                left, right = divisor * a, divisor * b
                key = tuple(sorted((left, right)))
                return Problem(f"gcd {left} {right}=", str(divisor), str(divisor), key, {"operands": [left, right]})

    def count(self, size: int) -> int:
        """For each divisor, the ordered pairs of coprime cofactors: ``2 (phi(1) + ... + phi(n)) - 1`` of them."""
        return sum(_coprime_pairs(size)[size // divisor] for divisor in range(1, isqrt(size) + 1))


@cache
def _coprime_pairs(largest: int) -> tuple[int, ...]:
    """Entry ``n``: how many ordered pairs of numbers from 1 to ``n`` are coprime, for ``n`` up to ``largest``."""
    phi = list(range(largest + 1))
    for prime in range(2, largest + 1):
        if phi[prime] == prime:
            for multiple in range(prime, largest + 1, prime):
                phi[multiple] -= phi[multiple] // prime
    pairs, total = [0], 0
    for value in phi[1:]:
        total += value
        pairs.append(2 * total - 1)
    return tuple(pairs)


def _terms(size: int) -> range:
    """The numbers from 1 of so many digits."""
    return range(10 ** (size - 1), 10**size)


@tasks.register("modular", source="this project")
@dataclass(frozen=True)
class Modular:
    """The remainder of a sum: ``(38+27)%13=`` is 0. How hard a problem is does not show in its form or length.

    All prompts of a level are equally long. What differs is the modulus (:data:`MODULI`): by 10 the last digit is the
    remainder, by 13 there is no short cut. The column ``hidden_difficulty``, 1 to 3, says which; it is for looking back
    at what a curriculum found out by itself, and no reward and no curriculum reads it. A model of 0.6 M parameters
    that was shown 9,000 problems of level 1 in 1,800 steps then solved 100 %, 67 % and 17 % of others, by difficulty.
    """

    sizes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=9)], ...], option("digits of both terms, by level", min_length=1)
    ] = (2, 3, 4)
    reward: ClassVar[str] = "exact_match"
    alphabet: ClassVar[str] = "0123456789(+)%="

    def draw(self, size: int, rng: random.Random) -> Problem:
        """The difficulty is uniform, then the modulus within it, then the terms."""
        difficulty = rng.choice(list(MODULI))
        modulus = rng.choice(MODULI[difficulty])
        left, right = rng.choice(_terms(size)), rng.choice(_terms(size))
        answer = str((left + right) % modulus)
        key = (*sorted((left, right)), modulus)
        columns = {"hidden_difficulty": difficulty, "operands": [left, right, modulus]}
        return Problem(f"({left}+{right})%{modulus}=", answer, answer, key, columns)

    def count(self, size: int) -> int:
        """Each modulus with each ordered pair of terms."""
        return len(_terms(size)) ** 2 * sum(map(len, MODULI.values()))
