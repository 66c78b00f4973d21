"""Rows of a batch that the policy did not sample."""

from torch import Tensor

from alignment.types import RATIO_BASES, SOURCES, Batch


def is_demonstration(batch: Batch) -> Tensor:
    """``[B]`` bool: rows that the policy did not sample."""
    return batch.source_B == SOURCES.index("demonstration")


def is_steered(batch: Batch) -> Tensor:
    """``[B]`` bool: rows that the policy sampled with the help of other models."""
    return batch.source_B == SOURCES.index("steered")


def is_imitated(batch: Batch) -> Tensor:
    """``[B]`` bool: demonstrations to be learned as they are, with advantage 1 and outside every baseline.

    These are the demonstrations of ratio base ``self``, and those without a reward. One with a reward and another
    base is judged within its group like a rollout (LUFFY, SRFT).
    """
    own_ratio_B = batch.ratio_base_B == RATIO_BASES.index("self")
    return is_demonstration(batch) & (own_ratio_B | ~batch.scored_B | batch.rewards_BK.isnan().all(1))
