"""The rows of a batch shared among the ranks that compute together, so that none waits long for another.

Every rank computes the whole division from lengths that all of them know, and then works on its own part: nothing is
exchanged. The cost of a row of ``L`` tokens is ``a L + b L^2``: matrix products act on each token, attention on each
pair; in a micro-batch each row counts as long as the longest, padding being computed as well. At ZeRO's stage 3 ranks
wait for each other in every micro-batch, so that the k-th ones of all ranks have to be alike, not only the totals. The
division changes no result, since losses are divided by counts of the whole mini-batch.

Sources: "Zeppelin" (arXiv 2509.21841) and "ByteScale" (arXiv 2502.21231) for cost models of sequences of unlike length;
longest processing time first (Graham, 1969) and largest differencing (Karmarkar and Karp, 1982) for the division.
Deviation: a sequence is never cut into pieces, and ranks take equal numbers of micro-batches.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignment.batching import pack, plan_micro_batches
from alignment.types import Batch

Rows = list[int]
"""Indices of the rows of a micro-batch."""


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

    One rank takes those of :func:`alignment.batching.plan_micro_batches`. Several take the quicker, by :func:`waits`,
    of two divisions: :func:`dealt`, whose micro-batches are even, and :func:`divided`, whose ranks are. Micro-batches
    come in order of cost, the most costly first; empty ones fill up.

    Raises:
        ValueError: One row alone is over the budget.
    """
    least = plan_micro_batches(length_B, max_tokens)
    if ranks == 1:
        return [least or [length_B.new_empty(0, dtype=torch.int64)]]
    lengths = [max(1, n) for n in length_B.tolist()]
    plans = [divide(lengths, ranks, len(least), max_tokens, cost) for divide in (dealt, divided)]
    best = min(plans, key=lambda plan: waits(lengths, plan, cost))
    return [[torch.tensor(m, dtype=torch.int64, device=length_B.device) for m in rank] for rank in best]


