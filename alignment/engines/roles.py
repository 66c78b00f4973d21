"""Models beside the policy: a critic, a prompt value model, a mask network.

A role owns its module and, if it learns, a :class:`~alignment.engines.optimizer.Slot`: an optimizer with its own
moments and schedule. There are two ways to learn, and a role may have either, both or none:

- a :class:`TrainedRole` is trained by ``learner.update`` on the same batch as the policy, in its own epochs and
  mini-batches (a critic);
- a role that is also an :class:`alignment.types.RoleHandle` is fitted by the component that named it in ``needs``,
  calling ``fit`` (a prompt value model). Its ``version`` can be ``slot.counts.updates``, which is restored with it.

The learner saves and restores every role: ``module.state_dict()`` and the slot.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from alignment.engines.optimizer import Slot
from alignment.types import Batch, RoleHandle


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

    module: nn.Module
    slot: Slot | None

    @property
    def provides(self) -> tuple[str, ...]:
        """The ``needs`` that :meth:`annotate` answers, such as ``values``."""
        ...

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        """Fields of the batch by name, such as ``values_BT``, for the rows of ``micro``; called without gradients."""
        ...


@runtime_checkable
class TrainedRole(Role, Goal, Protocol):
    """A role that ``learner.update`` trains. It must have a slot."""

    def loss(self, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds up over the micro-batches of a mini-batch: the loss and the sums for metrics (``*_max``: maximum)."""
        ...


def handles(roles: Mapping[str, Role]) -> dict[str, RoleHandle]:
    """The roles that components may query and fit."""
    return {name: role for name, role in roles.items() if isinstance(role, RoleHandle)}
