"""A checksum of named tensors that a learner and an engine compute alike, on a CPU and on a GPU."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD_BYTES = 8
ROW_WORDS = 1024
MODULUS = 1 << 64
_ODD = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: spreads neighbouring numbers far apart


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """A number below ``2^64`` that depends on names, shapes, types and every bit, not on order or device.

    A tensor's bytes are put into a table of 64-bit words with 1,024 columns. Sums over rows and over columns, each
    times a number of its place, are added up with wraparound. So it is exact wherever it is computed, needs two passes
    over the memory and no room beside it, and sees changed and exchanged values. It finds mistakes, not attacks.

    The checksum of several sets of tensors together is the sum of theirs modulo ``2^64``.
    """
    sums = [_content(t.detach()) for t in tensors.values()]
    if not sums:
        return 0
    total = 0
    # One copy from the device for all of them: each would wait for it.
    for (name, tensor), content in zip(tensors.items(), torch.stack(sums).tolist(), strict=True):
        about = f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}"
        key = int.from_bytes(hashlib.sha256(about.encode()).digest()[:8], "big")
        total += _mixed(_mixed(key) + content % MODULUS)
    return total % MODULUS


def _content(tensor: Tensor) -> Tensor:
    """int64, of the bytes alone."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    row_bytes = ROW_WORDS * WORD_BYTES
    whole = flat.numel() // row_bytes * row_bytes
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    # A view can start anywhere, and words have to start at a multiple of their size.
    body = flat[:whole] if flat.data_ptr() % WORD_BYTES == 0 else flat[:whole].clone()
    if whole:
        words = body.view(torch.int64).view(-1, ROW_WORDS)
        total = total + _placed(words.sum(1)) + 3 * _placed(words.sum(0))
    if whole < flat.numel():
        tail = pad(flat[whole:], (0, -(flat.numel() - whole) % WORD_BYTES)).clone().view(torch.int64)
        total = total + 5 * _placed(tail)
    return total


def _placed(values: Tensor) -> Tensor:
    """The sum of ``values``, each times an odd number of its own, modulo ``2^64``."""
    place = torch.arange(len(values), dtype=torch.int64, device=values.device)
    return (values * (2 * place * (_ODD >> 2) + 1)).sum()


def _mixed(value: int) -> int:
    """A bijection of 64-bit numbers under which nearby ones have nothing in common (SplitMix64's last steps)."""
    value %= MODULUS
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % MODULUS
    return value ^ (value >> 31)
