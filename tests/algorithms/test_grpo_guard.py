"""Regulated clipping: what is centred, scaled and balanced, and what stays PPO."""

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch

from alignment.algorithms.aggregations import TokenMean
from alignment.algorithms.grpo_guard import GrpoGuard, balanced
from alignment.algorithms.objective import Objective
from alignment.algorithms.policy_losses import Clip


def moments(values_N):
    return float(values_N.mean()), float(values_N.std(correction=0))


def test_the_bin_of_a_categorical_policy_is_centred_by_its_kl():
    """p_old = (.5, .3, .2) and p = (.4, .4, .2), as often as p_old says: E log rho = -KL = -.025267."""
    old, new = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    log_ratio_N = (new / old).log().repeat_interleave(torch.tensor([5, 3, 2]))
    assert float(log_ratio_N.mean()) == pytest.approx(-0.025267, abs=1e-6)
    shift_N, factor_N = GrpoGuard().regulation(log_ratio_N, torch.zeros(10, dtype=torch.int64))
    assert float(shift_N[0]) == pytest.approx(0.025267, abs=1e-6)
    mean, std = moments((log_ratio_N + shift_N) * factor_N)
    assert abs(mean) < 1e-12 and std == pytest.approx(0.221554, abs=1e-6)


def gaussian(s, d, n=4001):
    """log rho of samples of N(0, s^2) under N(d, s^2), at equally likely quantiles."""
    x_N = s * torch.tensor([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]).double()
    return (x_N * d - d**2 / 2) / s**2


def test_spreads_that_differ_by_noise_become_one():
    quiet_N, loud_N = gaussian(0.3, 0.12), gaussian(0.6, 0.12)
    assert moments(quiet_N) == pytest.approx((-0.08, 0.4), abs=1e-3)  # -d^2 / (2 s^2) and d / s
    both_N = torch.cat([quiet_N, loud_N])
    bin_N = torch.arange(2).repeat_interleave(len(quiet_N))
    shift_N, factor_N = GrpoGuard().regulation(both_N, bin_N)
    regulated_N = (both_N + shift_N) * factor_N
    overall = math.sqrt((0.4**2 + 0.2**2) / 2)
    for b in (0, 1):
        mean, std = moments(regulated_N[bin_N == b])
        assert abs(mean) < 1e-12 and std == pytest.approx(overall, rel=1e-2)
    assert GrpoGuard(ratio_center="none").regulation(both_N, bin_N)[0].eq(0).all()
    assert GrpoGuard(ratio_scale="none").regulation(both_N, bin_N)[1].eq(1).all()


def guarded(make_batch, loss, log_ratio_BT, adv_BT, **more):
    """Loss, gradient and metrics of rows whose policy moved by ``log_ratio_BT``."""
    old_BT = torch.full(log_ratio_BT.shape, -1.0).double() - torch.arange(log_ratio_BT.shape[1]) * 0.1
    lengths = [log_ratio_BT.shape[1] - 1] * len(log_ratio_BT)
    batch = make_batch(
        [0.0] * len(lengths), lengths, adv_BT=adv_BT, old_logp_BT=old_BT, logp_BT=old_BT + log_ratio_BT,
        entropy_BT=torch.arange(adv_BT.numel()).reshape(adv_BT.shape).double(), **more,
    )  # fmt: skip
    objective = Objective(loss, TokenMean())
    logp_BT = (old_BT + log_ratio_BT).requires_grad_()
    value, sums = objective.loss(logp_BT, None, objective.prepare(batch))
    return value.detach(), torch.autograd.grad(value, logp_BT)[0], objective.finish(sums)


def noise(rows=4, width=7):
    generator = torch.Generator().manual_seed(2)
    return 0.3 * torch.randn(rows, width, generator=generator).double(), torch.randn(
        rows, width, generator=generator
    ).double()


@pytest.mark.parametrize("by", ["entropy", "position"])
def test_where_the_policy_has_not_moved_it_is_ppo(make_batch, by):
    adv_BT = noise()[1]
    still_BT = torch.zeros_like(adv_BT)
    found = guarded(make_batch, GrpoGuard(bin_by=by, balance=False), still_BT, adv_BT)
    ppo = guarded(make_batch, Clip(), still_BT, adv_BT)
    torch.testing.assert_close(found[:2], ppo[:2], rtol=0, atol=1e-9)
    assert found[2]["clipped_low"] == found[2]["clipped_high"] == 0


def test_without_regulation_it_decides_as_ppo_does(make_batch):
    moved_BT, adv_BT = noise()
    plain = GrpoGuard(ratio_center="none", ratio_scale="none", balance=False)
    torch.testing.assert_close(
        guarded(make_batch, plain, moved_BT, adv_BT)[1], guarded(make_batch, Clip(), moved_BT, adv_BT)[1]
    )


