"""One run of a study: an ordinary ``alignment.train`` that ends when the budget is spent, and its row."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.checkpoint import Checkpoints
from alignment.metrics import Record
from alignment.runs import Run
from alignment.signals import Stopped
from alignment.studies.claim import read_claim
from alignment.studies.cost import Sizes, Unit
from alignment.studies.curve import gate_series, gate_value, measured, read_lines, spent
from alignment.studies.design import Study, Task
from alignment.tensorfile import digest, read_tensors
from alignment.trainer import train

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A stop was asked for; what was finished is kept."""

    def __init__(self, exit_code: int = 130) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Meter:
    """A sink that ends a run at its first evaluation, at the end of a step, at which the budget is spent."""

    def __init__(self, sizes: Mapping[str, Sizes] | None, unit: Unit, budget: float) -> None:
        self.sizes, self.budget = sizes, budget
        self.unit: Unit = unit
        self.folder = Path()
        self.evaluated: int | None = None

    def start(self, run: Mapping[str, Any]) -> None:
        self.folder = Path(run["folder"])

    def log(self, record: Record) -> None:
        if record.kind == "eval":
            self.evaluated = record.step
        elif record.step == self.evaluated and spent(read_lines(self.folder), self.sizes, self.unit) >= self.budget:
            raise Stopped("SIGTERM")

    def rollouts(self, step: int, stage: str, groups: Sequence[Any]) -> None:
        """Not of interest."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Not of interest."""

    def close(self) -> None:
        """Nothing is open."""


def compute(study: Study, task: Task) -> dict[str, Any]:
    """Trains, or goes on training, and returns the row of the run; empty for a warm-up.

    Raises:
        Interrupted: A stop was asked for.
        RecipeError: The run ended before the budget was spent.
    """
    recipe, claim = study.recipe(task), study.claim
    run = study.runs / task.run
    if task.kind == "warm-up":
        result = train(recipe)
        if result["status"] != "complete":
            raise Interrupted(result["exit_code"])
        return {}
    sizes, budget = study.sizes(task), study.budget
    done = (run / "result.json").exists() and budget is not None and spent(read_lines(run), sizes, claim.unit) >= budget
    if not done:
        meters = [] if budget is None else [Meter(sizes, claim.unit, budget)]
        result = train(recipe, sinks=meters, init_from=study.start(task))
        reached = spent(read_lines(run), sizes, claim.unit)
        if budget is not None and reached < budget:
            if result["status"] != "complete":
                raise Interrupted(result["exit_code"])
            more = f"ended at {reached:.4g} of {budget:.4g} {claim.unit} (run {task.run}); give the arm more steps"
            raise study.problem(("budget", claim.unit), more)
        if budget is None and result["status"] != "complete":
            raise Interrupted(result["exit_code"])
    row = measured(run, sizes, claim.unit, budget, claim.measure)
    saved = Checkpoints(Run(run).checkpoints).latest(log.warning)
    assert saved is not None, "the last step of a run is saved"
    row["policy"] = f"{saved.step}:{digest(read_tensors(saved.folder / 'learner' / 'policy.safetensors'))}"
    gates = [_gate(study, i, task, row) if g.arm == task.arm else None for i, g in enumerate(claim.gate)]
    return row | ({"gates": gates} if task.kind == "report" else {})


def one(claim: Path, folder: Path, quick: bool, task: Task) -> tuple[dict[str, Any], float]:
    """A run and its seconds; for a process that has nothing but plain values."""
    begun = time.monotonic()
    result = compute(Study(read_claim(claim), folder, quick), task)
    return result, time.monotonic() - begun


def _gate(study: Study, index: int, task: Task, row: Mapping[str, Any]) -> float | None:
    """The value of a gate in a report run; of another run, whether it has the metric is all that is asked."""
    gate, lines, scores = study.claim.gate[index], read_lines(study.runs / task.run), [at[3] for at in row["curve"]]
    try:
        gate_series(lines, gate, scores)
        return gate_value(lines, gate, scores) if task.kind == "report" else None
    except ValueError as error:
        raise study.problem(("gate", index, "metric"), str(error)) from error
