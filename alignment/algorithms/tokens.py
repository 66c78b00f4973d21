"""Which tokens of a mini-batch count, in an order that does not depend on that of its rows; random numbers by key.

Suffix beside the legend of :mod:`alignment.types`: N, the tokens of a mask, in :func:`in_order`.
"""

import math

import torch
from torch import Tensor

from alignment.algorithms.demonstrations import is_demonstration
from alignment.types import Batch, keyed_seed

Places = tuple[Tensor, Tensor]
"""Row and position of each of N tokens."""
_GAMMA, _MIX_1, _MIX_2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def sampled_tokens(batch: Batch) -> Tensor:
    """``[B, T]`` bool: trained tokens of rows that a policy sampled, so of all but demonstrations."""
    return batch.loss_mask_BT & ~is_demonstration(batch)[:, None]


def in_order(batch: Batch, mask_BT: Tensor) -> Places:
    """The tokens of ``mask_BT`` by (rollout key, position): sums over them are the same bits in any order of rows."""
    order_B = batch.key_B.argsort(stable=True)
    place_N, position_N = mask_BT[order_B].nonzero(as_tuple=True)
    return order_B[place_N], position_N


def largest(values_N: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest; of equal ones the first."""
    return values_N.argsort(descending=True, stable=True)[:count]


def share_up(share: float, of: int) -> int:
    """``ceil(share * of)``, where rounding in the product does not count as more."""
    return math.ceil(share * of - 1e-9)


def share_down(share: float, of: int) -> int:
    """``floor(share * of)`` likewise."""
    return math.floor(share * of + 1e-9)


def keyed_numbers(batch: Batch, places: Places, name: str) -> Tensor:
    """A pseudo-random int64 for each token, by (``name``, seed, step, rollout key, position) alone.

    The finaliser of SplitMix64 (Fast Splittable Pseudorandom Number Generators, Steele et al. 2014), twice.
    """
    row_N, position_N = places
    start_N = _mixed(batch.key_B[row_N] ^ keyed_seed(name, batch.seed, batch.step))
    return _mixed(start_N + position_N * _GAMMA)


def _mixed(x_N: Tensor) -> Tensor:
    """int64 products wrap around, and shifts must bring in zeros."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x_N = (x_N ^ _shifted(x_N, shift)) * factor
    return x_N ^ _shifted(x_N, 31)


def _shifted(x_N: Tensor, by: int) -> Tensor:
    return (x_N >> by) & ((1 << (64 - by)) - 1)


def placed(batch: Batch, places: Places, values_N: Tensor, otherwise: float) -> Tensor:
    """``[B, T]`` float32 with the values at their places and ``otherwise`` everywhere else."""
    whole_BT = torch.full(batch.ids_BT.shape, otherwise, device=values_N.device)
    whole_BT[places] = values_N.float()
    return whole_BT


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``; 0 where nothing is selected."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
