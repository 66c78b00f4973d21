"""The order of a study's runs: warm-ups, tuning, reports and controls; each is a cell once it is finished."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from alignment.studies.cells import Cells
from alignment.studies.design import Study, Task
from alignment.studies.pool import in_order

Say = Callable[[str], None]


def execute(study: Study, cells: Cells, workers: int, say: Say) -> dict[str, int]:
    """Computes every cell that is missing; the point of the grid that was chosen for each arm.

    Raises:
        Interrupted: A stop was asked for.
    """
    first, later = [*study.warm_ups(), *study.tuning()], study.reports(dict.fromkeys(study.claim.compared, 0))
    _do(study, cells, [t for t in first if t.kind == "warm-up"], [*first, *later], workers, say)
    _do(study, cells, [t for t in first if t.kind == "tune"], [*first, *later], workers, say)
    best = chosen(study, cells)
    _do(study, cells, study.reports(best), study.reports(best), workers, say)
    return best


def chosen(study: Study, cells: Cells) -> dict[str, int]:
    """The point of the grid with the best mean measure over tuning seeds, the first of equal ones, for each arm."""
    if not (tasks := study.tuning()):
        return dict.fromkeys(study.claim.compared, 0)

    def mean(arm: str, point: int) -> float:
        own = [t for t in tasks if t.arm == arm and t.point == point]
        return fmean(score(row(cells, t)) for t in own)

    return {arm: max(range(len(study.grid)), key=lambda p, a=arm: mean(a, p)) for arm in study.claim.compared}


def row(cells: Cells, task: Task) -> dict[str, Any]:
    """The row of a finished cell."""
    rows = cells.rows(task.cell, task.seed)
    assert rows is not None, f"{task} is not computed"
    return rows[0]


def score(row: Mapping[str, Any]) -> float:
    """The measure of a run: the mean over its problems."""
    return fmean(row["problems"].values())


def digest_of(study: Study) -> str:
    """Of everything that the numbers of a study depend on, versions of libraries apart."""
    text = json.dumps([study.read.sha256, study.described()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _do(study: Study, cells: Cells, tasks: Sequence[Task], all_: Sequence[Task], workers: int, say: Say) -> None:
    """Computes those of ``tasks`` that are missing, in order; ``all_`` is for the time that is left."""
    todo = [t for t in tasks if cells.rows(t.cell, t.seed) is None]
    for task, result, seconds in in_order(study, todo, workers):
        cells.add(task.cell, task.seed, [result], seconds)
        if task.kind != "warm-up":
            shutil.rmtree(study.runs / task.run / "checkpoints", ignore_errors=True)
        left = [t for t in all_ if cells.rows(t.cell, t.seed) is None]
        mean = fmean(cell["seconds"] for cell in cells.found.values())
        minutes = sum(cells.seconds(t.kind, mean) for t in left) / workers / 60
        what = f"{score(result):.3f} in " if result else ""
        point = " ".join(f"{k}={v}" for k, v in study.grid[task.point].items()) if task.arm else ""
        done = f"{len(all_) - len(left)}/{len(all_)}"
        say(f"{done}  {task.kind} {task.arm} {point} seed {task.seed}: {what}{seconds:.0f} s; "
            f"about {minutes:.0f} min left")  # fmt: skip