def dealt(lengths: Sequence[int], ranks: int, least: int, max_tokens: int, cost: Cost) -> list[list[Rows]]:
    """Rows are cut into micro-batches of like cost, at least ``least`` in all, and those are dealt round by round: in
    each the most costly goes to the rank that has the least so far."""
    rounds = max(1, -(-least // ranks))
    micros = cut(lengths, range(len(lengths)), rounds * ranks, max_tokens, cost)
    plan, totals = [list[Rows]() for _ in range(ranks)], [0.0] * ranks
    for first in range(0, rounds * ranks, ranks):
        order = sorted(range(ranks), key=totals.__getitem__)
        for rank, micro in zip(order, micros[first : first + ranks], strict=True):
            plan[rank].append(micro)
            totals[rank] += padded(lengths, micro, cost)
    return plan


def divided(lengths: Sequence[int], ranks: int, least: int, max_tokens: int, cost: Cost) -> list[list[Rows]]:
    """Rows are divided among ranks by :func:`balanced`, and each rank's cut into micro-batches of like cost."""
    parts = balanced([cost.of(n) for n in lengths], ranks)
    rounds = max(-(-least // ranks), *(_fewest(lengths, part, max_tokens) for part in parts), 1)
    return [cut(lengths, part, rounds, max_tokens, cost) for part in parts]


def cut(lengths: Sequence[int], rows: Sequence[int], count: int, max_tokens: int, cost: Cost) -> list[Rows]:
    """``count`` micro-batches of neighbours in length, so cut that the most costly is as cheap as can be within the
    budget of padded tokens (to a millionth); the most costly first, empty ones last. ``count`` has to be enough."""
    order = sorted(rows, key=lambda i: -lengths[i])
    low = cost.of(lengths[order[0]]) if order else 0.0
    high = low * max(1, len(order))
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if len(_filled(lengths, order, max_tokens, cost, middle)) <= count:
            high = middle
        else:
            low = middle
    micros = _filled(lengths, order, max_tokens, cost, high)
    assert len(micros) <= count, f"{len(micros)} micro-batches where {count} are planned"
    while len(micros) < count and (several := [m for m in micros if len(m) > 1]):
        most = max(several, key=lambda m: padded(lengths, m, cost))
        micros.remove(most)
        micros += [most[: len(most) // 2], most[len(most) // 2 :]]
    micros.sort(key=lambda m: -padded(lengths, m, cost))
    return micros + [[] for _ in range(count - len(micros))]


def padded(lengths: Sequence[int], micro: Rows, cost: Cost) -> float:
    """The cost of a micro-batch, in which every row is as long as the longest."""
    return len(micro) * cost.of(max((lengths[i] for i in micro), default=0))


def waits(lengths: Sequence[int], plan: Sequence[Sequence[Rows]], cost: Cost) -> float:
    """What a plan takes where all ranks wait for the slowest in each micro-batch."""
    return sum(max(padded(lengths, micro, cost) for micro in at_once) for at_once in zip(*plan, strict=True))


def _filled(lengths: Sequence[int], order: Sequence[int], max_tokens: int, cost: Cost, most: float) -> list[Rows]:
    """Micro-batches filled one after the other, up to a cost and the budget; ``order`` has the longest first."""
    micros: list[Rows] = []
    room = 0
    for i in order:
        if not room:
            micros.append([])
            room = max(1, int(min(max_tokens / lengths[i], most / cost.of(lengths[i]))))
        micros[-1].append(i)
        room -= 1
    return micros


def _fewest(lengths: Sequence[int], rows: Sequence[int], max_tokens: int) -> int:
    """How many micro-batches the budget alone asks for."""
    return len(_filled(lengths, sorted(rows, key=lambda i: -lengths[i]), max_tokens, Cost(), float("inf")))


@dataclass(frozen=True)
class Share:
    """Which rows are this rank's. The default is the only rank there is."""

    rank: int = 0
    ranks: int = 1
    cost: Cost = Cost()
    pack_tokens: int | None = None
    """Rows are put end to end up to this many tokens (:func:`alignment.batching.pack`); None: each stays alone."""

    def micro_batches(self, batch: Batch, max_tokens: int) -> list[tuple[Tensor, Batch]]:
        """Row indices in ``batch``, and rows, of this rank's micro-batches; rows without a trained token are left out.

        The two sides of a pair are in one micro-batch. All ranks get the same number. One without rows holds a row that
        stands in, in which nothing is trained on, so that all ranks go through the model together. Rows that are put
        end to end count as one row of the plan, and ``pack_B`` says which they are.
        """
        rows = batch.loss_mask_BT.any(1).nonzero()[:, 0]
        units = rows[:, None] if batch.side_B is None else _pairs(batch, rows)
        if self.pack_tokens is not None:
            return self._packed(batch, rows, units, max_tokens, self.pack_tokens)
        width_U = batch.length_B[units.clamp(min=0)].where(units >= 0, 0).amax(1) * (units >= 0).sum(1)
        plan = plan_ranks(width_U, self.ranks, max_tokens, self.cost)[self.rank]
        taken = [units[micro].flatten() for micro in plan]
        taken = [index[index >= 0] for index in taken]
        return [(index, batch.rows(index) if len(index) else _stand_in(batch, rows)) for index in taken]

    def _packed(
        self, batch: Batch, rows: Tensor, units: Tensor, max_tokens: int, pack_tokens: int
    ) -> list[tuple[Tensor, Batch]]:
        lengths = batch.length_B[units.clamp(min=0)].where(units >= 0, 0).sum(1).tolist()
        packs = pack(lengths, min(pack_tokens, max_tokens))
        together = torch.tensor([sum(lengths[i] for i in members) for members in packs], dtype=torch.int64)
        found = []
        for micro in plan_ranks(together, self.ranks, max_tokens, self.cost)[self.rank]:
            if not len(micro):
                found.append((rows[:0], _stand_in(batch, rows)))
                continue
            members = [units[packs[number]].flatten() for number in micro.tolist()]
            members = [index[index >= 0] for index in members]
            pack_B = torch.tensor([n for n, index in enumerate(members) for _ in index], device=rows.device)
            index = torch.cat(members)
            found.append((index, replace(batch.rows(index), pack_B=pack_B)))
        return found

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


def _pairs(batch: Batch, rows: Tensor) -> Tensor:
    """``[U, most]``: the ``rows`` that share a group, which have to be computed together; -1 fills up."""
    _, group_R = torch.unique(batch.group_B[rows], return_inverse=True)
    order = group_R.argsort(stable=True)
    sizes_U = torch.bincount(group_R)
    place_R = torch.arange(len(rows), device=rows.device) - (sizes_U.cumsum(0) - sizes_U)[group_R[order]]
    most = int(sizes_U.max()) if len(sizes_U) else 1
    units = rows.new_full((len(sizes_U), most), -1)
    units[group_R[order], place_R] = rows[order]
    return units


def _stand_in(batch: Batch, rows: Tensor) -> Batch:
    """One row, a short one, with nothing to train on."""
    row = rows[batch.length_B[rows].argmin()][None] if len(rows) else rows.new_zeros(1)
    short = batch.rows(row)
    return replace(short, loss_mask_BT=torch.zeros_like(short.loss_mask_BT))


__all__ = ["Cost", "Share", "balanced", "differencing", "greedy", "padded", "plan_ranks", "waits"]
