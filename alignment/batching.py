"""From groups of rollouts to tensors, and from tensors to the pieces that a learner works through.

A batch is split twice: into mini-batches (an optimizer step each, whole groups, random order) and those into
micro-batches (a forward and backward pass each, by a budget of padded tokens). Only the first changes the result.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from alignment.types import RATIO_BASES, SOURCES, Batch, Group, Rollout, keyed_seed

ENOUGH_TOKENS = 4096
"""Of a micro-batch: with more, a pass over it is hardly quicker per token."""
SIMILAR = 0.8
"""How long the other rows of such a micro-batch must be, as a share of its longest."""


def collate(
    groups: Sequence[Group],
    pad_id: int,
    objectives: Sequence[str],
    weights: Sequence[float],
    step: int = 0,
    seed: int = 0,
) -> Batch:
    """The batch of all rollouts of ``groups``, in their order; ``group_B`` numbers the groups from 0.

    A rollout that was not scored keeps its row, for the count, but nothing in it is trained on. A demonstration is
    trained on whether it was scored or not: its likelihood needs no reward. The first token of a row is never
    trained on, since nothing precedes it.

    Args:
        groups: At least one, with at least one rollout among them.
        pad_id: Token that fills rows up; it is never attended to by a real token and never trained on.
        objectives: Names of the K reward components, in the order of the recipe.
        weights: One fixed weight per component.
        step: Of the run, recorded in the batch.
        seed: Of the run, recorded in the batch.
    """
    assert len(objectives) == len(weights), f"{objectives} need as many weights, not {weights}"
    rollouts = [r for g in groups for r in g.rollouts]
    assert rollouts, f"a batch needs at least one rollout; the {len(groups)} groups given hold none"
    prompt_B, length_B = _lengths(rollouts)
    position_T = torch.arange(int(length_B.max()))
    present_BT = position_T < length_B[:, None]
    after_prompt_BT = present_BT & (position_T >= prompt_B[:, None])
    loss_mask_BT = _fill(after_prompt_BT, False, np.bool_, [r.loss_mask for r in rollouts])
    scored_B = _column([r.scored for r in rollouts], np.bool_)
    trained_B = scored_B | _column([r.source == "demonstration" for r in rollouts], np.bool_)
    return Batch(
        ids_BT=_fill(present_BT, pad_id, np.int64, [s for r in rollouts for s in (r.prompt_ids, r.token_ids)]),
        loss_mask_BT=loss_mask_BT & trained_B[:, None] & (position_T > 0),
        length_B=length_B,
        group_B=_column([i for i, g in enumerate(groups) for _ in g.rollouts], np.int64),
        source_B=_column([SOURCES.index(r.source) for r in rollouts], np.int8),
        ratio_base_B=_column([RATIO_BASES.index(r.ratio_base) for r in rollouts], np.int8),
        temperature_B=_column([r.sampling.temperature for r in rollouts], np.float32),
        behaviour_logp_BT=_fill(after_prompt_BT, 0.0, np.float32, [r.behaviour_logp for r in rollouts]),
        rewards_BK=_rewards(rollouts, objectives),
        weights_K=torch.tensor(list(weights), dtype=torch.float32),
        scored_B=scored_B,
        truncated_B=_column([r.finish_reason == "length" for r in rollouts], np.bool_),
        key_B=_column([keyed_seed(r.id) for r in rollouts], np.int64),
        objectives=tuple(objectives),
        step=step,
        seed=seed,
    )


def split_minibatches(batch: Batch, n: int, key: int) -> list[Tensor]:
    """Row indices of ``n`` mini-batches: every row once, groups whole, as even in rows as whole groups allow.

    With ``n`` above 1 the groups come in a random order that depends on ``key`` alone, such as
    ``keyed_seed(seed, step, epoch)``. A batch of fewer than ``n`` groups gives one mini-batch per group.
    """
    if n < 1:
        raise ValueError(f"a batch is split into at least 1 mini-batch, not {n}")
    if n == 1:
        return [torch.arange(len(batch), device=batch.ids_BT.device)]
    group_B = torch.unique(batch.group_B, return_inverse=True)[1].cpu()
    rows_G = torch.bincount(group_B)
    groups = len(rows_G)
    order_G = torch.randperm(groups, generator=torch.Generator().manual_seed(key))
    n = min(n, groups)
    # A group goes where the middle of its span falls when the shuffled rows are cut into n equal parts.
    middle_G = rows_G[order_G].cumsum(0) - rows_G[order_G] / 2
    piece_G = _without_gaps((middle_G * n / len(batch)).long(), n)
    piece_B = torch.empty(groups, dtype=torch.int64).scatter_(0, order_G, piece_G)[group_B]
    return [(piece_B == i).nonzero()[:, 0].to(batch.ids_BT.device) for i in range(n)]


def plan_micro_batches(length_B: Tensor, max_tokens: int) -> list[Tensor]:
    """Row indices of micro-batches: every row once, similar lengths together, the longest first.

    A micro-batch of ``n`` rows costs ``n * (its longest row)`` tokens, padding included, and that never exceeds
    ``max_tokens``. One that has :data:`ENOUGH_TOKENS` takes no more rows that are much shorter. The longest come first
    so that a lack of memory shows at once.

    Raises:
        ValueError: One row alone is over the budget.
    """
    lengths, order = torch.sort(length_B.cpu(), descending=True, stable=True)
    if len(lengths) and int(lengths[0]) > max_tokens:
        raise ValueError(
            f"a row of {int(lengths[0])} tokens does not fit micro_batch_tokens = {max_tokens}; "
            f"set micro_batch_tokens to {int(lengths[0])} or more, or make prompts and completions shorter"
        )
    order, sizes = order.to(length_B.device), [max(1, n) for n in lengths.tolist()]
    plan, start = [], 0
    while start < len(sizes):
        longest = sizes[start]
        end = start + max_tokens // longest
        enough = start + -(-ENOUGH_TOKENS // longest)
        end = next((i for i in range(enough, min(end, len(sizes))) if sizes[i] < SIMILAR * longest), end)
        plan.append(order[start:end])
        start = end
    return plan


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of rows that are put end to end, at most ``capacity`` tokens together: best fit decreasing.

    The longest row first, each to the pack in which it leaves the least room, a new one if it fits in none; rows of
    equal length, and packs of equal room, in their order. A row that is longer than ``capacity`` stays alone.

    These are the packs of TRL's ``pack_dataset`` (strategy ``bfd``; "Fewer Truncations Improve Language Modeling",
    arXiv 2404.10830), but for ties. That function rewrites the columns of an Arrow table, cuts rows that are too long,
    and its module imports ``datasets``; here tensors stay as they are, and a few lines say which go together.
    """
    rooms: list[tuple[int, int]] = []  # (room, pack), sorted
    packs: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, (lengths[i], -1))
        room, number = rooms.pop(at) if at < len(rooms) else (max(capacity, lengths[i]), len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(i)
        insort(rooms, (room - lengths[i], number))
    return packs


def _without_gaps(piece_G: Tensor, n: int) -> Tensor:
    """The nearest non-decreasing numbering that uses all of ``0 .. n-1`` (each at least once)."""
    pieces, last = [], -1
    for place, piece in enumerate(piece_G.tolist()):
        earliest = n - (len(piece_G) - place)  # the groups left must still reach n - 1
        last = min(max(piece, last, earliest), last + 1)
        pieces.append(last)
    return torch.tensor(pieces)


def _column(values: Sequence[float], dtype: type[np.generic]) -> Tensor:
    """One number per rollout. numpy reads Python numbers several times faster than torch does."""
    return torch.from_numpy(np.array(values, dtype=dtype))


def _lengths(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Tokens of each prompt, and of each whole row."""
    prompt_B = _column([len(r.prompt_ids) for r in rollouts], np.int64)
    return prompt_B, prompt_B + _column([len(r.token_ids) for r in rollouts], np.int64)


def _rewards(rollouts: Sequence[Rollout], objectives: Sequence[str]) -> Tensor:
    """``[B, K]``: the value of each component, NaN where it has none."""
    scores = [r.scores.get(name) for r in rollouts for name in objectives]
    values = _column([math.nan if s is None or s.value is None else s.value for s in scores], np.float32)
    return values.view(len(rollouts), len(objectives))


def _fill(where_BT: Tensor, otherwise: float, dtype: type[np.generic], pieces: Sequence[Sequence[float]]) -> Tensor:
    """``otherwise`` everywhere but at ``where_BT``, which takes the numbers of ``pieces`` in row order."""
    count = sum(map(len, pieces))
    assert count == int(where_BT.sum()), f"{count} numbers for {int(where_BT.sum())} places"
    numbers = torch.from_numpy(np.fromiter(chain.from_iterable(pieces), dtype=dtype, count=count))
    return torch.full(where_BT.shape, otherwise, dtype=numbers.dtype).masked_scatter_(where_BT, numbers)
