"""Losses that weigh ratios and divergences token by token, by what the reference's activations say or by learned masks.

Suffix beside the legend of :mod:`alignment.types`: N trained tokens of some rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.algorithms.preferences import REFERENCE, Beta, Pairs, Weight, preference_losses
from alignment.registry import option


@dataclass(frozen=True)
class ActivationMasks:
    """One mask for both, from activations of the reference; nothing is learned."""


@dataclass(frozen=True)
class LearnedMasks:
    """Masks that networks make of the reference's hidden states, and learn with the policy."""

    independent: bool
    """One for ratios and another for divergences; or one for both."""
    dropout: float
    weight_decay: float


@preference_losses.register(
    "mapo", source="SparsePO (arXiv 2410.05102): masks from activations, MaPO", evidence="end to end"
)
@dataclass(frozen=True)
class Mapo:
    """``-log sigmoid(beta (v_w - v_l))`` with ``v = sum_t m_t (r_t + k_t)`` of a completion.

    ``r_t`` is the log-ratio of a token to the reference, ``k_t`` the divergence of the policy from the reference over
    the vocabulary before it, and the mask ``m_t`` of a token says how active the reference was there:
    :func:`activation_mask`. With masks of 1 it is TDPO's first loss (arXiv 2404.11999).

    Looked at are, of each layer, what its feed-forward part has behind the activation function, what its attention
    heads put out and the state after it, and the logits. The authors' code also has queries, keys, values and states
    around the norms.
    """

    beta: Beta = 0.1
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE
    token_masks: ClassVar[ActivationMasks] = ActivationMasks()

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        return -logsigmoid(self.beta * masked_h(pairs))


@preference_losses.register("sparse_po", source="SparsePO (arXiv 2410.05102)", evidence="end to end")
@dataclass(frozen=True)
class SparsePo:
    """``-log sigmoid(beta (v_w - v_l)) + penalty`` with ``v = sum_t m^u_t r_t + m^d_t k_t`` of a completion.

    As :class:`Mapo`, with masks that are learned, in an optimizer of their own with the policy's learning rate; what
    they are made of: :class:`alignment.engines.token_masks.MaskNetwork`. The penalty is ``l1_ratio sum_t m^u_t +
    l1_divergence sum_t m^d_t`` over both completions; half of it if the mask is common, as in the authors' code. Which
    hidden states of a layer they read is inferred: those after it.
    """

    beta: Beta = 0.1
    masks: Annotated[Literal["common", "independent"], option("one for ratios and divergences, or one for each")] = (
        "common"
    )
    l1_ratio: Annotated[float, option("price of each unit of the mask of ratios", ge=0)] = 0.0
    l1_divergence: Annotated[float, option("price of each unit of the mask of divergences", ge=0)] = 0.0
    dropout: Annotated[float, option("of the masks' networks", ge=0, lt=1)] = 0.01
    weight_decay: Annotated[float, option("of the masks' networks, per step, times lr", ge=0)] = 0.01
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE

    @property
    def token_masks(self) -> LearnedMasks:
        """How they are made."""
        return LearnedMasks(self.masks == "independent", self.dropout, self.weight_decay)

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        h_P, sides = masked_h(pairs), [side.masked.size_R2 for side in (pairs.chosen, pairs.rejected) if side.masked]
        price_2 = torch.tensor([self.l1_ratio, self.l1_divergence], dtype=h_P.dtype, device=h_P.device)
        share = 0.5 if self.masks == "common" else 1.0
        return -logsigmoid(self.beta * h_P) + share * (sum(sides) * price_2).sum(-1)


def masked_h(pairs: Pairs) -> Tensor:
    """``[P]``: ``sum_t m^u_t r_t`` of the chosen completion less that of the other, and ``sum_t m^d_t k_t`` likewise.

    The sign of the divergences is that of TDPO's first loss and of the authors' code; gradients go through both.
    """
    chosen, rejected = pairs.chosen.masked, pairs.rejected.masked
    assert chosen is not None and rejected is not None, "a loss with token_masks is given them"
    return chosen.ratio_R - rejected.ratio_R + (chosen.divergence_R - rejected.divergence_R)


def activation_mask(kinds: Sequence[Sequence[Tensor]], row_N: Tensor) -> Tensor:
    """``[N]`` in ``[0, 1]``: how active a model was before each token, beside the other tokens of its row.

    Args:
        kinds: Of each kind of activations, ``[N]`` means over their features, one for each layer.
        row_N: The row that each token is of.
    """
    means = [torch.stack([rescaled(value_N, row_N) for value_N in layers]).mean(0) for layers in kinds]
    return torch.stack(means).mean(0)


def rescaled(value_N: Tensor, row_N: Tensor) -> Tensor:
    """``[N]``: within each row, the lowest value becomes 0 and the highest 1.

    The authors' code makes z-scores before, which changes nothing, and divides 0 by 0 in a row whose values are equal,
    as in one of a single token: here all of its tokens count, 1.
    """
    value_N = value_N.float()
    empty_B = value_N.new_zeros(int(row_N.max()) + 1)
    low_N = empty_B.scatter_reduce(0, row_N, value_N, "amin", include_self=False)[row_N]
    high_N = empty_B.scatter_reduce(0, row_N, value_N, "amax", include_self=False)[row_N]
    return torch.where(high_N > low_N, (value_N - low_N) / (high_N - low_N).clamp(min=1e-30), 1.0)
