"""What a procedural task is, and how its problems are divided so that no split ever holds another's.

A task is a component: its options say which problems there are, and its levels, one size each, how hard they are. A
problem belongs to training, demonstrations or evaluation by its content alone (:func:`split_of`), so no choice of
seeds, levels, sizes or other options makes two splits share one.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from pydantic import Field

from alignment.registry import Registry
from alignment.types import keyed_seed

Split = Literal["train", "demonstrations", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)
Size = Annotated[int, Field(ge=1)]
Sizes = tuple[Size, ...]
"""What one level after the other takes as its ``size``, level 1 first."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its answer, all as exact texts."""

    prompt: str
    answer: str
    completion: str
    """What a demonstration writes: the answer, or a way to it that ends with it."""
    key: tuple[object, ...]
    """The content that decides the split; equal for problems that give each other away, such as mirror images."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """More columns of its row: what rewards read, or what is known about it."""


@runtime_checkable
class Task(Protocol):
    """Problems of one kind. Optional: ``space(size)``, an iterator over all problems of a size, each prompt once, for
    sizes that have few; a task whose draws are not uniform over its problems had better not offer it."""

    reward: ClassVar[str]
    """The registered name of the reward that verifies its answers."""

    @property
    def sizes(self) -> Sizes:
        """The size of each level."""
        ...

    @property
    def alphabet(self) -> str:
        """Every character of its prompts and completions, each once, for models that are built from an alphabet."""
        ...

    def draw(self, size: int, rng: random.Random) -> Problem:
        """A random problem; everything random about it comes from ``rng``."""
        ...

    def count(self, size: int) -> int | None:
        """How many different prompts :meth:`draw` can give, exactly; None where that is not known."""
        ...


tasks: Registry[Task] = Registry("tasks", Task, "Problems made by rule, for the source `procedural`")


def split_of(name: str, problem: Problem) -> Split:
    """Of all problems of the task ``name``, 60 % are for training, 20 % for demonstrations and 20 % for evaluation."""
    return split_name(name, *problem.key)


def split_name(*content: object) -> Split:
    """The split that ``content`` belongs to, the same in every process and on every machine."""
    bucket = keyed_seed(*content) % 5
    return "eval" if bucket == 0 else "demonstrations" if bucket == 1 else "train"


def characters(*texts: str) -> str:
    """The characters of ``texts``, each once, in the order of their first use."""
    return "".join(dict.fromkeys("".join(texts)))