def test_the_regulated_ratio_decides_and_the_true_one_is_the_surrogate(make_batch):
    """All tokens moved by e^.5: their mean is no news, so nothing is clipped, and rho stays e^.5."""
    moved_BT, adv_BT = torch.full((2, 5), 0.5).double(), torch.ones(2, 5).double()
    _, gradient_BT, metrics = guarded(make_batch, GrpoGuard(balance=False, bins=1), moved_BT, adv_BT)
    torch.testing.assert_close(gradient_BT[:, 1:], torch.full((2, 4), -math.exp(0.5) / 8).double())
    assert metrics["clipped_high"] == 0 and guarded(make_batch, Clip(), moved_BT, adv_BT)[2]["clipped_high"] == 1
    surrogate = GrpoGuard(balance=False, bins=1, use_in_surrogate=True)
    _, gradient_BT, _ = guarded(make_batch, surrogate, moved_BT, adv_BT)
    torch.testing.assert_close(gradient_BT[:, 1:], torch.full((2, 4), -1 / 8).double())


def test_a_clipped_token_has_no_gradient(make_batch):
    moved_BT, adv_BT = torch.zeros(2, 6).double(), torch.ones(2, 6).double()
    moved_BT[0, 3] = 2.0
    _, gradient_BT, metrics = guarded(make_batch, GrpoGuard(balance=False, bins=1), moved_BT, adv_BT)
    assert gradient_BT[0, 3] == 0 and metrics["clipped_high"] == pytest.approx(0.1)
    assert gradient_BT[1, 1:].ne(0).all()


@pytest.mark.parametrize("pull", [[1.0, 2.0, 4.0], [1e-3, 1.0, 1.0, 1.0, 1.0], [5.0, 1e-30, 1.0], [3.0, 3.1]])
def test_weights_of_bins_have_mean_1_within_their_bounds(pull):
    weight = balanced(torch.tensor(pull).double())
    assert float(weight.mean()) == pytest.approx(1.0, abs=1e-9)
    assert 0.5 <= float(weight.min()) and float(weight.max()) <= 2.0
    assert weight[torch.tensor(pull).argsort(descending=True)].diff().min() >= 0


def test_within_the_bounds_weights_are_inverse_to_pulls():
    weight = balanced(torch.tensor([1.0, 1.25, 1.6]).double())
    assert (weight * torch.tensor([1.0, 1.25, 1.6])).tolist() == pytest.approx([float(weight[0])] * 3)


def test_a_single_bin_and_bins_without_a_pull_weigh_1(make_batch):
    assert balanced(torch.tensor([0.3]).double()).tolist() == pytest.approx([1.0])
    assert balanced(torch.zeros(3).double()).tolist() == [1.0] * 3
    assert balanced(torch.tensor([math.nan, 2.0]).double()).tolist() == pytest.approx([1.0, 1.0])
    assert balanced(torch.tensor([0.0, 0.0, 1.0, 1.0]).double()).tolist() == pytest.approx([1.0] * 4)
    among = balanced(torch.tensor([0.0, 1.0, 1.25, math.nan, 1.6]).double())
    alone = balanced(torch.tensor([1.0, 1.25, 1.6]).double())
    assert among.tolist() == pytest.approx([1.0, float(alone[0]), float(alone[1]), 1.0, float(alone[2])])
    moved_BT, adv_BT = noise()
    metrics = guarded(make_batch, GrpoGuard(bins=1), moved_BT, adv_BT)[2]
    assert metrics["guard_weight"] == pytest.approx(1.0)


def test_tokens_are_binned_by_rank_of_entropy_or_by_place(make_batch):
    batch = make_batch([0.0] * 2, [5, 2], entropy_BT=torch.tensor([[9, 5, 4, 3, 2, 1], [9, 6, 7, 9, 9, 9]]).double())
    places = batch.loss_mask_BT.nonzero(as_tuple=True)
    assert GrpoGuard(bins=7)._bins(batch, places).tolist() == [4, 3, 2, 1, 0, 5, 6]
    assert GrpoGuard(bins=2, bin_by="position")._bins(batch, places).tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert GrpoGuard().needs == ("logp", "entropy") and GrpoGuard(bin_by="position").needs == ("logp",)


def test_demonstrations_are_left_as_they_are(make_batch):
    moved_BT, adv_BT = noise()
    shown = torch.tensor([0, 1, 0, 0], dtype=torch.int8)
    batch = make_batch(
        [0.0] * 4, [6] * 4, adv_BT=adv_BT, logp_BT=moved_BT - 1, old_logp_BT=moved_BT * 0 - 1, entropy_BT=adv_BT
    )
    stats = GrpoGuard().prepare(replace(batch, source_B=shown))
    assert stats[1].tolist() == [[0.0, 1.0, 1.0]] * 7
