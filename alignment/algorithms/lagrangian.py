"""Lagrangian weighting: one component is the objective, the others are held at thresholds by multipliers."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from alignment.algorithms.advantages import whiten
from alignment.algorithms.streams import component_mask, component_means
from alignment.algorithms.weightings import weightings
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import Batch, Signals

Kind = Literal["mu", "xi"]


def multiplier(kind: Kind, u: float) -> float:
    """``mu = sigmoid(u)`` in (0, 1), or ``xi = tanh(u)`` in (-1, 1)."""
    return math.tanh(u) if kind == "xi" else 0.5 * (1.0 + math.tanh(0.5 * u))


def slope(kind: Kind, u: float) -> float:
    """The multiplier's derivative."""
    m = multiplier(kind, u)
    return 1.0 - m * m if kind == "xi" else m * (1.0 - m)


def base_weight(multipliers: list[float]) -> float:
    """``N - sum_i m_i``: what the objective's advantage is multiplied by."""
    return len(multipliers) - math.fsum(multipliers)


@weightings.register(
    "lagrangian",
    source="Confronting Reward Model Overoptimization with Constrained RLHF (arXiv 2310.04373)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Lagrangian:
    """``A = (N - sum_i m_i) A_0 + sum_i m_i A_i`` with a multiplier for each of N components that has a threshold.

    ``mu`` (``m = sigmoid(u)``) asks for ``J_i >= theta_i``; ``xi`` (``m = tanh(u)``) for ``J_i = theta_i``, and pushes
    a component down that is above. ``J_i`` is the mean reward over the policy's own rollouts of the batch, before any
    filter. After each batch u descends ``sum_i m_i(u_i) (J_i - theta_i)``: SGD with momentum, the norm of its gradient
    clipped. Each stream is normalised to mean 0 and deviation 1 over the batch's tokens before it is mixed, and has
    values of its own with a critic. A component that has no threshold and is not the objective counts by its recipe
    weight: 0 leaves it out.

    Deviations. The paper's objective is the KL reward; here it is a reward component, and a KL goes into the loss. One
    step of u follows a batch, where the code makes one per mini-batch, and streams are normalised over the batch. u
    begins at 0, in the code at noise of 0.01. The code's variant without a squash skips the first multiplier, which we
    take for a mistake; that variant is not offered.
    """

    streams: ClassVar[bool] = True

    thresholds: Annotated[dict[str, float], option("mean reward to reach or to keep, by component")]
    objective: Annotated[str | None, option("component that is maximised; null: the first without a threshold")] = None
    kind: Annotated[Kind, option("mu: at least the threshold; xi: exactly")] = "xi"
    lr: Annotated[float, option("of the multipliers' u", ge=0)] = 0.1
    momentum: Annotated[float, option("of the multipliers' u", ge=0, lt=1)] = 0.1
    max_grad_norm: Annotated[float | None, option("of the gradient over all u; null: not clipped", gt=0)] = 0.5
    normalise: Annotated[bool, option("each component's advantages to mean 0 and deviation 1 over the batch")] = True

    def __post_init__(self) -> None:
        if not self.thresholds:
            raise UserError("weighting 'lagrangian' needs a threshold for some reward: thresholds: {NAME: 0.5}")
        if self.objective in self.thresholds:
            raise UserError(f"{self.objective!r} is the objective and has a threshold; take one of them away")

    @property
    def names(self) -> tuple[str, ...]:
        """The reward components that options name."""
        return (*self.thresholds, *([] if self.objective is None else [self.objective]))

    @property
    def unit_scale(self) -> bool:
        """Of each stream."""
        return self.normalise

    def init(self) -> dict[str, Any]:
        zeros = dict.fromkeys(self.thresholds, 0.0)
        return {"u": zeros, "velocity": dict(zeros), "reached": {}}

    def weights(self, state: Any, batch: Batch) -> list[float]:
        """What each stream is multiplied by, in the batch's order.

        Raises:
            UserError: Every component has a threshold.
        """
        held = {name: multiplier(self.kind, u) for name, u in state["u"].items()}
        free = [name for name in batch.objectives if name not in held]
        if not free:
            raise UserError("weighting 'lagrangian': one reward must be the objective, but all have thresholds")
        objective = self.objective or free[0]
        given = dict(zip(batch.objectives, batch.weights_K.tolist(), strict=True))
        return [{**given, **held, objective: base_weight(list(held.values()))}[name] for name in batch.objectives]

    def mix(self, state: Any, adv_KBT: Tensor, batch: Batch) -> Tensor:
        if self.normalise:
            adv_KBT = torch.stack([whiten(adv_BT, component_mask(batch, k)) for k, adv_BT in enumerate(adv_KBT)])
        weight_K = torch.tensor(self.weights(state, batch), device=adv_KBT.device)
        return torch.einsum("k,kbt->bt", weight_K, adv_KBT)

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        reached = component_means(signals.groups)
        gradient = {
            name: slope(self.kind, u) * (reached[name] - self.thresholds[name])
            for name, u in state["u"].items()
            if name in reached
        }
        norm = math.hypot(*gradient.values())
        clip = self.max_grad_norm / norm if self.max_grad_norm is not None and norm > self.max_grad_norm else 1.0
        velocity = dict(state["velocity"])
        velocity |= {name: self.momentum * velocity[name] + clip * g for name, g in gradient.items()}
        u = {name: value - self.lr * velocity[name] * (name in gradient) for name, value in state["u"].items()}
        return {"u": u, "velocity": velocity, "reached": {name: reached[name] for name in gradient}}

    def metrics(self, state: Any) -> dict[str, float]:
        """The multipliers, the objective's weight, and how far each component is above its threshold."""
        held = {name: multiplier(self.kind, u) for name, u in state["u"].items()}
        above = {f"above/{name}": value - self.thresholds[name] for name, value in state["reached"].items()}
        named = {f"multiplier/{name}": m for name, m in held.items()}
        return named | above | {"objective_weight": base_weight(list(held.values()))}
