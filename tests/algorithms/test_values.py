"""Values: generalised advantages and lambda-returns over states, with golden numbers, identities and their limits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignment.algorithms.advantages import Gae
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.kl_penalties import K1
from alignment.algorithms.objective import Objective
from alignment.algorithms.policy_losses import Reinforce
from alignment.algorithms.values import (
    adaptive_lambda,
    batch_metrics,
    decision_mask,
    generalised,
    prediction_metrics,
    state_mask,
)

NAN = float("nan")


def row(values: list[float], rewards: list[float], **options: Any) -> tuple[list[float], list[float]]:
    """Advantages of a row of one prompt token and as many sampled ones, and targets of all its states.

    ``values`` are those of the states from which tokens are sampled; the terminal one may follow.
    """
    tokens = len(rewards)
    values = values + [9.9] * (tokens + 1 - len(values))  # a terminal value that no one may look at
    found = generalised(
        torch.tensor([values]),
        torch.tensor([rewards[-1]]),
        torch.tensor([[0.0, *rewards[:-1], 0.0]]),
        torch.tensor([[False, *[True] * tokens]]),
        torch.tensor([options.pop("truncated", False)]),
        **options,
    )
    assert found.adv_BT[0, 0] == 0
    return found.adv_BT[0, 1:].tolist(), found.target_BT[0].tolist()


@pytest.mark.parametrize(
    ("lam", "targets"),
    [(0.0, [0.2, 0.3, 1.0]), (0.5, [0.425, 0.65, 1.0]), (0.95, [0.92675, 0.965, 1.0]), (1.0, [1.0, 1.0, 1.0])],
)
def test_lambda_returns(lam, targets):
    _, found = row([0.1, 0.2, 0.3], [0, 0, 1], lam=lam)
    assert found == pytest.approx([*targets, 1.0]), "the last one is the terminal state's"


def test_generalised_advantages():
    assert row([0.5] * 3, [0, 0, 1], lam=0.95)[0] == pytest.approx([0.45125, 0.475, 0.5])
    assert row([0.5] * 3, [0, 0, 1], lam=1.0)[0] == pytest.approx([0.5, 0.5, 0.5])
    assert row([0.2, 0.4, 0.6], [0, 0, 1], lam=0.95)[0] == pytest.approx([0.751, 0.58, 0.4])


def test_a_completion_of_one_token_has_two_states_with_a_target():
    adv, targets = row([0.25], [1.0], lam=0.95)
    assert adv == [0.75] and targets == [1.0, 1.0]


def test_rewards_at_tokens_are_earned_when_they_are_sampled():
    adv, targets = row([0.0] * 3, [-0.1, -0.2, 1.0], lam=1.0)
    assert adv == pytest.approx([0.7, 0.8, 1.0]) and targets == pytest.approx([0.7, 0.8, 1.0, 1.0])
    assert row([0.0] * 3, [0, 0, 1.0], lam=1.0, gamma=0.5)[0] == pytest.approx([0.25, 0.5, 1.0])


def test_truncation_is_an_end_or_is_not():
    values = [0.1, 0.2, 0.3, 0.8]
    adv, targets = row(values, [0, 0, 1.0], lam=1.0, truncated=True, truncation="end")
    assert adv == pytest.approx([0.9, 0.8, 0.7]) and targets == pytest.approx([1.0] * 4)
    adv, targets = row(values, [0, 0, 1.0], lam=1.0, truncated=True, truncation="bootstrap")
    assert adv == pytest.approx([0.7, 0.6, 0.5]), "what stands behind the last token is the state that was reached"
    assert targets[:3] == pytest.approx([0.8] * 3) and targets[3] != targets[3], "which has no target itself"
    _, targets = row(values, [0, 0, 1.0], lam=0.0, gamma=0.5, truncated=True, truncation="bootstrap")
    assert targets[:3] == pytest.approx([0.1, 0.15, 0.4])


def test_observations_carry_values_through():
    """Two sampled tokens, an observation of two, one sampled token: as if the observation were not there."""
    mask_BT = torch.tensor([[False, True, True, False, False, True]])
    values_BT = torch.tensor([[0.1, 0.2, 5.0, 5.0, 0.3, 7.0]])  # after each token; the fourth and sixth go unused
    found = generalised(values_BT, torch.ones(1), None, mask_BT, torch.tensor([False]), lam=0.95)
    assert found.adv_BT[0, mask_BT[0]].tolist() == pytest.approx(row([0.1, 0.2, 0.3], [0, 0, 1], lam=0.95)[0])
    targets = found.target_BT[0].tolist()
    assert targets[:3] == pytest.approx([0.92675, 0.965, 1.0]), "before both tokens, and after the second"
    assert targets[3] != targets[3] and targets[4:] == pytest.approx([1.0, 1.0])
    assert state_mask(mask_BT)[0].tolist() == [True, True, True, False, True, True]
    assert decision_mask(mask_BT)[0].tolist() == [True, True, False, False, True, False]


finite = st.floats(-2, 2, width=32)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(finite, min_size=4, max_size=4),
    rewards=st.lists(finite, min_size=4, max_size=4),
    lam=st.floats(0, 1),
)
def test_identities(values, rewards, lam):
    adv, targets = row(values, rewards, lam=1.0)
    returns = [sum(rewards[t:]) for t in range(4)]
    assert adv == pytest.approx([r - v for r, v in zip(returns, values, strict=True)], abs=1e-5), "Monte Carlo"
    assert targets[:4] == pytest.approx(returns, abs=1e-5)
    perfect, _ = row(returns, rewards, lam=lam)
    assert perfect == pytest.approx([0.0] * 4, abs=1e-5), "what was expected is no news, whatever lambda"
    adv, targets = row(values, rewards, lam=lam)
    assert targets[:4] == pytest.approx([a + v for a, v in zip(adv, values, strict=True)], abs=1e-5)


def test_the_length_adaptive_lambda():
    found = adaptive_lambda(torch.tensor([100, 1000, 10_000, 10, 0]), 0.05)
    assert found.tolist() == pytest.approx([0.8, 0.98, 0.998, 0.0, 0.0])


def test_lambdas_are_decoupled(make_batch):
    values_BT = torch.tensor([[0.1, 0.2, 0.3, 0.0]])
    batch = make_batch([1.0], [3], values_BT=values_BT)
    gae = Gae(lam=0.5, normalise="none")
    assert gae(batch)[0, 1:].tolist() == pytest.approx([0.325, 0.45, 0.7])
    assert gae.returns(batch)[0].tolist() == pytest.approx([1.0] * 4), "the critic's is 1: Monte Carlo"
    assert replace(gae, critic_lam=0.5).returns(batch)[0].tolist() == pytest.approx([0.425, 0.65, 1.0, 1.0])
    adaptive = Gae(length_adaptive=2 / 3, normalise="none")  # 3 tokens: lambda 0.5
    assert adaptive(batch)[0, 1:].tolist() == pytest.approx([0.325, 0.45, 0.7])


def test_whitening_is_over_all_tokens_of_the_batch(make_batch):
    batch = make_batch([1.0, 0.0], [3, 1], values_BT=torch.zeros(2, 4))
    adv_BT, mask_BT = Gae(lam=1.0)(batch), batch.loss_mask_BT
    plain = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert adv_BT[mask_BT].tolist() == pytest.approx(((plain - plain.mean()) / plain.std()).tolist(), abs=1e-5)


def test_with_a_perfect_critic_and_one_update_ppo_is_reinforce_with_that_baseline(make_batch):
    """The gradient of the clipped loss at ratio 1 is that of ``-(R - V) log pi``."""
    values_BT = torch.tensor([[0.6, 0.5, 0.7, 0.0], [0.6, 0.2, 0.0, 0.0]])
    batch = make_batch([[1.0], [0.0]], [3, 2], values_BT=values_BT)
    algorithm = Algorithm(advantage=Gae(lam=1.0, normalise="none"), correction=None)
    credited = credit(batch, algorithm, {})
    assert credited.adv_BT is not None
    logp_BT = torch.full((2, 4), -1.5).requires_grad_()
    objective = Objective.of(algorithm, {})
    loss, _ = objective.loss(logp_BT, None, objective.prepare(credited))
    (gradient,) = torch.autograd.grad(loss, logp_BT)
    baseline_BT = torch.cat([torch.zeros(2, 1), values_BT[:, :-1]], 1)
    expected = -(torch.tensor([[1.0], [0.0]]) - baseline_BT) * batch.loss_mask_BT / 5
    torch.testing.assert_close(gradient, expected)
    plain = replace(objective, policy_loss=Reinforce())
    loss, _ = plain.loss(logp_BT, None, plain.prepare(credited))
    torch.testing.assert_close(torch.autograd.grad(loss, logp_BT)[0], gradient)


def test_a_kl_in_the_reward_is_earned_token_by_token(make_batch):
    old_BT = torch.tensor([[0.0, -1.0, -1.0, -1.0]])
    batch = make_batch(
        [[1.0]], [3], values_BT=torch.zeros(1, 4), old_logp_BT=old_BT, ref_logp_BT=old_BT - torch.tensor([0, 1, 2, 3])
    )
    kl = K1(coefficient=0.1, apply_to="reward")
    credited = credit(batch, Algorithm(advantage=Gae(lam=1.0, normalise="none"), kl=kl), {})
    assert credited.adv_BT is not None and credited.returns_BT is not None
    assert credited.adv_BT[0, 1:].tolist() == pytest.approx([0.4, 0.5, 0.7])
    assert credited.returns_BT[0].tolist() == pytest.approx([0.4, 0.5, 0.7, 1.0])


def test_unscored_rows_have_no_targets(make_batch):
    batch = make_batch([[1.0], [NAN]], [2, 2], scored=[True, False])
    credited = credit(batch, Algorithm(advantage=Gae()), {})
    assert credited.returns_BT is not None
    assert credited.returns_BT[0].tolist() == [1.0] * 3 and credited.returns_BT[1].isnan().all()


def test_metrics_of_predictions():
    mask_BT = torch.tensor([[False, True, True], [False, True, True]])
    target_BT = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, NAN]])
    exact = prediction_metrics(target_BT.nan_to_num(), target_BT, mask_BT)
    assert exact == {"calibration_error": 0.0, "bias": 0.0, "mean": 0.5, "explained_variance": 1.0}
    flat = prediction_metrics(torch.full((2, 3), 0.75), target_BT, mask_BT)
    assert flat["explained_variance"] == 0.0 and flat["bias"] == 0.25
    worse = prediction_metrics(1 - target_BT.nan_to_num(), target_BT, mask_BT)
    assert worse["explained_variance"] == pytest.approx(-3.0) and worse["calibration_error"] == 1.0
    same = prediction_metrics(torch.zeros(2, 3), torch.ones(2, 3), mask_BT)
    assert "explained_variance" not in same and same["bias"] == -1.0
    assert prediction_metrics(torch.zeros(2, 3), torch.full((2, 3), NAN), mask_BT) == {}


def test_metrics_of_streams(make_batch):
    values: Tensor = torch.zeros(1, 2, 2)
    batch = make_batch([[1.0, 2.0]], values_BT=values, returns_BT=torch.ones(1, 2, 2), objectives=("a", "b"))
    assert batch_metrics(batch)["critic/b/bias"] == -1.0
    assert batch_metrics(replace(batch, values_BT=None)) == {}
