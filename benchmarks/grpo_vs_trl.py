"""A whole GRPO step, beside the same step of TRL's `GRPOTrainer`: sampling, scoring, update, logs.

Both sides start from the same saved weights, with the same prompts, lengths, reward function and optimizer, each in a
process of its own with the same number of threads. They take turns: while one takes a step the other waits, and who
goes first changes with every step. Beside each phase stands the time that its arithmetic alone would take at the rate
of a 2048 x 2048 x 2048 matrix product, measured in the same run.

    python benchmarks/grpo_vs_trl.py
    python benchmarks/grpo_vs_trl.py --precision bfloat16 --steps 20
    python benchmarks/grpo_vs_trl.py --sleep       # on a machine that others use as well
"""

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import grpo_work
import harness
from grpo_work import Work
from lockstep import Side, in_turns

GOALS = {"float32": 1.5, "bfloat16": 2.5}
SIDES = ("ours", "trl")
QUICK = Work(
    prompts=2,
    group_size=2,
    prompt_tokens=4,
    completion_tokens=16,
    vocabulary=64,
    hidden=32,
    intermediate=48,
    layers=1,
    heads=2,
    warmup_steps=1,
    measured_steps=2,
)


EQUAL = [
    "Weights (checked), prompts, prompt and completion lengths (checked), reward function, temperature 1 without top-k "
    "or top-p, group-normalised advantages, clipping, token mean, no KL, AdamW, clipping of gradients, one update per "
    "step, threads, machine; the two take turns.",
    "bfloat16 is autocast on both sides; weights and optimizer are float32.",
]
NOT_EQUAL = [
    "Lengths are forced: TRL gives the end-of-sequence token no probability, ours treats it like any other token.",
    "Ours draws prompts in a shuffled order; TRL, here, in the order of the file.",
    "Ours scores in a worker process, records its sampler's log-probabilities, writes metrics, rollouts every tenth "
    "step and the flight recorder at every one; TRL calls the reward in its own process and writes nothing.",
    "Ours lets idle threads sleep (its default); TRL has PyTorch's default, which lets them spin for a moment and "
    "costs time on a busy machine (`--sleep` takes that difference away).",
]


def measure(work: Work, sleep: bool) -> dict[str, list[dict[str, Any]]]:
    """All steps of both sides, in lockstep."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folders = {side: Path(name) / side for side in SIDES}
        for folder in folders.values():
            folder.mkdir()
            grpo_work.prepare(folder, work)
        sides = [stack.enter_context(Side("grpo_sides.py", side, folders[side], work.threads, sleep)) for side in SIDES]
        _, steps = in_turns(sides, work.steps)
    check(steps, work)
    return steps


def check(steps: Mapping[str, Sequence[Mapping[str, Any]]], work: Work) -> None:
    """Both sides did the same amount of work, and their first rewards are alike."""
    for side, found in steps.items():
        assert all(step["tokens"] == work.tokens for step in found), f"{side}: not {work.tokens} tokens in every step"
    first = {side: steps[side][0]["reward"] for side in SIDES}
    # A token counts or does not, about as often: the standard error of a mean over all tokens, 6 times.
    bound = 6 * 0.5 * math.sqrt(2 / work.tokens)
    assert abs(first["ours"] - first["trl"]) < bound, f"first rewards {first} differ by more than chance ({bound:.3f})"


def rate(precision: str, threads: int, size: int = 2048) -> float:
    """GFLOP/s of a matrix product, the best of several."""
    import torch

    torch.set_num_threads(threads)
    a, b = (torch.randn(size, size).to(getattr(torch, precision)) for _ in range(2))
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def tables(work: Work, steps: Mapping[str, Sequence[Mapping[str, Any]]], gflop_per_s: float) -> list[dict[str, Any]]:
    """Seconds by phase, and what they come to."""
    kept = {side: found[work.warmup_steps :] for side, found in steps.items()}
    limits = {phase: gflop / gflop_per_s for phase, gflop in work.gflop().items()}
    limits["whole step"] = sum(limits.values())
    names = ["sample", "score", "annotate", "update"]
    rows = []
    for name in (*names, "rest", "whole step", "CPU time of the process"):
        row: dict[str, Any] = {"median seconds": name}
        for side in SIDES:
            row[side] = median(_of(step, name, names) for step in kept[side])
        rows.append({**row, "limit": limits.get(name)})
    speeds: dict[str, Any] = {side: work.tokens / median(s["seconds"] for s in kept[side]) for side in SIDES}
    speeds |= {"ratio": ratio(work, steps), "limit": work.tokens / limits["whole step"]}
    title = f"{work.precision}, {work.threads} threads; matrix products at {gflop_per_s:,.0f} GFLOP/s"
    return [
        {"title": f"One GRPO step in {title}", "rows": rows},
        {"title": f"Completion tokens per second in {work.precision}", "rows": [speeds]},
    ]


def _of(step: Mapping[str, Any], name: str, phases: Sequence[str]) -> float:
    whole = {"whole step": step["seconds"], "CPU time of the process": step["cpu"]}
    if name == "rest":
        return step["seconds"] - sum(step["phases"].get(phase, 0.0) for phase in phases)
    return whole[name] if name in whole else step["phases"].get(name, 0.0)


def ratio(work: Work, steps: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """TRL's time over ours: the median over pairs of steps that were taken side by side."""
    pairs = zip(steps["ours"], steps["trl"], strict=True)
    return median([theirs["seconds"] / own["seconds"] for own, theirs in pairs][work.warmup_steps :])


def mismatch(work: Work, steps: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """How far our sampler and learner are apart, as a row of a table."""
    kept = steps["ours"][work.warmup_steps :]
    return {
        "precision": work.precision,
        "KL (k3), nats per token": f"{median(s['mismatch_kl'] for s in kept):.1e}",
        "largest difference of a log-probability": f"{max(s['mismatch_abs_max'] for s in kept):.1e}",
    }


def main() -> None:
    """Runs the benchmark."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--precision", nargs="+", choices=GOALS, default=[*GOALS])
    parser.add_argument("--steps", type=int, help="measured steps of each side")
    parser.add_argument("--sleep", action="store_true", help="idle threads sleep on TRL's side, too")
    args = parser.parse_args()
    import torch

    busy = os.getloadavg()[0]

    base = replace(QUICK if args.quick else Work(), threads=torch.get_num_threads())
    base = replace(base, measured_steps=args.steps or base.measured_steps)
    shown, goals, apart = [], [], []
    for precision in args.precision:
        work = replace(base, precision=precision)
        gflop_per_s = rate(precision, work.threads, 256 if args.quick else 2048)
        steps = measure(work, args.sleep)
        shown += tables(work, steps, gflop_per_s)
        apart.append(mismatch(work, steps))
        found, goal = ratio(work, steps), GOALS[precision]
        what = f"TRL's completion tokens per second in {precision}, times"
        if not args.quick:
            goals.append({"what": what, "goal": goal, "measured": f"{found:.2f}", "met": found >= goal})
    shown.append({"title": "Our sampler beside our learner", "rows": apart})
    settings = {name: value for name, value in asdict(base).items() if name not in ("precision", "threads")}
    harness.finish(
        {
            "title": "A GRPO step beside TRL's",
            "settings": settings | {"load average before": round(busy, 2), "TRL's idle threads sleep": args.sleep},
            "tables": shown,
            "equal": EQUAL,
            "not_equal": NOT_EQUAL,
            "goals": goals,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
