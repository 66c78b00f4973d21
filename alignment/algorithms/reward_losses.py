"""Losses of reward models: a number for each completion, from which of two was preferred.

Suffix beside the legend of :mod:`alignment.types`: P pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.algorithms.preference_objective import pairs_of
from alignment.algorithms.value_losses import ValueLoss
from alignment.registry import Registry, option
from alignment.types import Batch


@runtime_checkable
class RewardLoss(Protocol):
    """How rewards of pairs are fitted."""

    def __call__(self, chosen_P: Tensor, rejected_P: Tensor, gap_P: Tensor) -> Tensor:
        """``[P]`` losses of the rewards of both sides; ``gap_P`` is how much better the scores call the chosen one, NaN
        where there are none."""
        ...


reward_losses: Registry[RewardLoss] = Registry("reward_losses", RewardLoss, "How a reward model is fitted to pairs")


@reward_losses.register(
    "bradley_terry",
    source="Training language models to follow instructions with human feedback (arXiv 2203.02155); margin: Llama 2 "
    "(arXiv 2307.09288); centring: Helping or Herding? (arXiv 2312.09244); ties: MM-RLHF (arXiv 2502.10391)",
    evidence="end to end",
)
@dataclass(frozen=True)
class BradleyTerry:
    """``-log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2``, and of a pair whose scores are equal ``t (r_w - r_l)^2`` in
    place of the first term, if ``t`` is given.

    Only differences count in the first term, so rewards may drift as a whole: ``centring`` c holds their mean near 0.
    """

    margin: Annotated[Literal["none", "scores"], option("m: 0, or how much better the scores call the chosen one")] = (
        "none"
    )
    centring: Annotated[float, option("c, of the squared sum of both rewards (MM-RLHF: 0.01)", ge=0)] = 0.0
    tie: Annotated[float, option("t, of pairs whose scores are equal; 0: such pairs are like any other", ge=0)] = 0.0

    @property
    def scores(self) -> bool:
        """Whether it asks for scores of both sides."""
        return self.margin == "scores" or self.tie > 0

    def __call__(self, chosen_P: Tensor, rejected_P: Tensor, gap_P: Tensor) -> Tensor:
        """``[P]``."""
        ahead_P = chosen_P - rejected_P
        loss_P = -logsigmoid(ahead_P - gap_P if self.margin == "scores" else ahead_P)
        if self.tie:
            loss_P = torch.where(gap_P == 0, self.tie * ahead_P.square(), loss_P)
        return loss_P + self.centring * (chosen_P + rejected_P).square()


@dataclass(frozen=True)
class RewardObjective:
    """The mean of a reward loss over pairs; like the policy's, it is reduced once.

    A reward is what the head says, as a number, of the state after the last token of a completion.
    """

    loss_of: RewardLoss
    head: ValueLoss
    """How a number is read from what the head puts out."""

    @torch.no_grad()
    def prepare(self, minibatch: Batch) -> Batch:
        """``minibatch`` with ``pair_scale_B``, which needs all of it: one over the number of pairs."""
        assert minibatch.side_B is not None
        pairs = len(pairs_of(minibatch.side_B, minibatch.group_B)[0])
        ones_B = torch.ones(len(minibatch), device=minibatch.side_B.device)
        return replace(minibatch, pair_scale_B=ones_B / max(1, pairs))

    def rewards(self, output: Tensor, micro: Batch) -> Tensor:
        """``[B]`` from what the head put out for all states, ``[B, T, M]``."""
        last_B = micro.length_B - 1
        return self.head.readout(output[torch.arange(len(micro), device=last_B.device), last_B])

    def loss(self, output: Tensor, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that the pairs of ``micro`` make, and sums over pairs for :meth:`finish`."""
        assert micro.side_B is not None and micro.pair_scale_B is not None, "prepare the whole mini-batch first"
        reward_B = self.rewards(output, micro)
        chosen, rejected = pairs_of(micro.side_B, micro.group_B)
        score_B = torch.full_like(micro.temperature_B, torch.nan) if micro.reward_B is None else micro.reward_B
        chosen_P, rejected_P = reward_B[chosen], reward_B[rejected]
        loss = (micro.pair_scale_B[0] * self.loss_of(chosen_P, rejected_P, score_B[chosen] - score_B[rejected])).sum()
        with torch.no_grad():
            right_P = (chosen_P > rejected_P).float()
            shorter_P = (micro.length_B[chosen] < micro.length_B[rejected]).float()
            sums = {
                "loss": loss.detach(),
                "pairs": torch.tensor(float(len(chosen)), device=loss.device),
                "accuracy": right_P.sum(),
                "margin": (chosen_P - rejected_P).sum(),
                "reward": (chosen_P + rejected_P).sum() / 2,
                "confidence": (chosen_P - rejected_P).abs().sigmoid().sum(),
                "chosen_shorter": shorter_P.sum(),
                "accuracy_shorter": (right_P * shorter_P).sum(),
            }
        return loss, sums

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """``loss`` and ``pairs``; means per pair: ``accuracy``, ``margin`` (chosen less rejected), ``reward`` (of both
        sides) and ``confidence`` (the probability that the model gives its own verdict; with good calibration it is the
        accuracy); ``accuracy_shorter``, among pairs whose chosen side is the shorter one (NaN without any)."""
        totals = {name: float(value) for name, value in sums.items()}
        pairs, shorter = max(1.0, totals["pairs"]), totals["chosen_shorter"]
        found = {name: totals[name] / pairs for name in ("accuracy", "margin", "reward", "confidence")}
        found["accuracy_shorter"] = totals["accuracy_shorter"] / shorter if shorter else float("nan")
        return {"loss": totals["loss"], "pairs": totals["pairs"], **found}


def judged(reward_P2: Tensor, length_P2: Tensor) -> dict[str, float]:
    """What rewards of held-out pairs are worth.

    Args:
        reward_P2: Rewards of both sides, the preferred first.
        length_P2: Tokens of both, the preferred first.

    Returns:
        ``accuracy``; ``calibration``, the mean over ten equal-width bins, by their pairs, of the distance between the
        probability that the model gives its own verdict and the share in which that verdict is right; and
        ``length_correlation``, Pearson's, of the difference of the rewards with that of the lengths: what remains of it
        where longer is not better is a bias.
    """
    ahead_P = (reward_P2[:, 0] - reward_P2[:, 1]).double()
    right_P, sure_P = (ahead_P > 0).double(), ahead_P.abs().sigmoid()
    bin_P = ((sure_P - 0.5) * 20).long().clamp(max=9)
    error = 0.0
    for b in bin_P.unique().tolist():
        inside = bin_P == b
        error += float((sure_P[inside].mean() - right_P[inside].mean()).abs() * inside.double().mean())
    # either side may be called the first, so both orders count: the differences then have mean 0
    longer_P = (length_P2[:, 0] - length_P2[:, 1]).double()
    scale = float(ahead_P.square().sum().sqrt() * longer_P.square().sum().sqrt())
    correlation = float((ahead_P * longer_P).sum()) / scale if scale > 0 else float("nan")
    return {"accuracy": float(right_P.mean()), "calibration": error, "length_correlation": correlation}
