"""What choosing prompts costs: CPU time of `select` and `observe`, against the number of prompts.

Each selector of the project alone, with a state in which it has learned something of every prompt. One that draws has
the whole data set as candidates, one that chooses among candidates as many as it asks for; one that admits prompts
stands beside `uniform`. `prompt_curriculum` asks a table here, whose time does not count: `prompt_curriculum.py`
measures it with a model.

    python benchmarks/curricula.py
    python benchmarks/curricula.py --sizes 1000 1000000
"""

import gc
import sys
import time
from collections.abc import Sequence
from functools import cache
from statistics import median
from typing import Any

import harness
import torch

from alignment.curricula import Uniform, curricula, select_prompts
from alignment.score import Score
from alignment.types import Context, Group, Prompt, Rollout, SamplingParams, Signals

SIZES = (10_000, 100_000, 1_000_000)
QUICK_SIZES = (1_000, 10_000)
WORST, EACH = "slowest, ms per 1,000", "ms per 1,000"
CHOSEN, LEVELS, CALLS, GROUP = 256, 8, 9, 8
LIMIT_MS = 1.0
"""Per 1,000 candidates."""
SAMPLING = SamplingParams(8)


class Table:
    """A prompt value model that knows: a level is as hard as it is high."""

    version = 0

    def __init__(self) -> None:
        self.seconds = 0.0
        """CPU time of all that it was asked."""

    def values(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        start = time.process_time()
        found = torch.tensor([p.row["level"] / LEVELS for p in prompts])
        self.seconds += time.process_time() - start
        return found

    def fit(self, prompts: Sequence[Prompt], targets: torch.Tensor) -> dict[str, float]:
        return {}


class Beside:
    """`uniform` and one that admits prompts, as if they were one selector."""

    def __init__(self, admits: Any) -> None:
        self.admits, self.both = admits, (Uniform(), admits)

    def init(self) -> dict[str, Any]:
        return {"curricula.0": Uniform().init(), "curricula.1": self.admits.init()}

    def select(self, state: Any, prompts: Sequence[Prompt], n: int, context: Context) -> tuple[list[Prompt], Any]:
        return select_prompts(self.both, state, prompts, n, context)

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        return {**state, "curricula.1": self.admits.observe(state["curricula.1"], signals)}


@cache
def rollouts(level: int) -> tuple[Rollout, ...]:
    """Of a group of that level, from all wrong to all right but one. All its groups share them, for room."""
    empty = Rollout("", "", (1,), (2,), (True,), (0.0,), "", "stop", 0, "none", SAMPLING, ((0, 0),))
    right = [float(i * LEVELS < (level - 1) * GROUP) for i in range(GROUP)]
    return tuple(empty.judged({"right": Score(value)}, value) for value in right)


def sampled(prompts: Sequence[Prompt]) -> list[Group]:
    """A group of each."""
    return [Group(uid, prompt, rollouts(prompt.row["level"])) for uid, prompt in enumerate(prompts)]


def learned(component: Any, prompts: Sequence[Prompt], context: Context) -> dict[str, Any]:
    """A state after every prompt was sampled once. One that keeps numbers by prompt has as many as there can be."""
    state = component.init()
    if "levels" in state:
        state = component.select(state, prompts, 1, context)[1]
    return observe(component, state, prompts, context)[0] if hasattr(component, "observe") else state


def observe(component: Any, state: Any, prompts: Sequence[Prompt], context: Context) -> tuple[dict[str, Any], float]:
    """The state after groups of ``prompts``, and the seconds that it took."""
    unused: Any = None  # selectors learn from groups, not from the batch
    signals = Signals(sampled(prompts), unused, {}, None, context)
    start = time.process_time()
    return component.observe(state, signals), time.process_time() - start


def measure(name: str, component: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """A row of the table."""
    prompts = list(prompts)  # what is remembered of a data set is not known of this one
    table = Table()
    context = Context(3, 0, {"prompt_value": table})
    refines = hasattr(component, "candidates")
    drawn, state, seconds, observing = Uniform().init(), learned(component, prompts, context), [], []
    gc.collect()
    gc.freeze()
    for _ in range(CALLS + 1):
        pool: Sequence[Prompt] = prompts
        if refines:
            pool, drawn = Uniform().select(drawn, prompts, component.candidates(CHOSEN), context)
        start, asked = time.process_time(), table.seconds
        chosen, state = component.select(state, pool, CHOSEN, context)
        seconds.append(time.process_time() - start - (table.seconds - asked))
        if hasattr(component, "observe"):
            state, taken = observe(component, state, chosen, context)
            observing.append(taken)
    gc.unfreeze()
    return {
        "selector": name,
        "prompts": len(prompts),
        "candidates": len(pool),
        "first select, ms": 1e3 * seconds[0],
        "select, ms": 1e3 * median(seconds[1:]),
        "observe, ms": 1e3 * median(observing) if observing else None,
        WORST: 1e6 * max(seconds) / len(pool),
        EACH: 1e6 * median(seconds[1:]) / len(pool),
    }


def main() -> None:
    """Measures at the sizes asked for."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="prompts of the data set")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = args.sizes or (QUICK_SIZES if args.quick else SIZES)
    ours = [e for e in curricula if e.cls.__module__.startswith("alignment.")]
    ours = [e for e in ours if hasattr(e.cls, "select") or hasattr(e.cls, "admits")]
    rows = []
    for size in sizes:
        prompts = [Prompt(f"train/{i}", {"prompt": str(i), "level": 1 + i % LEVELS}) for i in range(size)]
        for entry in ours:
            component = Beside(entry.cls()) if hasattr(entry.cls, "admits") else entry.cls()
            rows.append(measure(entry.name, component, prompts))
            harness.console.print(f"{entry.name}, {size:,} prompts: {rows[-1]['select, ms']:.2f} ms")
    harness.finish(result(rows), args.json)


def result(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `harness.finish` shows and writes."""
    return {
        "title": "Choosing prompts",
        "settings": {"chosen per call": CHOSEN, "levels": LEVELS, "rollouts per group": GROUP, "threads": 1},
        "tables": [{"title": "CPU time of one call, medians after the first", "rows": rows}],
        "not_equal": [
            "The first call of an epoch makes its order, and the first of all sorts the data set by arms; the "
            "candidates of one that chooses among some are drawn beforehand.",
            "Python's garbage collector does not look at the data set here (`gc.freeze`). In a run it does, at times, "
            "in whatever happens to allocate.",
            "`observe` is of the groups of one call; making those groups does not count.",
        ],
        "goals": [goal(name, rows) for name in dict.fromkeys(row["selector"] for row in rows)],
    }


def goal(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the median call of a selector, the first one aside, is quick enough at every size."""
    of = [row for row in rows if row["selector"] == name]
    worst, largest = max(row[EACH] for row in of), max(row["prompts"] for row in of)
    what = f"{name}: select per 1,000 candidates, up to {largest:,} prompts"
    return {"what": what, "goal": f"under {LIMIT_MS:g} ms", "measured": f"{worst:.3f} ms", "met": worst < LIMIT_MS}


if __name__ == "__main__":
    sys.exit(main())
