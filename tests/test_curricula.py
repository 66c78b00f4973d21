"""Curricula: the epochs of uniform, the band of the difficulty filter, and how a list of them composes."""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alignment.curricula import (
    DifficultyFilter,
    SampleBuffer,
    Shuffled,
    Uniform,
    curricula,
    keeps,
    places,
    refill_bound,
    replays,
    select_prompts,
    with_selector,
)
from alignment.curricula.filters import informative_share, optimum_kl
from alignment.errors import UserError
from alignment.score import Score
from alignment.types import Context, Group, Prompt, Rollout, SamplingParams
from tests.curricula_helpers import signals

AT = Context(step=0, seed=0)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", {"prompt": str(i)}) for i in range(count)]


def group(*rewards: float | None, uid: int = 0) -> Group:
    empty = Rollout("", "p0", (), (), (), (), "", "stop", 0, "test", SamplingParams(1), ())
    scores = [{"right": Score(reward, "skipped" if reward is None else "ok")} for reward in rewards]
    rollouts = (replace(empty, scores=s, reward=reward) for s, reward in zip(scores, rewards, strict=True))
    return Group(uid, prompts(1)[0], tuple(rollouts))


def drawn(count: int, sizes: list[int], seed: int = 0) -> list[str]:
    state, ids = Uniform().init(), []
    for n in sizes:
        chosen, state = Uniform().select(state, prompts(count), n, Context(0, seed))
        assert len(chosen) == n
        ids += [p.id for p in chosen]
    return ids


@given(st.integers(1, 20), st.lists(st.integers(0, 45), max_size=12))
def test_every_prompt_once_per_epoch_whatever_the_batch_size(count, sizes):
    ids = drawn(count, sizes)
    for start in range(0, len(ids) - count + 1, count):
        assert len(set(ids[start : start + count])) == count
    counts = Counter(ids)
    assert max(counts.values(), default=0) - min((counts[p.id] for p in prompts(count)), default=0) <= 1


@pytest.mark.parametrize("n", [1, 3, 7, 10, 23])
def test_after_whole_epochs_each_prompt_was_seen_that_often(n):
    epochs = n
    assert Counter(drawn(10, [n] * 10)) == {p.id: epochs for p in prompts(10)}


def test_order_hangs_on_the_seed_and_changes_with_the_epoch():
    assert drawn(50, [100]) == drawn(50, [7] * 14 + [2])
    assert drawn(50, [50], seed=0) != drawn(50, [50], seed=1)
    both = drawn(50, [100])
    assert both[:50] != both[50:] and both[:50] != [p.id for p in prompts(50)]


def test_selection_continues_from_its_state():
    first, state = Uniform().select(Uniform().init(), prompts(10), 6, AT)
    rest, end = Uniform().select({"epoch": state["epoch"], "cursor": state["cursor"]}, prompts(10), 4, AT)
    assert {p.id for p in first + rest} == {p.id for p in prompts(10)}
    assert (state, end) == ({"epoch": 0, "cursor": 6}, {"epoch": 1, "cursor": 0})


def kept(group_size: int, **options) -> list[int]:
    """The numbers of successes with which a group is kept."""
    rule = DifficultyFilter(**options)
    found = [group(*[1.0] * k, *[0.0] * (group_size - k)) for k in range(group_size + 1)]
    return [k for k, g in enumerate(found) if rule.keep(None, g)]


@pytest.mark.parametrize(
    ("group_size", "band", "inclusive", "expected"),
    [
        (8, (0.25, 0.75), False, range(3, 6)),
        (8, (0.25, 0.75), True, range(2, 7)),
        (8, (0.2, 0.8), False, range(2, 7)),
        (8, (0.0, 1.0), False, range(1, 8)),
        (16, (0.25, 0.75), False, range(5, 12)),
        (5, (0.2, 0.8), False, range(2, 4)),
        (10, (0.3, 0.3), True, range(3, 4)),
        (4, (0.0, 1.0), True, range(5)),
    ],
)
def test_a_band_of_pass_rates(group_size, band, inclusive, expected):
    low, high = band
    assert kept(group_size, low=low, high=high, inclusive=inclusive) == list(expected)


def test_the_default_band_is_balanced_and_strict():
    assert kept(10) == kept(10, low=0.2, high=0.8) == list(range(3, 8))


