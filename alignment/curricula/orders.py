"""Orders in which prompts are taken, the same in every process: a place in one is an epoch and a cursor."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch

from alignment.errors import UserError
from alignment.types import Prompt, keyed_seed

T = TypeVar("T")
LARGE = 10_000
"""Orders longer than this are kept a few at a time."""


def next_of(name: str, seed: int, epoch: int, cursor: int, count: int, n: int) -> tuple[list[int], int, int]:
    """The next ``n`` of ``count`` indices, and the epoch and cursor behind them.

    Each epoch has an order of its own, by ``(name, seed, epoch)``; ``cursor`` counts what was taken from ``epoch``.
    """
    taken: list[int] = []
    while len(taken) < n:
        part = order(name, seed, epoch, count)[cursor : cursor + n - len(taken)].tolist()
        taken, cursor = taken + part, cursor + len(part)
        if cursor == count:
            epoch, cursor = epoch + 1, 0
    return taken, epoch, cursor


def distinct(prompts: Sequence[Prompt], n: int) -> Sequence[Prompt]:
    """The candidates without repeats: over the end of an epoch a prompt may come twice. As they are where fewer than
    ``n`` would be left."""
    kept = list({prompt.id: prompt for prompt in prompts}.values())
    return kept if n <= len(kept) < len(prompts) else prompts


def order(name: str, seed: int, epoch: int, count: int) -> np.ndarray[Any, Any]:
    """All of ``count`` indices in the order of ``epoch``."""
    return (_few if count > LARGE else _many)(name, seed, epoch, count)


def _permutation(name: str, seed: int, epoch: int, count: int) -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(keyed_seed(name, seed, epoch))
    return torch.randperm(count, generator=generator).numpy().astype(np.int32)


_few = lru_cache(maxsize=16)(_permutation)
_many = lru_cache(maxsize=512)(_permutation)


class OfPrompts:
    """Keeps what ``make(prompts, *key)`` gave for the last few lists of prompts, so that it is made once per data set.

    A list is known by its identity and length: the data set of a run is one list that nobody changes.
    """

    def __init__(self, make: Callable[..., Any], keep: int = 4) -> None:
        self.make, self.keep = make, keep
        self._made: OrderedDict[tuple[Any, ...], tuple[Sequence[Prompt], Any]] = OrderedDict()

    def __call__(self, prompts: Sequence[Prompt], *key: Any) -> Any:
        """``make(prompts, *key)``."""
        at = (id(prompts), len(prompts), *key)
        if at not in self._made:
            self._made[at] = (prompts, self.make(prompts, *key))  # holding the list keeps its identity its own
            while len(self._made) > self.keep:
                self._made.popitem(last=False)
        self._made.move_to_end(at)
        return self._made[at][1]


def arm_of(prompt: Prompt, by: Sequence[str]) -> str:
    """The arm that a prompt belongs to: the values of its columns ``by``, joined by ``+``.

    Raises:
        UserError: It lacks one of them.
    """
    try:
        return "+".join([str(prompt.row[column]) for column in by])
    except KeyError as error:
        where = prompt.origin or prompt.id
        raise UserError(f"{where} has no column {error}; its columns are: {', '.join(prompt.row)}") from None


def _arms(prompts: Sequence[Prompt], by: tuple[str, ...]) -> Mapping[str, np.ndarray[Any, Any]]:
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(arm_of(prompt, by), []).append(i)
    return {arm: np.array(found[arm]) for arm in sorted(found)}


arms_of: Callable[[Sequence[Prompt], tuple[str, ...]], Mapping[str, np.ndarray[Any, Any]]] = OfPrompts(_arms)
"""The indices of the prompts of each arm, by its name, in the order of the names."""


def draw(
    arms: Mapping[str, np.ndarray[Any, Any]],
    weights: Mapping[str, float],
    cursors: Mapping[str, Sequence[int]],
    n: int,
    seed: int,
    key: int,
) -> tuple[list[int], dict[str, list[int]]]:
    """``n`` indices: for each an arm is drawn with replacement, by ``weights``, then the arm's next prompt is taken.

    Args:
        arms: Indices by arm.
        weights: Of the arms that may be drawn; they need not add up to 1.
        cursors: Epoch and cursor of each arm that was ever drawn.
        n: How many.
        seed: Of the run: for the order within an arm.
        key: Of this draw.

    Returns:
        The indices, and the cursors moved on.
    """
    names = list(weights)
    generator = torch.Generator().manual_seed(key)
    weights_A = torch.tensor([weights[name] for name in names], dtype=torch.float64)
    drawn = torch.multinomial(weights_A, n, replacement=True, generator=generator).tolist()
    after, queues = {arm: list(place) for arm, place in cursors.items()}, {}
    for a, times in Counter(drawn).items():
        arm, (epoch, cursor) = names[a], cursors.get(names[a], (0, 0))
        places, *moved = next_of(f"arm {arm}", seed, epoch, cursor, len(arms[arm]), times)
        queues[a], after[arm] = iter(arms[arm][places].tolist()), moved
    return [next(queues[a]) for a in drawn], after
