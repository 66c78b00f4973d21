"""State values: targets, generalised advantages, and how good predictions are. Pure functions of a batch's tensors.

``values_BT[b, t]`` is the value of the state *after* token ``t`` (what is still to be earned once it stands there), so
a state before token ``t`` is found at ``t - 1``, the state at the end of the prompt at its last token, and the terminal
state at the last token. The reward of a row is earned at its end: the terminal state's value is that reward, which is
what a decoder asks for when it weighs whether to stop. Between sampled tokens there may be observations: they take no
time, and a value is carried through them.

Sources: High-Dimensional Continuous Control Using Generalized Advantage Estimation (arXiv 1506.02438); Learning to
Predict by the Methods of Temporal Differences (Sutton 1988).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignment.types import Batch

Truncation = Literal["end", "bootstrap"]
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Returns:
    """What :func:`generalised` finds for each sampled token and each state."""

    adv_BT: Tensor
    """float64, at sampled tokens; 0 elsewhere."""
    target_BT: Tensor
    """float64 lambda-return of the state after each token; NaN where a state has no target."""


def state_mask(loss_mask_BT: Tensor) -> Tensor:
    """``[B, T]`` bool: states that a sampled token leads to or starts from, the terminal one included."""
    before_BT = torch.zeros_like(loss_mask_BT)
    before_BT[:, :-1] = loss_mask_BT[:, 1:]
    return loss_mask_BT | before_BT


def decision_mask(loss_mask_BT: Tensor) -> Tensor:
    """``[B, T]`` bool: states from which a token is sampled."""
    before_BT = torch.zeros_like(loss_mask_BT)
    before_BT[:, :-1] = loss_mask_BT[:, 1:]
    return before_BT


def adaptive_lambda(length_B: Tensor, alpha: float) -> Tensor:
    """``1 - 1 / (alpha l)`` for completions of ``l`` sampled tokens, in float64, kept within [0, 1].

    Longer completions get a larger lambda, so that a reward at their end still reaches their beginning. Source: VAPO:
    Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks (arXiv 2504.05118). The bound is ours:
    below ``1 / alpha`` tokens the formula is negative.
    """
    return (1 - 1 / (alpha * length_B.double().clamp(min=1))).clamp(0, 1)


def generalised(
    values_BT: Tensor,
    reward_B: Tensor,
    token_reward_BT: Tensor | None,
    loss_mask_BT: Tensor,
    truncated_B: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    truncation: Truncation = "end",
) -> Returns:
    """Generalised advantages and lambda-returns, over sampled tokens; observations are skipped without discount.

    With ``V_t`` the value before sampled token ``t``, ``V_{t+1}`` the one before the next sampled token, and ``r`` the
    token rewards: ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lambda A_{t+1}``, and the target of
    the state before ``t`` is ``A_t + V_t``. Behind the last sampled token stands the row's reward, undiscounted.

    Args:
        values_BT: Values of states after tokens.
        reward_B: Reward of each row; NaN rows get no advantage and no target.
        token_reward_BT: Rewards at tokens beside it, or None.
        loss_mask_BT: Sampled tokens.
        truncated_B: Rows that a length limit ended.
        gamma: Discount per sampled token.
        lam: Lambda, one or one per row; 1 is Monte Carlo, 0 one-step temporal difference.
        truncation: ``end``: the limit is part of the task, and the reward of a truncated row is its return.
            ``bootstrap``: it is not an end. What stands behind the last token is then ``gamma`` times the value of the
            state that was reached, the row's reward is not used, and that last state has no target.
    """
    scored_B = ~reward_B.isnan()
    mask_BT = loss_mask_BT & scored_B[:, None]
    values_BT = torch.where(state_mask(loss_mask_BT), values_BT, 0.0).double()
    token_BT = torch.zeros_like(values_BT) if token_reward_BT is None else torch.where(mask_BT, token_reward_BT, 0.0)
    lam_B = torch.as_tensor(lam, dtype=torch.float64, device=values_BT.device).expand(len(reward_B))
    end_B = torch.where(scored_B, reward_B, 0.0).double()
    open_B = truncated_B & (truncation == "bootstrap")
    return _backwards(values_BT, token_BT, end_B, mask_BT, open_B, gamma, lam_B)


def _backwards(
    values_BT: Tensor,
    token_BT: Tensor,
    reward_B: Tensor,
    mask_BT: Tensor,
    open_B: Tensor,
    gamma: float,
    lam_B: Tensor,
) -> Returns:
    """The recursion, from the last token to the first; rows that are ``open_B`` go on behind their last token."""
    adv_BT, target_BT = torch.zeros_like(values_BT), torch.full_like(values_BT, torch.nan)
    following_B, adv_B = reward_B, torch.zeros_like(reward_B)  # what stands behind the token, and its advantage
    target_B = torch.where(open_B, torch.nan, reward_B)
    seen_B = torch.zeros_like(open_B)
    for t in reversed(range(1, mask_BT.shape[1])):
        here_B = mask_BT[:, t]
        target_BT[:, t] = torch.where(here_B, target_B, target_BT[:, t])
        before_B = values_BT[:, t - 1]
        end_B = torch.where(open_B, gamma * values_BT[:, t], following_B)
        behind_B = torch.where(seen_B, gamma * following_B, end_B)
        new_B = token_BT[:, t] + behind_B - before_B + torch.where(seen_B, gamma * lam_B * adv_B, 0.0)
        adv_B, following_B = torch.where(here_B, new_B, adv_B), torch.where(here_B, before_B, following_B)
        target_B = torch.where(here_B, adv_B + before_B, target_B)
        seen_B = seen_B | here_B
        adv_BT[:, t] = torch.where(here_B, adv_B, 0.0)
        target_BT[:, t - 1] = torch.where(here_B, target_B, target_BT[:, t - 1])
    return Returns(adv_BT, target_BT)


def prediction_metrics(values_BT: Tensor, target_BT: Tensor, loss_mask_BT: Tensor) -> dict[str, float]:
    """How well values predict targets, over the states from which tokens are sampled.

    On rollouts that the value model has not been trained on, as a fresh batch is, this is its error on new data.

    Returns:
        ``explained_variance``: ``1 - Var(target - value) / Var(target)``, left out where targets do not vary;
        ``calibration_error``: mean over ten bins of equal size, sorted by value, of ``|mean value - mean target|``;
        ``bias``: mean of value less target; ``mean``: mean value. Empty where there is no target.
    """
    mask_BT = decision_mask(loss_mask_BT) & ~target_BT.isnan()
    value_N, target_N = values_BT[mask_BT].double(), target_BT[mask_BT].double()
    if not len(value_N):
        return {}
    error_N = value_N - target_N
    order_N = value_N.argsort(stable=True)
    bins = [b for b in order_N.tensor_split(CALIBRATION_BINS) if len(b)]
    gaps = torch.stack([error_N[b].mean().abs() * len(b) for b in bins])
    metrics = {
        "calibration_error": float(gaps.sum() / len(value_N)),
        "bias": float(error_N.mean()),
        "mean": float(value_N.mean()),
    }
    variance = target_N.var(unbiased=False)
    if variance > 0:
        metrics["explained_variance"] = float(1 - error_N.var(unbiased=False) / variance)
    return metrics


def batch_metrics(batch: Batch) -> dict[str, float]:
    """:func:`prediction_metrics` of a batch under ``critic/``; with several streams under ``critic/OBJECTIVE/``."""
    values, target = batch.values_BT, batch.returns_BT
    if values is None or target is None:
        return {}
    mask_BT = batch.loss_mask_BT
    if values.dim() == 2:
        return {f"critic/{name}": value for name, value in prediction_metrics(values, target, mask_BT).items()}
    return {
        f"critic/{objective}/{name}": value
        for k, objective in enumerate(batch.objectives)
        for name, value in prediction_metrics(values[..., k], target[..., k], mask_BT).items()
    }
