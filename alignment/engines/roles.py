"""Models beside the policy: a critic, a value model, a prompt value model, a mask network.

A role has a :class:`~alignment.engines.backend.Backend` of its own, so weights in the same processes as the policy's,
and, if it learns, a :class:`~alignment.engines.optimizer.Slot`: an optimizer with its own moments and schedule. Then it
is trained by ``learner.update`` on the same batches as the policy, in its own epochs and mini-batches (a critic); or,
one that is ``of_prompts``, by the component that named it in ``needs``, through its handle (a prompt value model).

The learner saves and restores every role, weights and slot.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from alignment.engines.backend import Backend
from alignment.engines.optimizer import Slot
from alignment.models import Model
from alignment.types import Batch, Prompt


@runtime_checkable
class Goal(Protocol):
    """Something to minimise: the policy's objective and a trained role look alike to the learner."""

    @property
    def epochs(self) -> int:
        """Passes over the batch in one update."""
        ...

    @property
    def minibatches(self) -> int:
        """Optimizer steps in one pass."""
        ...

    def prepare(self, minibatch: Batch) -> Batch:
        """Called once per mini-batch, before it is split: whatever depends on all its rows, such as ``scale_BT``."""
        ...

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics out of the sums of :meth:`TrainedRole.loss` over micro-batches."""
        ...


@runtime_checkable
class Role(Protocol):
    """A model beside the policy. ``slot`` is None for one that does not learn."""

    backend: Backend
    slot: Slot | None
    of_prompts: bool
    """It says something of prompts, for a component that asks, and takes no part in updates."""

    @property
    def provides(self) -> tuple[str, ...]:
        """The ``needs`` that :meth:`annotate` answers, such as ``values``."""
        ...

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        """Fields of the batch by name, such as ``values_BT``, for the rows of ``micro``; called without gradients."""
        ...


@runtime_checkable
class TrainedRole(Role, Goal, Protocol):
    """A role that learns. It must have a slot."""

    def loss(self, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds up over the micro-batches of a mini-batch: the loss and the sums for metrics (``*_max``: maximum)."""
        ...


class RoleSpec(Protocol):
    """What a role is made from, wherever the learner's processes are; it can be pickled."""

    def check(self, policy: Model) -> None:
        """Refuses a policy that the role does not go with, before anything is started."""
        ...

    def build(self, backend: Backend, config: Any, total_updates: int) -> Role:
        """The role beside the policy of ``backend``; ``config`` are the learner's options."""
        ...


@dataclass(frozen=True)
class PromptHandle:
    """A role of a learner as components see it (:class:`alignment.types.RoleHandle`): by prompts."""

    learner: Any
    name: str
    encode: Callable[[Prompt], Sequence[int]]
    """The tokens that the policy is shown."""
    counts: Counter[str] = field(default_factory=Counter)
    """``read_tokens`` and ``fitted_tokens`` since :func:`passed` looked last."""

    @property
    def version(self) -> int:
        """How many updates it has had."""
        return self.learner.updates_of(self.name)

    def values(self, prompts: Sequence[Prompt]) -> Tensor:
        """``[len(prompts)]`` float32: what is expected of a completion, read at the prompt's last token."""
        asked = self._encoded(prompts)
        self.counts["read_tokens"] += sum(map(len, asked))
        return self.learner.predict(self.name, asked)

    def fit(self, prompts: Sequence[Prompt], targets: Tensor) -> Mapping[str, float]:
        """One round of regression on ``targets``; metrics. A critic, which learns from each batch, is left alone."""
        metrics = self.learner.fit(self.name, self._encoded(prompts), targets)
        self.counts["fitted_tokens"] += int(metrics.get("fitted_tokens", 0))
        return metrics

    def _encoded(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        return [tuple(self.encode(prompt)) for prompt in prompts]


def handles(learner: Any, encode: Callable[[Prompt], Sequence[int]]) -> dict[str, PromptHandle]:
    """The roles of ``learner`` that components may query and fit."""
    return {name: PromptHandle(learner, name, encode) for name in learner.of_prompts}


def passed(asked: Mapping[str, Any]) -> dict[str, float]:
    """Tokens of prompts that each role has read, and learned from, since this was asked last: ``NAME/read_tokens`` and
    ``NAME/fitted_tokens``."""
    found = {f"{role}/{name}": float(n) for role, handle in asked.items() for name, n in handle.counts.items() if n}
    for handle in asked.values():
        handle.counts.clear()
    return found
