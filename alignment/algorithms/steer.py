"""How much an update moves the entropy, token by token, and STEER, which weighs tokens down by it.

For a softmax of logits z and a step dz, ``dH = -sum_b p_b (log p_b + H) dz_b + O(|dz|^2)``. A policy-gradient step on
the sampled token a with coefficient c moves ``dz_b = c (1[b = a] - p_b)``, so per unit of c

    exact   dH = -(p_a (log p_a + H) - S),    S = sum_b p_b^2 (log p_b + H)
    own     dH = -p_a (1 - p_a) (log p_a + H),    the displacement of the chosen logit alone

``own`` has the right order of magnitude, and often the sign, but may be two or three times off; it asks for nothing
over the vocabulary. A likely token of positive advantage lowers the entropy, an unlikely one raises it; the other way
round for negative advantages.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from alignment.algorithms.entropy_controls import PenaltyView, entropy_controls
from alignment.algorithms.policy_losses import log_ratio
from alignment.algorithms.tokens import in_order, placed
from alignment.registry import option
from alignment.types import Batch

LEAST_PROBABILITY = 1e-8


def own_change(logp: Tensor, entropy: Tensor) -> Tensor:
    """``-p (1 - p) (log p + H)``: the entropy's change per unit of c, by the chosen logit's displacement alone."""
    p = logp.exp()
    return -p * (1 - p) * (logp + entropy)


def exact_change(logp: Tensor, entropy: Tensor, drift: Tensor) -> Tensor:
    """``-(p (log p + H) - S)`` with ``drift`` S: its change per unit of c, to first order."""
    return drift - logp.exp() * (logp + entropy)


def repository_change(logp: Tensor, entropy: Tensor) -> Tensor:
    """``-(1 - p) (log p + H)``: STEER's own form, which has one factor p less than :func:`own_change`."""
    return -(1 - logp.exp()) * (logp + entropy)


@entropy_controls.register(
    "steer",
    source="Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective (arXiv 2510.10150)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Steer:
    """Weighs down the tokens whose update would move the entropy most, in either direction.

    ``Omega = |A rho dH|`` with A the advantage, rho the ratio of the policy before this mini-batch's step to the loss's
    base, and dH, per unit of the step, by ``omega``: ``repo``, ``-(1 - p)(log p + H)``, is what the method's code
    computes; ``own`` and ``exact`` are those of this module, our derivation. The paper's text and its code differ: with
    ``rho = p / p_old`` the code's ``A / p_old p (1 - p)(log p + H)`` has one factor p less than the change of the
    entropy by the chosen logit. What is not finite counts as 0.

    With M the largest Omega of the mini-batch's trained tokens the weight is, by ``shape``,

    - ``exponential``: ``clip(exp(log(lambda_min) Omega / max(M, floor)), lambda_min, 1)``; ``floor: 0`` is the formula
      of the paper's fourth version.
    - ``linear``: from ``lambda_max`` at the smallest Omega to ``lambda_min`` at M; their mean where all are equal.

    Weights are not renormalised. H, and S for ``exact``, are of the policy before the batch's first update, as in the
    method's code. Deviations: M is the mini-batch's, where the code takes each micro-batch's and so depends on how a
    mini-batch is split; log-ratios are clamped to +-20 nats, and p to [1e-8, 1 - 1e-8], before anything is multiplied.
    """

    omega: Annotated[
        Literal["repo", "own", "exact"], option("estimate of the entropy's change; exact needs the vocabulary's S")
    ] = "repo"
    shape: Annotated[Literal["exponential", "linear"], option("how a weight falls with Omega")] = "exponential"
    lambda_min: Annotated[float, option("weight of the token with the largest Omega", gt=0, le=1)] = 0.8
    lambda_max: Annotated[float, option("weight of the smallest Omega in the linear shape", ge=1)] = 1.2
    floor: Annotated[float, option("least scale of Omega in the exponential shape", ge=0)] = 0.02

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logp", "entropy", *(["entropy_drift"] if self.omega == "exact" else []))

    @property
    def unit_scale(self) -> tuple[str, ...]:
        """``floor``, if it is the method's own and is used."""
        return ("floor",) if self.shape == "exponential" and self.floor == Steer.floor else ()

    def prepare(self, state: Any, minibatch: Batch) -> Tensor:
        omega_BT = self.omegas(minibatch)
        places = in_order(minibatch, minibatch.loss_mask_BT)
        return placed(minibatch, places, self.weights(omega_BT[places]), 0.0)

    def omegas(self, minibatch: Batch) -> Tensor:
        """Omega of each token of a mini-batch with ``logp_BT``, advantages and entropies."""
        logp_BT, adv_BT, entropy_BT = minibatch.logp_BT, minibatch.adv_BT, minibatch.entropy_BT
        assert logp_BT is not None and adv_BT is not None and entropy_BT is not None, "annotate, then credit"
        ratio_BT = log_ratio(logp_BT, minibatch).exp()
        logp_BT = logp_BT.exp().clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY).log()
        if self.omega == "exact":
            assert minibatch.entropy_drift_BT is not None, "annotate with what the objective needs"
            change_BT = exact_change(logp_BT, entropy_BT, minibatch.entropy_drift_BT)
        else:
            change_BT = (own_change if self.omega == "own" else repository_change)(logp_BT, entropy_BT)
        return (adv_BT * ratio_BT * change_BT).abs().nan_to_num(0.0, 0.0, 0.0)

    def weights(self, omega_N: Tensor) -> Tensor:
        """The weight of each of the mini-batch's tokens."""
        if not len(omega_N):
            return omega_N
        largest, smallest = omega_N.max(), omega_N.min()
        if self.shape == "exponential":
            scale = largest.clamp(min=self.floor)
            share_N = torch.where(scale > 0, omega_N / scale, 0.0)
            return (math.log(self.lambda_min) * share_N).exp().clamp(self.lambda_min, 1.0)
        span = self.lambda_max - self.lambda_min
        if largest == smallest:
            return torch.full_like(omega_N, self.lambda_min + span / 2)
        share_N = (omega_N - smallest) / (largest - smallest)
        return (self.lambda_max - span * share_N).clamp(self.lambda_min, self.lambda_max)

    def penalty(self, state: Any, view: PenaltyView) -> None:
        return None
