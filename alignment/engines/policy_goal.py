"""What an update of the policy minimises: its objective, and the loss of a critic that shares the forward pass."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from alignment.engines.backend import Backend
from alignment.engines.gradients import Part
from alignment.engines.logprobs import Entropy
from alignment.engines.optimizer import StepCounts
from alignment.engines.roles import Goal
from alignment.engines.value_roles import HeadRole, nothing_of
from alignment.types import Batch

PASS_NEEDS = {"old_logp", "logp", "entropy", "entropy_drift"}
"""What one pass of the policy gives. ``old_logp`` is of a batch before its update, ``logp`` of a mini-batch before its
step; of a batch that has had no step they are the same."""


def fields_of_pass(backend: Backend, micro: Batch, needs: Collection[str]) -> tuple[dict[str, Tensor], list[Any]]:
    """The batch's fields for :data:`PASS_NEEDS` from one pass, and with ``values`` what the value head puts out."""
    entropy: Entropy = "drift" if "entropy_drift" in needs else "value" if "entropy" in needs else "none"
    logp_BT, entropy_BT, *output = backend.forward(micro, entropy, "values" in needs)
    found = {"old_logp_BT": logp_BT, "logp_BT": logp_BT}
    if entropy == "drift":
        found |= {"entropy_BT": entropy_BT[..., 0], "entropy_drift_BT": entropy_BT[..., 1]}
    elif entropy == "value":
        found["entropy_BT"] = entropy_BT
    return found, output


class PolicyObjective(Goal, Protocol):
    """What the learner asks of :class:`alignment.algorithms.objective.Objective`."""

    @property
    def entropies(self) -> Literal["none", "value", "gradient"]:
        """What :meth:`loss` is to be given: none, those it reports, or with a gradient those it uses."""
        ...

    @property
    def lr_factor(self) -> float:
        """Multiplies the learning rate of the update."""
        ...

    @property
    def update_norm(self) -> bool:
        """Whether to measure how far the update moves the policy's weights."""
        ...

    @property
    def wants_logp(self) -> bool:
        """Whether :meth:`prepare` is to be given ``logp_BT`` of the policy before the mini-batch's step."""
        ...

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the mini-batch's loss, and sums for metrics."""
        ...


@dataclass
class Reader:
    """Annotates, and counts the tokens that it reads for it, prompts included."""

    annotate: Callable[[Batch, Collection[str]], Batch]
    tokens: int = 0

    def __call__(self, batch: Batch, needs: Collection[str]) -> Batch:
        self.tokens += int(batch.length_B.sum())
        return self.annotate(batch, needs)


@dataclass(frozen=True)
class PolicyGoal:
    """The objective with the policy's forward pass in front of it, and the loss of a critic that shares it."""

    backend: Backend
    objective: PolicyObjective
    annotate: Callable[[Batch, Collection[str]], Batch]
    counts: StepCounts
    """Of the optimizer that is about to step."""
    head: HeadRole | None = None
    steps_before: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps_before", self.counts.steps)

    @property
    def epochs(self) -> int:
        return self.objective.epochs

    @property
    def minibatches(self) -> int:
        return self.objective.minibatches

    def begin(self) -> None:
        """Called before an update."""

    def end(self, found: Mapping[str, float]) -> dict[str, float]:
        """Called after an update that had metrics ``found``; more of them."""
        return {}

    def prepare(self, minibatch: Batch) -> Batch:
        if self.objective.wants_logp and self.counts.steps > self.steps_before:  # before, it is old_logp
            minibatch = self.annotate(minibatch, {"logp"})
        prepared = self.objective.prepare(minibatch)
        return prepared if self.head is None else self.head.prepare(minibatch, prepared)

    def loss(self, micro: Batch) -> Part:
        logp_BT, entropy_BT, *output = self.backend.forward(micro, self.objective.entropies, self.head is not None)
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
