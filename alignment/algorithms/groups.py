"""Statistics over the groups of a batch, returned per row."""

import torch
from torch import Tensor


def group_sum(values_B: Tensor, group_B: Tensor) -> Tensor:
    """Sum of ``values_B`` over the group of each row."""
    groups, index_B = torch.unique(group_B, return_inverse=True)
    return values_B.new_zeros(len(groups)).index_add(0, index_B, values_B)[index_B]


def above_baseline(reward_B: Tensor, group_B: Tensor, weight_B: Tensor) -> Tensor:
    """``r_i - sum_j w_j r_j / sum_j w_j`` over the group of row i; 0 for rows of weight 0, which nobody else sees.

    In float64, where sums of float32 rewards by whole weights are exact: equal rewards give exactly 0.

    Args:
        reward_B: Rewards; may be NaN where the weight is 0.
        group_B: Group of each row.
        weight_B: Non-negative weight of each row in its group's baseline.

    Returns:
        float64 ``[B]``.
    """
    counted_B = weight_B > 0
    reward_B = torch.where(counted_B, reward_B.double(), 0.0)
    weight_B = weight_B.double()
    total_B = group_sum(weight_B, group_B)
    baseline_B = group_sum(weight_B * reward_B, group_B) / torch.where(total_B > 0, total_B, 1.0)
    return torch.where(counted_B, reward_B - baseline_B, 0.0)
