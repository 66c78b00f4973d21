"""Where prompts come from. The sources themselves are in ``procedural.py`` and ``dataset_source.py``.

A row's ``prompt`` is text or chat messages; ``answer`` is for rewards, ``completion`` for demonstrations, and any other
column reaches reward functions by its name.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from alignment.registry import Registry
from alignment.types import Prompt


@dataclass(frozen=True)
class Dataset:
    """Prompts, always the same and in the same order, and where they come from."""

    prompts: Sequence[Prompt]
    origin: str
    """A file, a hub id with configuration, split and revision, or the name of a procedural task."""
    bad: tuple[str, ...] = ()
    """Rows that cannot be used and are not among the prompts: each named by file and line, with what is wrong."""


@runtime_checkable
class Source(Protocol):
    """A data set that is read when a run starts."""

    def load(self, base: Path) -> Dataset:
        """Its rows. ``base`` is the recipe's folder.

        Raises:
            UserError: It cannot be read, or holds less than was asked for.
        """
        ...


sources: Registry[Source] = Registry("sources", Source, "Where prompts come from")


def describe(prompts: Sequence[Prompt]) -> dict[str, float]:
    """What to know before reading an accuracy: how much there is, and what answering always the same would score.

    Returns:
        ``prompts`` (rows), ``distinct`` (different prompts) and ``floor``: the share of the most frequent answer, as
        rewards read it (what follows ``####`` in a worked solution), among the rows that have one, 0 where none has.
    """
    answers = Counter(filter(None, (_gold(p.row.get("answer")) for p in prompts)))
    return {
        "prompts": len(prompts),
        "distinct": len({json.dumps(p.row["prompt"], sort_keys=True) for p in prompts}),
        "floor": max(answers.values()) / answers.total() if answers else 0.0,
    }


def _gold(answer: Any) -> tuple[str, ...]:
    from rewards.extraction import gold_texts  # rewards import this package

    other = answer is not None and not isinstance(answer, Sequence)  # a truth value or a mapping stands for itself
    return gold_texts(answer) or ((str(answer),) if other else ())
