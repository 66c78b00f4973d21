"""Prompts made by rule: the source of procedural tasks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from alignment.data.sources import Dataset, sources
from alignment.errors import UserError
from alignment.registry import component, option
from alignment.tasks.levels import PATIENCE, enumerated, problems
from alignment.tasks.task import Problem, Split, Task, tasks
from alignment.types import Prompt


@sources.register("procedural", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Procedural:
    """Problems of a task, as many from each of its levels; the three splits never share a problem.

    With the same seed, fewer problems are the first of more.
    """

    task: Annotated[Task, component(tasks), option("which problems: a name, or a mapping with 'name' and options")]
    split: Annotated[Split, option("train (60 % of all problems), demonstrations (20 %) or eval (20 %)")]
    levels: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], option("which of the task's levels, in turn", min_length=1)
    ] = (1,)
    size: Annotated[int | None, option("how many problems; all of the split when null", unit="prompts", ge=1)] = None
    seed: Annotated[int, option("which problems are taken, and their order")] = 0
    pairs: Annotated[
        bool, option("preferences: also 'chosen', the right completion, and 'rejected', that of another problem")
    ] = False

    def __post_init__(self) -> None:
        there = len(self.task.sizes)
        if max(self.levels) > there:
            name = tasks.name_of(self.task)
            raise UserError(
                f"levels {list(self.levels)}: {name} has level{'s 1 to' if there > 1 else ''} {there}, one for each of "
                f"its sizes {list(self.task.sizes)}"
            )
        if len(set(self.levels)) < len(self.levels):
            raise UserError(f"levels {list(self.levels)}: name each level once")

    def load(self, base: Path) -> Dataset:
        """Rows with ``prompt``, ``answer``, ``completion``, ``task``, ``level`` and the columns of the task.

        Raises:
            UserError: A level has fewer problems in this split than its share of ``size``, or no ``size`` is given and
                a level has too many to list.
        """
        name = tasks.name_of(self.task)
        taken = list(self._taken(name))
        rows = [Prompt(f"{name}/{p.prompt}", _row(name, level, p)) for level, p in taken]
        return Dataset(_with_sides(rows, name) if self.pairs else rows, name)

    def _taken(self, name: str) -> Iterator[tuple[int, Problem]]:
        """Problems from each level in turn, each prompt once, together with the level."""
        if self.size is None:
            self._check_listed(name)
        streams = {level: problems(self.task, level, self.split, self.seed) for level in self.levels}
        given = dict.fromkeys(self.levels, 0)
        seen: set[str] = set()
        while streams and (self.size is None or len(seen) < self.size):
            for level in list(streams)[: None if self.size is None else self.size - len(seen)]:
                problem = next((p for p in streams[level] if p.prompt not in seen), None)
                if problem is not None:
                    seen.add(problem.prompt)
                    given[level] += 1
                    yield level, problem
                elif self.size is None:
                    del streams[level]
                else:
                    raise self._too_few(name, level, given[level])
        if not seen:
            raise self._too_few(name, self.levels[0], 0)

    def _check_listed(self, name: str) -> None:
        for level in self.levels:
            size = self.task.sizes[level - 1]
            if enumerated(self.task, size) is None:
                number = self.task.count(size)
                many = "an unknown number of" if number is None else f"{number:,}"
                raise UserError(
                    f"{name} has {many} problems at level {level} (sizes: {size}), too many to take all; give a size"
                )

    def _too_few(self, name: str, level: int, found: int) -> UserError:
        size = self.task.sizes[level - 1]
        there = "has" if enumerated(self.task, size) is not None else f"gave, in {PATIENCE:,} draws without a new one,"
        wanted = -(-(self.size or 1) // len(self.levels))
        share = f"the {wanted}" if len(self.levels) == 1 else f"its share {wanted} of the {self.size or 1}"
        return UserError(
            f"{name} {there} {found} different problems for split {self.split!r} at level {level} (sizes: {size}), "
            f"fewer than {share} asked for; lower size, or take another level or larger sizes"
        )


def _with_sides(rows: list[Prompt], name: str) -> list[Prompt]:
    """Rows with ``chosen``, their own completion, and ``rejected``, the next one by the alphabet: many begin alike.

    Raises:
        UserError: All problems have the same completion.
    """
    texts = sorted({row.row["completion"] for row in rows})
    if len(texts) < 2:
        raise UserError(
            f"{name}: all {len(rows)} problems have the completion {texts[0]!r}, so none is wrong; raise size"
        )
    after = dict(zip(texts, [*texts[1:], texts[-2]], strict=True))
    sides = [{"chosen": row.row["completion"], "rejected": after[row.row["completion"]]} for row in rows]
    return [replace(row, row={**row.row, **own}) for row, own in zip(rows, sides, strict=True)]


def _row(name: str, level: int, problem: Problem) -> dict[str, Any]:
    texts = {"prompt": problem.prompt, "answer": problem.answer, "completion": problem.completion}
    return {**texts, "task": name, "level": level, **problem.columns}
