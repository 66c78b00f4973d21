"""From cells to results: gates, controls, the contrast and its verdict."""

import importlib.metadata
import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from alignment.errors import UserError
from alignment.studies.cells import Cells
from alignment.studies.claim import Gate
from alignment.studies.cost import Unit
from alignment.studies.design import Study, Task
from alignment.studies.statistics import bootstrap_interval, seed_interval, word
from alignment.studies.work import row, score

ROWS = ("arms", "cells", "gate", "controls", "papers")
"""Of the results: lists with one line for each entry in the file."""
MOST_UNJUDGED = 0.05
COLUMNS: dict[Unit, int] = {"steps": 0, "flops": 1, "tokens": 2}


def results_of(study: Study, cells: Cells, chosen: Mapping[str, int]) -> dict[str, Any]:
    """Everything that is kept of a study whose cells are all there: JSON values.

    Raises:
        UserError: Too many problems were not judged.
    """
    claim, tasks = study.claim, study.reports(chosen)
    own = {(t.arm, t.seed): row(cells, t) for t in tasks if t.kind == "report"}
    _refuse_unjudged(own)
    gates, controls = _gates(study, own), _controls(study, cells, tasks, own)
    effect = _contrast(own, claim.primary.arm, claim.primary.against, claim.level)
    passed = all(control["passed"] for control in controls)
    low, high = effect.pop("ends")
    verdict = word(effect["mean"], (low, high), claim.primary.minimum_effect, all(g["met"] for g in gates))
    if not passed and verdict != "regime not reached":
        verdict = "inconclusive"
    return {
        "study": study.read.name,
        "verdict": "quick: no verdict" if study.quick else verdict,
        "claim": claim.claim,
        "claim_sha256": study.read.sha256,
        "sources_sha256": study.sources,
        "versions": {
            name: importlib.metadata.version(name) for name in ("alignment-rl", "torch", "transformers", "numpy")
        },
        "seeds": {"tune": list(claim.tune.seeds) if claim.tune else [], "report": list(study.report_seeds)},
        "measure": claim.measure.model_dump() | {"over": claim.unit, "budget": study.budget},
        "primary": claim.primary.model_dump() | effect | {"level": claim.level},
        "gate": gates,
        "controls": controls,
        "arms": [_arm(study, arm, chosen, own, cells) for arm in claim.compared],
        "cells": [
            {"arm": arm, "seed": seed, "value": score(r), "unjudged": r["unjudged"], "curve": r["curve"]}
            for (arm, seed), r in own.items()
        ],
        "papers": [{"arm": None} | p.model_dump() for p in claim.papers]
        + [{"arm": name} | p.model_dump() for name, arm in claim.arms.items() for p in arm.papers],
        "seconds": round(sum(cell["seconds"] for cell in cells.found.values())),
    }


def paired(own: Mapping[tuple[str, int], Mapping[str, Any]], a: str, b: str) -> tuple[list[list[float]], bool]:
    """Differences of arm ``a`` over arm ``b`` for each seed and problem, and whether all seeds have the same problems.

    Of problems, those that were judged in both arms; where seeds share most of them, those judged in every seed.
    """
    seeds = [seed for arm, seed in own if arm == a]
    known = [own[a, s]["problems"].keys() & own[b, s]["problems"].keys() for s in seeds]
    common = set[str]().union(*known).intersection(*known)
    crossed = len(common) >= (1 - MOST_UNJUDGED) * max(map(len, known))
    ids = [sorted(common if crossed else of_seed) for of_seed in known]
    return [
        [own[a, s]["problems"][i] - own[b, s]["problems"][i] for i in of_seed]
        for s, of_seed in zip(seeds, ids, strict=True)
    ], crossed


