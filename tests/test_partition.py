"""Rows shared among ranks by cost: golden numbers, bounds, and that the division changes no result."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.algorithms.objective import combine
from alignment.batching import plan_micro_batches
from alignment.engines.logprobs import LogProbs
from alignment.partition import (
    Cost,
    Share,
    balanced,
    dealt,
    differencing,
    divided,
    greedy,
    padded,
    plan_ranks,
    waits,
)
from alignment.types import Batch
from tests.engines.helpers import grpo, make_batch, tiny

COSTS = st.lists(st.integers(1, 40).map(float), max_size=9)


def sums(costs: list[float], parts: list[list[int]]) -> list[float]:
    return [sum(costs[i] for i in part) for part in parts]


@pytest.mark.parametrize(
    ("costs", "ranks", "by_greedy", "by_differencing"),
    [
        ([8, 7, 6, 5, 4], 2, [17, 13], [16, 14]),
        ([9, 8, 7, 6, 5, 5, 4, 3], 3, [14, 17, 16], [16, 16, 15]),
        ([3, 3, 2, 2, 2], 2, [7, 5], [7, 5]),  # 6 and 6 would be possible
    ],
)
def test_both_rules_give_their_known_divisions(costs, ranks, by_greedy, by_differencing):
    assert sums(costs, greedy(costs, ranks)) == by_greedy
    assert sorted(sums(costs, differencing(costs, ranks))) == sorted(by_differencing)
    assert max(sums(costs, balanced(costs, ranks))) == min(max(by_greedy), max(by_differencing))


@given(COSTS, st.integers(1, 4))
def test_every_index_once_and_near_the_best_there_is(costs, parts):
    for rule in (greedy, differencing, balanced):
        divided = rule(costs, parts)
        assert len(divided) == parts
        assert sorted(itertools.chain(*divided)) == list(range(len(costs)))
    best = _best(costs, parts)
    assert max(sums(costs, greedy(costs, parts))) <= (4 / 3 - 1 / (3 * parts)) * best + 1e-9
    assert best - 1e-9 <= max(sums(costs, balanced(costs, parts))) <= max(sums(costs, greedy(costs, parts)))


def _best(costs: list[float], parts: int) -> float:
    """The least that the largest part can be, by trying all that could be better."""
    loads = {(0.0,) * parts}
    for cost in costs:
        loads = {tuple(sorted((*l[:i], l[i] + cost, *l[i + 1 :]))) for l in loads for i in range(parts)}  # noqa: E741
    return min(map(max, loads))


def test_long_rows_cost_more_than_their_tokens():
    cost = Cost(per_token=24576.0, per_pair=1.0)
    assert cost.of(32 * 1024) / (4 * cost.of(8 * 1024)) == pytest.approx(1.75)
    assert Cost(24576.0, 0.0).of(32 * 1024) == 4 * Cost(24576.0, 0.0).of(8 * 1024)
    # By tokens (the first short row padded to 32) 2 x 32 and 11 x 8 are the evenest; by pairs the long row has enough.
    length_B = torch.tensor([32] + [8] * 12)
    plain = plan_ranks(length_B, 2, 1000)
    curved = plan_ranks(length_B, 2, 1000, Cost(1.0, 1.0))
    assert sorted(sorted(torch.cat(rank).tolist()) for rank in plain) == [[0, 1], [*range(2, 13)]]
    assert sorted(sorted(torch.cat(rank).tolist()) for rank in curved) == [[0], [*range(1, 13)]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 5), st.integers(30, 90))
def test_ranks_take_equal_numbers_of_micro_batches_within_the_budget(lengths, ranks, budget):
    length_B = torch.tensor(lengths)
    plans = plan_ranks(length_B, ranks, budget, Cost(10.0, 1.0))
    assert len(plans) == ranks and len({len(plan) for plan in plans}) == 1 and len(plans[0]) >= 1
    rows = [row for plan in plans for micro in plan for row in micro.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    for micro in itertools.chain(*plans):
        assert len(micro) == 0 or len(micro) * int(length_B[micro].max()) <= budget


def test_a_row_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="31"):
        plan_ranks(torch.tensor([31, 5]), 2, 30)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("rows", "ranks", "budget"), [(256, 16, 18432), (64, 4, 18432), (512, 32, 22528)])
def test_micro_batches_of_like_cost_come_at_the_same_time(rows, ranks, budget, seed):
    """Log-normal lengths, in a model of 7B parameters: at each position no rank is far above the mean."""
    cost, generator = Cost(7.6e9, 28 * 3584), torch.Generator().manual_seed(seed)
    length_B = (torch.exp(torch.randn(rows, generator=generator)) * 1500).long().clamp(200, 9000)
    lengths = length_B.tolist()
    plans = [[micro.tolist() for micro in plan] for plan in plan_ranks(length_B, ranks, budget, cost)]
    for position in zip(*plans, strict=True):
        costs = [padded(lengths, micro, cost) for micro in position]
        assert max(costs) <= 1.35 * sum(costs) / ranks
    assert waits(lengths, plans, cost) <= 1.2 * sum(map(cost.of, lengths)) / ranks, "padding included"
    assert len(plans[0]) <= -(-len(plan_micro_batches(length_B, budget)) // ranks), "no more passes than are needed"


def test_ranks_that_are_even_are_taken_where_that_is_quicker():
    """Of both divisions the quicker: by hand, with two ranks and one micro-batch each."""
    cost = Cost()
    for lengths in ([9, 9, 5, 5], [8, 7, 6, 5, 4], [9, 3, 3, 3]):
        plans = [rule(lengths, 2, 2, 100, cost) for rule in (dealt, divided)]
        chosen = [[m.tolist() for m in plan] for plan in plan_ranks(torch.tensor(lengths), 2, 100, cost)]
        assert waits(lengths, chosen, cost) <= min(waits(lengths, plan, cost) for plan in plans)
    assert waits([9, 3, 3, 3], [[[0]], [[1, 2, 3]]], cost) == 9
    assert waits([9, 3, 3, 3], [[[0], []], [[1, 2], [3]]], cost) == 9 + 3
    assert padded([9, 3], [0, 1], Cost(1.0, 1.0)) == 2 * (9 + 81)


def test_a_rank_without_rows_has_one_that_stands_in():
    batch = make_batch(3)  # one of three is not trained on
    shares = [Share(rank, 4) for rank in range(4)]
    parts = [share.micro_batches(batch, 30) for share in shares]
    assert {len(part) for part in parts} == {1}
    real = [rows.tolist() for part in parts for rows, _ in part]
    assert sorted(itertools.chain(*real)) == [0, 2] and real.count([]) == 2
    for [(rows, micro)] in parts:
        assert len(micro) == 1 and micro.loss_mask_BT.any() == bool(len(rows))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_loss_sums_and_gradients_do_not_depend_on_the_division(ranks):
    batch = grpo().prepare(make_batch(9))
    whole = _backward(batch, [Share()], 10_000)
    for budget in (11, 40):
        loss, combined, gradients = _backward(batch, [Share(r, ranks, Cost(1.0, 0.5)) for r in range(ranks)], budget)
        assert loss == pytest.approx(whole[0], abs=1e-6)
        assert combined == {name: pytest.approx(value, rel=1e-5, abs=1e-5) for name, value in whole[1].items()}
        for one, other in zip(gradients, whole[2], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def _backward(batch: Batch, shares: list[Share], budget: int) -> tuple[float, dict[str, float], list[Any]]:
    module, total, combined = tiny(), 0.0, dict[str, Any]()
    logprobs = LogProbs(module, 128.0, False)
    for share in shares:
        for rows, micro in share.micro_batches(batch, budget):
            if not len(rows):
                continue
            loss, parts = grpo().loss(*logprobs(micro, "value"), micro)
            loss.backward()
            total += float(loss.detach())
            combined = combine(combined, parts)
    gradients = [p.grad for p in module.parameters()]
    return total, {name: float(value) for name, value in combined.items()}, gradients


def test_fields_are_computed_for_own_rows_and_are_0_elsewhere():
    batch = make_batch(9)
    found = []
    for rank in range(2):
        share = Share(rank, 2)
        found.append(share.compute(batch, 30, lambda m: {"x_BT": m.ids_BT.float(), "y_B": m.length_B.float()}))
    trained = batch.loss_mask_BT.any(1)
    assert torch.equal(found[0]["x_BT"] + found[1]["x_BT"], batch.ids_BT * trained[:, None])
    assert torch.equal(found[0]["y_B"] + found[1]["y_B"], batch.length_B * trained)
    assert not (found[0]["y_B"].bool() & found[1]["y_B"].bool()).any()
