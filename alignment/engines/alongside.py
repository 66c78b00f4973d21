"""A model that runs alongside a policy's decoding: it keeps a cache over the rows and can look one token ahead.

One pass of ``1 + K`` tokens per row does it: the token that the row got, and K candidates for the one after it. The
candidates of a row all stand at the same position, and a mask lets each see the row and itself, so they share the
row's cache, of which nothing is copied. In the cache's buffers, token ``p`` of a row lies in place ``p``; candidates
lie behind the longest row, where the next pass writes over them.

Rows join with the tokens that they have and leave at any time; those of different length are decoded together.

Suffixes here: R rows of the buffers, some of them free; M rows that are asked for; K candidates, Q tokens of a pass,
P prefixes, T places, ``X`` what is read of the model: hidden states or logits.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from alignment.engines.cpu import fitting_threads
from alignment.errors import UserError

ROOM = 64
"""Places by which buffers grow at least."""


class Alongside:
    """A model and its cache over rows. Its arithmetic is that of its own weights, whatever autocast is around.

    Args:
        module: A decoder of transformers, with or without an output layer, in evaluation mode.
        read: What is wanted of its output: ``[rows, tokens, X]``.
        name: For messages.
        remembers: Whether what was read at a row's last token is kept, for passes in which the row got none.

    Raises:
        UserError: Its attention is not full attention, or it takes no positions.
    """

    def __init__(self, module: nn.Module, read: Callable[[Any], Tensor], name: str, *, remembers: bool) -> None:
        config: Any = module.config
        layers = DynamicCache(config=config).layers
        accepted = inspect.signature(module.forward).parameters
        if not layers or any(type(layer) is not DynamicLayer for layer in layers) or "position_ids" not in accepted:
            raise UserError(f"{name}: a model beside the policy needs full attention in every layer; use another one")
        self.module, self.read, self.remembers = module, read, remembers
        self.keeps_logits = "logits_to_keep" in accepted
        self.device, self.dtype = (getattr(next(module.parameters()), a) for a in ("device", "dtype"))
        sizes = [m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)]
        self.flop_per_token = 2 * sum(sizes) / max(1, len(sizes))
        self.cache = DynamicCache(config=config)
        self.cache.layers = [_Layer() for _ in layers]  # pyright: ignore[reportAttributeAccessIssue]
        self.length_R: list[int] = []
        """Tokens of each row; 0 where it is free."""
        self.last_RX: Tensor | None = None
        self._row: dict[int, int] = {}
        self._joined = 0

    @property
    def layers(self) -> "list[_Layer]":
        return self.cache.layers  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def join(self, prefixes: Sequence[Sequence[int]]) -> list[int]:
        """Takes rows with the tokens that they have, at least one each; a number for each, by which it is known.

        Equal prefixes are computed once.
        """
        place = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, prefixes)))}
        lengths = [len(ids) for ids in place]
        width = max(lengths)
        ids_PT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in place], device=self.device)
        fresh = DynamicCache(config=self.module.config)  # pyright: ignore[reportArgumentType]
        # Padding on the right is seen by no token of the row. All ones: models warn where they think of padding.
        ends = sorted(set(lengths))
        ends_E = torch.tensor([end - 1 for end in ends], device=self.device)
        keep = {"logits_to_keep": ends_E} if self.keeps_logits else {}
        out_PEX = self._pass(ids_PT, fresh, attention_mask=torch.ones_like(ids_PT), **keep)
        out_PEX = out_PEX if self.keeps_logits else out_PEX[:, ends_E]
        rows = self._rows(len(prefixes), width)
        row_N = torch.tensor(rows, device=self.device)
        prefix_N = torch.tensor([place[tuple(ids)] for ids in prefixes], device=self.device)
        for own, new in zip(self.layers, fresh.layers, strict=True):
            own.fill(row_N, max(rows) + 1, prefix_N, new)
        if self.remembers:
            end_N = torch.tensor([ends.index(len(ids)) for ids in prefixes], device=self.device)
            self._remember(row_N, out_PEX[prefix_N, end_N])
        handles = list(range(self._joined, self._joined + len(rows)))
        self._joined += len(rows)
        for handle, row, ids in zip(handles, rows, prefixes, strict=True):
            self._row[handle], self.length_R[row] = row, len(ids)
        return handles

    @torch.no_grad()
    def step(
        self, handles: Sequence[int], token_M: Tensor, grew: Sequence[bool], candidates_MK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Takes a token for each row that got one, and looks at candidates for the token after it.

        Args:
            handles: The rows; others stay as they are.
            token_M: What each got; anything where ``grew`` is False.
            grew: Which rows got one.
            candidates_MK: Tokens to look at, which leave no trace.

        Returns:
            ``[M, X]``, read at the last token of each row, of no meaning for rows that did not grow unless the model
            ``remembers``; and ``[M, K, X]``, read at each candidate, None without any.
        """
        rows = [self._row[handle] for handle in handles]
        row_M = torch.tensor(rows, device=self.device)
        if candidates_MK is None and not any(grew):
            assert self.last_RX is not None, "what was read is not kept"
            return self.last_RX[row_M], None
        start_R = list(self.length_R)
        for row, more in zip(rows, grew, strict=True):
            self.length_R[row] += more
        count, candidates = len(self.length_R), 0 if candidates_MK is None else candidates_MK.shape[1]
        ids_RQ = token_M.new_zeros(count, 1 + candidates)
        ids_RQ[row_M, 0] = torch.where(torch.tensor(grew, device=self.device), token_M, 0)
        if candidates_MK is not None:
            ids_RQ[row_M, 1:] = candidates_MK
        out_RQX = self._look(ids_RQ, start_R)
        if self.remembers:
            grown = [i for i, more in enumerate(grew) if more]
            self._remember(row_M[grown], out_RQX[row_M[grown], 0])
            assert self.last_RX is not None
            return self.last_RX[row_M], out_RQX[row_M, 1:] if candidates else None
        return out_RQX[row_M, 0], out_RQX[row_M, 1:] if candidates else None

    def leave(self, handles: Sequence[int]) -> None:
        """Forgets rows. Where a quarter of the rows is free, the buffers are made smaller."""
        for handle in handles:
            self.length_R[self._row.pop(handle)] = 0
        free = self.length_R.count(0)
        if free and 4 * free >= len(self.length_R):
            kept = [row for row, length in enumerate(self.length_R) if length]
            now = {row: i for i, row in enumerate(kept)}
            self._row = {handle: now[row] for handle, row in self._row.items()}
            self.length_R = [self.length_R[row] for row in kept]
            index = torch.tensor(kept, dtype=torch.int64, device=self.device)
            for layer in self.layers:
                layer.select(index, max(self.length_R, default=0))
            self.last_RX = None if self.last_RX is None else self.last_RX[index]

    def _look(self, ids_RQ: Tensor, start_R: Sequence[int]) -> Tensor:
        """The pass itself: the first token of each row is written at its end, the others behind all rows."""
        count, width = ids_RQ.shape[1] - 1, max(self.length_R)
        start, length = (torch.tensor(n, device=self.device) for n in (start_R, self.length_R))
        for layer in self.layers:
            layer.aim(start, width, width + 1 + count)
        place_T = torch.arange(width + count, device=self.device)
        seen_R1T = (place_T < length[:, None])[:, None]
        own_QT = place_T - width == torch.arange(-1, count, device=self.device)[:, None]
        own_QT[0] = False
        mask_R1QT = torch.zeros(len(start_R), 1, 1 + count, width + count, dtype=self.dtype, device=self.device)
        # Not minus infinity: a free row sees nothing, and would become NaN.
        mask_R1QT.masked_fill_(~(seen_R1T | own_QT)[:, None], torch.finfo(self.dtype).min)
        position_RQ = torch.cat([(length - 1).clamp(min=0)[:, None], length[:, None].expand(-1, count)], 1)
        return self._pass(ids_RQ, self.cache, attention_mask=mask_R1QT, position_ids=position_RQ)

    def _pass(self, ids: Tensor, cache: DynamicCache, **options: Any) -> Tensor:
        bfloat16 = self.dtype == torch.bfloat16
        with (
            torch.autocast(self.device.type, enabled=False),
            fitting_threads(self.device, ids.numel() * self.flop_per_token, bfloat16),
        ):
            return self.read(self.module(input_ids=ids, past_key_values=cache, use_cache=True, **options))

    def _rows(self, count: int, width: int) -> list[int]:
        """Free rows for ``count`` new ones of at most ``width`` tokens; buffers grow where there are too few."""
        free = [row for row, length in enumerate(self.length_R) if not length][:count]
        more = list(range(len(self.length_R), len(self.length_R) + count - len(free)))
        self.length_R += [0] * len(more)
        return free + more

    def _remember(self, row_N: Tensor, read_NX: Tensor) -> None:
        rows = len(self.length_R)
        if self.last_RX is None:
            self.last_RX = read_NX.new_zeros(rows, read_NX.shape[1])
        elif len(self.last_RX) < rows:
            self.last_RX = torch.cat([self.last_RX, read_NX.new_zeros(rows - len(self.last_RX), read_NX.shape[1])])
        self.last_RX[row_N] = read_NX


