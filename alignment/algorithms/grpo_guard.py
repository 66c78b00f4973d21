"""GRPO-Guard's regulated clipping, translated from flow matching to tokens.

The translation is ours: the paper is about denoising steps of known variance, and nothing here is in it as it stands.
There, the log-ratio of a step is shifted left by that step's KL, and its spread depends on the step's noise, so that a
clip of one width clips unequally. For tokens, ``E_old[log rho] = -KL(old || pi) < 0`` at each position likewise, and
the spread depends on the position's entropy.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from alignment.algorithms.policy_losses import log_ratio, policy_losses
from alignment.algorithms.tokens import in_order, placed, sampled_tokens
from alignment.registry import option
from alignment.types import Batch

LEAST_STD = 1e-4
LEAST_WEIGHT, LARGEST_WEIGHT = 0.5, 2.0


@policy_losses.register(
    "grpo_guard",
    source="inspired by GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping "
    "(arXiv 2510.22319); the translation to tokens is this project's",
    evidence="end to end",
)
@dataclass(frozen=True)
class GrpoGuard:
    """Regulated clipping, our translation: the clip looks at log-ratios that are centred and scaled bin by bin.

    The tokens that a policy sampled are put into ``bins`` bins of equal size by entropy, or by position within their
    completion. With ``log rho`` of the policy before this mini-batch's step,

    - ``ratio_center: bin`` adds a constant to a bin's log-ratios so that their mean is 0;
    - ``ratio_scale: bin_std`` multiplies them by ``s_all / s_bin``, standard deviations of centred log-ratios (at
      least 1e-4), so that one clip range clips comparable shares everywhere;
    - ``balance`` weighs bins by ``mean_b' g_b' / g_b`` with ``g_b`` the mean of ``|A| (1 - pi)``, in place of the size
      of the gradient by the logits; the weights are within [0.5, 2] and their mean over bins is 1. Bins in which that
      is 0 weigh 1 and are left out of both means.

    ``rho~`` is only asked whether the token is clipped, as ``clip`` asks rho; the surrogate is ``-rho A`` with the true
    ratio, and a clipped token keeps its value and loses its gradient. ``use_in_surrogate`` puts rho~ in the surrogate
    as the paper does, which is then no policy gradient of the true ratio.

    At the first step of a batch every ratio is 1 and only ``balance`` acts. The exact KL over the vocabulary as the
    shift is not offered: it would take both distributions at every position. Demonstrations are left as they are.
    """

    clip_low: Annotated[float, option("lower clip distance of the regulated ratio", ge=0, le=1)] = 0.2
    clip_high: Annotated[float, option("upper clip distance of the regulated ratio", ge=0)] = 0.2
    ratio_center: Annotated[Literal["bin", "none"], option("shift of log-ratios")] = "bin"
    ratio_scale: Annotated[Literal["bin_std", "none"], option("scale of log-ratios")] = "bin_std"
    balance: Annotated[bool, option("weigh bins so that each pulls alike")] = True
    bin_by: Annotated[Literal["entropy", "position"], option("what tokens are put into bins by")] = "entropy"
    bins: Annotated[int, option("number of bins", ge=1)] = 10
    use_in_surrogate: Annotated[bool, option("the surrogate has the regulated ratio as well")] = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logp", *(["entropy"] if self.bin_by == "entropy" else []))

    def prepare(self, minibatch: Batch) -> Tensor:
        """``[B, T, 3]``: what is added to the log-ratio, what it is then multiplied by, and the token's weight."""
        logp_BT, adv_BT = minibatch.logp_BT, minibatch.adv_BT
        assert logp_BT is not None and adv_BT is not None, "annotate, then credit"
        places = in_order(minibatch, sampled_tokens(minibatch))
        bin_N = self._bins(minibatch, places)
        log_ratio_N = log_ratio(logp_BT, minibatch)[places].double()
        shift_N, factor_N = self.regulation(log_ratio_N, bin_N)
        weight_N = torch.ones_like(shift_N)
        if self.balance:
            pull_N = adv_BT[places].double().abs() * (1 - logp_BT[places].double().exp())
            weight_N = balanced(_bin_means(pull_N, bin_N))[bin_N]
        parts = ((shift_N, 0.0), (factor_N, 1.0), (weight_N, 1.0))
        return torch.stack([placed(minibatch, places, value_N, otherwise) for value_N, otherwise in parts], -1)

    def regulation(self, log_ratio_N: Tensor, bin_N: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to each log-ratio, and what it is then multiplied by."""
        shift_N, factor_N = torch.zeros_like(log_ratio_N), torch.ones_like(log_ratio_N)
        if not len(log_ratio_N):
            return shift_N, factor_N
        mean_N = _bin_means(log_ratio_N, bin_N)[bin_N]
        if self.ratio_center == "bin":
            shift_N = -mean_N
        if self.ratio_scale == "bin_std":
            square_N = (log_ratio_N - mean_N).square()
            std_N = _bin_means(square_N, bin_N)[bin_N].sqrt().clamp(min=LEAST_STD)
            factor_N = square_N.mean().sqrt().clamp(min=LEAST_STD) / std_N
        return shift_N, factor_N

    def __call__(self, logp_BT: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.adv_BT is not None and batch.loss_stats_BTS is not None, "prepare the whole mini-batch first"
        shift_BT, factor_BT, weight_BT = batch.loss_stats_BTS.unbind(-1)
        log_ratio_BT, adv_BT = log_ratio(logp_BT, batch), batch.adv_BT
        regulated_BT = ((log_ratio_BT + shift_BT) * factor_BT).exp()
        seen_BT = regulated_BT.detach()
        low_BT = (seen_BT < 1 - self.clip_low) & (adv_BT < 0)
        high_BT = (seen_BT > 1 + self.clip_high) & (adv_BT > 0)
        loss_BT = -(regulated_BT if self.use_in_surrogate else log_ratio_BT.exp()) * adv_BT
        loss_BT = weight_BT * torch.where(low_BT | high_BT, loss_BT.detach(), loss_BT)
        return loss_BT, {"clipped_low": low_BT.float(), "clipped_high": high_BT.float(), "guard_weight": weight_BT}

    def _bins(self, minibatch: Batch, places: tuple[Tensor, Tensor]) -> Tensor:
        """The bin of each token, from 0."""
        row_N, position_N = places
        if self.bin_by == "position":
            mask_BT = minibatch.loss_mask_BT
            before_N = (mask_BT.cumsum(1) - 1)[places]
            return before_N * self.bins // mask_BT.sum(1)[row_N]
        assert minibatch.entropy_BT is not None, "annotate with what the objective needs"
        order_N = minibatch.entropy_BT[places].argsort(stable=True)
        bin_N = torch.empty_like(position_N)
        bin_N[order_N] = torch.arange(len(order_N), device=order_N.device) * self.bins // max(1, len(order_N))
        return bin_N


def _bin_means(values_N: Tensor, bin_N: Tensor) -> Tensor:
    """The mean of each bin, NaN where it is empty."""
    size = int(bin_N.max()) + 1 if len(bin_N) else 0
    sums = values_N.new_zeros(size).index_add(0, bin_N, values_N)
    return sums / values_N.new_zeros(size).index_add(0, bin_N, torch.ones_like(values_N))


def balanced(pull: Tensor) -> Tensor:
    """Weights of bins, in inverse proportion to their pulls, within [0.5, 2] and with mean 1.

    The proportion is the one at which the mean is 1 after the bounds, found by bisection: dividing by the mean
    afterwards would leave the bounds. Bins that are empty (NaN) or have no pull (0) weigh 1 and have no part in it:
    otherwise they would take the largest weight, for nothing, from those that carry the gradient.
    """
    pulls, weight = pull > 0, torch.ones_like(pull)
    if not bool(pulls.any()):
        return weight
    log_inverse = -pull[pulls].log()
    low, high = math.log(LEAST_WEIGHT) - log_inverse.max(), math.log(LARGEST_WEIGHT) - log_inverse.min()
    for _ in range(100):
        middle = (low + high) / 2
        over = _bounded(middle + log_inverse).mean() > 1
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    weight[pulls] = _bounded((low + high) / 2 + log_inverse)
    return weight


def _bounded(log_weight: Tensor) -> Tensor:
    return log_weight.exp().clamp(LEAST_WEIGHT, LARGEST_WEIGHT)
