"""Ensembles: several models of one reward, combined with caution."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from alignment.algorithms.weightings import weightings
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import Batch, Signals

Combine = Literal["mean", "worst", "uncertainty"]


def combined(scores_BM: Tensor, combine: Combine, penalty: float = 0.5, ddof: int = 1) -> Tensor:
    """``[B]`` float64: mean, minimum, or ``mean - penalty var`` of the scores that are there; NaN where none is.

    The variance divides by the number of scores less ``ddof``, and is 0 where that is not positive.
    """
    there_BM = ~scores_BM.isnan()
    count_B = there_BM.sum(1)
    mean_B, variance_B = _moments(scores_BM, ddof)
    found_B = {
        "mean": mean_B,
        "worst": torch.where(there_BM, scores_BM.double(), math.inf).amin(1),
        "uncertainty": mean_B - penalty * variance_B,
    }[combine]
    return torch.where(count_B > 0, found_B, torch.nan)


def _moments(scores_BM: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of what is there; 0 where nothing is."""
    there_BM, scores_BM = ~scores_BM.isnan(), scores_BM.double()
    count_B = there_BM.sum(1)
    mean_B = torch.where(there_BM, scores_BM, 0.0).sum(1) / count_B.clamp(min=1)
    square_B = torch.where(there_BM, (scores_BM - mean_B[:, None]).square(), 0.0).sum(1)
    return mean_B, torch.where(count_B > ddof, square_B / (count_B - ddof).clamp(min=1), 0.0)


@weightings.register(
    "ensemble",
    source="Reward Model Ensembles Help Mitigate Overoptimization (arXiv 2310.02743)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Ensemble:
    """``weight R + sum_k w_k r_k``: R combines the members, the other components count by the recipe's weights.

    ``mean``: the members' mean. ``worst``: their minimum (WCO). ``uncertainty``: ``mean - penalty var`` (UWO), with the
    variance, not the deviation. Members that do not apply to a row are left out; a row to which no member and no other
    component applies has no reward. The members' own recipe weights do not count.

    The official code takes the sample variance in PPO (``ddof`` 1, the default) and the population's in best-of-n (0).
    The penalty is .5 in its best-of-n and .1 in its example of PPO. It scales with the square of the scores while the
    mean scales with them, and all three compare members: give members one scale.
    """

    streams: ClassVar[bool] = False

    members: Annotated[tuple[str, ...], option("reward components that model the same reward")]
    combine: Annotated[Combine, option("mean, worst (minimum) or uncertainty (mean less penalty times variance)")] = (
        "uncertainty"
    )
    penalty: Annotated[float, option("lambda of the variance", ge=0)] = 0.5
    ddof: Annotated[Literal[0, 1], option("the variance divides by members less this: 1 sample, 0 population")] = 1
    weight: Annotated[float, option("of the combined reward")] = 1.0

    def __post_init__(self) -> None:
        if len(self.members) < 2 or len(set(self.members)) < len(self.members):
            raise UserError(f"an ensemble has two or more members, each named once; not {list(self.members)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The reward components that options name."""
        return self.members

    def init(self) -> dict[str, float]:
        return {}

    def scalarise(self, state: Any, batch: Batch) -> Tensor:
        of_members = torch.tensor([name in self.members for name in batch.objectives], device=batch.rewards_BK.device)
        combined_B = combined(batch.rewards_BK[:, of_members], self.combine, self.penalty, self.ddof)
        other_BK, weight_K = batch.rewards_BK[:, ~of_members], batch.weights_K[~of_members]
        applies_BK = ~other_BK.isnan()
        other_B = torch.where(applies_BK, other_BK * weight_K, 0.0).sum(1)
        reward_B = (self.weight * combined_B.nan_to_num(0.0)).float() + other_B
        return torch.where(applies_BK.any(1) | ~combined_B.isnan(), reward_B, torch.nan)

    def observe(self, state: Any, signals: Signals) -> dict[str, float]:
        """The members' mean deviation over scored rows where the variance has a degree of freedom, for the metrics."""
        batch = signals.batch
        of_members = torch.tensor([name in self.members for name in batch.objectives], device=batch.rewards_BK.device)
        scores_BM = batch.rewards_BK[batch.scored_B][:, of_members]
        scores_BM = scores_BM[(~scores_BM.isnan()).sum(1) > self.ddof]
        if not len(scores_BM):
            return {}
        return {"std": float(_moments(scores_BM, self.ddof)[1].sqrt().mean())}

    def metrics(self, state: Any) -> dict[str, float]:
        """``std``: the members' mean standard deviation in the batch."""
        return dict(state)
