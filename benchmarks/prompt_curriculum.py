"""Choosing prompts by a prompt value model, beside sampling groups of all candidates: what `prompt_curriculum` saves.

To know which candidates are of middling difficulty one may sample a group of each, or ask a model. In each engine, in a
process of its own, the two take turns on the same candidates: `prompt_curriculum` chooses its batch by the learner's
value model, of the policy's size, and the sampler samples a group of every candidate at several lengths. The model's
update on the batch, which comes after a step, is timed as well.

    python benchmarks/prompt_curriculum.py
    python benchmarks/prompt_curriculum.py --engines transformers
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import harness
from decoding import ENGINES, POLICY, build, sampler_of, timed

ROLE = "prompt_value"
GOAL_LENGTH, GOAL = 512, 0.1


@dataclass(frozen=True)
class Work:
    """What is chosen from, and sampled."""

    chosen: int = 8
    oversample: int = 4
    group_size: int = 4
    prompt_tokens: int = 32
    lengths: tuple[int, ...] = (8, 64, GOAL_LENGTH)
    rounds: int = 3

    @property
    def candidates(self) -> int:
        return self.oversample * self.chosen

    @property
    def rows(self) -> int:
        """Rollouts of all candidates."""
        return self.candidates * self.group_size

    @property
    def completion_tokens(self) -> int:
        return max(self.lengths)


QUICK = Work(chosen=2, oversample=2, group_size=2, prompt_tokens=8, lengths=(2, 4), rounds=1)


def prompts_of(work: Work, number: int) -> list[Any]:
    """Candidates of a round, each another prompt."""
    from alignment.types import Prompt

    seeds = range(number * work.candidates, (number + 1) * work.candidates)
    ids = {seed: tuple((seed * 104729 + i * 31) % 4000 + 2 for i in range(work.prompt_tokens)) for seed in seeds}
    return [Prompt(str(seed), {"ids": ids[seed]}) for seed in seeds]


def learner_of(work: Work, policy: Any) -> Any:
    """The learner with the prompt value model."""
    from alignment.algorithms.value_losses import Scalar
    from alignment.engines.learner_config import TorchLearnerConfig
    from alignment.engines.torch_learner import TorchLearner
    from alignment.engines.value_model import ValueShape
    from alignment.engines.value_roles import ValueRoleSpec

    spec = ValueRoleSpec(ValueShape(Scalar()), build(work, 1).origin, of_prompts=True)  # pyright: ignore[reportArgumentType]
    config = TorchLearnerConfig(device="cpu", micro_batch_tokens=2048)
    return TorchLearner(policy.module, config, work.rounds + 1, 0, roles={ROLE: spec})


def side(engine: str, work: Work) -> dict[str, list[float]]:
    """Seconds of each round: of ``select``, of ``fit``, and of the rollouts at each length."""
    import alignment  # noqa: F401 - before torch: it says how threads wait

    import torch  # isort: skip

    from alignment.curricula import PromptCurriculum
    from alignment.engines.roles import handles
    from alignment.sampling import submit
    from alignment.types import Context, Request, SamplingParams

    policy = build(work, 0)  # pyright: ignore[reportArgumentType]
    learner, sampler = learner_of(work, policy), sampler_of(engine, work, policy, None)  # pyright: ignore[reportArgumentType]
    role = handles(learner, lambda prompt: prompt.row["ids"])[ROLE]
    component, context = PromptCurriculum(oversample=work.oversample), Context(0, 0, {ROLE: role})
    targets = torch.rand(work.chosen, generator=torch.Generator().manual_seed(0))

    def sample(candidates: Sequence[Any], length: int, number: int) -> None:
        params = SamplingParams(length)
        places = [(i, s) for i in range(len(candidates)) for s in range(work.group_size)]
        asked = [Request(f"{number}.{length}.{i}.{s}", candidates[i].row["ids"], params, i * 64 + s) for i, s in places]
        assert sum(len(c.token_ids) for c in submit(sampler, asked)) == work.rows * length

    found: dict[str, list[float]] = {name: [] for name in ("select", "fit", *map(str, work.lengths))}
    for number in range(work.rounds + 1):
        candidates = prompts_of(work, number)
        seconds = {
            "select": timed(lambda c=candidates: component.select(component.init(), c, work.chosen, context)),
            "fit": timed(lambda c=candidates: role.fit(c[: work.chosen], targets)),
        }
        for length in work.lengths if number else work.lengths[:1]:
            seconds[str(length)] = timed(lambda c=candidates, n=length, i=number: sample(c, n, i))
        for name in found if number else ():  # the first round warms up
            found[name].append(seconds[name])
    sampler.close()
    return found


def run_side(engine: str, quick: bool) -> dict[str, list[float]]:
    """The seconds of one engine."""
    command = [sys.executable, __file__, "--side", engine, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    lines = [line[1:] for line in done.stdout.splitlines() if line.startswith("@")]
    if done.returncode or not lines:
        raise SystemExit(f"{engine} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(lines[-1])


def rows_of(engine: str, found: Mapping[str, Sequence[float]], work: Work) -> list[dict[str, Any]]:
    """A row of the table for each length; ratios are medians of those within a round, with their range."""
    rows = []
    for length in work.lengths:
        shares = [chosen / sampled for chosen, sampled in zip(found["select"], found[str(length)], strict=True)]
        rows.append(
            {
                "sampler": engine,
                "length": length,
                "rollouts, s": median(found[str(length)]),
                "choosing, s": median(found["select"]),
                "fitting, s": median(found["fit"]),
                "times quicker": 1 / median(shares),
                "choosing / rollouts": median(shares),
                "from": min(shares),
                "to": max(shares),
            }
        )
    return rows


def goal(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether choosing takes little enough of the time of rollouts."""
    share = found["choosing / rollouts"]
    what = f"{found['sampler']}, length {found['length']}: time to choose over that of all candidates' rollouts"
    return {"what": what, "goal": f"at most {GOAL:g}", "measured": f"{share:.4f}", "met": share <= GOAL}


def main() -> None:
    """The benchmark, or one side of it."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--side", choices=ENGINES, help="for the benchmark itself")
    args = parser.parse_args()
    work = QUICK if args.quick else Work()
    if args.side:
        sys.stdout.write("@" + json.dumps(side(args.side, work)) + "\n")
        return
    rows = [row for engine in args.engines for row in rows_of(engine, run_side(engine, args.quick), work)]
    title = f"{work.chosen} of {work.candidates} prompts of {work.prompt_tokens} tokens, groups of {work.group_size}"
    harness.finish(
        {
            "title": "Choosing prompts by a value model beside sampling them all",
            "settings": {**vars(work), "policy": POLICY},
            "tables": [{"title": f"{title}; medians, and the range of the share", "rows": rows}],
            "equal": ["Candidates, threads, process; policy and value model have one size."],
            "not_equal": [
                "A group tells the pass rate with the noise of its size, a model with its own error.",
                "Weights are random, so that no token ends a row: every rollout has the whole length.",
                "Rewards are not computed.",
            ],
            "goals": [goal(row) for row in rows if row["length"] == GOAL_LENGTH],
        },
        args.json,
    )


if __name__ == "__main__":
    main()
