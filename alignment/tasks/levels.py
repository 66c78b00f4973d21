"""The problems of a task's levels, in order, and what there is to know about them before an accuracy is read."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import Any

from alignment.tasks.task import Problem, Split, Task, split_of, tasks
from alignment.types import keyed_seed

ENUMERATED = 100_000
"""A level with at most so many problems is written out in full and shuffled; others are drawn from."""
PATIENCE = 10_000
"""Draws without a new problem after which a level counts as exhausted."""
SAMPLED = 2_000
"""Draws that a floor or a number of problems is measured on."""


def enumerated(task: Task, size: int) -> Iterator[Problem] | None:
    """All problems of a size, where the task can list them and they are few."""
    space, number = getattr(task, "space", None), task.count(size)
    return space(size) if space is not None and number is not None and number <= ENUMERATED else None


def problems(task: Task, level: int, split: Split, seed: int) -> Iterator[Problem]:
    """Different problems of one level and split, each once, in an order that ``seed`` determines.

    They end when there are no more, or when :data:`PATIENCE` draws in a row gave none that is new.
    """
    name, size = tasks.name_of(task), task.sizes[level - 1]
    space = enumerated(task, size)
    if space is not None:
        found = [problem for problem in space if split_of(name, problem) == split]
        random.Random(keyed_seed(name, seed)).shuffle(found)
        yield from found
        return
    seen: set[str] = set()
    last = 0
    for i in count():
        if i - last > PATIENCE:
            return
        problem = task.draw(size, random.Random(keyed_seed(name, level, split, seed, i)))
        if problem.prompt not in seen and split_of(name, problem) == split:
            seen.add(problem.prompt)
            last = i
            yield problem


def level_table(task: Task) -> list[dict[str, Any]]:
    """What each level holds.

    Returns:
        For each level ``level``, ``size``; ``problems``, how many different prompts there are, and ``problems_exact``,
        False where this is only how many there were among :data:`SAMPLED` draws, a lower bound; ``floor``, the share
        of the most frequent answer, which answering always the same would score, and ``floor_exact``, False where it
        was measured on as many draws; ``example``, a problem's prompt, answer and completion.
    """
    return [_row(task, level, size) for level, size in enumerate(task.sizes, start=1)]


def _row(task: Task, level: int, size: int) -> dict[str, Any]:
    name = tasks.name_of(task)
    drawn = [task.draw(size, random.Random(keyed_seed(name, level, "table", i))) for i in range(SAMPLED)]
    space, number = enumerated(task, size), task.count(size)
    answers = Counter(problem.answer for problem in (drawn if space is None else space))
    first = drawn[0]
    return {
        "level": level,
        "size": size,
        "problems": len({problem.prompt for problem in drawn}) if number is None else number,
        "problems_exact": number is not None,
        "floor": max(answers.values()) / answers.total(),
        "floor_exact": space is not None,
        "example": {"prompt": first.prompt, "answer": first.answer, "completion": first.completion},
    }
