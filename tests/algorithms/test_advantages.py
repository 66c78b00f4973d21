"""Golden numbers, identities and properties of the advantages."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.algorithms.advantages import DrGrpo, Grpo, Opo, ReinforcePp, ReinforcePpBaseline, Rloo, advantages
from alignment.algorithms.groups import above_baseline, group_sum

ALL = [entry.cls() for entry in advantages]
GROUPED = [Grpo(), Grpo(normalise="none"), Grpo(std="population"), DrGrpo(), Rloo()]
CENTRED = [*GROUPED, Opo(), ReinforcePp(), ReinforcePpBaseline()]
NAN, INF = float("nan"), float("inf")


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=0, equal_nan=False
    )


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        (Grpo(), [1.5, -0.5, -0.5, -0.5]),
        (Grpo(std="population"), [1.7320508, -0.5773503, -0.5773503, -0.5773503]),
        (Grpo(normalise="none"), [0.75, -0.25, -0.25, -0.25]),
        (DrGrpo(), [0.75, -0.25, -0.25, -0.25]),
        (Rloo(), [1.0, -1 / 3, -1 / 3, -1 / 3]),
        (Opo(), [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_one_success_of_four(make_batch, advantage, expected):
    adv_BT = advantage(make_batch([1, 0, 0, 0], [10] * 4))
    close(adv_BT[:, 1], expected)
    assert adv_BT.dtype == torch.float32
    assert (adv_BT[:, 0] == 0).all()
    assert (adv_BT[:, 1:] == adv_BT[:, 1:2]).all()


def test_opo_weighs_the_baseline_by_trained_tokens(make_batch):
    batch = make_batch([1, 0, 0, 0], [30, 10, 10, 10])
    close(Opo()(batch)[:, 1], [0.5, -0.5, -0.5, -0.5])
    mask_BT = batch.loss_mask_BT.clone()
    mask_BT[0, 11:] = False  # observations: 10 trained tokens are left
    close(Opo()(replace(batch, loss_mask_BT=mask_BT))[:, 1], [0.75, -0.25, -0.25, -0.25])


def test_relift_advantages_without_std(make_batch):
    adv_BT = Grpo(normalise="none")(make_batch([1, 0, 0, 0, 0, 0, 0, 1]))
    close(adv_BT[:, 1], [0.75, *[-0.25] * 6, 0.75])


def test_reinforce_pp_is_the_whitened_discounted_return(make_batch):
    batch = make_batch([1.0, -2.0], [3, 2], token_reward_BT=torch.tensor([[9, 0.1, 0.2, 0.3], [9, -0.5, 0.0, NAN]]))
    returns = torch.tensor([0.1 + 0.5 * (0.2 + 0.5 * 1.3), 0.2 + 0.5 * 1.3, 1.3, -0.5 + 0.5 * -2.0, -2.0])
    expected = (returns - returns.mean()) / returns.std()
    close(ReinforcePp(gamma=0.5)(batch)[batch.loss_mask_BT], expected.tolist())


def test_reinforce_pp_carries_returns_through_observations_without_discount(make_batch):
    """The same trained tokens with and without an observation between them have the same returns."""
    plain = make_batch([1.0, 0.0], [3, 3])
    gapped = make_batch([1.0, 0.0], [5, 5], mask=[[False, True, False, False, True, True]] * 2)
    advantage = ReinforcePp(gamma=0.9)
    close(advantage(gapped)[gapped.loss_mask_BT], advantage(plain)[plain.loss_mask_BT].tolist())
    returns = torch.tensor([0.81, 0.9, 1.0, 0, 0, 0])
    close(advantage(plain)[plain.loss_mask_BT], ((returns - returns.mean()) / returns.std()).tolist())


def test_reinforce_pp_baseline_centres_groups_then_whitens_tokens(make_batch):
    batch = make_batch([1, 0, 5, 5.5], [1, 3, 2, 2], [0, 0, 1, 1])
    tokens = torch.tensor([0.5, -0.5, -0.5, -0.5, -0.25, -0.25, 0.25, 0.25])
    close(ReinforcePpBaseline()(batch)[batch.loss_mask_BT], ((tokens - tokens.mean()) / tokens.std()).tolist())


@pytest.mark.parametrize("advantage", [Grpo(), DrGrpo(), Rloo(), Opo(), ReinforcePpBaseline()])
def test_token_rewards_count_towards_the_row(make_batch, advantage):
    """KL in the reward: a row's whole reward is its score and its token rewards, observations and padding aside."""
    token_reward_BT = torch.tensor([[7.0, -0.1, -0.2], [7.0, -0.4, NAN]])
    batch = make_batch([1, 0], [2, 1], token_reward_BT=token_reward_BT)
    same = make_batch([0.7, -0.4], [2, 1])
    close(advantage(batch), advantage(same).tolist())


