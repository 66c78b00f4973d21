"""Tensors as numpy arrays, which Ray's object store hands to readers without copying."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Packed = dict[str, tuple[str, np.ndarray]]
"""By name: the type in torch, and the values; types that numpy lacks are kept as integers of their size."""

_SAME_BITS = {1: torch.int8, 2: torch.int16}
_ABSENT = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """The tensors as arrays; those on a CPU share their memory with them."""
    packed: Packed = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        bits = plain.view(_SAME_BITS[plain.element_size()]) if plain.dtype in _ABSENT else plain
        packed[name] = str(plain.dtype).removeprefix("torch."), bits.numpy()
    return packed


def unpack(packed: Packed) -> dict[str, Tensor]:
    """The tensors again. They share the arrays' memory, which may be Ray's own: only to be read."""
    tensors: dict[str, Tensor] = {}
    for name, (dtype, array) in packed.items():
        # PyTorch knows no memory that may only be read and warns of it; the flag is all that differs.
        writable = array if array.flags.writeable else _assumed_writable(array)
        tensors[name] = torch.from_numpy(writable).view(getattr(torch, dtype))
    return tensors


def _assumed_writable(array: np.ndarray) -> np.ndarray:
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)

    class _View:
        __array_interface__ = interface
        keeps = array  # whose memory it is

    return np.asarray(_View())
