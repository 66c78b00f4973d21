"""RECAP: components that still improve, or waver, count for more than those that are done."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from alignment.algorithms.streams import component_means
from alignment.algorithms.weightings import weightings
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import Batch, Signals

LEAST = 1e-3
"""Added to the distance from the best reward, so that losses are positive."""
Orientation = Literal["previous_over_recent", "recent_over_previous"]


def signal(losses: Sequence[float], orientation: Orientation = "previous_over_recent") -> tuple[float, float]:
    """Convergence and instability of 2 W positive losses, oldest first.

    ``c = mean(previous W) / mean(recent W)`` in [0, 5] and ``i = std(recent W) / (sum of both means)``, with the
    population's deviation.
    """
    window = len(losses) // 2
    previous, recent = fmean(losses[:window]), fmean(losses[window:])
    ratio = previous / recent if orientation == "previous_over_recent" else recent / previous
    return min(max(ratio, 0.0), 5.0), pstdev(losses[window:]) / (previous + recent)


def balance(scores: Sequence[float], temperature: float) -> list[float]:
    """``K softmax(s / temperature)``: adds up to K."""
    highest = max(scores)
    grown = [math.exp((s - highest) / temperature) for s in scores]
    return [len(scores) * g / math.fsum(grown) for g in grown]


@weightings.register(
    "recap",
    source="Beyond Reasoning Gains: Mitigating General Capabilities Forgetting in Large Reasoning Models "
    "(arXiv 2510.21978)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Recap:
    """``A = sum_k w_k lambda_k A_k / sum_k w_k`` with ``lambda = K softmax((c + i) / temperature)``.

    ``c_k`` tells whether component k's loss falls (above 1) and ``i_k`` how unsteady it is, over two windows of W
    batches; see :func:`signal`. A component's loss is ``max - mean reward + 1e-3`` over the policy's own rollouts of a
    batch, before any filter. Until there are 2 W losses of every component, lambda is 1.

    Unverified: the paper prints the ratio as recent over previous and reads it as previous over recent; we take the
    latter (``orientation`` has both). Ours, the paper not saying: W, the loss of a reward, the range of c. Its other
    half, the replay of general data, is a matter of ``data.train``.
    """

    streams: ClassVar[bool] = True

    window: Annotated[int, option("batches in each of the two windows", ge=2)] = 10
    temperature: Annotated[float, option("of the softmax over components", gt=0)] = 5.0
    best: Annotated[dict[str, float], option("highest reward of a component, by its name; others: 1")] = field(
        default_factory=dict
    )
    orientation: Annotated[Orientation, option("of the ratio of the windows' mean losses")] = "previous_over_recent"

    @property
    def names(self) -> tuple[str, ...]:
        """The reward components that options name."""
        return tuple(self.best)

    def init(self) -> dict[str, Any]:
        return {"losses": {}}

    def balanced(self, state: Any, names: Sequence[str]) -> list[float]:
        """``lambda`` of each component."""
        losses = [state["losses"].get(name, []) for name in names]
        if any(len(each) < 2 * self.window for each in losses):
            return [1.0] * len(names)
        return balance([sum(signal(each, self.orientation)) for each in losses], self.temperature)

    def mix(self, state: Any, adv_KBT: Tensor, batch: Batch) -> Tensor:
        """As the class says.

        Raises:
            UserError: The recipe's weights do not add up to more than 0.
        """
        total = float(batch.weights_K.sum())
        if total <= 0:
            raise UserError(f"weighting 'recap' divides by the sum of the weights, {total:g}; make it positive")
        lambda_K = torch.tensor(self.balanced(state, batch.objectives), device=adv_KBT.device)
        return torch.einsum("k,kbt->bt", lambda_K * batch.weights_K.to(adv_KBT.device) / total, adv_KBT)

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        means, losses = component_means(signals.groups), dict(state["losses"])
        for name in signals.batch.objectives:
            if name in means:
                loss = max(self.best.get(name, 1.0) - means[name], 0.0) + LEAST
                losses[name] = [*losses.get(name, []), loss][-2 * self.window :]
        return {"losses": losses}

    def metrics(self, state: Any) -> dict[str, float]:
        """``lambda`` of each component of the next batch."""
        names = list(state["losses"])
        return {f"lambda/{name}": value for name, value in zip(names, self.balanced(state, names), strict=True)}
