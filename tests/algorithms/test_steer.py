"""STEER, and the first-order change of the entropy that it and the metrics are made of."""

import math
from dataclasses import replace

import pytest
import torch

from alignment.algorithms.aggregations import TokenMean
from alignment.algorithms.objective import Objective
from alignment.algorithms.policy_losses import Clip
from alignment.algorithms.steer import Steer, exact_change, own_change, repository_change


def entropy_of(logits_V):
    logp_V = logits_V.log_softmax(-1)
    return -(logp_V.exp() * logp_V).sum()


def golden_batch(make_batch, **changes):
    """(A, pi, pi_old, H) = (1, .9, .9, .5), (1, .1, .1, 2), (-1, .5, .5, ln 2), (.5, .2, .25, 1)."""
    rows = torch.tensor(
        [[1, 0.9, 0.9, 0.5], [1, 0.1, 0.1, 2], [-1, 0.5, 0.5, math.log(2)], [0.5, 0.2, 0.25, 1]]
    ).double()
    fields = {
        "adv_BT": rows[:, 0],
        "logp_BT": rows[:, 1].log(),
        "old_logp_BT": rows[:, 2].log(),
        "entropy_BT": rows[:, 3],
    }
    junk = {name: torch.stack([torch.full((4,), math.nan).double(), value_B], 1) for name, value_B in fields.items()}
    return Objective(Clip(), TokenMean()).prepare(make_batch([0.0] * 4, **(junk | changes)))


def test_golden_numbers(make_batch):
    batch = golden_batch(make_batch)
    omega = Steer().omegas(batch)[:, 1]
    assert omega.tolist() == pytest.approx([0.039464, 0.272327, 0.0, 0.195020], abs=1e-6)
    weight_BT = Steer().prepare(None, batch)
    assert weight_BT[:, 1].tolist() == pytest.approx([0.968181, 0.8, 1.0, 0.852315], abs=1e-6)
    assert weight_BT[:, 0].tolist() == [0.0] * 4, "0 on padding"


def test_the_largest_omega_gets_lambda_min_if_it_reaches_the_floor():
    def lowest(largest, **options):
        return float(Steer(**options).weights(torch.tensor([0.0, largest / 3, largest]).double())[-1])

    assert lowest(0.02) == pytest.approx(0.8) and lowest(7.0) == pytest.approx(0.8)
    assert lowest(0.01) == pytest.approx(0.894427, abs=1e-6)
    assert lowest(0.01, floor=0.0) == pytest.approx(0.8), "the formula of the paper's fourth version"
    assert lowest(0.0, floor=0.0) == 1.0


@pytest.mark.parametrize("shape", ["exponential", "linear"])
def test_weights_stay_within_their_bounds(shape):
    omega_N = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() ** 4
    steer = Steer(shape=shape)
    weight_N = steer.weights(omega_N)
    top = 1.0 if shape == "exponential" else steer.lambda_max
    assert weight_N.min() >= 0.8 and weight_N.max() <= top
    assert weight_N[omega_N.argsort()].diff().max() <= 0, "the larger Omega, the smaller the weight"
    assert weight_N[omega_N.argmax()] == pytest.approx(0.8)


def test_linear_weights_by_hand_and_where_all_are_equal():
    steer = Steer(shape="linear")
    assert steer.weights(torch.tensor([1.0, 3.0, 2.0])).tolist() == pytest.approx([1.2, 0.8, 1.0])
    assert steer.weights(torch.tensor([0.5, 0.5])).tolist() == pytest.approx([1.0, 1.0])


def test_no_advantage_or_log_p_of_minus_the_entropy_leaves_a_token_alone(make_batch):
    batch = golden_batch(make_batch)
    assert batch.adv_BT is not None and batch.logp_BT is not None
    adv_BT = batch.adv_BT.clone()
    adv_BT[1] = 0.0
    batch = replace(batch, adv_BT=adv_BT)
    assert Steer().prepare(None, batch)[[1, 2], 1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("omega", ["repo", "own", "exact"])
def test_the_sign_of_the_advantage_does_not_matter(make_batch, omega):
    batch = golden_batch(make_batch, entropy_drift_BT=torch.full((4, 2), 0.05).double())
    assert batch.adv_BT is not None
    steer = Steer(omega=omega)
    assert torch.equal(steer.prepare(None, batch), steer.prepare(None, replace(batch, adv_BT=-batch.adv_BT)))


def test_lambda_min_of_1_is_the_loss_and_gradient_without_it(make_batch):
    batch, found = golden_batch(make_batch), []
    for controls in ((), ((Steer(lambda_min=1.0), None),), ((Steer(), None),)):
        objective = Objective(Clip(), TokenMean(), entropy_controls=controls)
        assert batch.logp_BT is not None
        logp_BT = batch.logp_BT.clone().requires_grad_()
        loss, _ = objective.loss(logp_BT, None, objective.prepare(batch))
        found.append((loss.detach(), torch.autograd.grad(loss, logp_BT)[0]))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert found[0][0] != found[2][0]


def test_numbers_that_are_not_finite_count_as_no_change(make_batch):
    batch = golden_batch(make_batch)
    assert batch.entropy_BT is not None
    broken_BT = batch.entropy_BT.clone()
    broken_BT[0, 1] = math.inf
    assert Steer().omegas(replace(batch, entropy_BT=broken_BT))[0, 1] == 0


def test_first_order_change_of_the_entropy_on_a_softmax():
    """A step of 1e-3 on each token: exact to 2 %; the chosen logit alone within a factor of 3 where it is likely."""
    logits_V = torch.tensor([2.0, 1.1, 0.3, -0.4, -1.0, 0.8], dtype=torch.float64)
    logp_V, entropy, eta = logits_V.log_softmax(-1), entropy_of(logits_V), 1e-3
    drift = (logp_V.exp().square() * (logp_V + entropy)).sum()
    for a in range(6):
        step_V = eta * (torch.eye(6, dtype=torch.float64)[a] - logp_V.exp())
        true = float(entropy_of(logits_V + step_V) - entropy)
        assert eta * float(exact_change(logp_V[a], entropy, drift)) == pytest.approx(true, rel=0.02, abs=1e-6)
        general = -float((logp_V.exp() * (logp_V + entropy) * step_V).sum())
        assert general == pytest.approx(eta * float(exact_change(logp_V[a], entropy, drift)), rel=1e-9)
        own = eta * float(own_change(logp_V[a], entropy))
        assert own == pytest.approx(float(repository_change(logp_V[a], entropy) * logp_V[a].exp()) * eta, rel=1e-9)
    likely, unlikely = (eta * float(own_change(logp_V[a], entropy)) for a in (0, 4))
    assert likely < 0 < unlikely, "a likely token of positive advantage lowers the entropy, an unlikely one raises it"
    step_V = eta * (torch.eye(6, dtype=torch.float64)[0] - logp_V.exp())
    assert 1 / 3 < likely / float(entropy_of(logits_V + step_V) - entropy) < 3
