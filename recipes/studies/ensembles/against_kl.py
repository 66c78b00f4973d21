"""Gold against KL in the runs of the study of ensembles: a table, and the plot ``docs/studies/ensembles_kl.png``.

``python recipes/studies/ensembles/against_kl.py`` reads ``runs/studies/ensembles`` once the study is done and writes
``against_kl.json`` beside this file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from alignment.ledger import Verdicts
from alignment.studies.claim import read_claim
from alignment.studies.curve import read_lines

HERE = Path(__file__).parent
LEVELS = (2.0, 4.0, 8.0)
"""KL at which arms are compared, in nats per completion."""


def curve(run: Path) -> list[tuple[int, float, float]]:
    """Step, KL from the start of RL in nats per completion, and gold, of each evaluation of a run.

    KL is that of the batch that the step was made of, so of the policy one step before; 0 at the start.
    """
    trained = {line["step"]: line["kl"] * line["length"] for line in read_lines(run) if line["kind"] == "train"}
    found = Verdicts(run / "evaluations.jsonl").read()
    return [
        (step, trained.get(step, 0.0), fmean(tally.total / tally.judged for tally in found[step].values()))
        for step in sorted(found)
    ]


def at_level(rows: Sequence[tuple[int, float, float]], level: float) -> float | None:
    """Gold where KL, straight between evaluations, first reaches ``level``; None where it never does."""
    for (_, before, low), (_, kl, high) in zip(rows, rows[1:], strict=False):
        if kl >= level:
            share = (level - before) / (kl - before)
            return low + share * (high - low)
    return None


Curve = Sequence[tuple[int, float, float]]


def over(curves: Sequence[Curve], others: Sequence[Curve], level: float) -> dict[str, float] | None:
    """How far one arm is above another at ``level``: mean and deviation over the seeds of which both get there; None of
    fewer than two."""
    pairs = [(at_level(a, level), at_level(b, level)) for a, b in zip(curves, others, strict=True)]
    found = [a - b for a, b in pairs if a is not None and b is not None]
    return {"seeds": len(found), "mean": fmean(found), "deviation": stdev(found)} if len(found) > 1 else None


def described(arm: str, curves: Sequence[Curve], single: Sequence[Curve]) -> dict[str, Any]:
    """Means over seeds of one arm, and how far it is above the single model's."""
    peaks = [max(rows, key=lambda row: row[2]) for rows in curves]
    found: dict[str, Any] = {
        "arm": arm,
        "peak": fmean(peak[2] for peak in peaks),
        "end": fmean(rows[-1][2] for rows in curves),
        "step_of_peak": fmean(peak[0] for peak in peaks),
        "kl_of_peak": fmean(peak[1] for peak in peaks),
        "kl_of_end": fmean(rows[-1][1] for rows in curves),
    }
    for level in LEVELS:
        golds = [gold for rows in curves if (gold := at_level(rows, level)) is not None]
        found[f"at_{level:g}"] = {"seeds": len(golds), "gold": fmean(golds) if golds else None}
        found[f"over_single_at_{level:g}"] = over(curves, single, level)
    mean = np.mean([[row[1:] for row in rows] for rows in curves], axis=0)
    return found | {"curve": [[round(float(v), 4) for v in row] for row in mean]}


def row(arm: dict[str, Any]) -> str:
    """The arm's line in the page's table."""
    ends = [f"{arm[name]:.3f} | {arm[f'kl_of_{name}']:.1f}" for name in ("peak", "end")]
    told = [f"{of['mean']:+.3f} ± {of['deviation']:.3f} ({of['seeds']})" for of in
            (arm[f"over_single_at_{level:g}"] for level in LEVELS)]  # fmt: skip
    return f"| {arm['arm']} | " + " | ".join([*ends, *(["" for _ in told] if arm["arm"] == "single" else told)]) + " |"


def plot(arms: Sequence[dict[str, Any]], path: Path) -> None:
    """The means over seeds of gold against those of KL, evaluation by evaluation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for arm in arms:
        kl, gold = zip(*arm["curve"], strict=True)
        style = "--" if arm["arm"].endswith("_kl") else "-"
        colour = f"C{[a['arm'] for a in arms].index(arm['arm'].removesuffix('_kl'))}"
        axis.plot(kl, gold, style, marker=".", color=colour, label=arm["arm"])
    axis.set(xlabel="KL from the start of RL, nats per completion", ylabel="held-out gold")
    axis.legend(loc="lower right", ncols=2)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def main(runs: Path, out: Path, figure: Path) -> None:
    """Writes table and plot."""
    claim = read_claim(HERE / "claim.yaml").claim
    curves = {arm: [curve(runs / f"{arm}.0.{seed}") for seed in claim.report_seeds] for arm in claim.compared}
    arms = [described(arm, own, curves["single"]) for arm, own in curves.items()]
    out.write_text("[\n " + ",\n ".join(json.dumps(arm) for arm in arms) + "\n]\n", encoding="utf-8")
    plot(arms, figure)
    for arm in arms:
        sys.stdout.write(f"{json.dumps({key: value for key, value in arm.items() if key != 'curve'})}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/ensembles/runs"))
    parser.add_argument("--out", type=Path, default=HERE / "against_kl.json")
    parser.add_argument("--figure", type=Path, default=HERE.parents[2] / "docs/studies/ensembles_kl.png")
    main(**vars(parser.parse_args()))
