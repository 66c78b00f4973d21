"""Asynchronous training, on a simulated cluster: what is promised whatever the durations are."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alignment.collect
from alignment.collect import Collector, Sealed
from alignment.curricula import DifficultyFilter, Uniform
from alignment.data.load import LoadedData
from alignment.environments import Step, environments
from alignment.errors import UserError
from alignment.job import Job
from alignment.ledger import Ledger
from alignment.metrics import Phases
from alignment.online import train_online
from alignment.recipe import OnlineStage
from alignment.rollouts import WAIT_S, Player, play
from alignment.types import Prompt, Request, Rollout, SamplingParams, TrainState
from tests.simulated import (
    Clock,
    Kept,
    SimulatedLearner,
    SimulatedSampler,
    SimulatedThread,
    SimulatedTransport,
    VerdictScorer,
    keyed_share,
    long_tailed,
    plan,
    prompts,
    simulated_job,
)
from tests.test_rollouts import EOS, Letters

PARAMS = SamplingParams(max_tokens=64, stop_ids=(EOS,))
FRESH = TrainState(components={"curricula.0": {"epoch": 0, "cursor": 0}})
FILTER = DifficultyFilter(low=0, high=1, max_refills=200)


@environments.register("turns", source="this test")
@dataclass(frozen=True)
class Turns:
    """As many turns as the prompt asks for."""

    def reset(self, row: Mapping[str, Any]) -> tuple[Any, str]:
        return {"left": row["turns"]}, row["prompt"]

    def step(self, state: Any, completion: str) -> Step:
        left = state["left"] - 1
        return Step({"left": left}, "+", done=left <= 0)


@dataclass(frozen=True)
class Setup:
    """Sizes and durations of a simulated run, all durations with a long tail."""

    staleness: int = 1
    workers: int = 32
    prompts_per_step: int = 4
    group_size: int = 3
    rows: int = 11
    right: float = 0.5
    """The share of rollouts that are right; groups that are all alike are dropped."""
    turns: int = 2
    """At most; prompts differ."""
    in_flight: str = "continue"
    turn_s: float = 5.0
    sigma: float = 1.0
    update_s: float = 10.0
    publish_s: float = 0.5
    scoring_s: float = 0.3
    timing: int = 0
    """Which durations are drawn."""

    def draw(self, mean_s: float, salt: int) -> Callable[[int], float]:
        drawn = long_tailed(mean_s, self.sigma, self.timing * 7 + salt, 509)
        return lambda key: drawn(key) if mean_s else 0.0

    def learner(self, clock: Clock, idle: Callable[[], None] = lambda: None) -> SimulatedLearner:
        return SimulatedLearner(clock, self.draw(self.update_s, 2), idle, tick_s=max(0.1, self.update_s / 20))

    def prompts(self) -> list[Prompt]:
        turns = itertools.cycle(range(1, self.turns + 1))
        return [replace(p, row={**p.row, "turns": n}) for p, n in zip(prompts(self.rows), turns, strict=False)]

    def answer(self) -> Callable[[Request], tuple[tuple[int, ...], float]]:
        seconds = self.draw(self.turn_s, 1)
        return lambda request: ((ord("1"),) * (1 + request.seed % 9) + (EOS,), 0.01 + seconds(request.seed))

    def sampler(self, clock: Clock, kind: type[SimulatedSampler] = SimulatedSampler) -> SimulatedSampler:
        return kind(clock, self.workers, self.answer(), self.in_flight)  # pyright: ignore


SETUPS = st.builds(
    Setup,
    staleness=st.integers(0, 4),
    workers=st.integers(1, 64),
    prompts_per_step=st.integers(1, 5),
    group_size=st.integers(2, 4),
    rows=st.integers(1, 17),
    right=st.sampled_from([0.3, 0.5, 0.7]),
    turns=st.integers(1, 3),
    in_flight=st.sampled_from(["continue", "pause"]),
    sigma=st.sampled_from([0.0, 0.5, 1.5]),
    update_s=st.sampled_from([0.0, 1.0, 10.0, 100.0]),
    publish_s=st.sampled_from([0.0, 2.0]),
    scoring_s=st.sampled_from([0.0, 0.3, 5.0]),
    timing=st.integers(0, 1000),
)
many = settings(max_examples=60, deadline=None, derandomize=True)
few = settings(max_examples=12, deadline=None, derandomize=True)


def verdict(right: float) -> Callable[[Rollout], float]:
    """Another policy gives another answer to the same seed, so what is sampled again may end otherwise."""
    return lambda rollout: float(keyed_share(rollout.seed, rollout.versions) < right)


class Killed(BaseException):
    """The process is gone."""


class Run:
    """A collector with a simulated cluster, and the loop around it without tensors."""

    def __init__(self, setup: Setup, state: TrainState = FRESH, steps: int = 8, **changes: Any) -> None:
        self.setup, self.state, self.steps = setup, state, steps
        self.clock = Clock()
        self.sampler = setup.sampler(self.clock, changes.pop("kind", SimulatedSampler))
        self.transport = SimulatedTransport(self.clock, self.sampler, setup.publish_s)
        self.scorer = VerdictScorer(verdict(setup.right))
        self.player = Player(self.sampler, Letters(), Turns(), 20)  # pyright: ignore
        plain: dict[str, Any] = {
            "player": self.player,
            "scorer": self.scorer,
            "prompts": setup.prompts(),
            "curricula": (Uniform(), FILTER),
            "prompts_per_step": setup.prompts_per_step,
            "params": [PARAMS] * setup.group_size,
            "max_failed_share": 0.0,
            "seed": 5,
            "roles": {},
            "phases": Phases(),
            "steps": steps,
            "max_staleness": setup.staleness,
            "_scorers": SimulatedThread(self.clock, setup.draw(setup.scoring_s, 3)),
        }
        self.collector = Collector(**{**plain, **changes})
        self.learner = setup.learner(self.clock, self.collector.pump)
        self.transport.publish(state.step)

    def __iter__(self) -> Iterator[tuple[int, Sealed]]:
        """Each batch with the policy version that it trains."""
        while self.state.stage_step < self.steps:
            sealed = self.collector.collect(self.state)
            self.learner.wait(self.learner.update_s(self.state.step))
            yield self.state.step, sealed
            self.transport.publish(self.state.step + 1)
            self.state = sealed.state.next_step()

    def evaluate(self, uids: int = 3) -> None:
        """An evaluation on the same sampler."""
        player = Player(self.sampler, Letters(), Turns(), 20, playing=self.player.playing)  # pyright: ignore
        groups = play(player, self.setup.prompts()[:1] * uids, range(uids), 2, PARAMS, 9, "eval/")
        assert [g.uid for g in groups] == list(range(uids))


def lag(version: int, sealed: Sealed) -> int:
    """How old the oldest token of a batch is, of every run of every rollout."""
    return max(version - v for g in sealed.groups for r in g.rollouts for v, _ in r.versions)


@many
@given(SETUPS)
def test_no_token_that_is_trained_on_is_older_than_max_staleness_and_no_group_is_dropped_for_it(setup):
    for version, sealed in Run(setup):
        assert lag(version, sealed) <= setup.staleness
        assert min(version - v for g in sealed.groups for r in g.rollouts for v, _ in r.versions) >= 0
        assert len(sealed.groups) == setup.prompts_per_step
        assert set(sealed.dropped) <= {"difficulty_filter"}
        for group in sealed.sampled:
            alike = len({r.reward for r in group.rollouts}) == 1
            assert alike == (group.uid in sealed.dropped_by)


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("in_flight", ["continue", "pause"])
def test_the_bound_is_reached_and_queue_time_counts(k, in_flight):
    run = Run(Setup(staleness=k, in_flight=in_flight, workers=1000, right=0.5), steps=k + 6)
    assert max(lag(version, sealed) for version, sealed in run) == k


def test_versions_of_a_completion_that_goes_on_over_an_update_are_runs_and_a_pause_leaves_one():
    def runs(in_flight: str) -> list[int]:
        setup = Setup(staleness=2, in_flight=in_flight, turns=1, turn_s=30.0, update_s=5.0)
        return [len(r.versions) for _, sealed in Run(setup) for g in sealed.groups for r in g.rollouts]

    assert max(runs("continue")) > 1
    assert max(runs("pause")) == 1


@many
@given(SETUPS)
def test_batches_are_in_launch_order_and_every_group_is_in_one_place(setup):
    run = Run(setup)
    trained: list[int] = []
    seen: list[int] = []
    for _, sealed in run:
        sampled = [g.uid for g in sealed.sampled]
        assert sampled == sorted(sampled)
        trained += [g.uid for g in sealed.groups]
        seen += sampled
        in_flight = [uid for uid, _ in sealed.state.in_flight]
        assert in_flight == sorted(in_flight)
        assert sorted(seen + in_flight) == list(range(sealed.state.launched)), "every uid once"
    assert trained == sorted(trained), "never first finished, first taken"
    firsts = {request.id: request for request in reversed(run.sampler.asked or ())}
    rows = [firsts[f"{uid}.0"].prompt_ids for uid in range(run.state.launched)]
    for at in range(0, len(rows) - setup.rows + 1, setup.rows):
        assert len(set(rows[at : at + setup.rows])) == setup.rows, "every prompt once in an epoch"


@many
@given(SETUPS, st.integers(1, 64), st.integers(0, 1000))
def test_in_lockstep_durations_change_nothing(setup, workers, timing):
    one = Run(replace(setup, staleness=0), steps=3)
    other = Run(replace(setup, staleness=0, workers=workers, timing=timing, scoring_s=1.0, update_s=3.0), steps=3)
    assert [sealed for _, sealed in one] == [sealed for _, sealed in other]
    assert one.state == other.state and one.state.in_flight == []
    assert one.scorer.scored == other.scorer.scored, "rewards see the groups in the same order"
    assert {(r.id, r.prompt_ids, r.seed) for r in one.sampler.asked or ()} == {
        (r.id, r.prompt_ids, r.seed) for r in other.sampler.asked or ()
    }


@dataclass
class Mortal(SimulatedSampler):
    """Its process is killed at poll number ``polls``."""

    polls: int = 10**9

    def poll(self, timeout_s: float | None = None) -> Any:
        self.polls -= 1
        if self.polls < 0:
            raise Killed
        return super().poll(timeout_s)


def through_json(state: TrainState) -> TrainState:
    return TrainState(**json.loads(json.dumps(asdict(state))))


@many
@given(SETUPS, st.integers(1, 150))
def test_what_was_in_flight_is_launched_again_after_a_kill_and_the_ledger_adds_up(setup, polls):
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.jsonl")
        first = Run(setup, kind=Mortal)
        first.sampler.polls = polls  # pyright: ignore
        saved = FRESH
        try:
            for _, sealed in first:
                ledger.append(sealed.state.step + 1, sealed)
                if sealed.state.step % 2 == 0:  # later steps are run again
                    saved = sealed.state.next_step()
        except Killed:
            pass
        ledger.rewind(saved.step)
        again = Run(setup, through_json(saved))
        trained: dict[int, int] = {}
        for version, sealed in again:
            assert lag(version, sealed) <= setup.staleness
            ledger.append(sealed.state.step + 1, sealed)
            trained |= {g.uid: version for g in sealed.groups}
        seeds = {r.id: r.seed for r in reversed(first.sampler.asked or ())}
        asked = again.sampler.asked or []
        in_flight = [uid for uid, _ in saved.in_flight]
        if saved.step < again.steps:
            head = [f"{uid}.{i}" for uid in in_flight for i in range(setup.group_size)]
            assert [r.id for r in asked[: len(head)]] == head, "exactly these, first, in launch order"
            assert all(seeds[r.id] == r.seed for r in asked[: len(head)])
        uids = {int(r.id.partition(".")[0]) for r in asked}
        assert uids == {*in_flight, *range(saved.launched, again.state.launched)}, "nothing else is sampled twice"
        fates = ledger.fates()
        assert set(fates) == set(range(again.state.launched))
        assert sum(fate == "trained" for fate in fates.values()) == again.steps * setup.prompts_per_step
        assert "in flight" not in fates.values()


@many
@given(SETUPS, st.integers(1, 6))
def test_nothing_is_launched_beyond_the_last_batch_of_a_stage(setup, steps):
    run = Run(setup, steps=steps, curricula=(Uniform(),))
    assert sum(len(sealed.groups) for _, sealed in run) == steps * setup.prompts_per_step
    assert run.state.launched == steps * setup.prompts_per_step
    refilled = Run(setup, steps=steps)
    assert len(list(refilled)) == steps
    assert refilled.state.in_flight == [] and not refilled.player.playing


def test_what_finishes_while_the_learner_works_is_scored_meanwhile():
    run = Run(Setup(staleness=2, update_s=10_000.0, sigma=0.0, turn_s=50.0, scoring_s=20.0, workers=8))
    _, sealed = next(iter(run))
    assert sealed.state.in_flight
    assert sorted(run.scorer.scored) == list(range(sealed.state.launched))
    assert all(flight.group is not None for flight in run.collector.flights), "and the verdicts are there"


@dataclass
class Punctual(SimulatedSampler):
    """Notes how long each turn that follows another was not asked for."""

    ends_s: dict[str, float] = field(default_factory=dict)
    delays_s: list[float] = field(default_factory=list)

    def add(self, requests: Sequence[Request]) -> None:
        self.delays_s += [self.clock.now_s - self.ends_s[r.id] for r in requests if r.id in self.ends_s]
        super().add(requests)

    def _completion(self, ended: Any) -> Any:
        if not ended.request.id.startswith("eval/"):  # whose ids come again at each evaluation
            self.ends_s[ended.request.id] = ended.end_s
        return super()._completion(ended)


@few
@given(SETUPS)
def test_an_evaluation_in_the_middle_neither_loses_nor_delays_a_group(setup):
    setup = replace(setup, publish_s=0.0, in_flight="continue", scoring_s=0.0)
    run = Run(setup, kind=Punctual)
    plain = Run(setup)
    uids = []
    for (version, sealed), (_, alone) in zip(run, plain, strict=True):
        run.evaluate()
        uids += [g.uid for g in sealed.sampled]
        assert lag(version, sealed) <= setup.staleness
        if setup.staleness == 0:
            assert sealed == alone
    assert sorted(uids) == list(range(run.state.launched))
    assert max(run.sampler.delays_s, default=0.0) <= max(run.learner.tick_s, WAIT_S) + 1e-9  # pyright: ignore


# The real loop, with records, checkpoints and the ledger.


@contextmanager
def job(
    folder: Path, setup: Setup, steps: int = 6, kind: type[SimulatedSampler] = SimulatedSampler, **run: Any
) -> Iterator[tuple[Job, OnlineStage]]:
    stage = {
        "steps": steps,
        "prompts_per_step": setup.prompts_per_step,
        "group_size": setup.group_size,
        "max_staleness": setup.staleness,
        "curricula": ["uniform", {"name": "difficulty_filter", "low": 0, "high": 1, "max_refills": 200}],
        "environment": "turns",
        "sampler": "vllm",  # that a recipe may ask for staleness; a simulated one takes its place
    }
    clock = Clock()
    sampler, learner = setup.sampler(clock, kind), setup.learner(clock)
    sampler.answer = numbers(setup.answer())
    data = LoadedData(train=setup.prompts())
    scorer = VerdictScorer(verdict(setup.right))
    with pytest.MonkeyPatch.context() as patch:
        thread = SimulatedThread(clock, setup.draw(setup.scoring_s, 3))
        patch.setattr(alignment.collect, "ThreadPoolExecutor", lambda *_: thread)
        recipe = plan(folder, stage, run)
        with simulated_job(recipe, sampler, learner, scorer, data, setup.publish_s) as (made, online):
            yield made, online


def numbers(answer: Callable[[Request], tuple[tuple[int, ...], float]]) -> Callable[[Request], Any]:
    """Tokens of the simulated model: it has few."""
    return lambda request: ((3,) * len(answer(request)[0]), answer(request)[1])


@few
@given(SETUPS)
def test_the_loop_keeps_the_bound_and_its_account(setup):
    with TemporaryDirectory() as folder, job(Path(folder), setup) as (made, stage):
        made.sink.members = (kept := Kept(),)  # pyright: ignore
        state = train_online(made, stage, made.state)
        lags = [record.metrics["staleness"] for record in kept.records]
        assert len(lags) == stage.steps and max(lags) <= setup.staleness
        fates = made.ledger.fates()
        assert set(fates) == set(range(state.launched))
        assert sum(fate == "trained" for fate in fates.values()) == stage.steps * setup.prompts_per_step


@few
@given(SETUPS, st.integers(5, 120))
def test_the_loop_goes_on_after_a_kill_where_its_checkpoint_says(setup, polls):
    with TemporaryDirectory() as folder:
        with job(Path(folder), setup, kind=Mortal, save_every=2) as (made, stage):
            made.engines.sampler.polls = polls  # pyright: ignore
            try:
                train_online(made, stage, made.state)
            except Killed:
                pass
        with job(Path(folder), setup, save_every=2) as (made, stage):
            before = made.state
            state = train_online(made, stage, before)
            fates = made.ledger.fates()
            asked = [int(r.id.partition(".")[0]) for r in made.engines.sampler.asked]  # pyright: ignore
            assert set(asked) == {*(uid for uid, _ in before.in_flight), *range(before.launched, state.launched)}
            assert sum(fate == "trained" for fate in fates.values()) == stage.steps * setup.prompts_per_step


@dataclass
class Failing(SimulatedSampler):
    """Fails when it is polled without time to wait, which is what the collector does while the learner works."""

    error: Exception = field(default_factory=lambda: RuntimeError("broken"))

    def poll(self, timeout_s: float | None = None) -> Any:
        if timeout_s == 0 and self.published[-1][1] == 2:
            raise self.error
        return super().poll(timeout_s)


@pytest.mark.parametrize("error", [RuntimeError("broken"), UserError("no engine left"), FloatingPointError("nan")])
def test_what_fails_while_the_learner_works_stops_the_run_between_two_steps(tmp_path, error):
    with job(tmp_path, Setup(staleness=2), kind=Failing) as (made, stage):
        made.engines.sampler.error = error  # pyright: ignore
        with pytest.raises(type(error), match=str(error)):
            train_online(made, stage, made.state)
        assert made.state.step == made.engines.learner.updates == 3  # pyright: ignore
        assert made.settled, "the step that was under way is complete, and may be saved"


def test_what_is_too_old_is_noticed_when_it_is_trained_on(tmp_path):
    with job(tmp_path, Setup(staleness=1)) as (made, stage):
        made.engines.transport.publish = lambda version: {}  # pyright: ignore - new weights never arrive
        with pytest.raises(AssertionError, match="a group is 2 policy versions old, more than 1"):
            train_online(made, stage, made.state)
