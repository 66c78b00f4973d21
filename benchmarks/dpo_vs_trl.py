"""A step of DPO beside TRL's `DPOTrainer`, and a supervised one beside its `SFTTrainer`: tokens per second and memory.

Both sides start from the same saved weights and learn from the same rows in every step (their losses are compared),
with the same optimizer, each in a process of its own with the same number of threads. They take turns, a step each.
Completions are of unlike length, as answers that were compared are; a second measurement has all of one length, where
nobody fills rows up. DPO's reference is a model in memory on both sides, and a pass of it is in every step.

    python benchmarks/dpo_vs_trl.py
    python benchmarks/dpo_vs_trl.py --kinds dpo --precision bfloat16 --steps 20
    python benchmarks/dpo_vs_trl.py --sleep       # on a machine that others use as well
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import harness
import offline_work
from grpo_vs_trl import rate
from lockstep import Side, in_turns
from offline_work import KINDS, LENGTHS, Work

GOAL = 1.5
SIDES = ("ours", "trl")
PRECISIONS = ("float32", "bfloat16")
QUICK = Work(
    rows=4,
    prompt_tokens=4,
    median_tokens=8,
    most_tokens=24,
    vocabulary=64,
    hidden=32,
    intermediate=48,
    layers=1,
    heads=2,
    warmup_steps=1,
    measured_steps=2,
)
EQUAL = [
    "Weights (checked), rows and their tokens (checked), loss (checked at every step), AdamW (PyTorch's fused one), "
    "clipping of gradients, one optimizer step over all rows, threads, machine; the two take turns.",
    "bfloat16 is autocast on both sides; weights and optimizer are float32.",
    "Neither side packs rows, recomputes activations or keeps the reference's log-probabilities from step to step.",
]
NOT_EQUAL = [
    "TRL fills all rows of a step up to the longest and passes an attention mask; ours puts rows of like length "
    "together in micro-batches and passes none.",
    "TRL also reports entropy, mean logits and the share of tokens that it would have chosen itself.",
    "Ours writes metrics to a file at every step; TRL writes nothing.",
    "Ours lets idle threads sleep (its default); TRL has PyTorch's default, which lets them spin for a moment and "
    "costs time on a busy machine (`--sleep` takes that difference away).",
    "Memory is the most that a process had, less what it had before its first step, so libraries do not count; TRL "
    "holds its reference before it, ours copies it in the first step.",
]
Steps = Mapping[str, Sequence[Mapping[str, Any]]]


def measure(work: Work, sleep: bool) -> tuple[dict[str, dict[str, Any]], Steps]:
    """What both sides start from, and all their steps."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folders = {side: Path(name) / side for side in SIDES}
        for folder in folders.values():
            folder.mkdir()
            offline_work.prepare(folder, work)
        sides = [
            stack.enter_context(Side("offline_sides.py", side, folders[side], work.threads, sleep)) for side in SIDES
        ]
        starts, steps = in_turns(sides, work.steps)
    check(steps, work)
    return starts, steps


def check(steps: Steps, work: Work) -> None:
    """Both sides learned the same from the same."""
    for side, found in steps.items():
        assert all(step["tokens"] == work.tokens for step in found), f"{side}: not {work.tokens} tokens in every step"
    bound = 2e-4 if work.precision == "float32" else 2e-2
    for number, (own, theirs) in enumerate(zip(steps["ours"], steps["trl"], strict=True)):
        apart = abs(own["loss"] - theirs["loss"])
        assert apart < bound * max(1, theirs["loss"]), f"step {number}: losses {own['loss']} and {theirs['loss']}"


def speed(work: Work, steps: Steps, gflop_per_s: float) -> dict[str, Any]:
    """Tokens per second as a row of a table."""
    found: dict[str, Any] = {"step": name_of(work)}
    for side in SIDES:
        found[side] = work.tokens / median(step["seconds"] for step in steps[side][work.warmup_steps :])
    limit = work.tokens / (work.gflop() / gflop_per_s)
    return {**found, "ratio": ratio(work, steps), "limit": limit, "filled up": work.padded()}


def costs(work: Work, starts: Mapping[str, Mapping[str, Any]], steps: Steps) -> dict[str, Any]:
    """CPU time and memory as a row of a table."""
    found: dict[str, Any] = {"step": name_of(work)}
    for side in SIDES:
        found[f"{side}, CPU s"] = median(step["cpu"] for step in steps[side][work.warmup_steps :])
    for side in SIDES:
        found[f"{side}, MiB"] = steps[side][-1]["peak_mb"] - starts[side]["memory_mb"]
    return found


def name_of(work: Work) -> str:
    """Of a row."""
    return f"{work.kind}, {work.lengths} lengths, {work.precision}"


def ratio(work: Work, steps: Steps) -> float:
    """TRL's time over ours: the median over pairs of steps that were taken side by side."""
    pairs = zip(steps["ours"], steps["trl"], strict=True)
    return median([theirs["seconds"] / own["seconds"] for own, theirs in pairs][work.warmup_steps :])


def goals_of(speeds: Sequence[Mapping[str, Any]], spent: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each measurement: tokens per second, and no more memory."""
    goals = []
    for row, cost in zip(speeds, spent, strict=True):
        times, share = row["ratio"], cost["ours, MiB"] / cost["trl, MiB"]
        quick, small = f"{row['step']}: TRL's tokens per second, times", f"{row['step']}: TRL's memory, times at most"
        goals += [
            {"what": quick, "goal": GOAL, "measured": f"{times:.2f}", "met": times >= GOAL},
            {"what": small, "goal": 1.0, "measured": f"{share:.2f}", "met": share <= 1},
        ]
    return goals


def main() -> None:
    """Runs the benchmark."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=[*LENGTHS])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    parser.add_argument("--steps", type=int, help="measured steps of each side")
    parser.add_argument("--sleep", action="store_true", help="idle threads sleep on TRL's side, too")
    args = parser.parse_args()
    import torch

    busy = os.getloadavg()[0]
    base = replace(QUICK if args.quick else Work(), threads=torch.get_num_threads())
    base = replace(base, measured_steps=args.steps or base.measured_steps)
    speeds, spent = [], []
    for precision in args.precision:
        gflop_per_s = rate(precision, base.threads, 256 if args.quick else 2048)
        for kind in args.kinds:
            for lengths in args.lengths:
                work = replace(base, kind=kind, lengths=lengths, precision=precision)
                starts, steps = measure(work, args.sleep)
                speeds.append(speed(work, steps, gflop_per_s))
                spent.append(costs(work, starts, steps))
    settings = {name: value for name, value in asdict(base).items() if name not in ("kind", "lengths", "precision")}
    harness.finish(
        {
            "title": "Steps of DPO and of supervised fine-tuning beside TRL's",
            "settings": settings | {"load average before": round(busy, 2), "TRL's idle threads sleep": args.sleep},
            "tables": [
                {"title": "Tokens per second, prompts included and padding not", "rows": speeds},
                {"title": "CPU time of a step, and memory", "rows": spent},
            ],
            "equal": EQUAL,
            "not_equal": NOT_EQUAL,
            "goals": [] if args.quick else goals_of(speeds, spent),
        },
        args.json,
    )


if __name__ == "__main__":
    main()
