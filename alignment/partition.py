"""The rows of a batch shared among the ranks that compute together, so that none waits long for another.

Every rank computes the whole division from lengths that all of them know, and then works on its own part: nothing is
exchanged. The cost of a row of ``L`` tokens is ``a L + b L^2``: matrix products act on each token, attention on each
pair. The division changes no result, since losses are divided by counts of the whole mini-batch.

Sources: "Zeppelin" (arXiv 2509.21841) and "ByteScale" (arXiv 2502.21231) for cost models of sequences of unlike length;
longest processing time first (Graham, 1969) and largest differencing (Karmarkar and Karp, 1982) for the division.
Deviation: a sequence is never cut into pieces, and ranks take equal numbers of micro-batches.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignment.batching import plan_micro_batches
from alignment.types import Batch


@dataclass(frozen=True)
class Cost:
    """Work that a row makes: ``per_token * L + per_pair * L^2``."""

    per_token: float = 1.0
    per_pair: float = 0.0

    def of(self, length: float) -> float:
        """The cost of a row of ``length`` tokens."""
        return self.per_token * length + self.per_pair * length**2


def greedy(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices by part: the most costly first, each to the part that has the least so far.

    At equal sums the part with the lowest number takes it. The largest sum is at most ``4/3 - 1/(3 parts)`` times the
    best possible.
    """
    loads = [(0.0, part) for part in range(parts)]
    divided: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, part = heapq.heappop(loads)
        divided[part].append(index)
        heapq.heappush(loads, (load + costs[index], part))
    return divided


def differencing(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices by part, by largest differencing: the two divisions that differ most are joined until one is left.

    Joining puts the largest part of one together with the smallest of the other. It is often more even than
    :func:`greedy`, and not always.
    """
    # A division: its spread, a number that settles ties, and (sum, indices) of its parts, the largest first.
    heap = [(-cost, i, [(cost, [i]), *[(0.0, list[int]())] * (parts - 1)]) for i, cost in enumerate(costs)]
    if not heap:
        return [[] for _ in range(parts)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, tie, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(a + b, x + y) for (a, x), (b, y) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], tie, joined))
    return [sorted(indices) for _, indices in heap[0][2]]


def balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices by part: the more even of :func:`greedy` and :func:`differencing`, the former where they are alike."""

    def largest(divided: list[list[int]]) -> float:
        return max(sum(costs[i] for i in part) for part in divided)

    return min(greedy(costs, parts), differencing(costs, parts), key=largest)


def plan_ranks(length_B: Tensor, ranks: int, max_tokens: int, cost: Cost = Cost()) -> list[list[Tensor]]:  # noqa: B008
    """Row indices of each rank's micro-batches: every row once, and the same number for each rank, at least one.

    A rank's micro-batches are those of :func:`alignment.batching.plan_micro_batches` for its rows, so the k-th ones of
    all ranks are of similar cost; empty ones fill up.

    Raises:
        ValueError: One row alone is over the budget.
    """
    lengths = length_B.tolist()
    divided = [sorted(part) for part in balanced([cost.of(n) for n in lengths], ranks)] if ranks > 1 else None
    parts = [torch.arange(len(length_B))] if divided is None else [torch.tensor(p, dtype=torch.int64) for p in divided]
    parts = [part.to(length_B.device) for part in parts]
    plans = [[part[micro] for micro in plan_micro_batches(length_B[part], max_tokens)] for part in parts]
    count = max(1, *map(len, plans))
    empty = torch.empty(0, dtype=torch.int64, device=length_B.device)
    return [plan + [empty] * (count - len(plan)) for plan in plans]


@dataclass(frozen=True)
class Share:
    """Which rows are this rank's. The default is the only rank there is."""

    rank: int = 0
    ranks: int = 1
    cost: Cost = Cost()

    def micro_batches(self, batch: Batch, max_tokens: int) -> list[tuple[Tensor, Batch]]:
        """Row indices in ``batch``, and rows, of this rank's micro-batches; rows without a trained token are left out.

        All ranks get the same number. One without rows holds a row that stands in, in which nothing is trained on, so
        that all ranks go through the model together.
        """
        rows = batch.loss_mask_BT.any(1).nonzero()[:, 0]
        plan = plan_ranks(batch.length_B[rows], self.ranks, max_tokens, self.cost)[self.rank]
        return [(rows[micro], batch.rows(rows[micro]) if len(micro) else _stand_in(batch, rows)) for micro in plan]

    def compute(
        self, batch: Batch, max_tokens: int, fields_of: Callable[[Batch], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Runs ``fields_of`` on this rank's micro-batches; fields of the whole batch, 0 in all other rows.

        Fields are named as in :class:`alignment.types.Batch`: ``*_BT`` has rows and tokens, ``*_B`` rows.
        """
        whole: dict[str, Tensor] = {}
        for rows, micro in self.micro_batches(batch, max_tokens):
            for name, value in fields_of(micro).items():
                per_token = name.rpartition("_")[2].startswith("BT")
                if name not in whole:
                    shape = (*batch.ids_BT.shape, *value.shape[2:]) if per_token else (len(batch), *value.shape[1:])
                    whole[name] = value.new_zeros(shape)
                if not len(rows):
                    continue
                if per_token:
                    whole[name][rows, : value.shape[1]] = value
                else:
                    whole[name][rows] = value
        return whole


def _stand_in(batch: Batch, rows: Tensor) -> Batch:
    """One row, a short one, with nothing to train on."""
    row = rows[batch.length_B[rows].argmin()][None] if len(rows) else rows.new_zeros(1)
    short = batch.rows(row)
    return replace(short, loss_mask_BT=torch.zeros_like(short.loss_mask_BT))


__all__ = ["Cost", "Share", "balanced", "differencing", "greedy", "plan_ranks"]
