"""A key-value cache that grows in place, for decoding a batch token by token."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _GrowingLayer(DynamicLayer):
    """A cache layer that appends in place, in buffers with room to spare.

    Its parent concatenates at every token: that copies the whole cache, and gives back and asks for its memory each
    time, which was seen to take most of the decoding time.
    """

    room: tuple[Tensor, Tensor]
    """Keys and values ``[rows, heads, positions, head size]``, of which the first ``used`` positions are filled."""
    used = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # Attention would convert the whole cache at every token: keys leave their rotation in float32.
        device = key_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.room = (key_states[:, :, :0].to(dtype), value_states[:, :, :0].to(dtype))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.used = self.used, self.used + key_states.shape[2]
        if self.used > self.room[0].shape[2]:
            self.room = (self._enlarged(self.room[0], start), self._enlarged(self.room[1], start))
        self.room[0][:, :, start : self.used] = key_states
        self.room[1][:, :, start : self.used] = value_states
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room = (self.room[0].index_select(0, indices), self.room[1].index_select(0, indices))
        self._show()

    def _enlarged(self, old: Tensor, filled: int) -> Tensor:
        new = old.new_empty(*old.shape[:2], self.used + max(16, self.used // 2), old.shape[3])
        new[:, :, :filled] = old[:, :, :filled]
        return new

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = self.room[0][:, :, : self.used], self.room[1][:, :, : self.used]
        self.keys, self.values = keys, values
        return keys, values


def growing_cache(module: nn.Module) -> DynamicCache:
    """The model's own kind of cache, with its plain layers (not sliding or linear ones) replaced."""
    cache = DynamicCache(config=module.config)  # pyright: ignore[reportArgumentType]
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
