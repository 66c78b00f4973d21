"""Advantages: from rewards to one number per trained token.

Rows with ``scored_B`` False take part in no baseline and get advantage 0. Sequence-level advantages see the whole
reward of a row, ``reward_B + sum_t token_reward_BT``, and are the same at all its trained tokens. An advantage that
also makes targets for a critic has a method ``returns(batch) -> returns_BT``.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignment.algorithms.groups import above_baseline, group_sum
from alignment.algorithms.tokens import masked_mean
from alignment.algorithms.values import Returns, Truncation, adaptive_lambda, generalised
from alignment.registry import Registry, option
from alignment.types import SOURCES, Batch


@runtime_checkable
class Advantage(Protocol):
    """How good each trained token was, compared with what was to be expected.

    Optional on the class: ``min_group_size: ClassVar[int]``, completions of a prompt that it takes to say anything;
    ``scale_free: bool``, whether a positive factor on all rewards changes nothing; ``unit_scale: bool``, whether
    advantages deviate by about 1 whatever the rewards, which one that is ``scale_free`` need not say.
    """

    def __call__(self, batch: Batch) -> Tensor:
        """``[B, T]`` float32; 0 outside the loss mask and on unscored rows."""
        ...


advantages: Registry[Advantage] = Registry("advantages", Advantage, "How rewards become per-token advantages")


def sequence_reward(batch: Batch) -> Tensor:
    """``[B]`` float64: ``reward_B + sum_t token_reward_BT`` over a row's trained tokens; NaN where it is unscored."""
    assert batch.reward_B is not None, "credit sets reward_B before it calls the advantage"
    total_B = batch.reward_B.double()
    if batch.token_reward_BT is not None:
        total_B = total_B + torch.where(batch.loss_mask_BT, batch.token_reward_BT, 0.0).double().sum(1)
    return torch.where(batch.scored_B, total_B, torch.nan)


def to_tokens(adv_B: Tensor, batch: Batch) -> Tensor:
    """``[B, T]`` float32: the advantage of each row, ``adv_B``, at every one of its trained tokens, 0 elsewhere."""
    return torch.where(_trained(batch), adv_B[:, None], 0.0).float()


