"""Weightings: from several reward components to one reward, or one advantage, per row.

A scalarising weighting has ``scalarise(state, batch) -> reward_B``. One with ``streams = True`` has
``mix(state, adv_KBT, batch) -> adv_BT`` instead: each component then gets advantages of its own before they are mixed.
``rewards_BK`` is NaN where a component does not apply. The whole batch is given, so groups can be normalised.

Those of a paper stand in files of their own: ``hypervolume``, ``gradient_weights``, ``lagrangian``, ``ensembles``,
``recap``, ``normalised_sum``.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignment.errors import UserError
from alignment.registry import Registry, option
from alignment.types import Batch


@runtime_checkable
class Weighting(Protocol):
    """How components become one: a :class:`Scalarisation`, or with ``streams`` a :class:`StreamMix`.

    Optional on the class: ``advantage_factor(state) -> float``, which multiplies all advantages in the end, those of
    imitated demonstrations excepted; ``lr_factor(state) -> float``, which multiplies the learning rate of the next
    update and leaves its schedule alone; ``names``, the reward components that its options name, which a recipe's
    check looks up; ``unit_scale: bool``, whether what it mixes deviates by about 1 whatever the rewards.
    """

    streams: ClassVar[bool]
    """Whether advantages are mixed instead of rewards."""


@runtime_checkable
class Scalarisation(Protocol):
    """Weighting of rewards."""

    def scalarise(self, state: Any, batch: Batch) -> Tensor:
        """``reward_B``; NaN for rows to which no component applies."""
        ...


@runtime_checkable
class StreamMix(Protocol):
    """Weighting of advantages."""

    def mix(self, state: Any, adv_KBT: Tensor, batch: Batch) -> Tensor:
        """``adv_BT`` from one advantage per component of ``batch``; 0 where a component does not apply."""
        ...


weightings: Registry[Weighting] = Registry(
    "weightings", Weighting, "How several reward components become one", any_of=("scalarise", "mix")
)


def weighted_sum(batch: Batch) -> Tensor:
    """``sum_k w_k r_k`` over the components that apply to each row; NaN where none does."""
    applies_BK = ~batch.rewards_BK.isnan()
    total_B = torch.where(applies_BK, batch.rewards_BK * batch.weights_K, 0.0).sum(1)
    return torch.where(applies_BK.any(1), total_B, torch.nan)


@weightings.register("fixed", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Fixed:
    """Sum of the components that apply, by the recipe's weights: ``sum_k w_k r_k``.

    ``truncated`` takes the place of the sum for completions that the length limit ended: Tulu 3 (arXiv 2411.15124)
    gives them -10, whatever their verifier says.
    """

    streams: ClassVar[bool] = False

    truncated: Annotated[
        float | None, option("reward of completions that the length limit ended; null: as the others")
    ] = None

    def scalarise(self, state: Any, batch: Batch) -> Tensor:
        reward_B = weighted_sum(batch)
        if self.truncated is None:
            return reward_B
        return torch.where(batch.truncated_B & ~reward_B.isnan(), self.truncated, reward_B)


@weightings.register("normalised", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Normalised:
    """Mean of the components that apply, by the recipe's weights: ``sum_k w_k r_k / sum_k w_k``.

    Rows to which few components apply are on the scale of the others, which the plain sum does not give.
    """

    streams: ClassVar[bool] = False

    def scalarise(self, state: Any, batch: Batch) -> Tensor:
        """As the class says.

        Raises:
            UserError: The weights of the components that apply to a scored row do not add up to more than 0.
        """
        applies_BK = ~batch.rewards_BK.isnan()
        weight_B = torch.where(applies_BK, batch.weights_K, 0.0).sum(1)
        if (batch.scored_B & applies_BK.any(1) & (weight_B <= 0)).any():
            raise UserError(
                "weighting 'normalised' divides by the sum of the weights that apply to a rollout, and for some "
                f"rollout it is not positive (weights {batch.weights_K.tolist()}); make the weights positive, "
                "or use 'fixed'"
            )
        return weighted_sum(batch) / weight_B
