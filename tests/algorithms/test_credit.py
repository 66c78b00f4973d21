"""Credit assignment: rewards, streams, KL in the reward, demonstrations, unscored rows."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from alignment.algorithms.advantages import Advantage, DrGrpo, Gae, ReinforcePp, advantages
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.kl_penalties import K1
from alignment.algorithms.values import batch_metrics

NAN = math.nan
DR = Algorithm(advantage=DrGrpo())


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=0)


def test_components_are_weighted_then_compared_within_groups(make_batch):
    batch = credit(make_batch([[1, 0], [0, 1], [1, NAN], [0, 0]], [2] * 4, [0, 0, 1, 1], weights=[1.0, 0.5]), DR, {})
    assert batch.reward_B is not None and batch.adv_BT is not None
    close(batch.reward_B, [1.0, 0.5, 1.0, 0.0])
    close(batch.adv_BT[:, 1], [0.25, -0.25, 0.5, -0.5])
    assert batch.weight_BT is None and batch.returns_BT is None and batch.token_reward_BT is None


def test_an_unscored_row_is_never_reward_zero(make_batch):
    """Without a value, or with one beside a failure: out of the baseline, advantage 0, reward NaN."""
    for rewards in ([[1.0], [0.0], [NAN]], [[1.0], [0.0], [7.0]]):
        batch = credit(make_batch(rewards, [2] * 3, scored=[True, True, False]), DR, {})
        assert batch.reward_B is not None and batch.adv_BT is not None
        assert batch.reward_B[2].isnan()
        close(batch.adv_BT[:, 1], [0.5, -0.5, 0.0])
        assert batch.scored_B.tolist() == [True, True, False]


def test_every_advantage_survives_unscored_rows(make_batch):
    for entry in [e for e in advantages if e.cls.__module__.startswith("alignment.")]:  # other tests register their own
        batch = make_batch([[1.0], [0.0], [NAN], [NAN]], [2, 3, 1, 2], [0, 0, 0, 1], scored=[True, True, False, False])
        adv_BT = credit(batch, Algorithm(advantage=entry.cls()), {}).adv_BT
        assert adv_BT is not None and adv_BT.isfinite().all()
        assert (adv_BT[2:] == 0).all() and (adv_BT[:2, 1] != 0).all()


def test_imitated_demonstrations_have_advantage_one_and_are_in_no_baseline(make_batch):
    batch = make_batch(
        [[1.0], [0.0], [5.0], [NAN]],
        [2, 3, 2, 1],
        sources=["policy", "policy", "demonstration", "demonstration"],
        bases=["old", "old", "self", "one"],
        scored=[True, True, True, False],
    )
    adv_BT = credit(batch, DR, {}).adv_BT
    assert adv_BT is not None
    close(adv_BT, [[0, 0.5, 0.5, 0], [0, -0.5, -0.5, -0.5], [0, 1, 1, 0], [0, 1, 0, 0]])


def test_a_judged_demonstration_belongs_to_its_group(make_batch):
    """Ratio base one and a reward, as in LUFFY: compared with the rollouts, and they with it."""
    batch = make_batch([0.0, 0.0, 0.0, 1.0], sources=["policy"] * 3 + ["demonstration"], bases=["old"] * 3 + ["one"])
    adv_BT = credit(batch, DR, {}).adv_BT
    assert adv_BT is not None
    close(adv_BT[:, 1], [-0.25, -0.25, -0.25, 0.75])


def kl_batch(make_batch, **more):
    tensors = {
        "old_logp_BT": torch.tensor([[NAN, -1.0, -2.0], [NAN, -1.0, NAN]]),
        "ref_logp_BT": torch.tensor([[0.0, -1.5, -1.0], [0.0, -3.0, 0.0]]),
    }
    return make_batch([[1.0], [0.0]], [2, 1], **tensors, **more)


def test_kl_in_the_reward(make_batch):
    algorithm = Algorithm(advantage=DrGrpo(), kl=K1(coefficient=0.1))
    batch = credit(kl_batch(make_batch), algorithm, {"kl": {}})
    assert batch.token_reward_BT is not None and batch.adv_BT is not None and batch.reward_B is not None
    close(batch.token_reward_BT, [[0, -0.05, 0.1], [0, -0.2, 0]])
    close(batch.reward_B, [1.0, 0.0])
    close(batch.adv_BT[:, 1], [0.625, -0.625])  # (1.05 + .2) / 2


def test_kl_in_the_reward_uses_the_steered_coefficient_and_adds_to_other_token_rewards(make_batch):
    algorithm = Algorithm(advantage=ReinforcePp(), kl=K1(coefficient=0.1, target=1.0))
    given_BT = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    batch = credit(kl_batch(make_batch, token_reward_BT=given_BT), algorithm, {"kl": {"coefficient": 1.0}})
    assert batch.token_reward_BT is not None
    close(batch.token_reward_BT, [[0, 0.5, 1.0], [0, -2.0, 0]])


def test_kl_in_the_reward_leaves_demonstrations_alone(make_batch):
    batch = kl_batch(make_batch, sources=["policy", "demonstration"], bases=["old", "self"])
    token_reward_BT = credit(batch, Algorithm(kl=K1(coefficient=0.1)), {"kl": {}}).token_reward_BT
    assert token_reward_BT is not None
    close(token_reward_BT, [[0, -0.05, 0.1], [0, 0, 0]])


@dataclass(frozen=True)
class Lagrangian:
    """A = (N - sum m) A_0 + sum m_i A_i (Constrained RLHF, arXiv 2310.04373)."""

    streams: ClassVar[bool] = True

    def mix(self, state, adv_KBT, batch):
        m_N = torch.tensor(state["m"])
        return (len(m_N) - m_N.sum()) * adv_KBT[0] + (m_N[:, None, None] * adv_KBT[1:]).sum(0)


@dataclass(frozen=True)
class WithCritic:
    """Reward less value; returns are the reward."""

    needs: ClassVar[tuple[str, ...]] = ("values",)

    def __call__(self, batch):
        values_BT = batch.values_BT
        assert values_BT.dim() == 2
        return torch.where(batch.scored_B[:, None], batch.reward_B[:, None] - values_BT, 0.0)

    def returns(self, batch):
        return torch.where(batch.scored_B[:, None], batch.reward_B[:, None], 0.0).expand_as(batch.values_BT)


def test_streams_get_advantages_of_their_own(make_batch):
    rewards = [[1.0, 2.0, 0.0], [0.0, 0.0, 4.0], [NAN, NAN, 2.0]]
    batch = make_batch(rewards, [1, 2, 1])
    algorithm = Algorithm(advantage=DrGrpo(), weighting=Lagrangian())
    credited = credit(batch, algorithm, {"weighting": {"m": [-0.2, 0.3]}})
    assert credited.adv_BT is not None and credited.reward_B is not None
    a_0, a_1, a_2 = (0.5, -0.5, 0.0), (1.0, -1.0, 0.0), (-2.0, 2.0, 0.0)  # row 2 is in the third stream alone
    expected = [1.9 * x - 0.2 * y + 0.3 * z for x, y, z in zip(a_0, a_1, a_2, strict=True)]
    close(credited.adv_BT[:, 1], expected)
    close(credited.reward_B, [3.0, 4.0, 2.0])
    assert credited.scored_B.all()


def test_streams_with_a_critic_of_as_many_values(make_batch):
    values_BTK = torch.tensor([0.25, 1.0]).expand(2, 2, 2)
    batch = make_batch([[1.0, 2.0], [0.0, NAN]], values_BT=values_BTK)
    credited = credit(batch, Algorithm(advantage=WithCritic(), weighting=Lagrangian()), {"weighting": {"m": [0.5]}})
    assert credited.adv_BT is not None and credited.returns_BT is not None
    close(credited.adv_BT[:, 1], [0.5 * 0.75 + 0.5 * 1.0, 0.5 * -0.25])
    close(credited.returns_BT[:, 1], [[1.0, 2.0], [0.0, 0.0]])
    assert torch.equal(credited.values_BT, values_BTK)


def test_an_advantage_with_returns_makes_targets(make_batch):
    assert isinstance(WithCritic(), Advantage)
    batch = make_batch([[1.0], [0.0]], values_BT=torch.full((2, 2), 0.5))
    returns_BT = credit(batch, Algorithm(advantage=WithCritic()), {}).returns_BT
    assert returns_BT is not None
    close(returns_BT, [[1.0, 1.0], [0.0, 0.0]])


@dataclass(frozen=True)
class Halve:
    """A mixer that halves the demonstrations."""

    def route(self, state, groups, demonstrations, context):
        return {"rl": list(groups)}

    def coefficients(self, state, batch):
        return torch.where(batch.source_B == 1, state["c"], 1.0)


def test_a_critic_is_fitted_to_what_the_policy_does_by_itself(make_batch):
    sources = ["policy", "steered", "policy"]
    batch = make_batch([[1.0], [0.0], [NAN]], [2, 3, 2], sources=sources, scored=[True, True, False])
    batch = replace(batch, values_BT=torch.zeros(batch.ids_BT.shape))
    credited = credit(batch, Algorithm(advantage=Gae(normalise="none")), {})
    assert credited.returns_BT is not None and credited.adv_BT is not None
    assert (~credited.returns_BT.isnan()).any(1).tolist() == [True, False, False]
    assert (credited.adv_BT[0] != 0).any() and batch_metrics(credited)["critic/bias"] < 0


def test_the_mixer_weighs_rows(make_batch):
    batch = make_batch([[1.0], [0.0]], sources=["policy", "demonstration"], bases=["old", "self"])
    algorithm, states = Algorithm(mixer=Halve()), {"mixer": {"c": 0.5}}
    weight_BT = credit(batch, algorithm, states).weight_BT
    assert weight_BT is not None
    close(weight_BT, [[1.0, 1.0], [0.5, 0.5]])
    again = credit(replace(batch, weight_BT=torch.full((2, 2), 3.0)), algorithm, states).weight_BT
    assert again is not None
    close(again, [[3.0, 3.0], [1.5, 1.5]])


def test_a_row_that_gets_no_reward_is_not_trained_on(make_batch):
    """The scorer found it scored, but no weighted component applies."""
    batch = make_batch([[1], [NAN], [0]], [2] * 3, [0] * 3)
    batch = replace(batch, scored_B=torch.ones(3, dtype=torch.bool))
    credited = credit(batch, DR, {})
    assert credited.scored_B.tolist() == [True, False, True]
    assert credited.loss_mask_BT.any(1).tolist() == [True, False, True]
