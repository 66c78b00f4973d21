"""Credit assignment: what each trained token of a batch earned. Once per batch, on all of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignment.algorithms.advantages import Advantage
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.demonstrations import is_demonstration, is_imitated, is_steered
from alignment.algorithms.weightings import Scalarisation, StreamMix, weighted_sum
from alignment.types import Batch


def credit(batch: Batch, algorithm: Algorithm, states: Mapping[str, Any]) -> Batch:
    """``batch`` with ``reward_B``, ``token_reward_BT``, ``adv_BT``, ``returns_BT`` and ``weight_BT`` filled in.

    A KL penalty in the reward becomes a token reward; the weighting makes one reward of the components, or one
    advantage of their advantages, and may multiply all of them; imitated demonstrations get advantage 1; the mixer may
    have advantages of its own and weigh rows. ``reward_B`` is NaN, never 0, where a row is unscored.

    Args:
        batch: Annotated with what ``algorithm.needs`` names.
        algorithm: The components.
        states: Their states by :meth:`Algorithm.components` names.

    Raises:
        UserError: The weighting cannot make one reward of the components, such as ``normalised`` with weights whose
            sum is not positive.
        AssertionError: The batch lacks what ``algorithm.needs`` names.
    """
    imitated_B = is_imitated(batch)
    judged = replace(
        batch, token_reward_BT=_token_reward(batch, algorithm, states), scored_B=batch.scored_B & ~imitated_B
    )
    reward_B, adv_BT, returns_BT = _judge(judged, algorithm, states)
    factor = getattr(algorithm.weighting, "advantage_factor", None)
    if factor is not None:
        adv_BT = factor(states.get("weighting")) * adv_BT
    adv_BT = torch.where(imitated_B[:, None], 1.0, adv_BT)
    trained_B = imitated_B | ~reward_B.isnan()
    credited = replace(
        batch,
        loss_mask_BT=batch.loss_mask_BT & trained_B[:, None],
        scored_B=batch.scored_B & trained_B,
        token_reward_BT=judged.token_reward_BT,
        reward_B=reward_B,
        adv_BT=torch.where(batch.loss_mask_BT & trained_B[:, None], adv_BT, 0.0),
        returns_BT=returns_BT,
    )
    own_advantages = getattr(algorithm.mixer, "advantages", None)
    if own_advantages is not None:
        adv_BT = own_advantages(states.get("mixer"), credited)
        credited = replace(credited, adv_BT=torch.where(credited.loss_mask_BT, adv_BT, 0.0))
    row_weight_B = algorithm.mixer.coefficients(states.get("mixer"), credited)
    if row_weight_B is None:
        return credited
    weight_BT = torch.ones_like(adv_BT) if batch.weight_BT is None else batch.weight_BT
    return replace(credited, weight_BT=weight_BT * row_weight_B[:, None])


def component_advantages(batch: Batch, algorithm: Algorithm) -> Tensor:
    """``[K, B, T]``: the advantages that each component alone gives the rows of a credited batch; imitated rows: 0."""
    judged = replace(batch, scored_B=batch.scored_B & ~is_imitated(batch))
    return torch.stack([algorithm.advantage(_stream(judged, k)) for k in range(batch.rewards_BK.shape[1])])


def _token_reward(batch: Batch, algorithm: Algorithm, states: Mapping[str, Any]) -> Tensor | None:
    """The batch's token rewards less ``coefficient * kl_BT`` on sampled tokens."""
    if algorithm.kl is None or algorithm.kl.apply_to != "reward":
        return batch.token_reward_BT
    assert batch.old_logp_BT is not None and batch.ref_logp_BT is not None, "annotate with what the algorithm needs"
    sampled_BT = batch.loss_mask_BT & ~is_demonstration(batch)[:, None]
    cost_BT = algorithm.kl.coefficient_now(states.get("kl")) * algorithm.kl(batch.old_logp_BT, batch.ref_logp_BT)
    earlier_BT = 0.0 if batch.token_reward_BT is None else batch.token_reward_BT
    return earlier_BT - torch.where(sampled_BT, cost_BT, 0.0)


def _judge(batch: Batch, algorithm: Algorithm, states: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reward, advantages and, if the advantage makes them, returns."""
    weighting, state = algorithm.weighting, states.get("weighting")
    if not getattr(weighting, "streams", False):
        assert isinstance(weighting, Scalarisation), "a weighting without streams has 'scalarise'"
        reward_B = weighting.scalarise(state, batch)
        stream = _with_reward(batch, reward_B)
        assert stream.reward_B is not None
        return stream.reward_B, algorithm.advantage(stream), _returns(algorithm.advantage, stream)
    assert isinstance(weighting, StreamMix), "a weighting with streams has 'mix'"
    streams = [_stream(batch, k) for k in range(batch.rewards_BK.shape[1])]
    adv_BT = weighting.mix(state, torch.stack([algorithm.advantage(stream) for stream in streams]), batch)
    returns = [r for stream in streams if (r := _returns(algorithm.advantage, stream)) is not None]
    reward_B = torch.where(batch.scored_B, weighted_sum(batch), torch.nan)
    return reward_B, adv_BT, torch.stack(returns, -1) if returns else None


def _with_reward(batch: Batch, reward_B: Tensor) -> Batch:
    """``batch`` with this reward; rows where it is NaN count as unscored."""
    scored_B = batch.scored_B & ~reward_B.isnan()
    return replace(batch, scored_B=scored_B, reward_B=torch.where(scored_B, reward_B, torch.nan))


def _stream(batch: Batch, k: int) -> Batch:
    """What component ``k`` alone would see."""
    values = batch.values_BT
    if values is not None and values.dim() == 3:
        values = values[..., k]
    return replace(_with_reward(batch, batch.rewards_BK[:, k]), values_BT=values)


def _returns(advantage: Advantage, batch: Batch) -> Tensor | None:
    """Targets for a critic, of what the policy does by itself; only some advantages define them."""
    make = getattr(advantage, "returns", None)
    return None if make is None else torch.where(is_steered(batch)[:, None], torch.nan, make(batch))
