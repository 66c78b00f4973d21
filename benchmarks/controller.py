"""What the controller costs: everything in an online step that is neither the model nor a reward function.

The real loop (`train_online` with a real job: GRPO, `uniform`, `difficulty_filter`, JSON lines, flight recorder,
all at their defaults) runs against engines that do nothing: a sampler that answers at once from prepared completions, a
learner that prepares its mini-batches and stops there, a scorer that compares two texts in process. What is left is
choosing prompts, requests and their seeds, episodes, text, records, tensors, credit, metrics and files.

The scorer with its worker process is measured beside it: what it costs this process to hand completions over and to
take verdicts back.

    python benchmarks/controller.py                        # 10, 1,000 and 100,000 rollouts per step
    python benchmarks/controller.py --tokens 1000 --sizes 1000
    python benchmarks/controller.py --profile 10000        # where the time goes
"""

import cProfile
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import harness

import alignment  # noqa: F401 - before torch: it says how threads wait

import torch  # isort: skip
from torch import nn

import rewards  # noqa: F401 - registers exact_match
from alignment.algorithms.objective import Objective
from alignment.algorithms.state import fresh
from alignment.batching import split_minibatches
from alignment.checkpoint import Checkpoints
from alignment.data.load import LoadedData
from alignment.engines.assembly import Engines
from alignment.engines.config import SharedTransport
from alignment.flight import Watched
from alignment.job import Job
from alignment.metrics import Phases, Record, Sinks
from alignment.models import load_model
from alignment.online import train_online
from alignment.recipe import OnlineStage, Recipe
from alignment.rollouts import play
from alignment.runs import open_run
from alignment.scoring import Scorer
from alignment.signals import GracefulStop
from alignment.trackers import JsonlSink
from alignment.types import Batch, Completion, Group, Prompt, Request, Rollout, Score, keyed_seed

