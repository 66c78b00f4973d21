"""Aggregations: how much each trained token weighs in the one number that is minimised.

``objective = sum(scale_BT * loss_BT)``. Scales are computed once over a whole mini-batch, so that the parts of any
split add up to the whole. Rows without a trained token count nowhere.
"""

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

from torch import Tensor

from alignment.registry import Registry, option


@runtime_checkable
class Aggregation(Protocol):
    """The weight of each token in the loss."""

    def scale(self, loss_mask_BT: Tensor) -> Tensor:
        """``[B, T]`` float32, 0 outside the mask; ``loss_mask_BT`` (bool) is that of the whole mini-batch."""
        ...


aggregations: Registry[Aggregation] = Registry("aggregations", Aggregation, "How token losses become one number")


def _sequences(mask_BT: Tensor) -> Tensor:
    return mask_BT.any(1).sum().clamp(min=1)


@aggregations.register(
    "token_mean",
    source="DAPO: An Open-Source LLM Reinforcement Learning System at Scale (arXiv 2503.14476)",
    evidence="end to end",
)
@dataclass(frozen=True)
class TokenMean:
    """Mean over all trained tokens: ``sum_{i,t} l / sum_i T_i``. Long rows weigh more."""

    def scale(self, loss_mask_BT: Tensor) -> Tensor:
        return loss_mask_BT.float() / loss_mask_BT.sum().clamp(min=1)


@aggregations.register(
    "sequence_mean",
    source="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (arXiv 2402.03300)",
    evidence="end to end",
)
@dataclass(frozen=True)
class SequenceMean:
    """Mean over rows of each row's mean: ``mean_i (1 / T_i) sum_t l``. Tokens of long rows weigh less."""

    def scale(self, loss_mask_BT: Tensor) -> Tensor:
        tokens_B = loss_mask_BT.sum(1, keepdim=True).clamp(min=1)
        return loss_mask_BT.float() / (tokens_B * _sequences(loss_mask_BT))


@aggregations.register(
    "sequence_sum", source="this project; the same choice exists in verl as seq-mean-token-sum", evidence="end to end"
)
@dataclass(frozen=True)
class SequenceSum:
    """Mean over rows of each row's sum: ``mean_i sum_t l``. Grows with length, and so does its gradient."""

    def scale(self, loss_mask_BT: Tensor) -> Tensor:
        return loss_mask_BT.float() / _sequences(loss_mask_BT)


@aggregations.register(
    "constant",
    source="Understanding R1-Zero-Like Training: A Critical Perspective (arXiv 2503.20783)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Constant:
    """Mean over rows of each row's sum divided by a constant length: ``mean_i (1 / L) sum_t l``.

    Every token weighs the same whatever the length of its row; L is usually the longest completion allowed.
    """

    length: Annotated[int, option("the constant length L", unit="tokens", ge=1)]

    def scale(self, loss_mask_BT: Tensor) -> Tensor:
        return loss_mask_BT.float() / (_sequences(loss_mask_BT) * self.length)
