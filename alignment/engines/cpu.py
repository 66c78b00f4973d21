"""What makes training on a CPU quicker without changing what is computed (beyond rounding)."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep what this process frees for its next allocations; False where there is no glibc.

    By default it hands blocks of 32 MiB and more back to the system at once, and with them the work of clearing every
    page when the same block is asked for again a moment later. That was a fifth of an update. The price is that the
    process stays as large as its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def float32_attention(device: torch.device, autocast: bool) -> Iterator[None]:
    """Runs scaled dot-product attention in float32 inside, where bfloat16 autocast would run it on a CPU.

    PyTorch's backward pass of attention on a CPU is four times slower in bfloat16 than in float32. Backward passes
    belong inside as well: gradient checkpointing computes attention there.
    """
    if not (autocast and device.type == "cpu"):
        yield
        return
    with _Float32Attention():
        yield


class _Float32Attention(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*[_widened(a) for a in args], **{name: _widened(value) for name, value in kwargs.items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
