"""Gradient-based weighting: components whose gradient helps the sum of all gain weight."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from alignment.algorithms.weightings import weightings
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import Batch, Signals


def influence(gram_KK: Tensor, max_norm: float | None = None) -> list[float]:
    """``s_k = sum_j <g_k, g_j>``, the diagonal included, of gradients that were first clipped to ``max_norm``."""
    if max_norm is not None:
        norm_K = gram_KK.diagonal().clamp(min=0).sqrt()
        clip_K = torch.where(norm_K > max_norm, max_norm / norm_K, 1.0)
        gram_KK = gram_KK * clip_K[:, None] * clip_K
    return gram_KK.sum(1).tolist()


def exponentiated(weights: list[float], scores: list[float], rate: float) -> list[float]:
    """``softmax(log w + rate s)``: the weights stay positive and add up to 1."""
    highest = max(scores)
    grown = [w * math.exp(rate * (s - highest)) for w, s in zip(weights, scores, strict=True)]
    return [g / math.fsum(grown) for g in grown]


@weightings.register(
    "gradient",
    source="Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting (arXiv 2509.11452)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Gradient:
    """``sum_k w_k r_k`` with weights that follow the gradients: ``w <- softmax(log w + rate s)``.

    ``s_k = sum_j <g_k, g_j>`` over the policy's gradients ``g_k`` with component k's advantages alone, on the whole
    batch, the KL and entropy terms of the loss included. The weights begin as the recipe's over their sum. Components
    that do not apply to a row are left out of its sum. Two components, both clipped to ``max_norm``, have equal scores
    (``max_norm^2`` and their inner product, each), so neither gains.

    Deviations. The official code weighs the batch by its own gradients; here, where a component learns in ``observe``
    alone, they make the weights of the next batch. Its rate is the learning rate over 1e-5 and follows its schedule;
    ours is constant, by default its 1e-6 over 1e-5. It clips each gradient over all weights and then chooses layers;
    ours is clipped over the chosen layers. A Gram matrix that is not finite leaves the weights as they are and is
    counted (``skipped``).

    Costs K passes forward and backward more, and ``4 K / ranks`` bytes of the host's memory for each chosen weight.
    """

    streams: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("gram",)

    rate: Annotated[float, option("of the weights, per unit of a squared gradient norm", ge=0)] = 0.1
    max_norm: Annotated[float | None, option("each component's gradient is clipped to it; null: not", gt=0)] = 1.0
    layers: Annotated[
        str | None, option("regular expression that names of the weights to look at contain; null: all trained ones")
    ] = None
    accumulation: Annotated[int, option("batches whose scores are averaged for one step of the weights", ge=1)] = 1

    def __post_init__(self) -> None:
        try:
            re.compile(self.layers or "")
        except re.error as error:
            raise UserError(f"layers: {self.layers!r} is no regular expression ({error}); try layers\\.1\\.") from error

    def init(self) -> dict[str, Any]:
        return {"weights": {}, "scores": {}, "batches": 0, "skipped": 0}

    def scalarise(self, state: Any, batch: Batch) -> Tensor:
        """As the class says.

        Raises:
            UserError: A weight of the recipe is not positive.
        """
        weight_K = torch.tensor(list(self._weights(state, batch).values()), device=batch.rewards_BK.device)
        applies_BK = ~batch.rewards_BK.isnan()
        reward_B = torch.where(applies_BK, batch.rewards_BK * weight_K, 0.0).sum(1)
        return torch.where(applies_BK.any(1), reward_B, torch.nan)

    def _weights(self, state: Any, batch: Batch) -> dict[str, float]:
        """By component, in the batch's order."""
        if state["weights"]:
            return {name: state["weights"][name] for name in batch.objectives}
        first: list[float] = batch.weights_K.tolist()
        if min(first) <= 0:
            raise UserError(f"weighting 'gradient' starts from the rewards' weights: make them positive, not {first}")
        return {name: w / math.fsum(first) for name, w in zip(batch.objectives, first, strict=True)}

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        if signals.gram_KK is None:
            return state
        if not signals.gram_KK.isfinite().all():
            return {**state, "skipped": state["skipped"] + 1}
        weights, scores = self._weights(state, signals.batch), influence(signals.gram_KK, self.max_norm)
        total = {name: state["scores"].get(name, 0.0) + s for name, s in zip(weights, scores, strict=True)}
        batches = state["batches"] + 1
        if batches < self.accumulation:
            return {**state, "weights": weights, "scores": total, "batches": batches}
        moved = exponentiated(list(weights.values()), [total[name] / batches for name in weights], self.rate)
        return {**state, "weights": dict(zip(weights, moved, strict=True)), "scores": {}, "batches": 0}

    def metrics(self, state: Any) -> dict[str, float]:
        """The weights of the next batch."""
        return {f"weight/{name}": weight for name, weight in state["weights"].items()} | {"skipped": state["skipped"]}