SIZES = (10, 1_000, 100_000)
QUICK_SIZES = (10, 1_000)
TOKENS = 4
LIMIT_US = 50.0
MODEL = {"alphabet": "0123456789+=", "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 2, "intermediate_size": 16}


@dataclass
class StubSampler:
    """Answers every request at once: right, wrong, right, wrong, so that no group is all alike."""

    module: nn.Module
    completions: Sequence[tuple[int, ...]]
    name: str = "stub"
    version: int = 0

    waiting: list[Request] = field(default_factory=list)

    def add(self, requests: Sequence[Request]) -> None:
        self.waiting += requests

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        versions, requests, self.waiting = ((self.version, 0),), self.waiting, []
        prepared = cycle([(ids, (-0.5,) * len(ids)) for ids in self.completions])
        return [
            Completion(request.id, ids, logp, "stop", versions)
            for request, (ids, logp) in zip(requests, prepared, strict=False)
        ]

    def abort(self, ids: Collection[str]) -> None: ...
    def close(self) -> None: ...


@dataclass
class StubLearner:
    """Goes through a batch as the embedded learner does, mini-batch by mini-batch, but computes no model."""

    module: nn.Module
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    needs: frozenset[str] = frozenset()
    of_prompts: tuple[str, ...] = ()

    def annotate(self, batch: Batch, needs: object) -> Batch:
        return batch

    def update(self, batch: Batch, objective: Objective | Watched) -> dict[str, float]:
        trained = 0
        for epoch in range(objective.epochs):
            key = keyed_seed("minibatches", batch.seed, batch.step, epoch)
            for rows in split_minibatches(batch, objective.minibatches, key):
                trained += int(objective.prepare(batch.rows(rows)).loss_mask_BT.sum())
        return {"tokens": float(trained), "loss": 0.0}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


@dataclass
class StubScorer:
    """Compares the text with the answer, in this process."""

    def score(self, groups: Sequence[Group], *, step: int = 0, max_steps: int = 0) -> list[Group]:
        return [replace(g, rollouts=tuple(_judged(r, g.prompt.row["answer"]) for r in g.rollouts)) for g in groups]


def _judged(rollout: Rollout, answer: str) -> Rollout:
    right = rollout.text == answer
    return rollout.judged({"exact_match": Score(1.0) if right else Score(0.0, "wrong")}, float(right))


@dataclass
class Stopwatch:
    """A sink that keeps the metrics of each step and the time at which it was complete."""

    records: list[Record] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def start(self, run: object) -> None: ...

    def log(self, record: Record) -> None:
        self.records.append(record)
        self.cpu_s.append(time.process_time())
        self.wall_s.append(time.perf_counter())

    def rollouts(self, step: int, stage: str, groups: object) -> None: ...

    def finish(self, result: object) -> None: ...

    def close(self) -> None: ...


def recipe(folder: Path, rollouts: int, steps: int) -> Recipe:
    """One online stage of ``rollouts`` per step, in groups of 8 or, where that does not divide, 5."""
    group_size = 8 if rollouts % 8 == 0 else 5
    stage = {
        "stage": "online",
        "name": "rl",
        "steps": steps,
        "prompts_per_step": rollouts // group_size,
        "group_size": group_size,
        "sampling": {"max_tokens": 4096},
        "curricula": ["uniform", {"name": "difficulty_filter", "low": 0.0, "high": 1.0}],
        "algorithm": {"advantage": "grpo", "minibatches": 2},
    }
    values = {
        "run": {"name": "controller", "output": str(folder), "sinks": ["jsonl"]},
        "model": {"build": MODEL},
        "rewards": ["exact_match"],
        "stages": [stage],
    }
    return Recipe.model_validate_json(json.dumps(values), strict=True)


@contextmanager
def job(rollouts: int, steps: int, tokens: int) -> Iterator[tuple[Job, OnlineStage, Stopwatch]]:
    """A job at the beginning of its stage, with engines that do nothing and twice as many prompts as a step takes."""
    with ExitStack() as stack:
        plan = recipe(Path(stack.enter_context(tempfile.TemporaryDirectory())), rollouts, steps)
        stage = plan.stages[0]
        assert isinstance(stage, OnlineStage)
        run = stack.enter_context(open_run(plan.run.output, plan.run.name))
        model = load_model(plan.model, seed=0)
        watch = Stopwatch()
        sinks = stack.enter_context(Sinks([watch, JsonlSink()]))
        sinks.start({"folder": run.folder})
        right, wrong = "1" * (tokens - 1), "2" * (tokens - 1)
        rows = [{"prompt": f"{i}+{7 * i}=", "answer": right} for i in range(2 * stage.prompts_per_step)]
        made = Job(
            recipe=plan,
            run=run,
            model=model,
            scorer=StubScorer(),  # pyright: ignore[reportArgumentType]
            checkpoints=Checkpoints(run.checkpoints, 3),
            sink=sinks,
            stop=GracefulStop(),
            data=LoadedData(train=[Prompt(f"train/{i}", row, f"train:{i}") for i, row in enumerate(rows)]),
        )
        eos = model.tokenizer.eos_token_id
        assert eos is not None
        answers = [(*model.tokenizer.encode(text), eos) for text in (right, wrong)]
        sampler, learner = StubSampler(model.module, answers), StubLearner(model.module)
        transport = SharedTransport().build(learner, sampler)
        made.engines = Engines(learner, sampler, transport)  # pyright: ignore[reportArgumentType]
        made.state = replace(made.state, components=fresh(stage.components()))
        yield made, stage, watch


def measure(rollouts: int, tokens: int) -> dict[str, Any]:
    """One column of the table: medians over steps, of which the first does not count."""
    steps = max(3, min(100, 10_000 // rollouts))
    with job(rollouts, steps + 1, tokens) as (made, stage, watch):
        made.phases = Phases(clock=time.process_time)
        train_online(made, stage, made.state)
    per_rollout = 1e6 / rollouts
    metrics = [record.metrics for record in watch.records[1:]]
    assert {m["rollouts"] for m in metrics} == {rollouts}, "the filter refilled: groups were all alike"
    names = sorted({name for m in metrics for name in m if name.startswith("time/")} - {"time/total"})
    phases = {name.removeprefix("time/"): per_rollout * median(m.get(name, 0.0) for m in metrics) for name in names}
    cpu_s, wall_s = (_median_step(times) for times in (watch.cpu_s, watch.wall_s))
    totals = {"all": per_rollout * cpu_s, "all, elapsed": per_rollout * wall_s}
    # What no phase covers is counters, the metrics' line and the rollouts that are written in full.
    return {"rollouts": rollouts, "phases": phases | {"rest": totals["all"] - sum(phases.values())}, **totals}


def _median_step(times: Sequence[float]) -> float:
    return median([after - before for before, after in zip(times[:-1], times[1:], strict=True)])


def measure_scorer(rollouts: int, tokens: int) -> dict[str, Any]:
    """What `Scorer` with one worker process costs this process, and how long it takes."""
    with job(rollouts, 1, tokens) as (made, stage, _):
        uids, player = range(stage.prompts_per_step), made.player(stage.environment)
        prompts = made.data.train[: stage.prompts_per_step]
        groups = play(player, prompts, uids, stage.group_size, made.params(stage.sampling), 0)
        cpu_s, wall_s = [time.process_time()], [time.perf_counter()]
        with Scorer(made.recipe.reward_specs, workers=1) as scorer:
            scorer.check()
            for _ in range(4):
                scored = scorer.score(groups)
                cpu_s.append(time.process_time())
                wall_s.append(time.perf_counter())
    assert {r.reward for g in scored for r in g.rollouts} == {0.0, 1.0}
    cpu, wall = (1e6 / rollouts * _median_step(times[1:]) for times in (cpu_s, wall_s))
    return {"rollouts": rollouts, "us per rollout": cpu, "us per rollout, elapsed": wall}


def main() -> None:
    """Measures, or profiles, at the sizes asked for."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="rollouts per step, multiples of 5")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens per completion (default %(default)s)")
    parser.add_argument("--profile", type=int, metavar="N", help="profile steps of N rollouts and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        with job(args.profile, 2, args.tokens) as (made, stage, _):
            profiler = cProfile.Profile()
            profiler.runcall(train_online, made, stage, made.state)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
        return
    sizes = args.sizes or (QUICK_SIZES if args.quick else SIZES)
    columns = []
    for size in sizes:
        columns.append(measure(size, args.tokens))
        harness.console.print(f"{size:,} rollouts per step: {columns[-1]['all']:.1f} us each")
    scorer = [measure_scorer(size, args.tokens) for size in sizes]
    harness.finish(result(columns, scorer, args.tokens), args.json)


def result(columns: Sequence[dict[str, Any]], scorer: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """What `harness.finish` shows and writes."""
    spent = [(name, us) for column in columns for name, us in column["phases"].items() if name != "rest"]
    names = dict.fromkeys(name for name, us in spent if us > 0)
    flat = [{**column["phases"], **column} for column in columns]
    rows = [
        {"us per rollout": name} | {f"{column['rollouts']:,}": column.get(name, 0.0) for column in flat}
        for name in (*names, "rest", "all", "all, elapsed")
    ]
    return {
        "title": "The controller, with engines that do nothing",
        "settings": {"tokens per completion": tokens, "group size": "8, or 5 where that does not divide", "threads": 1},
        "tables": [
            {"title": "CPU time of the controller by phase, at so many rollouts per step", "rows": rows},
            {"title": "Beside it: handing rollouts to a scoring process and back (exact_match)", "rows": scorer},
        ],
        "not_equal": [
            "Prompts are text; a chat template, rendered once per group, is not in these numbers.",
            "Text, tensors and the flight recorder cost more for longer completions (`--tokens`).",
        ],
        "goals": _goals({column["rollouts"]: column["all"] for column in columns}),
    }


def _goals(each_us: dict[int, float]) -> list[dict[str, Any]]:
    goals = [
        (f"CPU time per rollout at {size:,} rollouts per step", f"{us:.1f} us", us < LIMIT_US)
        for size, us in each_us.items()
    ]
    if len(each_us) > 1:
        (small, least), (large, most) = min(each_us.items()), max(each_us.items())
        slope = (large * most - small * least) / (large - small)
        fixed_ms = (least - slope) * small / 1e3
        goals.append(
            ("CPU time per rollout beyond a step's fixed cost", f"{slope:.1f} us + {fixed_ms:.2f} ms", slope < LIMIT_US)
        )
    under = f"under {LIMIT_US:.0f} us"
    return [{"what": what, "goal": under, "measured": measured, "met": met} for what, measured, met in goals]


if __name__ == "__main__":
    sys.exit(main())
