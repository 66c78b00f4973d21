"""The real loop and the real queue with simulated engines, from 8 to 4,096 of them: how busy they are, how stale
batches get, and how much time the one controller takes.

Engines, learner and their clock are simulated, so nothing waits; collector, player, queue (`Router`), records, credit
and logs are real, and their CPU time is measured. Lengths have a long tail (log-normal, sigma 1), cut off by the length
limit at four times the mean.

    python benchmarks/simulate.py
    python benchmarks/simulate.py --plot utilisation.png
"""

import heapq
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness

import alignment  # noqa: F401 - before torch: it says how threads wait

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from alignment.data.load import LoadedData  # noqa: E402
from alignment.engines.routing import Router  # noqa: E402
from alignment.online import train_online  # noqa: E402
from alignment.types import Completion, Request, keyed_seed  # noqa: E402
from tests.simulated import (  # noqa: E402
    Clock,
    Kept,
    SimulatedLearner,
    VerdictScorer,
    long_tailed,
    plan,
    prompts,
    simulated_job,
)

WORKERS = (8, 32, 128, 512, 1024, 2048, 4096)
QUICK_WORKERS = (8, 32)
CAPACITY, WAVES = 4, 4
"""Completions that an engine decodes together, and how often over it does in a step."""
MEAN_S, LIMIT_S, PUBLISH_S = 60.0, 240.0, 1.0
"""Of a completion, of the longest, and of the weights on their way, in simulated seconds."""
GROUP = 8
TOKENS = 24
MANY = 512
"""Engines with which a step has so many rollouts that two steps are enough."""
WARMUP = 2
"""Steps at the beginning that do not count."""


@dataclass
class RoutedSampler:
    """Engines behind the real queue; a completion takes as long as its length, whatever runs beside it."""

    clock: Clock
    router: Router
    seconds: Callable[[int], float]
    name: str = "simulated"
    version: int = 0
    busy_s: float = 0.0
    running: list[tuple[float, str, float, int]] = field(default_factory=list)
    """A heap: end, id, start, version."""

    def add(self, requests: Sequence[Request]) -> None:
        """As a sampler's."""
        self.router.add(requests)
        self._start()

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """As a sampler's; waiting moves the clock."""
        if self.running and timeout_s:
            self.clock.wait_until(min(self.running[0][0], self.clock.now_s + timeout_s))
        ended: list[Completion] = []
        while self.running and self.running[0][0] <= self.clock.now_s:
            end_s, id_, start_s, version = heapq.heappop(self.running)
            self.busy_s += end_s - start_s
            completion = Completion(id_, (3,) * TOKENS, (-1.0,) * TOKENS, "stop", ((version, 0),))
            if self.router.finished(completion):
                ended.append(completion)
            self._start(end_s)
        return ended

    def abort(self, ids: Collection[str]) -> None:
        """As a sampler's."""
        self.router.abort(ids)

    def close(self) -> None:
        """Nothing to end."""

    def publish(self, version: int) -> None:
        """As an update does."""
        self.version = version

    def _start(self, at_s: float | None = None) -> None:
        start_s = self.clock.now_s if at_s is None else at_s
        for _, requests in self.router.dispatch():
            for request in requests:
                end_s = start_s + self.seconds(keyed_seed(request.id))
                heapq.heappush(self.running, (end_s, request.id, start_s, self.version))


def lengths() -> tuple[Callable[[int], float], float]:
    """Seconds of a completion by its key, and their mean."""
    draw = long_tailed(MEAN_S, 1.0)
    table = [min(LIMIT_S, draw(key)) for key in range(4093)]
    return lambda key: table[key % len(table)], sum(table) / len(table)


