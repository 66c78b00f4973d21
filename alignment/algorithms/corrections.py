"""Corrections of the mismatch between the learner's log-probabilities and the sampler's, for the same weights.

``rho = pi_old / mu``: learner over sampler, of the sampled token. The weights multiply the policy loss of sampled
rows, detached, beside the loss's own ratio ``pi / pi_old``. A dropped token keeps its place in the aggregation's
counts: nothing else weighs more because of it.

Suffix beside the legend of :mod:`alignment.types`: 1, a dimension of size one.
"""

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignment.algorithms.policy_losses import LOG_RATIO_LIMIT
from alignment.errors import UserError
from alignment.registry import Registry, option


@runtime_checkable
class Correction(Protocol):
    """A weight per token from how much more likely the learner finds it than the sampler did."""

    def weights(
        self, old_logp_BT: Tensor, behaviour_logp_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``weight_BT`` and per-token metrics by name; a row's weights depend on that row alone."""
        ...


corrections: Registry[Correction] = Registry(
    "corrections", Correction, "What is done about sampler and learner disagreeing on log-probabilities"
)


def _log_rho(old_logp_BT: Tensor, behaviour_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    difference_BT = torch.where(mask_BT, old_logp_BT - behaviour_logp_BT, 0.0)
    return difference_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _sequence_rho(old_logp_BT: Tensor, behaviour_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """``prod_t rho`` of each row, at each of its tokens."""
    log_B1 = _log_rho(old_logp_BT, behaviour_logp_BT, mask_BT).sum(1, keepdim=True)
    return log_B1.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().expand_as(old_logp_BT)


@corrections.register(
    "tis",
    source="Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (Yao et al. 2025)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Tis:
    """Truncated importance sampling per token: ``w = min(rho, cap)``, and at least ``floor``."""

    cap: Annotated[float, option("largest weight", gt=0)] = 2.0
    floor: Annotated[float, option("smallest weight", ge=0)] = 0.0

    def __post_init__(self) -> None:
        if self.floor > self.cap:
            raise UserError(f"floor {self.floor} is above cap {self.cap}; it must be at most the cap")

    def weights(
        self, old_logp_BT: Tensor, behaviour_logp_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rho_BT = _log_rho(old_logp_BT, behaviour_logp_BT, mask_BT).exp()
        weight_BT = rho_BT.clamp(self.floor, self.cap)
        return weight_BT, {"weight": weight_BT, "capped": (rho_BT > self.cap).float()}


@corrections.register(
    "icepop",
    source="Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model (arXiv 2510.18855)",
    evidence="end to end",
)
@dataclass(frozen=True)
class IcePop:
    """Drops tokens on which sampler and learner disagree: ``w = rho`` if ``low <= rho <= high``, else 0."""

    low: Annotated[float, option("smallest ratio that is kept", ge=0)] = 0.5
    high: Annotated[float, option("largest ratio that is kept", gt=0)] = 5.0

    def __post_init__(self) -> None:
        _check_band(self.low, self.high)

    def weights(
        self, old_logp_BT: Tensor, behaviour_logp_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rho_BT = _log_rho(old_logp_BT, behaviour_logp_BT, mask_BT).exp()
        kept_BT = (rho_BT >= self.low) & (rho_BT <= self.high)
        weight_BT = torch.where(kept_BT, rho_BT, 0.0)
        return weight_BT, {"weight": weight_BT, "dropped": (~kept_BT).float()}


_MIS = "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch (2025)"


@corrections.register("sequence_tis", source=_MIS, evidence="end to end")
@dataclass(frozen=True)
class SequenceTis:
    """Truncated importance sampling per sequence: ``w = min(prod_t rho_t, cap)`` at all its tokens."""

    cap: Annotated[float, option("largest weight", gt=0)] = 2.0

    def weights(
        self, old_logp_BT: Tensor, behaviour_logp_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rho_BT = _sequence_rho(old_logp_BT, behaviour_logp_BT, mask_BT)
        weight_BT = rho_BT.clamp(max=self.cap)
        return weight_BT, {"weight": weight_BT, "capped": (rho_BT > self.cap).float()}


@corrections.register("sequence_mask", source=_MIS, evidence="end to end")
@dataclass(frozen=True)
class SequenceMask:
    """Masked importance sampling per sequence: ``w = prod_t rho_t`` if that is at most ``cap``, else 0.

    Unverified: that kept sequences keep their weight in the source (some implementations give them 1).
    """

    cap: Annotated[float, option("largest weight that is kept", gt=0)] = 2.0

    def weights(
        self, old_logp_BT: Tensor, behaviour_logp_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rho_BT = _sequence_rho(old_logp_BT, behaviour_logp_BT, mask_BT)
        weight_BT = torch.where(rho_BT <= self.cap, rho_BT, 0.0)
        return weight_BT, {"weight": weight_BT, "dropped": (rho_BT > self.cap).float()}


@corrections.register("geometric_mask", source=_MIS, evidence="end to end")
@dataclass(frozen=True)
class GeometricMask:
    """Keeps (weight 1) sequences with ``low <= exp(mean_t log rho_t) <= high`` and drops the others (weight 0).

    The geometric mean does not depend on length, unlike the product. Unverified: the default band.
    """

    low: Annotated[float, option("smallest geometric mean that is kept", ge=0)] = 0.999
    high: Annotated[float, option("largest geometric mean that is kept", gt=0)] = 1.001

    def __post_init__(self) -> None:
        _check_band(self.low, self.high)

    def weights(
        self, old_logp_BT: Tensor, behaviour_logp_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tokens_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
        mean_B1 = (_log_rho(old_logp_BT, behaviour_logp_BT, mask_BT).sum(1, keepdim=True) / tokens_B1).exp()
        kept_BT = ((mean_B1 >= self.low) & (mean_B1 <= self.high)).expand_as(mask_BT)
        return kept_BT.to(old_logp_BT.dtype), {"dropped": (~kept_BT).float()}


def _check_band(low: float, high: float) -> None:
    if low > high:
        raise UserError(f"low {low} is above high {high}; it must be at most high")