class _Layer(DynamicLayer):
    """Keys and values ``[rows, heads, places, head size]``, with rows and places to spare."""

    room: tuple[Tensor, Tensor] | None = None
    start_R: Tensor
    """Where the first token of a pass goes."""
    width: int
    """Where the others go."""

    def fill(self, row_N: Tensor, rows: int, prefix_N: Tensor, new: Any) -> None:
        """Takes rows over from a cache of prefixes; buffers have ``rows`` rows at least."""
        places = new.keys.shape[2]
        self._enlarge(rows, places + ROOM, new.keys, new.values)
        assert self.room is not None
        for room, fresh in zip(self.room, (new.keys, new.values), strict=True):
            room[row_N, :, :places] = fresh[prefix_N]

    def aim(self, start_R: Tensor, width: int, places: int) -> None:
        """Says where the tokens of the next pass go."""
        assert self.room is not None
        self.start_R, self.width = start_R, width
        if places > self.room[0].shape[2]:
            self._enlarge(len(start_R), places + max(ROOM, places // 2), *self.room)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.room is not None
        count, others = len(key_states), key_states.shape[2] - 1
        row_R = torch.arange(count, device=key_states.device)
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            # What a row that got no token writes here is behind its end: it is seen by nobody and written over.
            room[row_R, :, self.start_R] = new[:, :, 0]
            room[:count, :, self.width : self.width + others] = new[:, :, 1:]
        keys, values = self.room
        return keys[:count, :, : self.width + others], values[:count, :, : self.width + others]

    def select(self, index: Tensor, places: int) -> None:
        """Keeps these rows, and of them so many places and some to spare."""
        if self.room is not None:
            keys, values = (room[:, :, : places + ROOM].index_select(0, index) for room in self.room)
            self.room = (keys, values)

    def _enlarge(self, rows: int, places: int, keys: Tensor, values: Tensor) -> None:
        """Buffers of at least this size, of the shape of ``keys`` and ``values`` otherwise."""
        had, had_places = (0, 0) if self.room is None else (self.room[0].shape[0], self.room[0].shape[2])
        if rows <= had and places <= had_places:
            return
        rows, places = rows if rows <= had or not had else max(rows, had + had // 4), max(places, had_places)
        larger = [new.new_zeros(max(rows, had), new.shape[1], places, new.shape[3]) for new in (keys, values)]
        if self.room is not None:
            for room, old in zip(larger, self.room, strict=True):
                room[:had, :, :had_places] = old
        self.room = (larger[0], larger[1])
