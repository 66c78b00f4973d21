"""The order of a study's runs: warm-ups, tuning, reports and controls; each is a cell once it is finished."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from alignment.studies.cells import Cells
from alignment.studies.design import Study, Task
from alignment.studies.pool import Pool

Say = Callable[[str], None]


def execute(study: Study, cells: Cells, workers: int, say: Say) -> dict[str, int]:
    """Computes every cell that is missing; the point of the grid that was chosen for each arm.

    Raises:
        Interrupted: A stop was asked for.
    """
    first, none = [*study.warm_ups(), *study.tuning()], dict.fromkeys(study.claim.compared, 0)
    whole = len(first) + len(study.reports(none))
    with Pool(study, workers) as pool:

        def compute(tasks: Sequence[Task], later: Sequence[Task]) -> None:
            _compute(pool, cells, tasks, later, whole, say)

        compute([t for t in first if t.kind == "warm-up"], [*study.tuning(), *study.reports(none)])
        compute(study.tuning(), study.reports(none))
        best = chosen(study, cells)
        compute(study.reports(best), [])
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
    """Of everything that the numbers of a study depend on, models in folders and versions of libraries apart."""
    text = json.dumps([study.read.sha256, study.sources, study.described(), study.data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _compute(pool: Pool, cells: Cells, tasks: Sequence[Task], later: Sequence[Task], whole: int, say: Say) -> None:
    """Computes those of ``tasks`` that are missing, in order; ``later`` ones are for the time that is left."""

    def missing(some: Sequence[Task]) -> list[Task]:
        return [t for t in some if cells.rows(t.cell, t.seed) is None]

    study = pool.study
    for task, result, seconds in pool.done(missing(tasks)):
        cells.add(task.cell, task.seed, [result], seconds)
        if task.kind != "warm-up":
            shutil.rmtree(study.runs / task.run / "checkpoints", ignore_errors=True)
        left = [*missing(tasks), *missing(later)]
        mean = fmean(cell["seconds"] for cell in cells.found.values())
        minutes = sum(cells.seconds(t.kind, mean) for t in left) / pool.workers / 60
        point = " ".join(f"{k}={v}" for k, v in study.grid[task.point].items()) if task.arm else ""
        what = " ".join(part for part in (task.kind, task.arm, point, f"seed {task.seed}") if part)
        value = f"{score(result):.3f} in " if result else ""
        say(f"{whole - len(left)}/{whole}  {what}: {value}{seconds:.0f} s; about {minutes:.0f} min left")
