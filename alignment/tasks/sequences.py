"""Sorting numbers, counting a symbol, reversing a text."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from math import perm
from typing import Annotated, ClassVar

from alignment.errors import UserError
from alignment.registry import option
from alignment.tasks.task import Problem, Sizes, characters, tasks


@tasks.register("sorting", source="this project")
@dataclass(frozen=True)
class Sorting:
    """Different whole numbers in ascending order: ``sort 31 5 7=`` is ``5 7 31``.

    All orders of the same numbers have the same key, so no held-out answer was a training answer.
    """

    sizes: Annotated[Sizes, option("how many numbers, by level", min_length=1)] = (3, 5, 8)
    largest: Annotated[int, option("the largest number; the smallest is 0", ge=1)] = 99
    reward: ClassVar[str] = "exact_match"
    alphabet: ClassVar[str] = characters("0123456789", "sort =")

    def __post_init__(self) -> None:
        if max(self.sizes) > self.largest + 1:
            raise UserError(
                f"sizes {list(self.sizes)}: there are only {self.largest + 1} different numbers from 0 to "
                f"{self.largest}; raise largest"
            )

    def draw(self, size: int, rng: random.Random) -> Problem:
        """Numbers and their order are uniform."""
        return _sorted(rng.sample(range(self.largest + 1), size))

    def count(self, size: int) -> int:
        """Ordered choices of ``size`` of the numbers."""
        return perm(self.largest + 1, size)

    def space(self, size: int) -> Iterator[Problem]:
        """In the order of :func:`itertools.permutations`."""
        return map(_sorted, permutations(range(self.largest + 1), size))


def _sorted(numbers: Sequence[int]) -> Problem:
    ordered = sorted(numbers)
    answer = " ".join(map(str, ordered))
    return Problem(f"sort {' '.join(map(str, numbers))}=", answer, answer, tuple(ordered))


@tasks.register("counting", source="this project")
@dataclass(frozen=True)
class Counting:
    """How often a symbol occurs in a text: ``a in bacab=`` is 2.

    The number is drawn first, uniformly from 0 to the length: in uniform texts one number would be right too often.
    """

    sizes: Annotated[Sizes, option("length of the text, by level", min_length=1)] = (6, 12, 24)
    symbols: Annotated[str, option("what the text is made of", min_length=2)] = "abc"
    reward: ClassVar[str] = "exact_match"

    def __post_init__(self) -> None:
        _check_symbols("symbols", self.symbols)

    @property
    def alphabet(self) -> str:
        """The symbols, digits and ``in =``."""
        return characters("0123456789", self.symbols, "in =")

    def draw(self, size: int, rng: random.Random) -> Problem:
        """The number is uniform, then where the symbol stands, then what stands elsewhere."""
        symbol, times = rng.choice(self.symbols), rng.randint(0, size)
        others = self.symbols.replace(symbol, "")
        text = [symbol] * times + [rng.choice(others) for _ in range(size - times)]
        rng.shuffle(text)
        key = (symbol, "".join(text))
        return Problem(f"{symbol} in {''.join(text)}=", str(times), str(times), key)

    def count(self, size: int) -> int:
        """Each symbol with each text."""
        return len(self.symbols) ** (size + 1)


@tasks.register("reversal", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Reversal:
    """A text from its end to its beginning: ``rev abcd=`` is ``dcba``.

    A text and its reverse have the same key: what was trained on would otherwise hold the answer.
    """

    sizes: Annotated[Sizes, option("length of the text, by level", min_length=1)] = (3, 5, 8)
    letters: Annotated[str, option("what the text is made of", min_length=2)] = "abcdefghij"
    reward: ClassVar[str] = "exact_match"

    def __post_init__(self) -> None:
        _check_symbols("letters", self.letters)

    @property
    def alphabet(self) -> str:
        """The letters and ``rev =``."""
        return characters(self.letters, "rev =")

    def draw(self, size: int, rng: random.Random) -> Problem:
        """Texts are uniform."""
        return _reversed("".join(rng.choice(self.letters) for _ in range(size)))

    def count(self, size: int) -> int:
        """All texts."""
        return len(self.letters) ** size

    def space(self, size: int) -> Iterator[Problem]:
        """In the order of :func:`itertools.product`."""
        return (_reversed("".join(letters)) for letters in product(self.letters, repeat=size))


def _reversed(text: str) -> Problem:
    answer = text[::-1]
    return Problem(f"rev {text}=", answer, answer, (min(text, answer),))


def _check_symbols(name: str, symbols: str) -> None:
    if len(set(symbols)) < len(symbols) or set(symbols) & set(" =") or not symbols.isprintable():
        raise UserError(f"{name} {symbols!r} must be different visible characters, none of them '='")
