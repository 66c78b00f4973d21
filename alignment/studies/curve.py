"""What a run is worth: its evaluations over what it had cost when they were made."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from alignment.errors import UserError
from alignment.evaluation.statistics import pass_at_k
from alignment.ledger import Verdicts
from alignment.score import Tally
from alignment.studies.claim import Gate, Measure
from alignment.studies.cost import Cost, Sizes, Unit, costs


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; none where there is none yet. A line that was cut off does not count."""
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def spent(lines: Sequence[Mapping[str, Any]], sizes: Mapping[str, Sizes] | None, unit: Unit) -> float:
    """What had been spent when the last evaluation was made, at the end of its step."""
    at = [line["step"] for line in lines if line["kind"] == "eval"]
    whole = [line["step"] for line in lines if line["kind"] == "train"]
    steps = [step for step in at if step in whole or step == 0]
    return getattr(costs(lines, sizes)[max(steps)], unit) if steps else 0.0


def weights(x: Sequence[float], budget: float, measure: Measure) -> np.ndarray:
    """What each evaluation counts, so that a weighted sum is the mean over the cost or the value at the budget.

    Between two evaluations accuracy is taken to go straight, before the first to be the first one. ``area`` is the
    mean over the cost from 0 to ``budget``, ``final`` and ``after_peak`` the value at ``budget``. They add up to 1.
    """
    units = np.eye(len(x))
    ends = measure.metric in ("final", "after_peak")
    at = np.array([budget]) if ends else np.unique([0.0, budget, *(v for v in x if v < budget)])
    values = np.array([np.interp(at, x, unit) for unit in units])
    return values[:, 0] if ends else np.asarray(np.trapezoid(values, at, axis=1)) / budget


def peak(x: Sequence[float], score: Sequence[float], budget: float) -> np.ndarray:
    """1 for the evaluation with the highest score up to the budget, the first of equal ones, and 0 for the others."""
    inside = [i for i, cost in enumerate(x) if cost <= budget] or [0]
    return np.eye(len(x))[max(inside, key=lambda i: score[i])]


def crossing(accuracy: Sequence[float], level: float) -> np.ndarray:
    """What each evaluation counts where accuracy, straight between evaluations, first reaches ``level``.

    The first evaluation if it is there already; nothing where it is never reached, so that the measure is 0.
    """
    weight_E = np.zeros(len(accuracy))
    at = next((i for i, value in enumerate(accuracy) if value >= level), None)
    if at is not None:
        share = 1.0 if at == 0 else (level - accuracy[at - 1]) / (accuracy[at] - accuracy[at - 1])
        weight_E[at] = share
        if at:
            weight_E[at - 1] = 1 - share
    return weight_E


def measured(
    run: Path, sizes: Mapping[str, Sizes] | None, unit: Unit, budget: float | None, measure: Measure
) -> dict[str, Any]:
    """A finished run as one row: ``problems``, the measure of each held-out problem that was judged in every
    evaluation; how many were ``unjudged``; and the ``curve``, rows of step, FLOPs, tokens and score.

    Args:
        run: Its folder.
        sizes: Of its models by stage, or None.
        unit: Of the cost axis.
        budget: Where the axis ends; None: at the last evaluation.
        measure: What is taken of the curve.
    """
    verdicts = Verdicts(run / "evaluations.jsonl").read()
    at = costs(read_lines(run), sizes)
    steps = sorted(verdicts)
    need = measure.pass_at
    judged = [id_ for id_ in verdicts[steps[0]] if all(verdicts[step][id_].judged >= need for step in steps)]
    ids = [id_ for id_ in judged if fnmatchcase(id_, measure.problems)]
    if not judged:
        raise UserError(f"no held-out problem of {run} has {need} judged samples in every evaluation: its reward fails")
    if not ids:
        raise UserError(f"measure.problems: no judged problem of {run} matches '{measure.problems}' ({judged[:3]})")
    accuracy = [fmean(verdicts[s][id_].correct / verdicts[s][id_].judged for id_ in judged) for s in steps]
    score_EP = np.array([[_score(verdicts[s][id_], measure) for id_ in ids] for s in steps])
    x = [getattr(at.get(step, Cost()), unit) for step in steps]
    end = budget or max(x[-1], 1.0)
    weight_E = weights(x, end, measure) if measure.accuracy is None else crossing(accuracy, measure.accuracy)
    if measure.metric == "after_peak":
        weight_E = weight_E - peak(x, score_EP.mean(1), end)
    curve = [[s, at[s].flops, at[s].tokens, float(row.mean())] for s, row in zip(steps, score_EP, strict=True)]
    problems = dict(zip(ids, (round(float(v), 6) for v in weight_E @ score_EP), strict=True))
    return {"problems": problems, "unjudged": len(verdicts[steps[0]]) - len(judged), "curve": curve,
            "best_accuracy": max(accuracy)}  # fmt: skip


def _score(found: Tally, measure: Measure) -> float:
    """Of one problem in one evaluation."""
    if measure.of == "reward":
        return found.total / found.judged
    return pass_at_k(found.judged, found.correct, measure.pass_at)


def gate_value(lines: Sequence[Mapping[str, Any]], gate: Gate, scores: Sequence[float] = ()) -> float:
    """The metric of a gate in one run, whose evaluations have ``scores``.

    Raises:
        ValueError: No line has it, or it has no ratio.
    """
    found = gate_series(lines, gate, scores)
    if gate.when == "ratio":
        if found[0] <= 0:
            raise ValueError(f"'{gate.metric}' of arm '{gate.arm}' begins at {found[0]:g}, of which there is no ratio")
        return found[-1] / found[0]
    values = {"first": found[0], "last": found[-1], "mean": fmean(found), "highest": max(found)}
    return values.get(gate.when, max(found) - found[-1])


def gate_series(lines: Sequence[Mapping[str, Any]], gate: Gate, scores: Sequence[float] = ()) -> list[float]:
    """All values of the metric of a gate in one run, whose evaluations have ``scores``.

    Raises:
        ValueError: No line has it.
    """
    kind, name = ("eval", gate.metric[5:]) if gate.metric.startswith("eval/") else ("train", gate.metric)
    own = [line for line in lines if line["kind"] == kind]
    measure = gate.metric == "measure"
    found = [*scores] if measure else [float(line[name]) for line in own if line.get(name) is not None]
    if not found:
        names = sorted({("eval/" if kind == "eval" else "") + key for line in own for key in line if key != "kind"})
        raise ValueError(f"no run of arm '{gate.arm}' has a metric '{gate.metric}' (there are: {', '.join(names)})")
    return found
