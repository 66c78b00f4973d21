"""A learner's step with each entropy control, beside the same step without it: what a control costs.

A step is annotation, credit and update of the same rows. Each control is paired with a step that makes the passes which
it asks for and does nothing with them; the two take turns, and the ratio is taken within a pair. The cost of the passes
themselves stands beside it, against a step that makes none.

What a control computes itself is far less than steps differ from one another. So the objective alone, which is all that
a control is a part of, is timed as well, many times and without a model: what it takes with the control, less what it
takes without, as a share of the step. Only the gradient through the entropy, of the two bonuses, is elsewhere, and is
judged by the steps.

    python benchmarks/entropy.py
    python benchmarks/entropy.py --quick
    python benchmarks/entropy.py --controls bonus adaptive_bonus --rounds 61  # the intervals are narrower
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from statistics import median
from typing import Any

import harness
import torch
from ppo_step import Sizes, batch_of, language_model

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.covariance import ClipCov, KlCov
from alignment.algorithms.credit import credit
from alignment.algorithms.entropy_controls import AdaptiveBonus, Bonus, HighEntropy
from alignment.algorithms.objective import Objective
from alignment.algorithms.state import needs_of
from alignment.algorithms.steer import Steer
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.torch_learner import TorchLearner

FULL = Sizes(rows=16, rounds=21)
QUICK = Sizes(rows=4, tokens=24, prompt=8, hidden=32, layers=1, vocabulary=64, rounds=3)
MINIBATCHES = 2
LIMIT = 1.05
TRIALS = 200
CONTROLS: Mapping[str, Any] = {
    "bonus": Bonus(),
    "adaptive_bonus": AdaptiveBonus(target=100.0, coefficient=0.001),
    "high_entropy": HighEntropy(),
    "steer, repo": Steer(omega="repo"),
    "steer, own": Steer(omega="own"),
    "steer, exact": Steer(omega="exact"),
    "clip_cov": ClipCov(),
    "kl_cov": KlCov(),
}
NAMES = {"entropy": "entropy", "logp": "before each step", "entropy_drift": "drift"}


@dataclass(frozen=True)
class Passes:
    """A control that asks for passes and does nothing."""

    needs: tuple[str, ...] = ()

    def prepare(self, state: Any, minibatch: Any) -> None:
        return None

    def penalty(self, state: Any, view: Any) -> None:
        return None


def step(learner: TorchLearner, control: Any, sizes: Sizes, number: int) -> float:
    """CPU seconds of one step."""
    algorithm = Algorithm(entropy_controls=(control,), minibatches=MINIBATCHES)
    states = {"entropy_controls.0": control.init()} if hasattr(control, "init") else {}
    batch, objective = batch_of(sizes, number), Objective.of(algorithm, states)
    start = time.process_time()
    annotated = learner.annotate(batch, objective.needs() | algorithm.needs)
    learner.update(credit(annotated, algorithm, states), objective)
    return time.process_time() - start


def measure(sizes: Sizes, controls: Mapping[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """Of each control and each round: seconds of the plain step, of that with its passes, and of that with it."""
    config = TorchLearnerConfig(lr=1e-4, micro_batch_tokens=8 * sizes.tokens, device="cpu")
    learner = TorchLearner(language_model(sizes, sizes.hidden), config, 3 * len(controls) * (sizes.rounds + 1), 0)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in controls}
    for number in range(sizes.rounds + 1):
        for name, control in controls.items():
            arms = [Passes(), Passes(tuple(needs_of(control))), control]
            seconds = {i: step(learner, arms[i], sizes, number) for i in ((0, 1, 2) if number % 2 else (2, 1, 0))}
            if number:  # the first round warms up
                found[name].append((seconds[0], seconds[1], seconds[2]))
    return found


def own_seconds(sizes: Sizes, control: Any) -> list[float]:
    """CPU seconds of the objective for one step's mini-batches, forward and backward, in each of many trials."""
    algorithm = Algorithm(entropy_controls=(control,), minibatches=MINIBATCHES)
    states = {"entropy_controls.0": control.init()} if hasattr(control, "init") else {}
    objective, rows = Objective.of(algorithm, states), batch_of(sizes, 0)
    noise_BT = torch.rand(rows.ids_BT.shape, generator=torch.Generator().manual_seed(0))
    known = {"old_logp_BT": -8 - noise_BT, "logp_BT": -8 - noise_BT, "entropy_BT": 8 + noise_BT}
    batch = credit(replace(rows, entropy_drift_BT=noise_BT / 10, **known), algorithm, states)
    parts = [batch.rows(range(i, sizes.rows, MINIBATCHES)) for i in range(MINIBATCHES)]
    seconds: list[float] = []
    for _ in range(TRIALS):
        logp_BT, entropy_BT = (-8 - noise_BT).requires_grad_(), (8 + noise_BT).requires_grad_()
        start = time.process_time()
        for i, part in enumerate(parts):
            given = [tensor[i::MINIBATCHES] for tensor in (logp_BT, entropy_BT)]
            loss, _ = objective.loss(given[0], given[1], objective.prepare(part))
            loss.backward()
        seconds.append(time.process_time() - start)
    return seconds


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of the median with at least 95 % confidence, by order statistics; the extremes where there are too few."""
    ordered, n = sorted(values), len(values)
    below = [k for k in range(n // 2) if sum(comb(n, i) for i in range(k + 1)) / 2**n <= 0.025]
    k = below[-1] if below else 0
    return ordered[k], ordered[n - 1 - k]


def row(name: str, rounds: Sequence[tuple[float, float, float]], own: float) -> dict[str, Any]:
    """Medians over rounds, of ratios within a round; ``own`` are the control's own seconds."""
    beyond = [control / passes for _, passes, control in rounds]
    low, high = interval(beyond)
    asked = " + ".join(NAMES[need] for need in needs_of(CONTROLS[name]))
    return {
        "control": name,
        "asks for": asked or "nothing",
        "CPU seconds": median(control for *_, control in rounds),
        "times the plain step": median(control / plain for plain, _, control in rounds),
        "times the step with its passes": median(beyond),
        "from": low,
        "to": high,
        "own, ms": 1e3 * own,
        "own, share of the step": own / median(passes for _, passes, _ in rounds),
    }