@given(st.lists(st.sampled_from([0.0, 1.0, None]), max_size=8))
def test_dynamic_sampling_is_the_band_from_0_to_1_by_either_measure(rewards):
    """For right and wrong, three rules are one: DAPO's, the mean reward's, and a reward that is not constant."""
    differ = len({r for r in rewards if r is not None}) > 1
    rules = (DifficultyFilter(0, 1), DifficultyFilter(0, 1, "reward"), DifficultyFilter(None, None, "reward"))
    assert [rule.keep(None, group(*rewards)) for rule in rules] == [differ] * 3


@pytest.mark.parametrize(
    ("rewards", "by_rate", "by_reward"),
    [
        ((0.5, 0.5), False, False),
        ((0.5, 0.9), False, True),
        ((1.0, None, 0.5), True, True),
        ((1.0, None), False, False),
        ((), False, False),
        ((1.0, 1.5), False, False),
    ],
)
def test_partial_credit_counts_by_reward_alone_and_constant_groups_by_neither(rewards, by_rate, by_reward):
    assert DifficultyFilter(0, 1).keep(None, group(*rewards)) is by_rate
    assert DifficultyFilter(0, 1, "reward").keep(None, group(*rewards)) is by_reward


def test_a_band_of_rewards_may_have_one_end_and_any_scale():
    assert DifficultyFilter(-5.0, None, "reward").keep(None, group(-6.0, -3.0))
    assert not DifficultyFilter(-4.0, None, "reward").keep(None, group(-6.0, -3.0))
    assert not DifficultyFilter(None, -5.0, "reward").keep(None, group(-6.0, -3.0))


def test_the_filter_is_named_where_it_drops():
    rule = [Uniform(), DifficultyFilter()]
    assert keeps(rule, {}, group(1.0, 1.0)) == "difficulty_filter" and keeps(rule, {}, group(1.0, 0.0)) is None


@pytest.mark.parametrize(
    "options",
    [
        {"low": 0.8, "high": 0.2},
        {"low": 0.5, "high": 0.5},
        {"low": None},
        {"high": 1.5},
        {"low": -0.1},
        {"measure": "reward", "low": 2.0, "high": 1.0},
    ],
)
def test_a_band_that_holds_nothing_is_refused(options):
    with pytest.raises(ValidationError, match="must be"):
        curricula.build({"name": "difficulty_filter", **options})


def test_a_shuffled_filter_drops_as_much_as_the_other_and_not_the_same():
    filter_, n = Shuffled(of=DifficultyFilter(max_refills=3, on_exhausted="short")), 600
    groups = [replace(group(*([1.0, 0.0] if i % 3 else [0.0, 0.0]), uid=i), prompt=p) for i, p in enumerate(prompts(n))]
    assert (filter_.max_refills, filter_.on_exhausted, filter_.min_group_size) == (3, "short", 2)
    state = filter_.init()
    assert all(filter_.keep(state, g) for g in groups), "before any decision nothing is dropped"
    state = filter_.observe(state, signals(groups))
    kept, wanted = [filter_.keep(state, g) for g in groups], [i % 3 > 0 for i in range(n)]
    assert abs(sum(kept) - 400) < 5 * math.sqrt(n * 2 / 9), "two of three, within five standard errors"
    agree = sum(a == b for a, b in zip(kept, wanted, strict=True)) / n
    assert abs(agree - 5 / 9) < 5 * math.sqrt(20 / 81 / n), "by chance alone"
    assert kept == [filter_.keep(json.loads(json.dumps(state)), g) for g in groups]
    hopeless = [group(0.0, 0.0, uid=i) for i in range(4)]
    assert filter_.observe(state, signals([])) == state == filter_.observe(state, signals(hopeless))


def test_only_a_filter_can_be_shuffled():
    with pytest.raises(UserError, match="'uniform' is not a filter alone"):
        Shuffled(of=Uniform())
    with pytest.raises(UserError, match="'shuffled' is not a filter alone"):
        Shuffled(of=Shuffled(of=DifficultyFilter()))
    with pytest.raises(UserError, match="'sample_buffer' is not a filter alone"):
        Shuffled(of=SampleBuffer())


def test_how_likely_a_group_says_something():
    """Golden numbers of the share of groups with an advantage."""
    assert [informative_share(0.5, n) for n in (4, 8, 16)] == pytest.approx([0.875, 0.9922, 1.0], abs=5e-5)
    assert [informative_share(0.05, n) for n in (4, 8, 16)] == pytest.approx([0.1855, 0.3366, 0.5599], abs=5e-5)


