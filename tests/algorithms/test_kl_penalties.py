"""Exact checks of the KL estimators on a categorical pair, and of the steered coefficient."""

import math
from types import SimpleNamespace

import pytest
import torch

from alignment.algorithms.kl_penalties import K1, K2, K3, K3StraightThrough, kl_penalties
from alignment.errors import UserError

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REF = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
KL = 0.0252672


@pytest.mark.parametrize(("penalty", "mean"), [(K1(), KL), (K2(), 0.0248624), (K3(), KL), (K3StraightThrough(), KL)])
def test_means_under_the_policy(penalty, mean):
    assert float((P * penalty(P.log(), REF.log())).sum()) == pytest.approx(mean, abs=1e-7)


@pytest.mark.parametrize("penalty", [K3(), K3StraightThrough()])
def test_k3_per_token(penalty):
    values_V = penalty(P.log(), REF.log())
    assert values_V.tolist() == pytest.approx([0.0231436, 0.0456513, 0.0], abs=1e-7)


def exact_gradient(divergence):
    logits_V = P.log().requires_grad_()
    return torch.autograd.grad(divergence(logits_V.log_softmax(-1)), logits_V)[0].tolist()


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (K1(), [0.0, 0.0, 0.0]),
        (K2(), [0.098938, -0.093885, -0.005053]),
        (K3(), [0.1, -0.1, 0.0]),
        (K3StraightThrough(), [0.098938, -0.093885, -0.005053]),
    ],
)
def test_mean_gradient_as_a_loss(penalty, expected):
    """E over tokens drawn from the policy, whose probabilities are constants of the estimate."""
    logits_V = P.log().requires_grad_()
    loss = (P * penalty(logits_V.log_softmax(-1), REF.log())).sum()
    assert torch.autograd.grad(loss, logits_V)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_which_divergence_each_gradient_belongs_to():
    forward = exact_gradient(lambda logp_V: (logp_V.exp() * (logp_V - REF.log())).sum())
    backward = exact_gradient(lambda logp_V: (REF * (REF.log() - logp_V)).sum())
    assert forward == pytest.approx([0.098938, -0.093885, -0.005053], abs=1e-6)
    assert backward == pytest.approx((P - REF).tolist(), abs=1e-12)


def test_k3_is_clamped():
    logp_T = torch.tensor([-50.0, 50.0], requires_grad=True)
    value_T = K3()(logp_T, torch.zeros(2))
    assert value_T.tolist() == [10.0, 10.0]
    assert K3StraightThrough()(logp_T, torch.zeros(2)).tolist() == [10.0, 10.0]


def observed(penalty, state, kl, rows=100):
    signals = SimpleNamespace(metrics={} if kl is None else {"kl": kl}, batch=range(rows))
    return penalty.observe(state, signals)


@pytest.mark.parametrize("entry", list(kl_penalties), ids=kl_penalties.names())
def test_a_steered_coefficient_follows_the_clipped_proportional_rule(entry):
    penalty = entry.cls(coefficient=0.2, target=0.1, horizon=1000.0)
    state = penalty.init()
    assert penalty.coefficient_now(state) == 0.2
    assert observed(penalty, state, 0.11)["coefficient"] == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert observed(penalty, state, 5.0)["coefficient"] == pytest.approx(0.2 * (1 + 0.2 * 0.1))
    assert observed(penalty, state, 0.0)["coefficient"] == pytest.approx(0.2 * (1 - 0.2 * 0.1))
    assert observed(penalty, state, None) == state
    assert penalty.coefficient_now(observed(penalty, state, 0.1)) == pytest.approx(0.2)


def test_steering_finds_the_coefficient_that_holds_the_target():
    """On a toy where KL falls with the coefficient, KL = 1 / (1 + 10 c): the fixed point is KL = target."""
    penalty = K2(coefficient=0.01, target=0.25, horizon=1000.0)
    state = penalty.init()
    for _ in range(2000):
        state = observed(penalty, state, 1 / (1 + 10 * penalty.coefficient_now(state)))
    assert penalty.coefficient_now(state) == pytest.approx(0.3, abs=1e-3)


def test_a_steered_coefficient_stays_positive_whatever_the_batch():
    penalty = K2(coefficient=0.1, target=0.25, horizon=1.0)
    assert penalty.coefficient_now(observed(penalty, penalty.init(), 0.0)) > 0
    with pytest.raises(UserError, match="stays 0"):
        K2(coefficient=0.0, target=0.25)


def test_a_fixed_coefficient_has_no_state():
    penalty = K3(coefficient=0.04)
    assert penalty.init() == {}
    assert observed(penalty, {}, 7.0) == {}
    assert penalty.coefficient_now({}) == 0.04


def test_needs_depend_on_where_the_penalty_goes():
    assert K3().needs == ("reference",)
    assert K1().apply_to == "reward"
    assert K1().needs == ("reference", "old_logp")


def test_estimates_are_zero_for_equal_policies():
    for entry in kl_penalties:
        assert entry.cls()(P.log(), P.log()).tolist() == [0.0, 0.0, 0.0]
    assert math.isclose(float((P * (P / REF).log()).sum()), KL, abs_tol=1e-7)
