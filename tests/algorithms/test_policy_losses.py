"""Golden numbers and identities of the policy losses and of the unified estimator behind them."""

import math

import pytest
import torch

from alignment.algorithms.aggregations import SequenceMean, aggregations
from alignment.algorithms.policy_losses import Cispo, Clip, Gspo, Reinforce, log_ratio, policy_losses

ALL = [entry.cls() for entry in policy_losses if not hasattr(entry.cls, "prepare")]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=0)


def one_token(make_batch, ratio: float, adv: float, base: str = "old"):
    """A batch of one trained token with this ratio and advantage, and its log-probability as a leaf."""
    logp_BT = torch.tensor([[0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old_BT = torch.tensor([[0.0, -1.0 - math.log(ratio)]], dtype=torch.float64)
    return logp_BT, make_batch([1.0], bases=[base], old_logp_BT=old_BT, adv_BT=torch.tensor([[0.0, adv]]))


def loss_and_gradient(loss, logp_BT, batch):
    loss_BT, metrics = loss(logp_BT, batch)
    (gradient_BT,) = torch.autograd.grad(loss_BT[:, 1:].sum(), logp_BT)
    return float(loss_BT[0, 1].detach()), float(gradient_BT[0, 1]), {k: float(v[0, 1]) for k, v in metrics.items()}


@pytest.mark.parametrize(
    ("loss", "ratio", "adv", "value", "gradient"),
    [
        (Clip(clip_high=0.28), 1.25, 1.0, -1.25, -1.25),  # clip-higher lets the token grow
        (Clip(), 1.25, 1.0, -1.2, 0.0),
        (Clip(), 0.75, -1.0, 0.8, 0.0),
        (Clip(), 0.75, 1.0, -0.75, -0.75),  # clipping never hides a loss
        (Clip(), 1.25, -1.0, 1.25, 1.25),
        (Clip(dual_clip=3.0), 20.0, -1.0, 3.0, 0.0),
        (Clip(dual_clip=3.0), 2.0, -1.0, 2.0, 2.0),
        (Clip(dual_clip=3.0), 20.0, 1.0, -1.2, 0.0),
        (Clip(clip_high=0.28), 2.0, 1.0, -1.28, 0.0),
        (Cispo(clip_high=0.28), 2.0, 1.0, 1.28, -1.28),  # log pi is -1
        (Cispo(clip_low=0.2), 0.5, 1.0, 0.8, -0.8),
        (Cispo(), 0.5, -2.0, -1.0, 1.0),
        (Reinforce(), 2.0, 1.5, 3.0, -3.0),
    ],
)
def test_one_token(make_batch, loss, ratio, adv, value, gradient):
    got_value, got_gradient, _ = loss_and_gradient(loss, *one_token(make_batch, ratio, adv))
    assert got_value == pytest.approx(value, abs=1e-6)
    assert got_gradient == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "ratio", "adv", "clipped"),
    [
        (Clip(), 1.25, 1.0, {"clipped_high"}),
        (Clip(), 1.25, -1.0, set()),
        (Clip(), 0.75, -1.0, {"clipped_low"}),
        (Clip(), 0.75, 1.0, set()),
        (Clip(dual_clip=3.0), 20.0, -1.0, {"clipped_dual"}),
        (Cispo(), 2.0, -1.0, {"clipped_high"}),
        (Gspo(), 1.001, 1.0, {"clipped_high"}),
    ],
)
def test_metrics_name_what_was_clipped(make_batch, loss, ratio, adv, clipped):
    metrics = loss_and_gradient(loss, *one_token(make_batch, ratio, adv))[2]
    assert {name for name, value in metrics.items() if value == 1.0} == clipped
    assert set(metrics.values()) <= {0.0, 1.0}


def test_clip_higher_bounds_the_new_probability():
    """With ratio at its upper bound a token of probability .01 reaches .0128 under clip-higher and .012 without."""
    assert 0.01 * (1 + Clip(clip_high=0.28).clip_high) == pytest.approx(0.0128)
    assert 0.01 * (1 + Clip().clip_high) == pytest.approx(0.012)


def test_gspo_ratio_is_the_geometric_mean(make_batch):
    logp_BT = torch.full((1, 4), -1.0, dtype=torch.float64, requires_grad=True)
    old_BT = logp_BT.detach() - torch.tensor([[9.0, 0.1, -0.1, 0.3]], dtype=torch.float64)
    batch = make_batch([1.0], [3], old_logp_BT=old_BT, adv_BT=torch.tensor([[0.0, -1.0, -1.0, -1.0]]))
    loss_BT, metrics = Gspo()(logp_BT, batch)
    close(loss_BT[0, 1:], [1.105171] * 3, 1e-6)
    (gradient_BT,) = torch.autograd.grad(loss_BT[0, 1:].sum(), logp_BT)
    close(gradient_BT, [[0.0, 1.105171, 1.105171, 1.105171]], 1e-6)  # each token, by the sequence's ratio
    assert metrics["clipped_high"].sum() == 0

    positive = make_batch([1.0], [3], old_logp_BT=old_BT, adv_BT=torch.tensor([[0.0, 1.0, 1.0, 1.0]]))
    loss_BT, metrics = Gspo(clip_low=3e-4, clip_high=3e-4)(logp_BT, positive)
    close(loss_BT[0, 1:], [-1.0003] * 3, 1e-6)
    assert metrics["clipped_high"][0, 1:].eq(1).all()
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), logp_BT)
    assert (gradient_BT == 0).all()