@pytest.mark.parametrize("advantage", CENTRED)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3, 1e6])
def test_equal_rewards_give_exactly_zero(make_batch, advantage, value):
    adv_BT = advantage(make_batch([value] * 7, [3, 1, 4, 1, 5, 9, 2]))
    assert (adv_BT == 0).all()


@pytest.mark.parametrize("advantage", [*GROUPED, Opo(), Grpo(eps=0.0)])
def test_a_group_of_one_gives_exactly_zero(make_batch, advantage):
    adv_BT = advantage(make_batch([1.0, 1.0, 0.0], [1, 1, 1], [4, 5, 5]))
    assert adv_BT[0].eq(0).all()
    assert adv_BT[1, 1] > 0


rewards = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=9)


@settings(max_examples=40, deadline=None)
@given(first=rewards, second=rewards)
def test_advantages_sum_to_zero_per_group(make_batch, first, second):
    groups = [3] * len(first) + [8] * len(second)
    batch = make_batch(first + second, groups=groups)
    for advantage in GROUPED:
        adv_B = advantage(batch)[:, 1].double()
        assert adv_B.isfinite().all()
        scale = max(1.0, float(adv_B.abs().max()))
        assert group_sum(adv_B, batch.group_B).abs().max() < 1e-5 * scale


@settings(max_examples=40, deadline=None)
@given(values=rewards, shift=st.floats(-5, 5, width=32))
def test_a_shift_of_all_rewards_changes_nothing(make_batch, values, shift):
    for advantage in (DrGrpo(), Rloo(), Opo()):
        lengths = list(range(1, len(values) + 1))
        shifted = advantage(make_batch([v + shift for v in values], lengths))
        close(shifted, advantage(make_batch(values, lengths)).tolist(), 1e-4)


@pytest.mark.parametrize("advantage", ALL, ids=advantages.names())
@pytest.mark.parametrize("junk", [NAN, INF, 1e30])
def test_unscored_rows_are_in_no_baseline_and_get_zero(make_batch, advantage, junk):
    lengths, groups = [2, 3, 1, 2, 2], [0, 0, 0, 1, 1]
    with_junk = make_batch([1, 0, junk, 1, 0], lengths, groups, scored=[True, True, False, True, True])
    adv_BT = advantage(with_junk)
    assert (adv_BT[2] == 0).all()
    others = [0, 1, 3, 4]
    without = make_batch([1, 0, 1, 0], [lengths[i] for i in others], [groups[i] for i in others])
    close(adv_BT[others], advantage(without).tolist(), 1e-6)


@pytest.mark.parametrize("advantage", ALL, ids=advantages.names())
def test_a_batch_without_scored_rows_gives_zero(make_batch, advantage):
    adv_BT = advantage(make_batch([NAN, NAN], [2, 1], scored=[False, False]))
    assert (adv_BT == 0).all()


@pytest.mark.parametrize("advantage", ALL, ids=advantages.names())
def test_row_order_does_not_matter(make_batch, advantage):
    batch = make_batch([1, 0, 0.5, 0, 2, 0.25], [1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 1, 0])
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    close(advantage(batch.rows(order)), advantage(batch)[order].tolist(), 1e-6)


def test_group_statistics_return_to_rows():
    values_B, group_B = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([7, 3, 7, 3])
    assert group_sum(values_B, group_B).tolist() == [5, 10, 5, 10]
    weighted = above_baseline(values_B, group_B, torch.tensor([1.0, 1.0, 3.0, 0.0]))
    assert weighted.tolist() == [1 - 13 / 4, 0.0, 4 - 13 / 4, 0.0]