def test_the_exact_divergence_is_not_bounded_by_its_expansion():
    exact = {(0.75, 1.0): 0.0780, (0.5, 1.0): 0.1201, (0.1, 1.0): 0.0586}
    for (p, beta), value in exact.items():
        assert optimum_kl(p, beta) == pytest.approx(value, abs=5e-5)
        plain = math.log(1 - p + p * math.exp(1 / beta)) - p / beta
        assert optimum_kl(p, beta) == pytest.approx(plain, abs=1e-12)
    assert optimum_kl(0.75, 1.0) < 0.75 * 0.25 / 2, "smaller than the expansion here"
    assert optimum_kl(0.1, 1.0) > 0.1 * 0.9 / 2, "and larger here"
    for beta, best in ((10.0, 0.4917), (1.0, 0.4180), (0.2, 0.1932)):
        highest = max(range(1, 10_000), key=lambda i: optimum_kl(i / 10_000, beta)) / 10_000
        assert highest == pytest.approx(best, abs=1e-4)
        assert beta - 1 / math.expm1(1 / beta) == pytest.approx(best, abs=5e-5)


def test_the_smallest_refill_bound_holds_and_nothing_dropped_needs_none():
    assert refill_bound([Uniform()]) == 0
    assert refill_bound([Uniform(), DifficultyFilter()]) == 10
    assert refill_bound([DifficultyFilter(max_refills=4), DifficultyFilter(max_refills=2)]) == 2


@dataclass(frozen=True)
class Longest:
    """Chooses the longest ids of twice as many candidates, and counts how often it was asked."""

    factor: int = 2

    def init(self):
        return 0

    def candidates(self, n):
        return self.factor * n

    def select(self, state, prompts, n, context):
        assert len(prompts) == self.factor * n or state is None
        return sorted(prompts, key=lambda p: (-len(p.id), p.id))[:n], (state or 0) + 1


@dataclass(frozen=True)
class Again:
    """Replays what its state holds."""

    def replay(self, state, need, context):
        return state[:need]


def test_selectors_compose_and_demand_is_computed_from_the_last():
    chosen = [Uniform(), DifficultyFilter(), Longest(2), Longest(3)]
    states = {"curricula.0": Uniform().init(), "curricula.2": 0, "curricula.3": 0, "other": 7}
    picked, after = select_prompts(chosen, states, prompts(200), 5, AT)
    assert len(picked) == 5
    assert after == {"curricula.0": {"epoch": 0, "cursor": 30}, "curricula.2": 1, "curricula.3": 1, "other": 7}
    assert states["curricula.2"] == 0, "the states that went in are not changed"
    pool = Uniform().select(Uniform().init(), prompts(200), 30, AT)[0]
    assert [p.id for p in picked] == [p.id for p in sorted(pool, key=lambda p: (-len(p.id), p.id))[:5]]


def test_the_first_selector_sees_the_whole_data_set():
    picked, _ = select_prompts([Longest()], {}, prompts(101), 1, AT)
    assert picked[0].id == "p100"


def test_replays_fill_up_in_order_and_never_beyond_the_need():
    old = [group(0.0, uid=i) for i in range(4)]
    states = {"curricula.1": old[:1], "curricula.2": old[1:]}
    chosen = [Uniform(), Again(), Again()]
    assert [g.uid for g in replays(chosen, states, 3, AT)] == [0, 1, 2]
    assert replays(chosen, states, 0, AT) == [] and replays([Uniform()], {}, 2, AT) == []


def test_uniform_is_put_first_when_none_selects_and_must_be_first_otherwise():
    assert with_selector([DifficultyFilter()]) == (Uniform(), DifficultyFilter())
    assert with_selector([DifficultyFilter(), Uniform()]) == (DifficultyFilter(), Uniform())
    assert list(places(with_selector([]))) == ["curricula.0"]
    with pytest.raises(UserError, match="must be the first"):
        with_selector([Longest(), Uniform()])


def test_selecting_without_a_selector_or_without_prompts_is_an_error():
    with pytest.raises(UserError, match="put 'uniform' first"):
        select_prompts([DifficultyFilter()], {}, prompts(3), 1, AT)
    with pytest.raises(UserError, match="empty"):
        select_prompts([Uniform()], {"curricula.0": Uniform().init()}, [], 1, AT)


def test_a_curriculum_must_do_at_least_one_of_the_four():
    with pytest.raises(TypeError, match="at least one of select, admits, keep, replay"):

        @curricula.register("idle", source="this test")
        @dataclass(frozen=True)
        class Idle:
            """Does nothing."""

    assert "idle" not in curricula.names()


@pytest.mark.parametrize("options", [{"max_refills": -1}, {"on_exhausted": "ignore"}, {"max_refill": 3}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        curricula.build({"name": "difficulty_filter", **options})
