"""A cluster that is simulated: workers that sample, a learner, a scorer and weight updates share one clock.

Nothing here waits: whoever would wait moves the clock on. So a run of hours with thousands of workers takes moments,
and is the same every time. What is not simulated is all the rest: the collector, the player, the loop, its records.
"""

import heapq
import json
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

import rewards  # noqa: F401 - registers exact_match
from alignment.algorithms.state import fresh
from alignment.checkpoint import Checkpoints, load_state
from alignment.data.load import LoadedData
from alignment.engines.assembly import Engines
from alignment.job import Job
from alignment.metrics import Record, Sinks
from alignment.models import load_model
from alignment.recipe import OnlineStage, Recipe
from alignment.runs import open_run
from alignment.signals import GracefulStop
from alignment.types import Batch, Completion, Group, Prompt, Request, Rollout, Score, keyed_seed

Answer = Callable[[Request], tuple[tuple[int, ...], float]]
"""The tokens that a request gets, and how many seconds they take."""
MODEL = {"alphabet": "0123456789+=", "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 2, "intermediate_size": 16}


@dataclass
class Clock:
    """Simulated seconds."""

    now_s: float = 0.0

    def wait_until(self, at_s: float) -> None:
        """Time does not run backwards."""
        self.now_s = max(self.now_s, at_s)


@dataclass(frozen=True, slots=True, order=True)
class _Running:
    """A request in a slot; those that end first come first."""

    end_s: float
    number: int
    start_s: float
    request: Request = field(compare=False)
    token_ids: tuple[int, ...] = field(compare=False)


@dataclass
class SimulatedSampler:
    """``slots`` requests run at once, in the order in which they came; the others wait."""

    clock: Clock
    slots: int
    answer: Answer
    in_flight: Literal["continue", "pause"] = "continue"
    """What begun completions do when weights change: go on, or end first while nothing new begins."""
    name: str = "simulated"
    asked: list[Request] | None = field(default_factory=list)
    """Every request, in order; None does not keep them."""
    busy_s: float = 0.0
    """Of all slots, for completions that have ended."""
    queue: deque[Request] = field(default_factory=deque)
    running: list[_Running] = field(default_factory=list)
    """A heap."""
    ready: list[Completion] = field(default_factory=list)
    published: list[tuple[float, int]] = field(default_factory=lambda: [(-math.inf, 0)])
    """When each policy version came, in order."""
    _numbers: int = 0

    def add(self, requests: Sequence[Request]) -> None:
        self._run(self.clock.now_s)
        if self.asked is not None:
            self.asked += requests
        self.queue += requests
        self._fill(self.clock.now_s)

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        self._run(self.clock.now_s)
        if not self.ready and self.running:
            until_s = math.inf if timeout_s is None else self.clock.now_s + timeout_s
            self.clock.wait_until(min(self.running[0].end_s, until_s))
            self._run(self.clock.now_s)
        ready, self.ready = self.ready, []
        return ready

    def abort(self, ids: Collection[str]) -> None:
        self._run(self.clock.now_s)
        self.queue = deque(r for r in self.queue if r.id not in ids)
        self.ready = [c for c in self.ready if c.id not in ids]
        self.running = [r for r in self.running if r.request.id not in ids]
        heapq.heapify(self.running)
        self._fill(self.clock.now_s)

    def close(self) -> None: ...

    def publish(self, version: int) -> None:
        """The weights of ``version`` are in use from now on."""
        if self.in_flight == "pause":
            held, self.queue = self.queue, deque()
            self.clock.wait_until(max((r.end_s for r in self.running), default=0.0))
            self._run(self.clock.now_s)
            self.queue = held
        self._run(self.clock.now_s)
        self.published.append((self.clock.now_s, version))
        self._fill(self.clock.now_s)

    def utilisation(self) -> float:
        """The share of the time since the beginning that the slots were busy."""
        now_s = self.clock.now_s
        under_way_s = sum(min(r.end_s, now_s) - r.start_s for r in self.running)
        return (self.busy_s + under_way_s) / (self.slots * now_s) if now_s else 0.0

    def _run(self, until_s: float) -> None:
        """What happens until then: a slot takes the next request in the moment in which it becomes free."""
        while self.running and self.running[0].end_s <= until_s:
            ended = heapq.heappop(self.running)
            self.busy_s += ended.end_s - ended.start_s
            self.ready.append(self._completion(ended))
            self._fill(ended.end_s)

    def _fill(self, now_s: float) -> None:
        while self.queue and len(self.running) < self.slots:
            request = self.queue.popleft()
            token_ids, seconds = self.answer(request)
            self._numbers += 1
            heapq.heappush(self.running, _Running(now_s + seconds, self._numbers, now_s, request, token_ids))

    def _completion(self, ended: _Running) -> Completion:
        """A token is of the newest version that had come when its turn to be sampled came."""
        length, start_s = len(ended.token_ids), ended.start_s
        first = bisect_right(self.published, (start_s, math.inf)) - 1
        token_s = (ended.end_s - start_s) / length
        runs = {0: self.published[first][1]}
        for at_s, version in self.published[first + 1 :]:
            if at_s >= ended.end_s:
                break
            token = math.ceil((at_s - start_s) / token_s)
            if token < length:
                runs[token] = version
        versions = tuple((version, token) for token, version in runs.items())
        return Completion(ended.request.id, ended.token_ids, (-1.0,) * length, "stop", versions)


@dataclass
class SimulatedLearner:
    """Updates take ``update_s(number of the update)`` seconds, in which ``idle`` is called again and again."""

    clock: Clock
    update_s: Callable[[int], float]
    idle: Callable[[], None] = lambda: None
    tick_s: float = 0.1
    """How often ``idle`` is called."""
    updates: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    needs: frozenset[str] = frozenset()
    of_prompts: tuple[str, ...] = ()

    def annotate(self, batch: Batch, needs: object) -> Batch:
        return replace(batch, old_logp_BT=batch.behaviour_logp_BT)

    def update(self, batch: Batch, objective: Any, slot: str = "rl") -> dict[str, float]:
        self.wait(self.update_s(self.updates))
        self.updates += 1
        return {"loss": 0.0, "tokens": float(batch.loss_mask_BT.sum())}

    def wait(self, seconds: float) -> None:
        """As the handle of a learner in other processes does."""
        end_s = self.clock.now_s + seconds
        while self.clock.now_s < end_s:
            self.clock.wait_until(min(end_s, self.clock.now_s + self.tick_s))
            self.idle()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


@dataclass
class SimulatedTransport:
    """Weights that take ``seconds`` to arrive."""

    clock: Clock
    sampler: SimulatedSampler
    seconds: float = 0.0

    def publish(self, version: int) -> dict[str, float]:
        self.clock.wait_until(self.clock.now_s + self.seconds)
        self.sampler.publish(version)
        return {}


class _Due(Future[Any]):
    """Is done when the clock says so; who waits for it moves the clock."""

    def __init__(self, clock: Clock, due_s: float) -> None:
        super().__init__()
        self.clock, self.due_s = clock, due_s

    def done(self) -> bool:
        return self.clock.now_s >= self.due_s

    def result(self, timeout: float | None = None) -> Any:
        self.clock.wait_until(self.due_s)
        return super().result(0)


@dataclass
class SimulatedThread(Executor):
    """A thread whose jobs take ``seconds(number of the job)``."""

    clock: Clock
    seconds: Callable[[int], float]
    jobs: int = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        due = _Due(self.clock, self.clock.now_s + self.seconds(self.jobs))
        self.jobs += 1
        try:
            due.set_result(fn(*args, **kwargs))
        except Exception as error:
            due.set_exception(error)
        return due


@dataclass
class VerdictScorer:
    """The reward ``right`` of every rollout is what ``verdict`` says of it."""

    verdict: Callable[[Rollout], float]
    scored: list[int] = field(default_factory=list)
    """Uids in the order in which they came."""

    def score(self, groups: Sequence[Group], *, step: int = 0, max_steps: int = 0) -> list[Group]:
        self.scored += [g.uid for g in groups]
        return [replace(g, rollouts=tuple(self._judged(r) for r in g.rollouts)) for g in groups]

    def _judged(self, rollout: Rollout) -> Rollout:
        value = self.verdict(rollout)
        score = Score(1.0) if value else Score(0.0, "wrong")
        return rollout.judged({**rollout.scores, "exact_match": score}, value)


def long_tailed(mean: float, sigma: float, seed: int = 0, values: int = 4093) -> Callable[[int], float]:
    """Log-normal numbers by key: the same key, the same number. ``sigma`` 1 gives a tail as reasoning models have."""
    draw = random.Random(seed)
    table = [math.exp(draw.gauss(0.0, sigma) - sigma**2 / 2) * mean for _ in range(values)]
    return lambda key: table[key % values]


@dataclass
class Kept:
    """A sink that keeps what it is told."""

    records: list[Record] = field(default_factory=list)

    def start(self, run: object) -> None: ...

    def log(self, record: Record) -> None:
        self.records.append(record)

    def rollouts(self, step: int, stage: str, groups: object) -> None: ...
    def finish(self, result: object) -> None: ...
    def close(self) -> None: ...


def prompts(count: int) -> list[Prompt]:
    """Sums, so that the simulated model's tokenizer knows them."""
    return [Prompt(f"train/{i}", {"prompt": f"{i}+{7 * i}=", "answer": "1"}) for i in range(count)]


def plan(folder: Path, stage: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> Recipe:
    """One online stage, of GRPO unless ``stage`` says otherwise."""
    online = {"stage": "online", "name": "rl", "sampling": {"max_tokens": 64}, **stage}
    values = {
        "run": {"name": "simulated", "output": str(folder), "sinks": [], "flight_steps": 0, **(run or {})},
        "model": {"build": MODEL},
        "rewards": ["exact_match"],
        "stages": [online],
    }
    return Recipe.model_validate_json(json.dumps(values), strict=True)


@contextmanager
def simulated_job(
    recipe: Recipe,
    sampler: SimulatedSampler,
    learner: SimulatedLearner,
    scorer: Any,
    data: LoadedData,
    publish_s: float = 0.0,
    sink: Any = None,
) -> Iterator[tuple[Job, OnlineStage]]:
    """A job with these engines at the beginning of its stage, or where its run folder says that it stopped."""
    stage = recipe.stages[0]
    assert isinstance(stage, OnlineStage)
    with ExitStack() as stack:
        run = stack.enter_context(open_run(recipe.run.output, recipe.run.name))
        checkpoints = Checkpoints(run.checkpoints, 3)
        saved = checkpoints.latest(lambda problem: None)
        job = Job(
            recipe, run, load_model(recipe.model, 0), scorer, checkpoints, Sinks([sink or Kept()]), GracefulStop(), data
        )
        transport = SimulatedTransport(learner.clock, sampler, publish_s)
        job.engines = Engines(learner, sampler, transport)  # pyright: ignore[reportArgumentType]
        job.state = load_state(saved.folder) if saved else replace(job.state, components=fresh(stage.components()))
        job.ledger.rewind(job.state.step)
        learner.idle = job.idle
        yield job, stage


def keyed_share(*parts: object) -> float:
    """A number from 0 up to 1 that depends on ``parts`` alone."""
    return keyed_seed(*parts) / 2**63
