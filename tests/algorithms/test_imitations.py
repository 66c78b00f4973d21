"""Objectives of judged demonstrations: golden numbers of the paper's definitions, and what they must equal."""

import math
from dataclasses import replace

import pytest
import torch

from alignment.algorithms.aggregations import SequenceMean, TokenMean
from alignment.algorithms.imitations import (
    AdvantageWeighted,
    Likelihood,
    RewardWeighted,
    Unlike,
    Unlikelihood,
    imitations,
)
from alignment.algorithms.objective import Objective, combine
from alignment.algorithms.policy_losses import Reinforce

KEYS = ["a", "a", "b", "b"]


def test_golden_weights_of_unlikelihood():
    """The paper's threshold of toxicity; a score that equals it is aligned."""
    found = Unlikelihood(score="toxicity", threshold=5.6e-4, alpha=0.5).weights([5e-4, 5.7e-4, 5.6e-4], KEYS[:3])
    assert found == [1.0, -0.5, 1.0]


def test_golden_weights_of_regressions():
    assert RewardWeighted(reward="r", beta=0.5).weights([0.0, 1.0, -1.0], KEYS[:3]) == pytest.approx(
        [1.0, math.e**2, math.e**-2]
    )
    assert RewardWeighted(reward="r", beta=1e-3).weights([1.0], ["a"]) == [math.inf]
    advantage_one = [2.0, 0.0]
    assert AdvantageWeighted(reward="r", beta=0.1, clip=1e9).weights(advantage_one, KEYS[:2]) == pytest.approx(
        [22026.4657948, 4.5399930e-5]
    )
    assert AdvantageWeighted(reward="r", beta=0.1).weights(advantage_one, KEYS[:2])[0] == 1000.0


def test_the_baseline_is_the_mean_of_all_or_of_the_prompt():
    rewards = [1.0, 3.0, 5.0, 7.0]
    of_all = AdvantageWeighted(reward="r").weights(rewards, KEYS)
    of_prompt = AdvantageWeighted(reward="r", baseline="prompt").weights(rewards, KEYS)
    assert of_all == pytest.approx([math.exp(r - 4.0) for r in rewards])
    assert of_prompt == pytest.approx([math.exp(-1.0), math.exp(1.0)] * 2)
    assert AdvantageWeighted(reward="r").weights([0.3] * 4, KEYS) == Likelihood().weights([0.0] * 4, KEYS) == [1.0] * 4


@pytest.fixture
def batch(make_batch):
    """Three rows, the second of them unwanted."""
    made = make_batch([[math.nan]] * 3, [2, 5, 3], sources=["demonstration"] * 3)
    weight_B = torch.tensor([1.0, -0.5, 1.0])
    return replace(made, weight_BT=weight_B[:, None] * made.loss_mask_BT)


def test_golden_loss_of_unlikelihood(batch):
    logp_BT = torch.full(batch.ids_BT.shape, math.log(0.3))
    loss_BT = batch.weight_BT * Unlike()(logp_BT, batch)[0]
    at = batch.loss_mask_BT.float().argmax(1)
    assert loss_BT[1, at[1]] == pytest.approx(0.5 * 0.3566749, abs=1e-6)
    assert loss_BT[0, at[0]] == pytest.approx(-math.log(0.3), abs=1e-6)


def test_by_a_logit_the_gradient_of_unlikelihood_is_the_probability(batch):
    """Also where the token is all but certain."""
    for distance in (0.0, 3.0, 14.0):
        logits_BTV = torch.zeros(*batch.ids_BT.shape, 2, requires_grad=True)
        shifted_BTV = logits_BTV + torch.tensor([distance, 0.0])
        logp_BT = shifted_BTV.log_softmax(-1)[..., 0]
        loss_BT = batch.weight_BT * Unlike()(logp_BT, batch)[0]
        (gradient,) = torch.autograd.grad(loss_BT.sum(), logits_BTV)
        p = 1 / (1 + math.exp(-distance))
        found = gradient[1][batch.loss_mask_BT[1]][:, 0]
        torch.testing.assert_close(found, torch.full_like(found, 0.5 * p), rtol=5e-2 if distance > 10 else 1e-4, atol=0)
        certain = torch.zeros_like(logp_BT, requires_grad=True)
        Unlike()(certain, batch)[0].sum().backward()
        assert certain.grad is not None and certain.grad.isfinite().all()


def test_without_unwanted_rows_it_is_the_likelihood(batch):
    logp_BT = -torch.rand(batch.ids_BT.shape)
    wanted = replace(batch, weight_BT=batch.loss_mask_BT.float())
    plain = replace(batch, weight_BT=None)
    losses = []
    for objective, given in ((Objective.supervised(policy_loss=Unlike()), wanted), (Objective.supervised(), plain)):
        losses.append(objective.loss(logp_BT, None, objective.prepare(given))[0])
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean()])
@pytest.mark.parametrize("policy_loss", [Unlike(), Reinforce()])
def test_splitting_and_reordering_change_nothing(batch, aggregation, policy_loss):
    objective = Objective.supervised(aggregation, policy_loss)
    logp_BT = (-torch.rand(batch.ids_BT.shape)).requires_grad_()
    whole, sums = objective.loss(logp_BT, None, objective.prepare(batch))
    (gradient,) = torch.autograd.grad(whole, logp_BT)
    order, total, parts = torch.tensor([2, 0, 1]), torch.zeros(()), dict[str, torch.Tensor]()
    shuffled = replace(
        batch, **{n: getattr(batch, n)[order] for n in ("loss_mask_BT", "weight_BT", "ids_BT", "length_B")}
    )
    prepared = objective.prepare(shuffled)
    again = torch.zeros_like(gradient)
    for i in range(3):
        micro = prepared.rows([i])
        leaf = logp_BT.detach()[order[i : i + 1], : micro.ids_BT.shape[1]].requires_grad_()
        loss, more = objective.loss(leaf, None, micro)
        again[order[i], : leaf.shape[1]] = torch.autograd.grad(loss, leaf)[0][0]
        total, parts = total + loss.detach(), combine(parts, more)
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(again, gradient)
    assert objective.finish(parts) == pytest.approx(objective.finish(sums))


def test_what_a_recipe_says():
    assert imitations.build("likelihood") == Likelihood() and Likelihood().column is None
    built = imitations.build({"name": "unlikelihood", "score": "toxicity", "threshold": 0.1})
    assert built.column == "toxicity" and isinstance(built.policy_loss, Unlike)
    assert imitations.build({"name": "advantage_weighted", "reward": "r"}).column == "r"
