"""Reward models as roles of a learner: value models that are read at the end of a completion, and fitted to pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignment.algorithms.reward_losses import RewardLoss, RewardObjective
from alignment.engines.backend import Backend
from alignment.engines.optimizer import Slot
from alignment.engines.value_model import ValueModel, ValueShape
from alignment.engines.value_roles import ValueRoleSpec, nothing_of
from alignment.models import Model
from alignment.origin import Origin
from alignment.types import Batch


class RewardRole:
    """A reward model of its own, trained on pairs in a slot that has its name.

    Args:
        backend: Of a :class:`ValueModel`.
        slot: Its optimizer.
        objective: How it is read and fitted.
        name: Of the role.
    """

    of_prompts = False
    epochs = 1
    minibatches = 1

    def __init__(self, backend: Backend, slot: Slot, objective: RewardObjective, name: str) -> None:
        self.backend, self.objective = backend, objective
        self.slot: Slot | None = slot
        self.provides: tuple[str, ...] = (f"reward:{name}",)

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        """``reward_B``."""
        return {"reward_B": self.objective.rewards(self.backend.forward(micro.ids_BT), micro)}

    def prepare(self, minibatch: Batch) -> Batch:
        """See :class:`RewardObjective`."""
        return self.objective.prepare(minibatch)

    def loss(self, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`RewardObjective`."""
        output = self.backend.forward(micro.ids_BT)
        if not micro.loss_mask_BT.any():  # a row that stands in where a rank has none: all ranks go backward together
            return nothing_of(output), {}
        return self.objective.loss(output, micro)

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """See :class:`RewardObjective`."""
        return self.objective.finish(sums)


@dataclass(frozen=True)
class RewardRoleSpec:
    """A reward model: a body, from a saved value model or as ``origin`` has it, and a head that begins at random."""

    name: str
    loss: RewardLoss
    shape: ValueShape
    origin: Origin
    seed: int
    """Of the head, unless it comes with ``start``."""
    start: Any = None
    """Folder of a saved value or reward model to go on from; or None."""

    @property
    def as_values(self) -> ValueRoleSpec:
        """How its weights are made, checked and exported: as those of a value model."""
        return ValueRoleSpec(self.shape, self.origin, self.start)

    def check(self, policy: Model) -> None:
        """As :meth:`ValueRoleSpec.check`."""
        self.as_values.check(policy)

    def build(self, backend: Backend, config: Any, total_updates: int) -> RewardRole:
        """The role, in the processes of ``backend``; every one of them draws the same head."""
        model, _ = self.as_values.make()
        if self.start is None:
            draw_head(model, self.seed)
        own = backend.beside(model, replace(config))
        objective = RewardObjective(self.loss, self.shape.loss)
        return RewardRole(own, own.slot(total_updates), objective, self.name)


def draw_head(model: ValueModel, seed: int) -> None:
    """Gives the head small random weights, ``N(0, 1 / (H + 1))`` as TRL does, that depend on ``seed`` alone."""
    weight = model.head.linear.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5
        weight.copy_(drawn.to(weight))