def simulate(workers: int, staleness: int, counted: int = 6) -> dict[str, Any]:
    """A run of the real loop on ``workers`` engines, as one row of the table.

    An update takes as long as the engines need for a batch when none of them ever waits. Steps at the beginning, when
    engines fill up, do not count, nor do those at the end, for which everything is in flight already.
    """
    steps = WARMUP + counted + staleness
    clock, (seconds, mean_s) = Clock(), lengths()
    sampler = RoutedSampler(clock, Router(range(workers), CAPACITY), seconds)
    learner = SimulatedLearner(clock, lambda _: WAVES * mean_s, tick_s=1.0)
    groups = workers * CAPACITY * WAVES // GROUP
    stage = {
        "steps": steps,
        "prompts_per_step": groups,
        "group_size": GROUP,
        "max_staleness": staleness,
        "sampler": "vllm",
    }
    sink = Kept()
    with tempfile.TemporaryDirectory() as folder:
        recipe = plan(Path(folder), stage, {"save_every": 0, "rollouts_every": 0})
        data = LoadedData(train=prompts(groups))
        scorer = VerdictScorer(lambda rollout: float(keyed_seed(rollout.id) % 2))
        with simulated_job(recipe, sampler, learner, scorer, data, PUBLISH_S, sink) as (job, online):  # pyright: ignore
            marks = [(0.0, 0.0, 0.0)]
            finish = job.finish_step

            def finished(*args: Any) -> Any:
                state = finish(*args)
                marks.append((clock.now_s, time.process_time(), sampler.busy_s))
                return state

            job.finish_step = finished
            train_online(job, online, job.state)
    (start_s, start_cpu, start_busy), (end_s, end_cpu, end_busy) = marks[WARMUP], marks[WARMUP + counted]
    step_s, cpu_s = (end_s - start_s) / counted, (end_cpu - start_cpu) / counted
    lags = [record.metrics["staleness"] for record in sink.records if record.kind == "train"]
    lags = lags[WARMUP : WARMUP + counted]
    rollouts = groups * GROUP
    return {
        "engines": workers,
        "staleness allowed": staleness,
        "rollouts/step": rollouts,
        "step, simulated s": step_s,
        "engines busy": (end_busy - start_busy) / ((end_s - start_s) * workers * CAPACITY),
        "staleness mean": sum(lags) / len(lags),
        "staleness max": max(lags),
        "controller, s/step": cpu_s,
        "us/rollout": 1e6 * cpu_s / rollouts,
        "controller busy": cpu_s / step_s,
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """How busy engines and controller are, against the number of engines."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for staleness in sorted({row["staleness allowed"] for row in rows}):
        of = [row for row in rows if row["staleness allowed"] == staleness]
        count = [row["engines"] for row in of]
        axes.plot(count, [row["engines busy"] for row in of], "o-", label=f"engines, staleness {staleness}")
    axes.plot(count, [row["controller busy"] for row in of], "s--", label="controller")
    axes.set(xscale="log", ylim=(0, 1), xlabel="engines", ylabel="share of the time busy")
    axes.set_xscale("log", base=2)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """The benchmark."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, too")
    args = parser.parse_args()
    sizes = QUICK_WORKERS if args.quick else WORKERS
    rows = []
    for workers in sizes:
        counted = 2 if args.quick or workers > MANY else 6
        rows += [simulate(workers, staleness, counted) for staleness in (0, 1, 2)]
        harness.console.print(f"{workers:,} engines are done")
    largest = max(rows, key=lambda row: (row["engines"], row["us/rollout"]))
    saturated = int(largest["engines"] / max(row["controller busy"] for row in rows if row["engines"] == sizes[-1]))
    if args.plot:
        plot(rows, args.plot)
    result = {
        "title": "One controller and many engines",
        "settings": {"capacity": CAPACITY, "waves": WAVES, "mean_s": lengths()[1], "publish_s": PUBLISH_S},
        "tables": [{"title": "Simulated engines, real controller", "rows": rows}],
        "not_equal": [
            "Completions have 24 tokens here, whatever time they take: a controller's work grows with tokens, too.",
            "Talking to the engines is not in it, nor is moving tensors to the learner; the simulation itself is.",
        ],
        "goals": [
            {
                "what": f"controller's CPU time per rollout at {largest['engines']:,} engines",
                "goal": "at most 250 us",
                "measured": f"{largest['us/rollout']:.0f} us; busy all the time with about {saturated:,} engines",
                "met": largest["us/rollout"] <= 250,
            }
        ],
    }
    harness.finish(result, args.json)


if __name__ == "__main__":
    main()
