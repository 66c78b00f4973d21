"""What an update of the policy minimises: its objective, and the loss of a critic that shares the forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from alignment.engines.backend import Backend
from alignment.engines.roles import Goal
from alignment.engines.value_roles import HeadRole, nothing_of
from alignment.types import Batch


class PolicyObjective(Goal, Protocol):
    """What the learner asks of :class:`alignment.algorithms.objective.Objective`."""

    @property
    def wants_entropy_grad(self) -> bool:
        """Whether the loss uses the entropy, beyond reporting it."""
        ...

    @property
    def lr_factor(self) -> float:
        """Multiplies the learning rate of the update."""
        ...

    @property
    def update_norm(self) -> bool:
        """Whether to measure how far the update moves the policy's weights."""
        ...

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the mini-batch's loss, and sums for metrics."""
        ...


@dataclass(frozen=True)
class PolicyGoal:
    """The objective with the policy's forward pass in front of it, and the loss of a critic that shares it."""

    backend: Backend
    objective: PolicyObjective
    head: HeadRole | None = None

    @property
    def epochs(self) -> int:
        return self.objective.epochs

    @property
    def minibatches(self) -> int:
        return self.objective.minibatches

    def prepare(self, minibatch: Batch) -> Batch:
        prepared = self.objective.prepare(minibatch)
        return prepared if self.head is None else self.head.prepare(minibatch, prepared)

    def loss(self, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        entropy = "gradient" if self.objective.wants_entropy_grad else "value"
        logp_BT, entropy_BT, *output = self.backend.forward(micro, entropy, self.head is not None)
        if not micro.loss_mask_BT.any():  # a row that stands in where a rank has none: all ranks go backward together
            return sum(map(nothing_of, output), start=nothing_of(logp_BT)), {}
        loss, sums = self.objective.loss(logp_BT, entropy_BT, micro)
        if self.head is None:
            return loss, sums
        of_values, more = self.head.loss(output[0], micro)
        return loss + of_values, sums | more

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        own = {name: value for name, value in sums.items() if not name.startswith("critic/")}
        metrics = self.objective.finish(own)
        return metrics if self.head is None else metrics | self.head.finish(sums)
