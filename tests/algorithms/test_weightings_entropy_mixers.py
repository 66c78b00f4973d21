"""Weightings, the entropy bonus, and the mixer that mixes nothing."""

import math
from dataclasses import replace

import pytest
import torch

from alignment.algorithms.entropy_controls import Bonus, PenaltyView
from alignment.algorithms.mixers import NoMix
from alignment.algorithms.weightings import Fixed, Normalised
from alignment.types import Context, Group, Prompt

NAN = math.nan
REWARDS = [[1.0, 4.0], [NAN, 4.0], [1.0, NAN], [NAN, NAN]]


def test_fixed_is_the_weighted_sum_of_what_applies(make_batch):
    reward_B = Fixed().scalarise(None, make_batch(REWARDS, weights=[2.0, 0.5]))
    assert reward_B[:3].tolist() == [4.0, 2.0, 2.0]
    assert reward_B[3].isnan()


def test_a_completion_without_an_end_may_have_a_reward_of_its_own(make_batch):
    """Tulu 3: -10 in place of whatever the verifier says; what no component applies to stays without a reward."""
    truncated = torch.tensor([True, True, False, True])
    batch = replace(make_batch(REWARDS, weights=[2.0, 0.5]), truncated_B=truncated)
    reward_B = Fixed(truncated=-10.0).scalarise(None, batch)
    assert reward_B[:3].tolist() == [-10.0, -10.0, 2.0] and reward_B[3].isnan()
    assert Fixed().scalarise(None, batch)[:3].tolist() == [4.0, 2.0, 2.0]


def test_normalised_is_the_weighted_mean_of_what_applies(make_batch):
    reward_B = Normalised().scalarise(None, make_batch(REWARDS, weights=[2.0, 0.5]))
    assert reward_B[:3].tolist() == pytest.approx([1.6, 4.0, 1.0])
    assert reward_B[3].isnan()


def test_normalised_refuses_weights_that_do_not_add_up_to_something_positive(make_batch):
    with pytest.raises(ValueError, match="make the weights positive"):
        Normalised().scalarise(None, make_batch(REWARDS, weights=[2.0, -0.5]))
    unscored = make_batch(REWARDS, weights=[2.0, -0.5], scored=[True, False, True, False])
    assert Normalised().scalarise(None, unscored)[2] == 1.0


def of_entropy(entropy):
    return PenaltyView(torch.zeros(1), torch.zeros(1), entropy, None)


def entropy_of(logits_V):
    logp_V = logits_V.log_softmax(-1)
    return -(logp_V.exp() * logp_V).sum()


@pytest.mark.parametrize("size", [2, 7, 50])
def test_uniform_logits_have_entropy_log_v_and_no_gradient(size):
    logits_V = torch.full((size,), 3.0, dtype=torch.float64, requires_grad=True)
    entropy = entropy_of(logits_V)
    assert float(entropy.detach()) == pytest.approx(math.log(size), abs=1e-12)
    penalty = Bonus(coefficient=0.3).penalty(None, of_entropy(entropy))
    assert penalty is not None
    assert torch.autograd.grad(penalty, logits_V)[0].abs().max() < 1e-12


def test_the_bonus_is_minus_coefficient_times_entropy_and_raises_it():
    logits_V = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    entropy = entropy_of(logits_V)
    penalty = Bonus(coefficient=0.3).penalty(None, of_entropy(entropy))
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(-0.3 * float(entropy.detach()))
    (gradient_V,) = torch.autograd.grad(penalty, logits_V)
    p_V = logits_V.detach().softmax(-1)
    expected_V = 0.3 * p_V * (p_V.log() + entropy.detach())  # dH = -sum_a p_a (log p_a + H) dz_a
    torch.testing.assert_close(gradient_V, expected_V, atol=1e-12, rtol=0)
    assert entropy_of(logits_V.detach() - 0.1 * gradient_V) > entropy


def test_a_bonus_of_zero_asks_for_nothing(make_batch):
    assert Bonus(coefficient=0.0).penalty(None, of_entropy(None)) is None
    assert not Bonus(coefficient=0.0).entropy_gradient and Bonus().entropy_gradient
    assert Bonus().prepare(None, make_batch([0.0])) is None


def test_no_mixer_passes_groups_through(make_batch):
    groups = [Group(0, Prompt("a", {"prompt": "1+1="}), ())]
    assert NoMix().route(None, groups, {"a": []}, Context(step=0, seed=0)) == {"rl": groups}
    assert NoMix().coefficients(None, make_batch([0.0])) is None
