"""Asynchronous training beside our own lockstep: on simulated engines of equal cost, and on the real ones here.

Simulated: 32 engines and a learner whose update takes as long as the engines need for a batch when none waits; the real
loop, collector and queue on a simulated clock (see `simulate.py`). What lockstep loses is half of the time on either
side, and the tail of every batch. Real: vLLM, two DeepSpeed ranks and Ray, on the second stage of
`recipes/quickstart_cluster.yaml`, seconds a step after the first five.

    python benchmarks/asynchronous.py
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import harness
from simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
GOAL = 1.8
STEPS, SKIPPED = 25, 5


def simulated(quick: bool) -> list[dict[str, Any]]:
    """Steps per hour by the staleness that is allowed."""
    found = {k: simulate(8 if quick else 32, k, 2 if quick else 18) for k in (0, 1, 2, 4)}
    lockstep = found[0]["step, simulated s"]
    return [
        {
            "staleness allowed": k,
            "step, simulated s": row["step, simulated s"],
            "engines busy": row["engines busy"],
            "times lockstep": lockstep / row["step, simulated s"],
        }
        for k, row in found.items()
    ]


def real() -> list[dict[str, Any]]:
    """Seconds a step of the quickstart on the real engines, without its warm-up."""
    rows = []
    for staleness in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"run.output={folder}", f"stages.1.max_staleness={staleness}", f"stages.1.steps={STEPS}"]
            settings += ["stages.0.steps=20", "run.save_every=0", "data.eval=null", "run.sinks=[jsonl]"]
            command = [sys.executable, "-m", "alignment", "train", str(ROOT / "recipes/quickstart_cluster.yaml")]
            command += [word for setting in settings for word in ("--set", setting)]
            subprocess.run(command, check=True, env=dict(os.environ), cwd=ROOT)
            lines = (Path(folder) / "quickstart-cluster/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [line for line in map(json.loads, lines) if line["stage"] == "rl" and line["kind"] == "train"][SKIPPED:]
        rows.append({"staleness allowed": staleness, "step, s": mean(step["time/total"] for step in steps)})
    return [row | {"times lockstep": rows[0]["step, s"] / row["step, s"]} for row in rows]


def main() -> None:
    """The benchmark."""
    args = harness.parser(__doc__ or "").parse_args()
    rows = simulated(args.quick)
    tables = [{"title": "Simulated engines of equal cost", "rows": rows}]
    if not args.quick:
        tables.append({"title": "The real engines on this machine", "rows": real()})
    best = max(row["times lockstep"] for row in rows)
    goal = {
        "what": "steps per time of asynchronous training against lockstep, simulated engines of equal cost",
        "goal": f"at least {GOAL} times",
        "measured": f"{best:.2f} times",
        "met": best >= GOAL,
    }
    result = {
        "title": "Asynchronous training beside lockstep",
        "settings": {"steps": STEPS},
        "tables": tables,
        "equal": ["Recipe, batches, engines, lengths by rollout."],
        "not_equal": [
            "Two processor cores are shared by all real engines: what runs at the same time slows itself down."
        ],
        "goals": [goal],
    }
    harness.finish(result, args.json)


if __name__ == "__main__":
    main()