def _contrast(own: Mapping[tuple[str, int], Mapping[str, Any]], arm: str, other: str, level: float) -> dict[str, Any]:
    """The effect of an arm over another; ``ends`` are those of its interval, infinite where one seed has none."""
    values, crossed = paired(own, arm, other)
    ends = bootstrap_interval(values, crossed, level)
    by_seed = [fmean(of_seed) for of_seed in values]
    told = {"mean": fmean(by_seed), "interval": _finite(ends), "differences": by_seed, "same_problems": crossed}
    return told | {"ends": ends}


def _arm(
    study: Study, arm: str, chosen: Mapping[str, int], own: Mapping[tuple[str, int], Any], cells: Cells
) -> dict[str, Any]:
    rows = [r for (name, _), r in own.items() if name == arm]
    scores, last = [score(r) for r in rows], [r["curve"][-1] for r in rows]
    point, tune = study.grid[chosen[arm]], study.claim.tune
    tried = [
        {"settings": settings, "value": fmean(score(row(cells, Task("tune", arm, p, s))) for s in tune.seeds)}
        for p, settings in enumerate(study.grid)
        if tune is not None and study.tuning()
    ]
    return {
        "arm": arm,
        "value": fmean(scores),
        "interval": _finite(seed_interval(scores, study.claim.level)),
        "final": fmean(end[3] for end in last),
        "steps": fmean(end[0] for end in last),
        "flops": fmean(end[1] for end in last),
        "tokens": fmean(end[2] for end in last),
        "chosen": point,
        "at_end_of_grid": _at_end(study, point),
        "tried": tried,
    }


def _at_end(study: Study, point: Mapping[str, Any]) -> list[str]:
    """Settings that were chosen at an end of their grid, beyond which there may be better ones."""
    axes = study.claim.tune.grid if study.claim.tune and study.tuning() else {}
    return [key for key, values in axes.items() if len(values) > 1 and point[key] in (values[0], values[-1])]


def _gates(study: Study, own: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    claim = study.claim
    for i, gate in enumerate(claim.gate):
        value = fmean(r["gates"][i] for (arm, _), r in own.items() if arm == gate.arm)
        met = (gate.at_least is None or value >= gate.at_least) and (gate.at_most is None or value <= gate.at_most)
        found.append(gate.model_dump() | {"measured": value, "met": met})
    if (level := claim.measure.accuracy) is not None:  # runs that never were there cannot be compared there
        for arm in (claim.primary.arm, claim.primary.against):
            best = min(r["best_accuracy"] for (name, _), r in own.items() if name == arm)
            gate = Gate(arm=arm, metric="eval/accuracy", when="highest", at_least=level, text="every run gets there")
            found.append(gate.model_dump() | {"measured": best, "met": best >= level})
    return found


def _controls(
    study: Study, cells: Cells, tasks: list[Task], own: Mapping[tuple[str, int], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Whether each control ended with the same weights, at the same step, and with the same verdicts on the way; or
    was no better than its baseline."""
    found: list[dict[str, Any]] = []
    for control in study.claim.controls:
        if control.no_better_than is not None:
            effect = _contrast(own, control.arm, control.no_better_than, study.claim.level)
            told = {"mean": effect["mean"], "interval": effect["interval"], "passed": not effect["ends"][0] > 0}
        else:
            [task] = [t for t in tasks if t.kind == "control" and t.arm == control.arm]
            mine, other = row(cells, task), own[control.other, task.seed]
            told = {"passed": all(mine[name] == other[name] for name in ("policy", "problems", "curve"))}
        found.append(control.model_dump(exclude_none=True) | told)
    return found


def _refuse_unjudged(own: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    for (arm, seed), r in own.items():
        if r["unjudged"] > MOST_UNJUDGED * (len(r["problems"]) + r["unjudged"]):
            raise UserError(
                f"arm {arm}, seed {seed}: {r['unjudged']} held-out problems were not judged in every evaluation; "
                f"see why their reward fails, or, for pass@k, raise evaluation.samples"
            )


def _finite(ends: tuple[float, float]) -> list[float | None]:
    return [end if math.isfinite(end) else None for end in ends]
