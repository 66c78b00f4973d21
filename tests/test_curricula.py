"""Curricula: the epochs of uniform, the filter of constant groups, and how a list of them composes."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alignment.curricula import (
    ConstantGroupFilter,
    Uniform,
    curricula,
    keeps,
    places,
    refill_bound,
    replays,
    select_prompts,
    with_selector,
)
from alignment.errors import UserError
from alignment.types import Context, Group, Prompt, Rollout, SamplingParams

AT = Context(step=0, seed=0)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", {"prompt": str(i)}) for i in range(count)]


def group(*rewards: float | None, uid: int = 0) -> Group:
    empty = Rollout("", "p0", (), (), (), (), "", "stop", 0, "test", SamplingParams(1), ())
    return Group(uid, prompts(1)[0], tuple(replace(empty, reward=reward) for reward in rewards))


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


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ((0.0, 1.0), True),
        ((1.0, 1.0, 1.0), False),
        ((0.0, 0.0), False),
        ((1.0, None, 1.0), False),
        ((1.0, None, 0.5), True),
        ((1.0, None), False),
        ((None, None), False),
        ((), False),
    ],
)
def test_constant_groups_are_dropped_and_unscored_rollouts_do_not_count(rewards, kept):
    assert ConstantGroupFilter().keep(None, group(*rewards)) is kept
    by = keeps([Uniform(), ConstantGroupFilter()], {}, group(*rewards))
    assert by == (None if kept else "constant_group_filter")


def test_the_smallest_refill_bound_holds_and_nothing_dropped_needs_none():
    assert refill_bound([Uniform()]) == 0
    assert refill_bound([Uniform(), ConstantGroupFilter()]) == 10
    assert refill_bound([ConstantGroupFilter(max_refills=4), ConstantGroupFilter(max_refills=2)]) == 2


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
    chosen = [Uniform(), ConstantGroupFilter(), Longest(2), Longest(3)]
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
    assert with_selector([ConstantGroupFilter()]) == (Uniform(), ConstantGroupFilter())
    assert with_selector([ConstantGroupFilter(), Uniform()]) == (ConstantGroupFilter(), Uniform())
    assert list(places(with_selector([]))) == ["curricula.0"]
    with pytest.raises(UserError, match="must be the first"):
        with_selector([Longest(), Uniform()])


def test_selecting_without_a_selector_or_without_prompts_is_an_error():
    with pytest.raises(UserError, match="put 'uniform' first"):
        select_prompts([ConstantGroupFilter()], {}, prompts(3), 1, AT)
    with pytest.raises(UserError, match="empty"):
        select_prompts([Uniform()], {"curricula.0": Uniform().init()}, [], 1, AT)


def test_a_curriculum_must_do_at_least_one_of_the_three():
    with pytest.raises(TypeError, match="at least one of select, keep, replay"):

        @curricula.register("idle", source="this test")
        @dataclass(frozen=True)
        class Idle:
            """Does nothing."""

    assert "idle" not in curricula.names()


@pytest.mark.parametrize("options", [{"max_refills": -1}, {"on_exhausted": "ignore"}, {"max_refill": 3}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        curricula.build({"name": "constant_group_filter", **options})
