"""Log-probabilities and entropies of a linear output layer, forward and backward, a few tokens' logits at a time.

For a token with hidden state ``h``, ``l = W h / T`` over the vocabulary, ``p = softmax(l)`` and ``H = -sum p log p``:

    logp = l_token - logsumexp(l),    d logp / d l = onehot(token) - p,    d H / d l = -p (log p + H)

so with the gradients ``g`` of ``logp`` and ``e`` of ``H``, ``d l = g onehot(token) - p (g + e (log p + H))``. No graph
is kept over the vocabulary: a chunk of logits is written once, turned into ``d l`` where it lies, and multiplied with
``W`` and ``h``. The backward pass computes logits again, which costs less than to keep them and fetch them from memory.
Where ``W`` is frozen and entropies carry no gradient, ``d logp / d h`` is found in the forward pass, and nothing is
computed again.

On a CPU the passes over a chunk go block by block, so that a block stays in the processor's cache between them.

Suffixes beside the legend of :mod:`alignment.types`: N tokens, n tokens of a chunk or block, H the hidden size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE_BYTES = 1 << 19
"""Of a block of float32 logits; two of them are at work at once, in a core's second-level cache."""
VOCABULARY_SLICE = 8192
"""Rows of the weight's gradient that are computed at once where it is summed in another precision."""


