"""What weightings of advantage streams share: where a component applies, and what it gives the policy on average."""

import math
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from alignment.types import Batch, Group


def component_mask(batch: Batch, k: int) -> Tensor:
    """``[B, T]`` bool: trained tokens of scored rows to which component ``k`` applies."""
    applies_B = batch.scored_B & ~batch.rewards_BK[:, k].isnan()
    return batch.loss_mask_BT & applies_B[:, None]


def component_means(groups: Sequence[Group]) -> dict[str, float]:
    """The mean of each component that applies anywhere, over the policy's own scored rollouts.

    Demonstrations and rollouts that were steered while they were sampled are left out.
    """
    values: defaultdict[str, list[float]] = defaultdict(list)
    for rollout in (r for g in groups for r in g.rollouts if r.source == "policy"):
        for name, score in rollout.scores.items() if rollout.scored else ():
            if score.value is not None:
                values[name].append(score.value)
    return {name: math.fsum(found) / len(found) for name, found in values.items()}
