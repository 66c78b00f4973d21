"""Policy losses, per token and to be minimised; ``objective`` reduces them.

All are cases of the unified policy-gradient estimator, ``stable * A / pi_base * grad pi`` (Towards a Unified View of
Large Language Model Post-Training, arXiv 2509.04419): a row's ``ratio_base`` says what ``pi_base`` is, the advantage
and the loss say the rest. A demonstration with base ``self`` and advantage 1 therefore gets the gradient of its
negative log-likelihood under every loss here.
"""

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignment.registry import Registry, option
from alignment.types import RATIO_BASES, Batch

LOG_RATIO_LIMIT = 20.0
"""Log-ratios beyond this many nats carry no information, and their exponential would overflow further on."""
_SELF, _ONE = RATIO_BASES.index("self"), RATIO_BASES.index("one")


@runtime_checkable
class PolicyLoss(Protocol):
    """What pulls the policy towards tokens of positive advantage."""

    def __call__(self, logp_BT: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_BT`` and detached per-token metrics by name, whose mean over trained tokens is logged."""
        ...


policy_losses: Registry[PolicyLoss] = Registry("policy_losses", PolicyLoss, "How advantages move log-probabilities")


def log_ratio(logp_BT: Tensor, batch: Batch) -> Tensor:
    """``log pi - log pi_base`` of each trained token, clamped to +-20 nats; 0 elsewhere.

    ``pi_base`` by the row's ``ratio_base_B``: ``old`` is the policy before this batch's first update (the current
    one where ``old_logp_BT`` is absent: then this is the first and only update), ``self`` the current policy without
    gradient, ``one`` the constant 1. Where the clamp acts there is no gradient: for base ``one`` that is a token of
    probability below 2e-9, whose gradient has that size too.
    """
    current_BT = logp_BT.detach()
    old_BT = current_BT if batch.old_logp_BT is None else batch.old_logp_BT
    base_B = batch.ratio_base_B[:, None]
    base_BT = torch.where(base_B == _SELF, current_BT, torch.where(base_B == _ONE, 0.0, old_BT))
    return torch.where(batch.loss_mask_BT, logp_BT - base_BT, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def shaped(loss_BT: Tensor, logp_BT: Tensor, batch: Batch, gamma: float) -> Tensor:
    """``loss_BT``, with ``-A p / (p + gamma)`` in rows of ratio base ``one``: LUFFY's off-policy term, never clipped.

    Its derivative by p is ``-A gamma / (p + gamma)^2``: larger than that of ``-A p`` for improbable tokens, and smaller
    for those that the policy already knows (Learning to Reason under Off-Policy Guidance, arXiv 2504.14945).
    """
    p_BT = logp_BT.exp()
    return torch.where(batch.ratio_base_B[:, None] == _ONE, -_advantage(batch) * p_BT / (p_BT + gamma), loss_BT)


def _advantage(batch: Batch) -> Tensor:
    assert batch.adv_BT is not None, "credit sets adv_BT before any loss is taken"
    return batch.adv_BT


def _clipped_surrogate(ratio_BT: Tensor, adv_BT: Tensor, low: float, high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """``-min(rho A, clip(rho, 1 - low, 1 + high) A)`` and where the clip takes the gradient away."""
    loss_BT = torch.maximum(-ratio_BT * adv_BT, -ratio_BT.clamp(1 - low, 1 + high) * adv_BT)
    ratio_BT = ratio_BT.detach()
    return loss_BT, {
        "clipped_low": ((ratio_BT < 1 - low) & (adv_BT < 0)).float(),
        "clipped_high": ((ratio_BT > 1 + high) & (adv_BT > 0)).float(),
    }


@policy_losses.register(
    "reinforce",
    source="Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams 1992)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Reinforce:
    """Log-probability times advantage, importance-weighted, no clip.

    ``-sg[rho] A log pi``. Its gradient is that of ``-rho A``; at base ``self`` it is plain REINFORCE, and with
    advantage 1 exactly the negative log-likelihood.
    """

    def __call__(self, logp_BT: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        ratio_BT = log_ratio(logp_BT, batch).detach().exp()
        return -ratio_BT * _advantage(batch) * logp_BT, {}


@policy_losses.register(
    "clip",
    source="Proximal Policy Optimization Algorithms (arXiv 1707.06347); asymmetric: DAPO (arXiv 2503.14476); "
    "dual: Mastering Complex Control in MOBA Games with Deep Reinforcement Learning (arXiv 1912.09729)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate, with separate lower and upper clip distances and an optional dual clip.

    ``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``; with ``dual_clip`` c the loss of tokens of negative
    advantage is at most ``-c A``. A larger ``clip_high`` (0.28 in DAPO) lets improbable tokens grow.
    """

    clip_low: Annotated[float, option("lower clip distance of the ratio", ge=0, le=1)] = 0.2
    clip_high: Annotated[float, option("upper clip distance of the ratio", ge=0)] = 0.2
    dual_clip: Annotated[float | None, option("bound c of the loss of negative advantages; null for none", gt=1)] = None

    def __call__(self, logp_BT: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        adv_BT = _advantage(batch)
        loss_BT, metrics = _clipped_surrogate(log_ratio(logp_BT, batch).exp(), adv_BT, self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            bound_BT = -self.dual_clip * adv_BT
            metrics["clipped_dual"] = ((adv_BT < 0) & (loss_BT.detach() > bound_BT)).float()
            loss_BT = torch.where(adv_BT < 0, torch.minimum(loss_BT, bound_BT), loss_BT)
        return loss_BT, metrics


@policy_losses.register("gspo", source="Group Sequence Policy Optimization (arXiv 2507.18071)", evidence="end to end")
@dataclass(frozen=True)
class Gspo:
    """PPO's clipped surrogate with one ratio per sequence: the geometric mean of its token ratios.

    ``s_i = exp(mean_t log rho_{i,t})``, clipped as a whole; in token form ``s_{i,t} = sg[s_i] pi / sg[pi]``, whose
    value is ``s_i`` while the gradient reaches each token. The method goes with the ``sequence_mean`` aggregation.
    Unverified: the default clip distances.
    """

    clip_low: Annotated[float, option("lower clip distance of the sequence ratio", ge=0, le=1)] = 3e-4
    clip_high: Annotated[float, option("upper clip distance of the sequence ratio", ge=0)] = 4e-4

    def __call__(self, logp_BT: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens_B = batch.loss_mask_BT.sum(1).clamp(min=1)
        sequence_B = log_ratio(logp_BT, batch).detach().sum(1) / tokens_B
        ratio_BT = (sequence_B[:, None] + (logp_BT - logp_BT.detach())).exp()
        return _clipped_surrogate(ratio_BT, _advantage(batch), self.clip_low, self.clip_high)


@policy_losses.register(
    "cispo",
    source="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (arXiv 2506.13585)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Cispo:
    """REINFORCE whose importance weight is clipped: no token loses its gradient.

    ``-sg[clip(rho, 1 - clip_low, 1 + clip_high)] A log pi``. ``clip_low: 1`` means no lower bound.
    Unverified: the default distances, and that the paper uses the upper bound alone.
    """

    clip_low: Annotated[float, option("lower clip distance of the weight", ge=0, le=1)] = 1.0
    clip_high: Annotated[float, option("upper clip distance of the weight", ge=0)] = 0.28

    def __call__(self, logp_BT: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        ratio_BT = log_ratio(logp_BT, batch).detach().exp()
        weight_BT = ratio_BT.clamp(1 - self.clip_low, 1 + self.clip_high)
        metrics = {
            "clipped_low": (ratio_BT < 1 - self.clip_low).float(),
            "clipped_high": (ratio_BT > 1 + self.clip_high).float(),
        }
        return -weight_BT * _advantage(batch) * logp_BT, metrics
