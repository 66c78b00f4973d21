"""Collation and the two ways in which a batch is split."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignment.batching import collate, plan_micro_batches, split_minibatches
from alignment.partition import Share
from alignment.types import Group, Prompt, Rollout, SamplingParams, Score, keyed_seed
from tests.engines.helpers import make_batch

GOOD = {"exact": Score(1.0), "length": Score(0.25)}


def rollout(name: str, prompt: tuple[int, ...], tokens: tuple[int, ...], **changes: Any) -> Rollout:
    plain = Rollout(
        id=name,
        prompt_id="p",
        prompt_ids=prompt,
        token_ids=tokens,
        loss_mask=(True,) * len(tokens),
        behaviour_logp=tuple(-float(t) for t in tokens),
        text="",
        finish_reason="stop",
        seed=0,
        sampler="s",
        sampling=SamplingParams(max_tokens=4, temperature=0.5),
        versions=((0, 0),),
        scores=GOOD,
    )
    return replace(plain, **changes)


def batch_of(*rollouts: Rollout, **options: Any):
    groups = [Group(i, Prompt(str(i), {}), (r,)) for i, r in enumerate(rollouts)]
    return collate(groups, pad_id=9, objectives=("exact", "length"), weights=(1.0, 0.5), **options)


def test_rows_follow_the_groups_and_are_padded_on_the_right() -> None:
    first = Group(7, Prompt("x", {}), (rollout("a", (1, 2), (3, 4, 5)), rollout("b", (1, 2), (6,))))
    second = Group(3, Prompt("y", {}), (rollout("c", (1,), (2,), finish_reason="length"),))
    batch = collate([first, second], 9, ("exact", "length"), (1.0, 0.5), step=4, seed=11)
    assert batch.ids_BT.tolist() == [[1, 2, 3, 4, 5], [1, 2, 6, 9, 9], [1, 2, 9, 9, 9]]
    assert batch.loss_mask_BT.tolist() == [[False, False, True, True, True]] + [
        [False, False, True, False, False],
        [False, True, False, False, False],
    ]
    assert batch.behaviour_logp_BT.tolist() == [[0, 0, -3, -4, -5], [0, 0, -6, 0, 0], [0, -2, 0, 0, 0]]
    assert batch.length_B.tolist() == [5, 3, 2]
    assert batch.group_B.tolist() == [0, 0, 1]
    assert batch.truncated_B.tolist() == [False, False, True]
    assert batch.temperature_B.tolist() == [0.5] * 3
    assert batch.key_B.tolist() == [keyed_seed(name) for name in "abc"]
    assert (batch.objectives, batch.step, batch.seed) == (("exact", "length"), 4, 11)
    torch.testing.assert_close(batch.weights_K, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(batch.rewards_BK, torch.tensor([[1.0, 0.25]] * 3))


def test_observations_are_not_trained_on() -> None:
    batch = batch_of(rollout("a", (1,), (2, 3, 4), loss_mask=(True, False, True), behaviour_logp=(-1, 0, -2)))
    assert batch.loss_mask_BT.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    "scores",
    [{}, {"exact": Score(None)}, {"exact": Score(1.0), "length": Score(None, "timeout")}],
    ids=["never scored", "nothing applied", "one failed"],
)
def test_an_unscored_rollout_keeps_its_row_but_is_not_trained_on(scores: dict[str, Score]) -> None:
    batch = batch_of(rollout("a", (1,), (2, 3), scores=scores), rollout("b", (1,), (2, 3)))
    assert batch.scored_B.tolist() == [False, True]
    assert batch.loss_mask_BT.tolist() == [[False] * 3, [False, True, True]]
    assert torch.isnan(batch.rewards_BK[0, 1])


def test_a_component_that_does_not_apply_is_nan() -> None:
    batch = batch_of(rollout("a", (1,), (2,), scores={"exact": Score(1.0), "length": Score(None)}))
    assert batch.scored_B.tolist() == [True]
    torch.testing.assert_close(batch.rewards_BK, torch.tensor([[1.0, float("nan")]]), equal_nan=True)


def test_a_demonstration_is_trained_on_without_a_score() -> None:
    batch = batch_of(
        rollout("a", (1,), (2, 3), scores={}, source="demonstration", ratio_base="one"),
        rollout("b", (1,), (2, 3), source="replay", ratio_base="self"),
    )
    assert batch.loss_mask_BT.tolist() == [[False, True, True]] * 2
    assert batch.scored_B.tolist() == [False, True]
    assert batch.source_B.tolist() == [1, 2]
    assert batch.ratio_base_B.tolist() == [2, 1]


def test_the_first_token_of_a_row_is_never_trained_on() -> None:
    assert batch_of(rollout("a", (), (2, 3))).loss_mask_BT.tolist() == [[False, True]]


def test_wrong_input_is_named() -> None:
    with pytest.raises(AssertionError, match="at least one rollout"):
        collate([], 0, ("a",), (1.0,))
    with pytest.raises(AssertionError, match="need as many weights"):
        collate([], 0, ("a",), (1.0, 2.0))
    with pytest.raises(AssertionError, match="1 numbers for 2 places"):
        batch_of(rollout("a", (1,), (2, 3), behaviour_logp=(0.0,)))


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 100))
def test_a_plan_holds_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    plan = plan_micro_batches(torch.tensor(lengths, dtype=torch.int64), budget)
    assert sorted(i for rows in plan for i in rows.tolist()) == list(range(len(lengths)))
    for rows in plan:
        assert len(rows) and len(rows) * max(lengths[i] for i in rows) <= budget
    longest = [max(lengths[i] for i in rows) for rows in plan]
    assert longest == sorted(longest, reverse=True)


def test_similar_lengths_go_together() -> None:
    plan = plan_micro_batches(torch.tensor([2, 10, 3, 9, 2]), 20)
    assert [rows.tolist() for rows in plan] == [[1, 3], [2, 0, 4]]


def test_a_micro_batch_that_is_large_enough_leaves_much_shorter_rows_to_the_next() -> None:
    # Five rows of 1000 are over ENOUGH_TOKENS (4096); 850 is still similar to 1000, 700 is not, nor is 500 to 700.
    lengths = torch.tensor([500] * 9 + [1000] * 5 + [850] + [700] * 6)
    plan = [lengths[rows].tolist() for rows in plan_micro_batches(lengths, 16_384)]
    assert plan == [[1000] * 5 + [850], [700] * 6, [500] * 9]
    # Below that, the budget decides alone.
    assert len(plan_micro_batches(torch.tensor([1000, 10, 10, 10]), 16_384)) == 1


def test_a_row_over_the_budget_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"a row of 31 tokens does not fit micro_batch_tokens = 30; set .* to 31"):
        plan_micro_batches(torch.tensor([3, 31]), 30)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, 3))
def test_mini_batches_hold_whole_groups_and_every_row_once(sizes: list[int], n: int, key: int) -> None:
    rows = sum(sizes)
    batch = replace(
        make_batch(rows), group_B=torch.repeat_interleave(torch.arange(len(sizes)) * 3, torch.tensor(sizes))
    )
    pieces = split_minibatches(batch, n, key)
    assert len(pieces) == min(n, len(sizes))
    assert sorted(i for piece in pieces for i in piece.tolist()) == list(range(rows))
    groups = [set(batch.group_B[piece].tolist()) for piece in pieces]
    assert all(groups) and sum(map(len, groups)) == len(sizes)
    if len(set(sizes)) == 1:
        counts = [len(g) for g in groups]
        assert max(counts) - min(counts) <= 1


def test_the_order_of_mini_batches_depends_on_the_key_alone() -> None:
    batch = make_batch(24)
    one, again, other = (split_minibatches(batch, 3, key) for key in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert split_minibatches(batch, 1, 1)[0].tolist() == list(range(24))
    with pytest.raises(ValueError, match="at least 1 mini-batch, not 0"):
        split_minibatches(batch, 0, 1)


def test_micro_batches_leave_out_rows_without_trained_tokens() -> None:
    batch = make_batch()
    rows = torch.cat([rows for rows, _ in Share().micro_batches(batch, 22)])
    assert sorted(rows.tolist()) == [0, 2, 3, 4, 5, 6, 7]
    for rows, micro in Share().micro_batches(batch, 22):
        assert micro.ids_BT.shape[1] == int(batch.length_B[rows].max())


def test_fields_computed_by_micro_batch_come_back_in_their_rows() -> None:
    batch = make_batch()

    def compute(micro: Any) -> dict[str, torch.Tensor]:
        ids = micro.ids_BT * micro.loss_mask_BT
        return {"x_BT": ids, "y_BTK": ids[..., None] * torch.tensor([1, 2]), "z_B": micro.length_B}

    whole = Share().compute(batch, 22, compute)
    ids = batch.ids_BT * batch.loss_mask_BT
    assert torch.equal(whole["x_BT"], ids)
    assert torch.equal(whole["y_BTK"], ids[..., None] * torch.tensor([1, 2]))
    assert torch.equal(whole["z_B"], batch.length_B * batch.loss_mask_BT.any(1))
    nothing = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    assert not Share().compute(nothing, 22, compute)["x_BT"].any()