def whiten(values_BT: Tensor, mask_BT: Tensor, eps: float = 1e-8) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over all tokens in the mask (sample variance); exactly 0 when all are equal.

    Args:
        values_BT: ``[B, T]``; what it holds outside the mask does not matter.
        mask_BT: ``[B, T]`` bool.
        eps: Added to the variance, so in the square of the values' unit.

    Returns:
        ``[B, T]`` float32, 0 outside the mask.
    """
    count = mask_BT.sum()
    values_BT = torch.where(mask_BT, values_BT.double(), 0.0)
    centred_BT = torch.where(mask_BT, values_BT - values_BT.sum() / count.clamp(min=1), 0.0)
    variance = centred_BT.square().sum() / (count - 1).clamp(min=1)
    return (centred_BT / (variance + eps).sqrt()).float()


def _trained(batch: Batch) -> Tensor:
    return batch.loss_mask_BT & batch.scored_B[:, None]


def _above_mean(batch: Batch) -> Tensor:
    return above_baseline(sequence_reward(batch), batch.group_B, batch.scored_B)


def _group_size(batch: Batch) -> Tensor:
    return group_sum(batch.scored_B.double(), batch.group_B)


@advantages.register(
    "grpo",
    source="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (arXiv 2402.03300)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Grpo:
    """Reward relative to the group's mean, in units of the group's standard deviation.

    ``A_i = (r_i - mean) / (std + eps)``; with ``normalise: none`` just ``r_i - mean``. Groups of one and groups of
    equal rewards give exactly 0. Deviation: common implementations leave a group of one at its raw reward.
    """

    min_group_size: ClassVar[int] = 2

    normalise: Annotated[Literal["std", "none"], option("divide by the group's standard deviation, or do not")] = "std"
    std: Annotated[Literal["sample", "population"], option("divisor of the variance: G - 1 or G")] = "sample"
    eps: Annotated[float, option("added to the standard deviation", ge=0)] = 1e-6

    @property
    def scale_free(self) -> bool:
        return self.normalise == "std"

    def __call__(self, batch: Batch) -> Tensor:
        adv_B = _above_mean(batch)
        if self.normalise == "std":
            freedom_B = (_group_size(batch) - int(self.std == "sample")).clamp(min=1)
            std_B = (group_sum(adv_B.square(), batch.group_B) / freedom_B).sqrt()
            adv_B = torch.where(adv_B == 0, 0.0, adv_B / (std_B + self.eps))
        return to_tokens(adv_B, batch)


@advantages.register(
    "dr_grpo",
    source="Understanding R1-Zero-Like Training: A Critical Perspective (arXiv 2503.20783)",
    evidence="end to end",
)
@dataclass(frozen=True)
class DrGrpo:
    """Reward relative to the group's mean, without division by the standard deviation.

    ``A_i = r_i - mean``. The method's other half is the ``constant`` aggregation.
    """

    min_group_size: ClassVar[int] = 2

    def __call__(self, batch: Batch) -> Tensor:
        return to_tokens(_above_mean(batch), batch)


@advantages.register(
    "rloo",
    source="Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs "
    "(arXiv 2402.14740)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Rloo:
    """Reward relative to the mean of the other members of the group.

    ``A_i = r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean)``; 0 for a group of one.
    """

    min_group_size: ClassVar[int] = 2

    def __call__(self, batch: Batch) -> Tensor:
        size_B = _group_size(batch)
        return to_tokens(_above_mean(batch) * size_B / (size_B - 1).clamp(min=1), batch)


@advantages.register(
    "opo", source="On-Policy RL with Optimal Reward Baseline (arXiv 2505.23585)", evidence="end to end"
)
@dataclass(frozen=True)
class Opo:
    """Reward relative to the group's length-weighted mean.

    ``A_i = r_i - sum_j T_j r_j / sum_j T_j`` with ``T_j`` the trained tokens of row j: the variance-minimising
    baseline if the squared norm of a sequence's gradient grows with its length. The method also asks for a single
    update per batch (``epochs: 1``, ``minibatches: 1``).
    """

    min_group_size: ClassVar[int] = 2

    def __call__(self, batch: Batch) -> Tensor:
        length_B = _trained(batch).sum(1)
        return to_tokens(above_baseline(sequence_reward(batch), batch.group_B, length_B), batch)


_REINFORCE_PP = "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models (arXiv 2501.03262)"


@advantages.register("reinforce_pp", source=_REINFORCE_PP, evidence="end to end")
@dataclass(frozen=True)
class ReinforcePp:
    """Discounted return of each token, whitened over all trained tokens of the batch. Needs no groups.

    ``R_t = sum_{s >= t} gamma^(s - t) r_s``, where the reward of the row falls on its last trained token and
    ``token_reward_BT`` (such as a KL penalty) on the others. Deviation: tokens outside the loss mask, such as tool
    output, are skipped without discount instead of ending the return.
    """

    scale_free: ClassVar[bool] = True

    gamma: Annotated[float, option("discount per trained token", ge=0, le=1)] = 1.0

    def __call__(self, batch: Batch) -> Tensor:
        trained_BT = _trained(batch)
        assert batch.reward_B is not None, "credit sets reward_B before it calls the advantage"
        return_B = torch.where(batch.scored_B, batch.reward_B, 0.0).double()
        token_BT = torch.zeros_like(trained_BT, dtype=torch.float64)
        if batch.token_reward_BT is not None:
            token_BT = torch.where(trained_BT, batch.token_reward_BT, 0.0).double()
        # Going back in time: until the last trained token has been passed there is nothing to discount.
        seen_B = torch.zeros_like(batch.scored_B)
        columns = []
        for t in reversed(range(trained_BT.shape[1])):
            here_B = trained_BT[:, t]
            return_B = torch.where(here_B & seen_B, self.gamma * return_B, return_B) + token_BT[:, t]
            seen_B = seen_B | here_B
            columns.append(return_B)
        return whiten(torch.stack(columns[::-1], 1), trained_BT)


@advantages.register("reinforce_pp_baseline", source=_REINFORCE_PP, evidence="end to end")
@dataclass(frozen=True)
class ReinforcePpBaseline:
    """Reward relative to the group's mean, then whitened over all trained tokens of the batch.

    ``A_{i,t} = whiten(r_i - mean_group)``: one standard deviation for the whole batch instead of one per group, so
    that a nearly unanimous group is not blown up.
    """

    min_group_size: ClassVar[int] = 2
    scale_free: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Tensor:
        trained_BT = _trained(batch)
        return whiten(torch.where(trained_BT, _above_mean(batch)[:, None], 0.0), trained_BT)


@advantages.register(
    "gae",
    source="High-Dimensional Continuous Control Using Generalized Advantage Estimation (arXiv 1506.02438); decoupled "
    "and length-adaptive lambdas: VAPO (arXiv 2504.05118)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Gae:
    """Generalised advantages over a critic's values, whitened over the batch; needs no groups.

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = sum_l (gamma lambda)^l delta_{t+l}`` over sampled tokens, with
    the row's reward behind the last one and ``token_reward_BT`` (such as a KL penalty) at each. Values are carried
    through observations. The critic's targets are lambda-returns with a lambda of their own, 1 by default: Monte Carlo.

    ``length_adaptive`` sets the advantages' lambda of each row to ``1 - 1 / (length_adaptive l)`` for ``l`` sampled
    tokens. Unverified: VAPO's defaults beside that formula's 0.05. With ``lam: 1``, ``gamma: 1`` and no normalisation,
    ``A_t`` is the return less ``V_t``: REINFORCE with that baseline.
    """

    needs: ClassVar[tuple[str, ...]] = ("values",)

    gamma: Annotated[float, option("discount per sampled token", ge=0, le=1)] = 1.0
    lam: Annotated[float, option("lambda of the advantages", ge=0, le=1)] = 0.95
    critic_lam: Annotated[float, option("lambda of the critic's targets", ge=0, le=1)] = 1.0
    length_adaptive: Annotated[
        float | None, option("alpha of the length-adaptive lambda, which replaces lam; null: off", gt=0)
    ] = None
    truncation: Annotated[
        Truncation, option("at the length limit: take the reward as it stands, or the value of the state reached")
    ] = "end"
    normalise: Annotated[Literal["whiten", "none"], option("to mean 0 and variance 1 over the batch's tokens")] = (
        "whiten"
    )

    @property
    def unit_scale(self) -> bool:
        return self.normalise == "whiten"

    def __call__(self, batch: Batch) -> Tensor:
        lam: float | Tensor = self.lam
        if self.length_adaptive is not None:
            lam = adaptive_lambda(_trained(batch).sum(1), self.length_adaptive)
        adv_BT = self._generalised(batch, lam).adv_BT
        return whiten(adv_BT, _trained(batch)) if self.normalise == "whiten" else adv_BT.float()

    def returns(self, batch: Batch) -> Tensor:
        """``[B, T]`` float32 targets of the critic: see :attr:`alignment.types.Batch.returns_BT`."""
        return self._generalised(batch, self.critic_lam).target_BT.float()

    def _generalised(self, batch: Batch, lam: float | Tensor) -> Returns:
        assert batch.values_BT is not None and batch.reward_B is not None, "annotate with what the algorithm needs"
        reward_B = torch.where(batch.scored_B, batch.reward_B, torch.nan)
        return generalised(
            batch.values_BT,
            reward_B,
            batch.token_reward_BT,
            batch.loss_mask_BT,
            batch.truncated_B,
            gamma=self.gamma,
            lam=lam,
            truncation=self.truncation,
        )


def advantage_metrics(batch: Batch) -> dict[str, float]:
    """``advantage_abs``: the mean of ``|A|`` over sampled tokens that are trained on; 0 where there is no signal."""
    assert batch.adv_BT is not None, "credit the batch first"
    sampled_B = batch.source_B != SOURCES.index("demonstration")
    return {"advantage_abs": float(masked_mean(batch.adv_BT.abs(), batch.loss_mask_BT & sampled_B[:, None]))}
