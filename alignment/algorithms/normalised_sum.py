"""Normalise, then sum: each component is compared within groups before any of them can drown the others."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from alignment.algorithms.advantages import whiten
from alignment.algorithms.weightings import weightings
from alignment.registry import option
from alignment.types import Batch


@weightings.register(
    "normalise_then_sum",
    source="GDPO: Group reward-Decoupled Normalization Policy Optimization (arXiv 2601.05242)",
    evidence="end to end",
)
@dataclass(frozen=True)
class NormaliseThenSum:
    """``A = sum_k w_k A_k`` with the recipe's weights, then to mean 0 and deviation 1 over the batch's tokens.

    ``A_k`` are the stage's advantages of component k alone: with ``grpo``, its reward less the group's mean, over the
    group's deviation. So two rewards of unlike spread pull alike, and rollouts whose sums are equal for different
    reasons are told apart, which the deviation of a sum does not do.

    From memory: the paper's title, number and equations.
    """

    streams: ClassVar[bool] = True
    wants_scale_free: ClassVar[bool] = True

    whiten: Annotated[bool, option("the sum, over the batch")] = True

    @property
    def unit_scale(self) -> bool:
        """Of the sum."""
        return self.whiten

    def mix(self, state: Any, adv_KBT: Tensor, batch: Batch) -> Tensor:
        sum_BT = torch.einsum("k,kbt->bt", batch.weights_K.to(adv_KBT.device), adv_KBT)
        applies_B = batch.scored_B & ~batch.rewards_BK.isnan().all(1)
        return whiten(sum_BT, batch.loss_mask_BT & applies_B[:, None]) if self.whiten else sum_BT
