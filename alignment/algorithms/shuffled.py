"""A control with nothing to tell: another one's weights, dealt out to tokens at random."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from alignment.algorithms.entropy_controls import EntropyControl, PenaltyView, entropy_controls
from alignment.algorithms.tokens import in_order, keyed_numbers, placed, sampled_tokens
from alignment.errors import UserError
from alignment.registry import component, option
from alignment.types import Batch


@entropy_controls.register("shuffled", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Shuffled:
    """For studies: what another control gives to each token, given to the mini-batch's tokens in another order.

    How many tokens get which weight stays the same, and so does what the other one costs; which tokens they are is
    chance. What an arm with this attains does not come from what the other control looks at. The order is keyed by
    (seed, step, rollout, token), the same in any split; tokens of demonstrations keep what they were given.

    A bonus gives every token the same coefficient, and a control with a state would still be fed what is true: both are
    refused.
    """

    of: Annotated[EntropyControl, component(entropy_controls), option("the control: steer, clip_cov or the like")]

    def __post_init__(self) -> None:
        kept = hasattr(self.of, "init") or hasattr(self.of, "observe")
        if kept or getattr(self.of, "entropy_gradient", False) or isinstance(self.of, Shuffled):
            raise UserError(
                f"'{entropy_controls.name_of(self.of)}' does not pick tokens, so there is nothing to shuffle; 'of' "
                "takes steer, clip_cov, kl_cov, high_entropy, or a control of yours that weighs or marks tokens"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """What the other one needs."""
        return getattr(self.of, "needs", ())

    @property
    def several_updates(self) -> bool:
        """Whether the other one does nothing in the first update of a batch."""
        return getattr(self.of, "several_updates", False)

    @property
    def unit_scale(self) -> tuple[str, ...]:
        """Options of the other one that presume it."""
        return getattr(self.of, "unit_scale", ())

    def prepare(self, state: Any, minibatch: Batch) -> Tensor | None:
        weight_BT = self.of.prepare(state, minibatch)
        return None if weight_BT is None else dealt(weight_BT, minibatch)

    def mark(self, state: Any, minibatch: Batch) -> Tensor:
        """Those of the other one likewise; 0 if it makes none."""
        if not hasattr(self.of, "mark"):
            return torch.zeros(minibatch.ids_BT.shape, device=minibatch.ids_BT.device)
        return dealt(self.of.mark(state, minibatch), minibatch)  # pyright: ignore[reportAttributeAccessIssue]

    def penalty(self, state: Any, view: PenaltyView) -> Tensor | None:
        return self.of.penalty(state, view)


def dealt(values_BT: Tensor, minibatch: Batch) -> Tensor:
    """``values_BT`` with those of sampled tokens in a random order."""
    places = in_order(minibatch, sampled_tokens(minibatch))
    order_N = keyed_numbers(minibatch, places, "shuffled").argsort(stable=True)
    return torch.where(
        sampled_tokens(minibatch), placed(minibatch, places, values_BT[places][order_N], 0.0), values_BT.float()
    )
