"""Clip-Cov and KL-Cov: the few tokens whose advantage and log-probability go together most are held back.

``Cov_t = (A_t - mean A)(log pi_t - mean log pi)`` over the N tokens of the mini-batch that a policy sampled, with the
advantage before any weight and pi the policy before this very mini-batch's step. Its mean is the covariance, which is,
but for sign and scale, what an update takes from the entropy. The official code takes the means over a micro-batch.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from alignment.algorithms.entropy_controls import PenaltyView, entropy_controls
from alignment.algorithms.policy_losses import log_ratio
from alignment.algorithms.tokens import Places, in_order, keyed_numbers, largest, placed, sampled_tokens, share_down
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import Batch

_SOURCE = "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617)"


def covariances(minibatch: Batch) -> tuple[Places, Tensor]:
    """The tokens that a policy sampled, and Cov of each, in float64."""
    assert minibatch.logp_BT is not None and minibatch.adv_BT is not None, "annotate, then credit"
    places = in_order(minibatch, sampled_tokens(minibatch))
    adv_N, logp_N = minibatch.adv_BT[places].double(), minibatch.logp_BT[places].double()
    return places, (adv_N - adv_N.mean()) * (logp_N - logp_N.mean())


@entropy_controls.register("clip_cov", source=_SOURCE, evidence="end to end")
@dataclass(frozen=True)
class ClipCov:
    """A few tokens of high covariance, picked at random, get no policy gradient.

    Eligible are tokens with ``low < Cov < high`` that the loss's own clip leaves alone; ``max(1, floor(share N))`` of
    them, or all if they are fewer, get weight 0. The pick is keyed by (seed, step, rollout, token): the same in any
    split and in every epoch. ``low`` and ``high`` presume advantages of about unit scale.

    A control does not see the policy loss: where that one clips, give its distances as ``clip_low`` and ``clip_high``.
    Their default, 1, is that of the method's scripts, for the policy loss as well.
    """

    share: Annotated[float, option("of the tokens that are picked", gt=0, le=1)] = 2e-4
    low: Annotated[float, option("covariance above which a token is eligible")] = 1.0
    high: Annotated[float, option("covariance from which it no longer is")] = 5.0
    clip_low: Annotated[float, option("lower clip distance of the policy loss", ge=0)] = 1.0
    clip_high: Annotated[float, option("upper clip distance of the policy loss", ge=0)] = 1.0
    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise UserError(f"low {self.low:g} must be below high {self.high:g}, or no token is eligible")

    @property
    def unit_scale(self) -> tuple[str, ...]:
        """The bounds, if they are the method's own."""
        return ("low", "high") if (self.low, self.high) == (ClipCov.low, ClipCov.high) else ()

    def prepare(self, state: Any, minibatch: Batch) -> Tensor:
        places, cov_N = covariances(minibatch)
        assert minibatch.logp_BT is not None and minibatch.adv_BT is not None
        ratio_N = log_ratio(minibatch.logp_BT, minibatch)[places].exp()
        adv_N = minibatch.adv_BT[places]
        clipped_N = (ratio_N < 1 - self.clip_low) & (adv_N < 0) | (ratio_N > 1 + self.clip_high) & (adv_N > 0)
        eligible_N = ((cov_N > self.low) & (cov_N < self.high) & ~clipped_N).nonzero()[:, 0]
        order_N = keyed_numbers(minibatch, places, "clip_cov")[eligible_N].argsort(stable=True)
        weight_N = torch.ones_like(cov_N)
        weight_N[eligible_N[order_N[: max(1, share_down(self.share, len(cov_N)))]]] = 0.0
        return placed(minibatch, places, weight_N, 1.0)

    def penalty(self, state: Any, view: PenaltyView) -> None:
        return None


@entropy_controls.register("kl_cov", source=_SOURCE, evidence="end to end")
@dataclass(frozen=True)
class KlCov:
    """The tokens of highest covariance pay for moving away from the policy before the batch.

    At the ``max(1, floor(share N))`` tokens of largest Cov (of equal ones the first by rollout key and position) the
    loss gets ``coefficient |log pi - log pi_old|``. The method goes with an unclipped policy loss: ``reinforce``, whose
    gradient is that of ``-rho A``. At the first update of a batch ``pi = pi_old``, where the term has no gradient (or,
    where two passes of the policy round differently, one of random sign): it acts only with several updates per batch.

    ``share``: 2e-3 at 7B and 2e-4 at 32B in the paper; ``coefficient``: 1 in its scripts.
    """

    share: Annotated[float, option("of the tokens that pay", gt=0, le=1)] = 2e-3
    coefficient: Annotated[float, option("of the absolute log-ratio", ge=0)] = 1.0
    needs: ClassVar[tuple[str, ...]] = ("logp",)
    several_updates: ClassVar[bool] = True

    def prepare(self, state: Any, minibatch: Batch) -> None:
        return None

    def mark(self, state: Any, minibatch: Batch) -> Tensor:
        """1 at the tokens that pay."""
        places, cov_N = covariances(minibatch)
        mark_N = torch.zeros_like(cov_N)
        mark_N[largest(cov_N, max(1, share_down(self.share, len(cov_N))))] = 1.0
        return placed(minibatch, places, mark_N, 0.0)

    def penalty(self, state: Any, view: PenaltyView) -> Tensor:
        assert view.mark_BT is not None
        return self.coefficient * view.mark_BT * (view.logp_BT - view.old_logp_BT).abs()
