"""Curricula that learn which prompts to choose: golden numbers of their papers, their states, and whole runs."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import alignment
from alignment.curricula import (
    InstanceFilter,
    LevelSchedule,
    PromptCurriculum,
    SelfEvolving,
    Thompson,
    Uniform,
    curricula,
    places,
    select_prompts,
    thompson,
    with_selector,
)
from alignment.curricula.instance_filter import admission_probability
from alignment.curricula.orders import arm_of, arms_of
from alignment.curricula.prompt_curriculum import nearest
from alignment.errors import UserError
from alignment.types import Context, Prompt
from tests.curricula_helpers import Table, group, prompts, signals
from tests.test_train import Recorder, contents, lines
from tests.tiny import tiny

AT = Context(0, 0)
VALUES = [0.10, 0.45, 0.90, 0.55, 0.52, 0.30, 0.70, 0.99]


def through_json(state: Any) -> Any:
    back = json.loads(json.dumps(state))
    assert back == state
    return back


# Prompt curriculum learning


def table(values: list[float], **changes: Any) -> tuple[list[Prompt], Context, Table]:
    made = prompts(len(values))
    role = Table({p.id: v for p, v in zip(made, values, strict=True)}, **changes)
    return made, Context(0, 0, {"prompt_value": role}), role


@pytest.mark.parametrize(("target", "expected"), [(0.5, ["p4", "p1"]), (1.0, ["p7", "p2"]), (0.0, ["p0", "p5"])])
def test_prompts_nearest_to_the_target_are_chosen_and_ties_go_to_the_first(target, expected):
    made, context, _ = table(VALUES)
    chosen, state = PromptCurriculum(target=target).select(PromptCurriculum().init(), made, 2, context)
    assert [p.id for p in chosen] == expected
    shown = PromptCurriculum().metrics(through_json(state))
    assert shown["candidates"] == pytest.approx(sum(VALUES) / 8)


def test_no_oversampling_is_the_candidates_as_they_come_and_asks_no_model():
    made, context, role = table(VALUES)
    chosen, _ = PromptCurriculum(oversample=1).select(PromptCurriculum().init(), made, 8, context)
    assert chosen == made and role.asked == 0 and PromptCurriculum(oversample=1).candidates(8) == 8


def test_a_tabular_model_goes_to_the_mean_reward_as_the_closed_form_says():
    made, context, role = table([0.9, 0.2], lr=0.1)
    component, state = PromptCurriculum(), PromptCurriculum().init()
    sampled = [group(made[0], [1, 0, 0, 0]), group(made[1], [1, None, 1, 0]), group(made[1], [None, None])]
    for j in range(1, 6):
        state = component.observe(state, signals(sampled, step=j, roles=context.roles))
        assert role.table["p0"] == pytest.approx(0.25 + (0.9 - 0.25) * (1 - 0.2) ** j)
        assert role.table["p1"] == pytest.approx(2 / 3 + (0.2 - 2 / 3) * (1 - 0.2) ** j)
    assert through_json(state)["version"] == 5
    assert state["error"] < 0.35, "measured before the fit"
    untouched = component.observe(state, signals([group(made[0], [None])], roles=context.roles))
    assert untouched == state and role.version == 5


def test_steered_rollouts_say_nothing_of_the_policy():
    made, context, role = table([0.5, 0.5], lr=0.5)
    PromptCurriculum().observe(
        PromptCurriculum().init(), signals([group(made[0], [0, 0, 1, 1], steered=(2, 3))], roles=context.roles)
    )
    assert role.table["p0"] == 0.0


def test_a_share_explores_without_choosing_anything_twice():
    made, context, _ = table([i / 100 for i in range(100)])
    component = PromptCurriculum(explore_frac=0.3)
    chosen, _ = component.select(component.init(), made, 10, context)
    greedy, _ = PromptCurriculum().select(component.init(), made, 10, context)
    assert chosen[:7] == greedy[:7] and len({p.id for p in chosen}) == 10
    assert chosen == component.select(component.init(), made, 10, context)[0]
    made, context, _ = table([i / 400 for i in range(400)])
    chosen, greedy = (PromptCurriculum(explore_frac=f).select({}, made, 100, context)[0] for f in (0.29, 0.0))
    assert chosen[:71] == greedy[:71] and chosen[71] != greedy[71], "29 of 100, though 28.999... in floats"
    explored = Counter(i for key in range(2000) for i in nearest(torch.arange(10.0), 0.0, 4, 2, key)[2:])
    assert set(explored) == set(range(2, 10)) and max(explored.values()) < 1.2 * min(explored.values())


def test_uniform_draws_the_candidates_of_those_that_choose_among_some():
    assert with_selector([PromptCurriculum()]) == (Uniform(), PromptCurriculum())
    assert with_selector([SelfEvolving(), PromptCurriculum()]) == (SelfEvolving(), PromptCurriculum())
    with pytest.raises(UserError, match="'self_evolving' must be the first"):
        with_selector([PromptCurriculum(), SelfEvolving()])


# The bandit


def q_after(rewards: list[list[float]], component: SelfEvolving, q: dict[str, float], arms: list[str]) -> Any:
    made = prompts(len(rewards), level=arms)
    state = {**component.init(), "q": q}
    return component.observe(state, signals([group(p, r) for p, r in zip(made, rewards, strict=True)]))["q"]


def test_q_follows_its_closed_form():
    component, q = SelfEvolving(std="population"), {"a": 0.0}
    found = []
    for _ in range(5):
        q = q_after([[1, 0]], component, q, ["a"])
        found.append(q["a"])
    assert found == [0.5, 0.75, 0.875, 0.9375, 0.96875]
    slow, q = SelfEvolving(std="population", rate=0.1), {"a": 0.0}
    for n in range(1, 9):
        q = q_after([[1, 0]], slow, q, ["a"])
        assert q["a"] == pytest.approx(1 - 0.9**n)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, [0.5065, 0.3072, 0.1863]), (0.4, [0.7307, 0.2093, 0.0600]), (0.2, [0.9184, 0.0754, 0.0062])],
)
def test_arms_are_drawn_by_a_softmax(temperature, expected):
    shares = SelfEvolving(temperature=temperature).probabilities({"a": 1.0, "b": 0.5, "c": 0.0})
    assert list(shares.values()) == pytest.approx(expected, abs=5e-5)


def test_the_softmax_is_stable_and_goes_to_uniform():
    assert list(SelfEvolving().probabilities({"a": 1e4, "b": 1e4 - 1}).values()) == pytest.approx(
        [0.7311, 0.2689], abs=5e-5
    )
    assert list(SelfEvolving(temperature=1e9).probabilities({"a": 5.0, "b": 0.0}).values()) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("absent", "expected"), [("decay", [1.0, 0.5]), ("hold", [1.0, 1.0])])
def test_both_treatments_of_arms_that_were_not_sampled(absent, expected):
    component = SelfEvolving(absent=absent, std="population")
    assert list(q_after([[1, 0]], component, {"0": 1.0, "1": 1.0}, ["0"]).values()) == expected


@pytest.mark.parametrize(("std", "expected"), [("population", 0.8660), ("sample", 0.75)])
def test_the_signal_of_a_group(std, expected):
    found = SelfEvolving(std=std).magnitudes([1, 0, 0, 0])
    assert sum(found) / 4 == pytest.approx(expected, abs=5e-5)
    assert SelfEvolving(std=std).magnitudes([0.1] * 7) == [0.0] * 7 and SelfEvolving().magnitudes([1.0]) == [0.0]
    assert SelfEvolving(normalise="none").magnitudes([1, 0, 0, 0]) == [0.75, 0.25, 0.25, 0.25]


def test_a_stationary_bandit_finds_the_arm_of_middling_difficulty():
    component = SelfEvolving(std="population", temperature=0.2)
    rewards = [[1.0] * k + [0.0] * (20 - k) for k in (1, 10, 19)]
    q = {}
    for _ in range(30):
        q = q_after(rewards, component, q, ["hard", "middle", "easy"])
    assert q == pytest.approx({"hard": 0.4359, "middle": 1.0, "easy": 0.4359}, abs=1e-4)
    assert 2 * math.sqrt(0.05 * 0.95) == pytest.approx(q["hard"], abs=1e-4)
    shares = component.probabilities(q)
    assert max(shares, key=shares.__getitem__) == "middle"


def test_arms_are_values_or_combinations_and_each_goes_through_its_prompts():
    made = prompts(12, level=[1, 2] * 6, kind=["x"] * 6 + ["y"] * 6)
    assert arm_of(made[1], ("level", "kind")) == "2+x"
    assert {arm: len(at) for arm, at in arms_of(made, ("level", "kind")).items()} == dict.fromkeys(
        ("1+x", "1+y", "2+x", "2+y"), 3
    )
    component = SelfEvolving(by=("level", "kind"), temperature=0.1)
    state = {**component.init(), "q": {"2+x": 100.0}}
    chosen, after = component.select(state, made, 7, AT)
    times = Counter(p.id for p in chosen)
    assert sorted(times.values()) == [2, 2, 3] and set(times) == {"p1", "p3", "p5"}, "epoch by epoch"
    assert after["cursors"] == {"2+x": [2, 1]} and set(after["q"]) == {"1+x", "1+y", "2+x", "2+y"}
    with pytest.raises(UserError, match="p0 has no column 'topic'; its columns are: prompt, level"):
        SelfEvolving(by=("topic",)).select(component.init(), prompts(2, level=[1, 1]), 1, AT)


def test_draws_follow_the_probabilities_and_hang_on_the_state():
    made = prompts(30, level=[0, 1, 2] * 10)
    component = SelfEvolving()
    state = {**component.init(), "q": {"0": 1.0, "1": 0.5, "2": 0.0}}
    chosen, after = component.select(state, made, 20_000, AT)
    counts = Counter(p.row["level"] for p in chosen)
    assert [counts[i] / 20_000 for i in range(3)] == pytest.approx([0.5065, 0.3072, 0.1863], abs=0.015)
    assert component.select(through_json(state), made, 50, AT) == component.select(state, made, 50, AT)
    again, _ = component.select(after, made, 50, AT)
    assert again != component.select(state, made, 50, AT)[0], "the next draw is another"
    first, _ = component.select({**state, "draws": 5}, made, 50, Context(0, 1))
    assert first != component.select({**state, "draws": 5}, made, 50, Context(0, 2))[0]


def test_the_bandit_learns_from_groups_whose_rewards_are_all_equal():
    component = SelfEvolving(std="population")
    assert q_after([[1, 0], [1, 1]], component, {}, ["a", "a"]) == {"a": 0.25}
    assert component.metrics({"q": {"a": 0.25}}) == {"q/a": 0.25, "share/a": 1.0}
    assert component.metrics({"q": {str(i): 0.0 for i in range(33)}}) == {"arms": 33.0}


# Levels


def test_a_level_opens_when_the_one_before_is_solved_often_enough():
    made = prompts(40, level=[1, 2, 3, 10] * 10)
    component = LevelSchedule(window=4, threshold=0.75, newest=0.5)
    chosen, state = component.select(component.init(), made, 12, AT)
    assert {p.row["level"] for p in chosen} == {1} and state["levels"] == ["1", "2", "3", "10"], "by number"
    level = {n: next(p for p in made if p.row["level"] == n) for n in (1, 2, 3, 10)}
    state = component.observe(state, signals([group(level[1], [1, 1])] * 3))
    assert state["open"] == 1, "the window is not full"
    state = component.observe(through_json(state), signals([group(level[1], [0, 0]), group(level[2], [1, 1])]))
    assert state["open"] == 2 and state["rates"] == [], "0.75 of level 1 alone"
    chosen, state = component.select(state, made, 4000, AT)
    counts = Counter(p.row["level"] for p in chosen)
    assert set(counts) == {1, 2} and counts[2] / 4000 == pytest.approx(0.5, abs=0.03)
    state = component.observe(state, signals([group(level[2], [1, 0])] * 9))
    assert state["open"] == 2 and component.metrics(state) == {"open": 2.0, "rate": 0.5}
    for n in (2, 3, 10, 10):
        state = component.observe(component.select(state, made, 1, AT)[1], signals([group(level[n], [1, 1])] * 4))
    assert state["open"] == 4, "after the last there is no more"


def test_levels_are_numbers():
    with pytest.raises(UserError, match="by the numbers in their column 'level', and could not convert string"):
        LevelSchedule().select(LevelSchedule().init(), prompts(2, level=["easy", "hard"]), 1, AT)


# The tracker


def test_beliefs_are_beta_and_evidence_fades():
    made, component = prompts(3), Thompson(half_life=10)
    state = component.observe(component.init(), signals([group(made[0], [1, 1, 1, 0]), group(made[1], [None])], step=0))
    a, b = component.beliefs(through_json(state), made, 0)
    assert (a.tolist(), b.tolist()) == ([4.0, 1.0, 1.0], [2.0, 1.0, 1.0])
    a, b = component.beliefs(state, made, 10)
    assert (a.tolist(), b.tolist()) == ([2.5, 1.0, 1.0], [1.5, 1.0, 1.0])
    state = component.observe(state, signals([group(made[0], [0, 0])], step=20))
    assert state["recent"] == {"p0": [0.75, 2.25, 20]} and not state["seen"], "only what was sampled"
    assert component.metrics(state) == {"seen": 1.0}


def test_counts_do_not_hang_on_when_the_two_tables_become_one(monkeypatch):
    made, component = prompts(5), Thompson(half_life=3)
    ends = []
    for size in (0, 1, 3, 100):
        monkeypatch.setattr(thompson, "RECENT", size)
        state = component.init()
        for step in range(9):
            found = [group(made[(step + i) % 5], [1, step % 2]) for i in range(3)]
            state = component.observe(through_json(state), signals(found, step=step))
        assert component.metrics(state) == {"seen": 5.0} and len(state["recent"]) <= max(size, 3)
        ends.append([b.tolist() for b in component.beliefs(state, made, 9)])
    assert ends[0] == ends[1] == ends[2] == ends[3]


def test_thompson_sampling_chooses_what_is_likely_near_the_target():
    made, component = prompts(30), Thompson()
    known = {f"p{i}": [90.0, 10.0, 0] if i < 10 else [50.0, 50.0, 0] for i in range(20)}
    counts: Counter[str] = Counter()
    for draws in range(200):
        chosen, after = component.select({"seen": known, "recent": {}, "draws": draws}, made, 7, AT)
        assert len({p.id for p in chosen}) == 7 and after["draws"] == draws + 1
        counts.update("easy" if int(p.id[1:]) < 10 else "middle" if int(p.id[1:]) < 20 else "new" for p in chosen)
    assert counts["easy"] == 0 and counts["middle"] > counts["new"] > 100
    same = [component.select({"seen": known, "recent": {}, "draws": 3}, made, 7, AT)[0] for _ in range(2)]
    assert same[0] == same[1] != component.select({"seen": known, "recent": {}, "draws": 3}, made, 7, Context(0, 1))[0]
    assert component.select(component.init(), made[:5], 5, AT)[0] == made[:5]


# Instances that teach nothing


def drawn_through(
    component: Any, state: Any, made: list[Prompt], n: int, context: Context = AT, drawer: Any = None, drawn: Any = None
) -> tuple[list[Prompt], Any]:
    """``n`` prompts that ``component`` lets in, and the state of the drawer afterwards."""
    drawer = drawer or Uniform()
    states = {"curricula.0": drawn or drawer.init(), "curricula.1": state}
    chosen, after = select_prompts([drawer, component], states, made, n, context)
    assert after["curricula.1"] == state
    return chosen, after["curricula.0"]


ROWS = [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(("mastered", "kept"), [(False, ["p1", "p2"]), (True, ["p1"])])
def test_hopeless_prompts_are_left_out_and_mastered_ones_if_asked(mastered, kept):
    made, component = prompts(3), InstanceFilter(rollouts=4, drop_mastered=mastered)
    state = component.observe(component.init(), signals([group(p, r) for p, r in zip(made, ROWS, strict=True)], step=7))
    chosen, _ = drawn_through(component, state, made, 6 * len(kept))
    assert Counter(p.id for p in chosen) == dict.fromkeys(kept, 6), "epochs over those that are left"
    assert set(state["dropped"].values()) == {7}
    assert component.metrics(state) == {"dropped": 3.0 - len(kept)}


def test_it_takes_so_many_rollouts_in_a_row():
    made, component = prompts(1), InstanceFilter(rollouts=6)
    state = component.observe(component.init(), signals([group(made[0], [0, 0, None, 0, 0])]))
    assert state["runs"] == {"p0": -4} and not state["dropped"]
    assert component.observe(state, signals([group(made[0], [1, 0])]))["runs"] == {}
    assert component.observe(state, signals([group(made[0], [0, 0])]))["dropped"] == {"p0": 0}
    assert component.run(-3, [True]) == 0 == component.run(-3, [False, True])
    assert InstanceFilter(drop_mastered=True).run(-3, [True, True]) == 2


def test_prompts_are_let_in_again_and_when_none_is_left_it_says_so():
    made, component = prompts(2), InstanceFilter(rollouts=2, recheck_every=5)
    hopeless = signals([group(p, [0, 0]) for p in made], step=10)
    state = component.observe(component.init(), hopeless)
    with pytest.raises(UserError, match=r"'instance_filter' left out the last 5 prompts .* recheck_every"):
        drawn_through(component, state, made, 1, Context(14, 0))
    chosen, _ = drawn_through(component, state, made, 2, Context(15, 0))
    assert {p.id for p in chosen} == {"p0", "p1"}
    state = component.observe(state, signals([group(made[0], [0, 1])], step=15))
    assert state["dropped"] == {"p1": 10}, "one was solved meanwhile"


def test_how_likely_a_prompt_is_let_in():
    assert admission_probability(0.1, 8) == pytest.approx(0.5695, abs=5e-5)
    state = InstanceFilter(rollouts=8).init()
    generator = torch.Generator().manual_seed(0)
    made = prompts(4000)
    right = torch.rand(4000, 8, generator=generator) < 0.1
    state = InstanceFilter(rollouts=8).observe(
        state, signals([group(p, row) for p, row in zip(made, right.double().tolist(), strict=True)])
    )
    assert 1 - len(state["dropped"]) / 4000 == pytest.approx(0.5695, abs=0.03)


def test_without_anything_to_leave_out_nothing_is_another():
    made, drawers = prompts(12, level=[1 + i % 3 for i in range(12)]), (Uniform(), SelfEvolving(), LevelSchedule())
    for drawer in drawers:
        state, plain = drawer.init(), drawer.init()
        for n in (3, 9, 1, 8):
            chosen, state = drawn_through(
                InstanceFilter(), InstanceFilter().init(), made, n, drawer=drawer, drawn=state
            )
            expected, plain = drawer.select(plain, made, n, AT)
            assert chosen == expected and state == plain


@pytest.mark.parametrize("drawer", [SelfEvolving(temperature=0.5), LevelSchedule(start=3)], ids=["bandit", "levels"])
def test_whoever_draws_hopeless_prompts_are_left_out(drawer):
    """Of 30 prompts of three levels all of the first level are out, and every other one of the second."""
    made = prompts(30, level=[1 + i % 3 for i in range(30)])
    out = {p.id for i, p in enumerate(made) if i % 3 == 0 or i % 6 == 1}
    hopeless = signals([group(p, [0, 0] if p.id in out else [0, 1]) for p in made])
    state = InstanceFilter(rollouts=2).observe(InstanceFilter().init(), hopeless)
    chosen, after = drawn_through(InstanceFilter(rollouts=2), state, made, 300, drawer=drawer, drawn=drawer.init())
    seen = Counter(p.id for p in chosen)
    assert not seen.keys() & out and len(seen) == 30 - len(out) == 15
    arms = Counter(p.row["level"] for p in chosen)
    assert 1.6 < arms[3] / arms[2] < 2.6 if isinstance(drawer, SelfEvolving) else arms[3] > 3 * arms[2]
    assert after["draws"] > 1, "it went on from where it was"
    again = drawn_through(
        InstanceFilter(rollouts=2), through_json(state), made, 300, drawer=drawer, drawn=drawer.init()
    )
    assert again == (chosen, after)


def test_those_who_choose_get_candidates_that_are_all_let_in():
    made = prompts(40)
    state = InstanceFilter(rollouts=1).observe(InstanceFilter().init(), signals([group(p, [0]) for p in made[:30]]))
    seen: list[int] = []

    class Counting(Thompson):
        def select(self, state: Any, prompts: Any, n: int, context: Context) -> Any:
            seen.extend(int(p.id[1:]) for p in prompts)
            return super().select(state, prompts, n, context)

    chain = [Uniform(), Counting(oversample=2), InstanceFilter(rollouts=1)]
    states = {"curricula.0": Uniform().init(), "curricula.1": Thompson().init(), "curricula.2": state}
    chosen, _ = select_prompts(chain, states, made, 5, AT)
    assert len(chosen) == 5 and sorted(seen) == list(range(30, 40)), "also where it stands last in the list"


# All of them


OURS = [entry for entry in curricula if entry.cls.__module__.startswith("alignment.")]
CHOOSING = [entry for entry in OURS if hasattr(entry.cls, "select") or hasattr(entry.cls, "admits")]


@pytest.mark.parametrize("entry", CHOOSING, ids=lambda e: e.name)
def test_selectors_choose_what_is_asked_for_and_say_so_twice(entry):
    component = entry.cls()
    made = prompts(200, level=[1 + i % 3 for i in range(200)])
    role = Table({p.id: int(p.id[1:]) / 200 for p in made})
    chain = with_selector([component])
    states = {f"curricula.{i}": c.init() for i, c in enumerate(chain)}  # pyright: ignore[reportAttributeAccessIssue]
    before = json.dumps(states)
    runs = [select_prompts(chain, json.loads(before), made, 24, Context(3, 5, {"prompt_value": role})) for _ in "ab"]
    assert runs[0] == runs[1] and len(runs[0][0]) == 24 and json.dumps(states) == before
    through_json(runs[0][1])


LEVELS = {"name": "procedural", "task": {"name": "arithmetic", "sizes": [4, 9]}, "levels": [1, 2]}
FORMAT = [{"name": "format", "pattern": "[0-4].*"}]
SHORT = {"name": "difficulty_filter", "low": 0.0, "high": 1.0, "max_refills": 0, "on_exhausted": "short"}
RUNS: dict[str, dict[str, Any]] = {
    "bandit and buffer": {"curricula": [{"name": "self_evolving", "by": ["level", "task"]}, SHORT, "sample_buffer"]},
    "levels and tracker": {"curricula": [{"name": "level_schedule", "window": 2, "threshold": 0.1}, "thompson"]},
    "bandit and instances": {"curricula": [{"name": "self_evolving"}, {"name": "instance_filter", "rollouts": 4}]},
    "shuffled filter": {"curricula": ["uniform", {"name": "shuffled", "of": SHORT}]},
    "instances and model": {
        "curricula": [{"name": "instance_filter", "rollouts": 4}, {"name": "prompt_curriculum", "oversample": 2}],
        "prompt_value": {"name": "model", "lr": 1e-2},
    },
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_with_it_resumes_bit_for_bit(tmp_path, run):
    """Seven steps, the last four with the curricula; one run is stopped among them and goes on."""
    change = {
        "data": {name: LEVELS | {"split": name} for name in ("train", "demonstrations")},
        "rewards": FORMAT,
        "stages": {1: {"steps": 6, **RUNS[run]}},
    }
    whole = alignment.train(tiny(tmp_path, {**change, "run": {"name": "whole"}}))
    parts = tiny(tmp_path, {**change, "run": {"name": "parts"}})
    assert alignment.train(parts, sinks=[Recorder(6)])["status"] == "interrupted"
    second = alignment.train(parts)
    assert contents(second["folder"]) == contents(whole["folder"]) and lines(second["folder"]) == lines(whole["folder"])
    raw = contents(whole["folder"])["state.json"]
    assert isinstance(raw, bytes)
    state = json.loads(raw)["components"]
    ledger = [json.loads(line) for line in (Path(whole["folder"]) / "ledger.jsonl").read_text().splitlines()]
    if "buffer" in run:
        assert any(line["replayed"] for line in ledger), "some batch was short and was filled up"
        stale = {line["step"]: line["staleness"] for line in lines(whole["folder"]) if "staleness" in line}
        assert all(stale[line["step"]] > 0 for line in ledger if line["replayed"]), "so log-probabilities are compared"
        assert sum(state["curricula.0"]["q"].values()) > 0
    if "levels" in run:
        assert state["curricula.0"]["open"] == 2 and state["curricula.1"]["recent"]
    if "model" in run:
        assert state["curricula.2"]["version"] == 6 and state["curricula.2"]["error"] is not None
    if "instances" in run:
        assert state["curricula.1"]["dropped"], "some prompt was left out"


@pytest.mark.parametrize(
    "curriculum", [Thompson(oversample=4), PromptCurriculum(oversample=4)], ids=["thompson", "pcl"]
)
def test_no_prompt_is_chosen_twice_where_there_are_enough(curriculum):
    """A data set smaller than the candidates: they run over the end of an epoch."""
    pool = [Prompt(str(i), {"prompt": str(i)}) for i in range(100)]
    chosen = with_selector((curriculum,))
    states = {place: c.init() for place, c in places(chosen).items() if hasattr(c, "init")}

    class Model:
        version = 0

        def values(self, asked):
            return torch.tensor([int(p.id) / 100 for p in asked])

    for step in range(3):
        found, states = select_prompts(chosen, states, pool, 64, Context(step, 0, {"prompt_value": Model()}))
        assert len({p.id for p in found}) == len(found) == 64