def test_at_ratio_one_all_have_the_gradient_of_reinforce(make_batch):
    generator = torch.Generator().manual_seed(0)
    logp_BT = -torch.rand(3, 6, generator=generator, dtype=torch.float64)
    adv_BT = torch.randn(3, 1, generator=generator, dtype=torch.float64).expand(3, 6)
    batch = make_batch([0, 0, 0], [2, 5, 3], old_logp_BT=logp_BT.clone(), adv_BT=adv_BT)
    for aggregation in [entry.cls(8) if entry.name == "constant" else entry.cls() for entry in aggregations]:
        scale_BT = aggregation.scale(batch.loss_mask_BT)
        expected_BT = -scale_BT * adv_BT
        for loss in ALL:
            leaf_BT = logp_BT.clone().requires_grad_()
            (gradient_BT,) = torch.autograd.grad((scale_BT * loss(leaf_BT, batch)[0]).sum(), leaf_BT)
            close(gradient_BT, expected_BT, 1e-12)


def test_gspo_with_sequence_mean_is_the_gradient_of_the_sequence_ratio(make_batch):
    """Against autograd through s_i = exp(mean_t log rho) itself, without the token form."""
    generator = torch.Generator().manual_seed(1)
    old_BT = -torch.rand(3, 5, generator=generator, dtype=torch.float64)
    logp_BT = (old_BT + 0.1 * torch.randn(3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    adv_B = torch.tensor([-1.0, -0.5, -2.0], dtype=torch.float64)
    batch = make_batch([0, 0, 0], [4, 1, 3], old_logp_BT=old_BT, adv_BT=adv_B[:, None].expand(3, 5))
    mask_BT = batch.loss_mask_BT
    direct = -(((logp_BT - old_BT) * mask_BT).sum(1) / mask_BT.sum(1)).exp().mul(adv_B).mean()
    token_form = (SequenceMean().scale(mask_BT) * Gspo(clip_low=1.0, clip_high=9.0)(logp_BT, batch)[0]).sum()
    close(token_form.detach(), float(direct.detach()), 1e-7)
    close(torch.autograd.grad(token_form, logp_BT)[0], torch.autograd.grad(direct, logp_BT)[0], 1e-7)


class TestUnifiedEstimator:
    """grad = 1_stable / pi_base * A * grad pi, with the base chosen per row."""

    @pytest.mark.parametrize("loss", ALL, ids=str)
    def test_base_self_and_advantage_one_is_the_gradient_of_the_nll(self, make_batch, loss):
        logits_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
        logp_BT = torch.stack([torch.zeros((), dtype=torch.float64), logits_V.log_softmax(-1)[1]])[None]
        # An old log-probability that would be clipped, were it looked at.
        batch = make_batch(
            [1.0], bases=["self"], adv_BT=torch.ones(1, 2), old_logp_BT=torch.full((1, 2), -9.0, dtype=torch.float64)
        )
        loss_BT, _ = loss(logp_BT, batch)
        (gradient_V,) = torch.autograd.grad(loss_BT[0, 1], logits_V)
        close(gradient_V, [0.5, -0.7, 0.2], 1e-12)

    def test_base_one_is_the_gradient_of_the_probability(self, make_batch):
        for loss in (Reinforce(), Clip(), Cispo()):
            logp_BT, batch = one_token(make_batch, ratio=9.0, adv=2.0, base="one")
            assert loss_and_gradient(loss, logp_BT, batch)[1] == pytest.approx(-2 * math.exp(-1), abs=1e-7)

    @pytest.mark.parametrize("ratio", [0.9, 1.0, 1.1])
    def test_inside_the_clip_ppo_is_importance_weighted_reinforce(self, make_batch, ratio):
        gradients = [
            loss_and_gradient(loss, *one_token(make_batch, ratio, -0.7))[1] for loss in (Clip(), Reinforce(), Cispo())
        ]
        assert gradients == pytest.approx([0.7 * ratio] * 3, abs=1e-7)

    def test_bases_are_chosen_per_row(self, make_batch):
        logp_BT = torch.full((3, 2), -1.0)
        batch = make_batch([0, 0, 0], bases=["old", "self", "one"], old_logp_BT=torch.full((3, 2), -1.5))
        close(log_ratio(logp_BT, batch)[:, 1], [0.5, 0.0, -1.0])

    def test_without_old_log_probabilities_the_current_policy_is_the_old_one(self, make_batch):
        logp_BT = torch.full((1, 2), -1.0, requires_grad=True)
        ratio_BT = log_ratio(logp_BT, make_batch([0.0]))
        assert ratio_BT[0, 1] == 0
        (gradient_BT,) = torch.autograd.grad(ratio_BT.sum(), logp_BT)
        assert gradient_BT.tolist() == [[0.0, 1.0]]

    def test_extreme_and_masked_ratios_stay_finite(self, make_batch):
        logp_BT = torch.tensor([[float("nan"), 0.0, float("inf")], [float("-inf"), -90.0, 0.0]], requires_grad=True)
        old_BT = torch.tensor([[0.0, -90.0, 0.0], [0.0, 0.0, float("nan")]])
        ratio_BT = log_ratio(logp_BT, make_batch([0, 0], [1, 1], mask=[[False, True, False]] * 2, old_logp_BT=old_BT))
        assert ratio_BT.tolist() == [[0.0, 20.0, 0.0], [0.0, -20.0, 0.0]]