class ChunkedHead(torch.autograd.Function):
    """``logp_N, entropy_N`` of ``token_N`` under ``softmax(hidden_NH weight_VH^T / temperature_N)``, in nats.

    Args of ``apply``:
        hidden_NH: What the output layer is applied to.
        weight_VH: The layer's weight; it has no bias.
        token_N: int64, whose log-probability is asked for.
        temperature_N: Logits are divided by it.
        chunk: Most tokens whose logits exist at once.
        dtype: Of matrix products and of stored logits. The softmax is in float32, or float64 where that is given.
        entropy: ``"none"`` (None comes back in its place), ``"value"`` (without a gradient), ``"gradient"``, or
            ``"drift"``: without one, and ``[N, 2]``, with ``sum_v p_v^2 (log p_v + H)`` beside it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        token_N: Tensor,
        temperature_N: Tensor,
        chunk: int,
        dtype: torch.dtype,
        entropy: str,
    ) -> tuple[Tensor, Tensor | None]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        at_once = wants_hidden and not wants_weight and entropy != "gradient"
        wide = torch.promote_types(torch.float32, dtype)
        temperature_N = temperature_N.to(wide)
        logp_N = hidden_NH.new_empty(len(token_N), dtype=wide)
        normaliser_N, entropy_N = torch.empty_like(logp_N), None
        if entropy != "none":
            entropy_N = logp_N.new_empty(*logp_N.shape, *([2] if entropy == "drift" else []))
        d_hidden_NH = torch.empty_like(hidden_NH) if at_once else None
        weight, logits_nV = weight_VH.detach().to(dtype), hidden_NH.new_empty(0, dtype=dtype)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for part in _parts(len(token_N), chunk):
                logits_nV = _product(hidden_NH[part], weight, logits_nV)
                for block, scratch_2nV in _blocks(logits_nV, wide):
                    rows = slice(part.start + block.start, part.start + block.stop)
                    token_n, temperature_n = token_N[rows], temperature_N[rows]
                    logp_N[rows], normaliser_N[rows], entropy_n = _normalise(
                        logits_nV[block], scratch_2nV, token_n, temperature_n, entropy
                    )
                    if entropy_N is not None and entropy_n is not None:
                        entropy_N[rows] = entropy_n
                    if at_once:
                        g_n = 1 / temperature_n
                        _differentiate(logits_nV[block], scratch_2nV, token_n, temperature_n, normaliser_N[rows], g_n)
                if d_hidden_NH is not None:
                    d_hidden_NH[part] = logits_nV @ weight
        ctx.save_for_backward(hidden_NH, weight_VH, token_N, temperature_N, normaliser_N, entropy_N, d_hidden_NH)
        ctx.chunk, ctx.dtype = chunk, dtype
        if entropy_N is not None and entropy != "gradient":
            ctx.mark_non_differentiable(entropy_N)
        ctx.set_materialize_grads(False)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp_N: Tensor | None, d_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, token_N, temperature_N, normaliser_N, entropy_N, known_NH = ctx.saved_tensors
        d_logp_N = torch.zeros_like(normaliser_N) if d_logp_N is None else d_logp_N
        if known_NH is not None:
            return (known_NH * d_logp_N[:, None].to(known_NH.dtype), *[None] * 6)
        g_N: Tensor = d_logp_N / temperature_N
        e_N = None if d_entropy_N is None else d_entropy_N / temperature_N
        weight, logits_nV = weight_VH.to(ctx.dtype), hidden_NH.new_empty(0, dtype=ctx.dtype)
        d_hidden_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=g_N.dtype) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for part in _parts(len(token_N), ctx.chunk):
                logits_nV = _product(hidden_NH[part], weight, logits_nV)
                for block, scratch_2nV in _blocks(logits_nV, g_N.dtype):
                    rows = slice(part.start + block.start, part.start + block.stop)
                    of_entropy = None if e_N is None else (entropy_N[rows], e_N[rows])
                    known = token_N[rows], temperature_N[rows], normaliser_N[rows], g_N[rows]
                    _differentiate(logits_nV[block], scratch_2nV, *known, of_entropy)
                if d_hidden_NH is not None:
                    d_hidden_NH[part] = logits_nV @ weight
                if d_weight_VH is not None:
                    _add_product(d_weight_VH, logits_nV, hidden_NH[part])
        d_weight = None if d_weight_VH is None else d_weight_VH.to(weight_VH.dtype)
        return (d_hidden_NH, d_weight, *[None] * 5)


def _parts(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _blocks(logits_nV: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows to work on together, with room for two tensors of their size."""
    rows, vocabulary = logits_nV.shape
    size = max(1, CACHE_BYTES // (4 * vocabulary)) if logits_nV.device.type == "cpu" else rows
    scratch_2nV = logits_nV.new_empty(2, min(size, rows), vocabulary, dtype=wide)
    for block in _parts(rows, size):
        yield block, scratch_2nV[:, : block.stop - block.start]


def _product(hidden_nH: Tensor, weight: Tensor, room_nV: Tensor) -> Tensor:
    """Logits of a chunk, in the memory of the chunk before it where there was one."""
    if len(room_nV) < len(hidden_nH):
        room_nV = weight.new_empty(len(hidden_nH), len(weight))
    return torch.mm(hidden_nH.to(weight.dtype), weight.t(), out=room_nV[: len(hidden_nH)])


def _add_product(sum_VH: Tensor, d_logits_nV: Tensor, hidden_nH: Tensor) -> None:
    if d_logits_nV.dtype == sum_VH.dtype:
        sum_VH.addmm_(d_logits_nV.t(), hidden_nH.to(sum_VH.dtype))
        return
    hidden_nH = hidden_nH.to(d_logits_nV.dtype)
    for part in _parts(len(sum_VH), VOCABULARY_SLICE):
        sum_VH[part] += d_logits_nV[:, part].t() @ hidden_nH


def _normalise(
    logits_nV: Tensor, scratch_2nV: Tensor, token_n: Tensor, temperature_n: Tensor, entropy: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``logp_n``, ``logsumexp(l)`` and what is asked of the entropy; ``logits_nV`` stay as they are."""
    shifted_nV, exp_nV = scratch_2nV
    torch.div(logits_nV, temperature_n[:, None], out=shifted_nV)
    largest_n = shifted_nV.amax(-1)
    shifted_nV.sub_(largest_n[:, None])
    torch.exp(shifted_nV, out=exp_nV)
    sum_n = exp_nV.sum(-1)
    log_sum_n = sum_n.log()
    logp_n = shifted_nV.gather(-1, token_n[:, None])[:, 0] - log_sum_n
    entropy_n = None if entropy == "none" else log_sum_n - exp_nV.mul_(shifted_nV).sum(-1) / sum_n
    if entropy_n is not None and entropy == "drift":
        p_nV = torch.exp(shifted_nV, out=exp_nV).div_(sum_n[:, None])
        drift_n = p_nV.square_().mul_(shifted_nV.add_((entropy_n - log_sum_n)[:, None])).sum(-1)
        entropy_n = torch.stack([entropy_n, drift_n], -1)
    return logp_n, largest_n + log_sum_n, entropy_n


def _differentiate(
    logits_nV: Tensor,
    scratch_2nV: Tensor,
    token_n: Tensor,
    temperature_n: Tensor,
    normaliser_n: Tensor,
    g_n: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Puts the gradient by the logits where the logits were; ``g_n`` and ``e_n`` are divided by the temperature."""
    log_p_nV, p_nV = scratch_2nV
    torch.div(logits_nV, temperature_n[:, None], out=log_p_nV)
    log_p_nV.sub_(normaliser_n[:, None])
    if of_entropy is None:
        d_nV = log_p_nV.exp_().mul_(-g_n[:, None])
    else:
        entropy_n, e_n = of_entropy
        torch.exp(log_p_nV, out=p_nV)
        d_nV = log_p_nV.add_(entropy_n[:, None]).mul_(-e_n[:, None]).sub_(g_n[:, None]).mul_(p_nV)
    d_nV.scatter_add_(-1, token_n[:, None], g_n[:, None])
    logits_nV.copy_(d_nV)
