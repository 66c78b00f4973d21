"""Entropy controls: what keeps the policy from becoming certain too early."""

from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

from torch import Tensor

from alignment.registry import Registry, option
from alignment.types import Batch


@runtime_checkable
class EntropyControl(Protocol):
    """A weight on the policy loss, a term of the loss, or both; None for the one that it does not use.

    Optional on the class: ``penalises: bool`` (an attribute or property, default False). It must be True where
    ``penalty`` gives more than None: entropies carry a gradient only if some control says so.
    """

    def prepare(self, state: Any, minibatch: Batch) -> Tensor | None:
        """``weight_BT`` that multiplies the policy loss: once per mini-batch, whole and detached, before any split."""
        ...

    def penalty(self, state: Any, entropy_BT: Tensor) -> Tensor | None:
        """``penalty_BT``, minimised with the loss, from differentiable entropies in nats."""
        ...


entropy_controls: Registry[EntropyControl] = Registry(
    "entropy_controls", EntropyControl, "How the policy is kept from becoming certain too early"
)


@entropy_controls.register(
    "bonus", source="Asynchronous Methods for Deep Reinforcement Learning (arXiv 1602.01783)", evidence="end to end"
)
@dataclass(frozen=True)
class Bonus:
    """A fixed bonus for entropy: the loss gets ``-coefficient H`` at each trained token, aggregated like the rest.

    H is the entropy over the whole vocabulary, with its gradient.
    """

    coefficient: Annotated[float, option("weight of the entropy", ge=0)] = 0.001

    @property
    def penalises(self) -> bool:
        """Whether there is a penalty at all."""
        return self.coefficient > 0

    def prepare(self, state: Any, minibatch: Batch) -> None:
        return None

    def penalty(self, state: Any, entropy_BT: Tensor) -> Tensor | None:
        return -self.coefficient * entropy_BT if self.penalises else None
