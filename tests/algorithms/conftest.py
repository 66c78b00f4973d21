"""A builder of small batches for the tests of this folder."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from alignment.types import RATIO_BASES, SOURCES, Batch

MakeBatch = Callable[..., Batch]


def _make_batch(
    rewards: Sequence[float] | Sequence[Sequence[float]],
    lengths: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    *,
    sources: Sequence[str] | None = None,
    bases: Sequence[str] | None = None,
    scored: Sequence[bool] | None = None,
    mask: Sequence[Sequence[bool]] | None = None,
    weights: Sequence[float] | None = None,
    **more: Any,
) -> Batch:
    """Rows of one prompt token and ``lengths`` completion tokens (default 1), all trained unless ``mask`` says."""
    rewards_BK = torch.tensor(rewards, dtype=torch.float32)
    rewards_BK = rewards_BK[:, None] if rewards_BK.dim() == 1 else rewards_BK
    rows = len(rewards_BK)
    length_B = torch.tensor(lengths or [1] * rows) + 1
    position_T = torch.arange(int(length_B.max()))
    mask_BT = (position_T >= 1) & (position_T < length_B[:, None]) if mask is None else torch.tensor(mask)
    scored_B = torch.ones(rows, dtype=torch.bool) if scored is None else torch.tensor(scored)
    fields: dict[str, Any] = {
        "ids_BT": torch.ones_like(mask_BT, dtype=torch.int64),
        "loss_mask_BT": mask_BT,
        "length_B": length_B,
        "group_B": torch.zeros(rows, dtype=torch.int64) if groups is None else torch.tensor(groups),
        "source_B": torch.tensor([SOURCES.index(s) for s in sources or ["policy"] * rows], dtype=torch.int8),
        "ratio_base_B": torch.tensor([RATIO_BASES.index(b) for b in bases or ["old"] * rows], dtype=torch.int8),
        "temperature_B": torch.ones(rows),
        "behaviour_logp_BT": torch.zeros(mask_BT.shape),
        "rewards_BK": rewards_BK,
        "weights_K": torch.ones(rewards_BK.shape[1]) if weights is None else torch.tensor(weights),
        "scored_B": scored_B,
        "truncated_B": torch.zeros(rows, dtype=torch.bool),
        "key_B": torch.arange(rows),
        "values_BT": torch.zeros(mask_BT.shape),
        "reward_B": rewards_BK[:, 0] if rewards_BK.shape[1] == 1 else None,
    }
    return Batch(**(fields | more))


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    """See :func:`_make_batch`."""
    return _make_batch
