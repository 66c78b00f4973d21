"""What makes training on a CPU quicker."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SMALL_FLOP = {False: 25e6, True: 150e6}
"""Of a matrix product (in float32, in bfloat16): waking a sleeping thread to share it takes longer than that saves."""


@contextmanager
def fitting_threads(device: torch.device, flop: float, autocast: bool) -> Iterator[None]:
    """One thread inside, on a CPU, where a typical matrix product of ``flop`` is small and idle threads sleep.

    Decoding is thousands of small products one after another. Whether threads sleep is what ``OMP_WAIT_POLICY`` says;
    importing ``alignment`` sets it to ``PASSIVE`` if it is not set.
    """
    sleep = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" and "GOMP_SPINCOUNT" not in os.environ
    threads = torch.get_num_threads()
    if device.type != "cpu" or not sleep or threads == 1 or flop >= SMALL_FLOP[autocast]:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def float32_attention(device: torch.device, autocast: bool) -> Iterator[None]:
    """Runs scaled dot-product attention in float32 inside, where bfloat16 autocast would run it on a CPU.

    PyTorch's backward pass of attention on a CPU is four times slower in bfloat16 than in float32.
    """
    if not (autocast and device.type == "cpu"):
        yield
        return
    with _Float32Attention():
        yield


def checkpoint_contexts(
    device: torch.device, autocast: bool
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For ``torch.utils.checkpoint``: what is computed again in the backward pass has to be as it was at first.

    The first pass is inside :func:`float32_attention` anyway; a backward pass cannot be, as PyTorch turns modes off.
    """
    return nullcontext(), float32_attention(device, autocast)


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
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