def goal(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a control is quick enough."""
    if getattr(CONTROLS[found["control"]], "entropy_gradient", False):
        ratio = found["times the step with its passes"]
        measured = f"{ratio:.3f} ({found['from']:.3f} to {found['to']:.3f})"
        what = f"{found['control']}: CPU time of a step over that of one with its passes alone"
        return {"what": what, "goal": f"at most {LIMIT:g}", "measured": measured, "met": ratio <= LIMIT}
    share = found["own, share of the step"]
    what = f"{found['control']}: its own CPU time over that of a step with its passes"
    return {"what": what, "goal": f"at most {LIMIT - 1:.2g}", "measured": f"{share:.4f}", "met": share <= LIMIT - 1}


def main() -> None:
    """Runs the benchmark."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, metavar="N", help="pairs of each control")
    parser.add_argument("--controls", nargs="+", choices=[*CONTROLS], default=[*CONTROLS])
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    sizes = Sizes(**{**vars(sizes), "rounds": args.rounds or sizes.rounds})
    bare = median(own_seconds(sizes, Passes()))
    controls = {name: CONTROLS[name] for name in args.controls}
    own = {name: median(own_seconds(sizes, control)) - bare for name, control in controls.items()}
    rows = [row(name, rounds, own[name]) for name, rounds in measure(sizes, controls).items()]
    harness.finish(
        {
            "title": "Entropy controls",
            "settings": {**vars(sizes), "minibatches": MINIBATCHES},
            "tables": [{"title": "CPU time of a learner's step; medians, and 95 % of the last ratio", "rows": rows}],
            "equal": ["Learner, rows, micro-batches, one epoch, mini-batches, threads."],
            "not_equal": [
                "With several mini-batches the plain step makes a pass before the update, for log-probabilities.",
                "`adaptive_bonus` is given a target that it is always below, so that its bonus acts.",
            ],
            "goals": [] if args.quick else [goal(found) for found in rows],
        },
        args.json,
    )


if __name__ == "__main__":
    main()
