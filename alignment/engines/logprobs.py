"""Log-probabilities and entropies of the tokens that are trained on, without the whole ``[B, T, V]`` of logits.

The body of a causal language model gives hidden states; only those that precede a trained token go through the
output embeddings, a chunk at a time, and a chunk's logits are computed again in the backward pass: by hand where the
output embeddings are a plain linear layer (:mod:`alignment.engines.chunked_head`), by checkpointing where they are not.
That is right only where logits are the output embeddings of the body's hidden states and nothing else. Some
architectures cap, scale or shift them, so this is tried once, and where it does not hold the model's own logits are
used.

Suffixes beside the legend of :mod:`alignment.types`: N trained tokens of a micro-batch, H the size of a hidden state.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignment.engines.chunked_head import ChunkedHead
from alignment.engines.packing import Layout, check_packing
from alignment.types import Batch

log = logging.getLogger(__name__)
T = TypeVar("T")
Entropy = Literal["none", "value", "gradient", "drift"]
MOST_CHUNK_TOKENS = 2048
"""Matrix products of more tokens at once are no quicker, and smaller chunks stay in a processor's caches."""


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Turns dropout and its like off, and gives each submodule its own mode back afterwards."""
    training = [m for module in modules for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@dataclass(frozen=True)
class Trained:
    """The trained tokens of a micro-batch, and where a model's output before each of them stands."""

    row_N: Tensor
    column_N: Tensor
    token_N: Tensor
    temperature_N: Tensor
    inputs: dict[str, Any]
    """What the model is called with."""
    place_N: tuple[Tensor, Tensor]
    """Rows and columns of the model's output."""
    layout: Layout | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, batch: Batch, body: nn.Module, whole: bool = False) -> "Trained":
        """Those of ``batch``; ``whole``: the last token is read too, though it predicts nothing that is trained on."""
        row_N, previous_N = batch.loss_mask_BT[:, 1:].nonzero(as_tuple=True)
        layout = None
        if batch.pack_B is not None:
            layout = Layout.of(batch.ids_BT, batch.length_B, batch.pack_B, body)
        # No mask: causal attention hides the padding on the right.
        inputs = {"input_ids": batch.ids_BT if whole else batch.ids_BT[:, :-1], "use_cache": False}
        place_N = (row_N, previous_N)
        if layout is not None:
            inputs, place_N = inputs | layout.inputs, layout.place(row_N, previous_N)
        token_N, temperature_N = batch.ids_BT[row_N, previous_N + 1], batch.temperature_B[row_N]
        rows, columns = batch.ids_BT.shape
        return cls(row_N, previous_N + 1, token_N, temperature_N, inputs, place_N, layout, (rows, columns))

    def spread(self, value_N: Tensor) -> Tensor:
        """``[B, T]``, or more for tokens that have several values: 0 where nothing is trained."""
        empty = torch.zeros(*self.shape, *value_N.shape[1:], device=value_N.device)
        return empty.index_put((self.row_N, self.column_N), value_N)


class LogProbs:
    """Computes ``log softmax(logits / temperature)`` of a causal language model at the trained tokens.

    Args:
        module: A transformers causal language model, possibly wrapped by peft.
        chunk_mb: Most memory, in MiB, of the logits that exist at once, or those of one token if they alone take more.
        autocast: Whether matrix products run in bfloat16. The softmax is in float32 either way.
        value_head: Called with hidden states and tokens where values are asked for as well.
        packing: Whether batches may have ``pack_B``.

    Raises:
        UserError: ``packing``, and the model does not keep rows apart that stand end to end.

    Attributes:
        slow_reason: Why the model's own full logits are used (more memory), or None where they are not.
    """

    def __init__(
        self,
        module: nn.Module,
        chunk_mb: float,
        autocast: bool = False,
        value_head: nn.Module | None = None,
        packing: bool = False,
    ) -> None:
        self.module, self.chunk_mb, self.autocast, self.value_head = module, chunk_mb, autocast, value_head
        inner: Any = _without_adapter(module)
        self.body: nn.Module = inner.base_model
        self.head: nn.Module | None = inner.get_output_embeddings()
        if packing:
            with torch.no_grad(), evaluating(module):
                check_packing(self.body, type(inner).__name__)
        self.slow_reason = _why_not_split(module, self.body, self.head)
        if self.slow_reason is not None:
            log.warning(
                "%s: %s; the logits of every token of a micro-batch are kept at once, which takes more memory "
                "(lower micro_batch_tokens if it runs out)",
                type(inner).__name__,
                self.slow_reason,
            )

    @overload
    def __call__(
        self, batch: Batch, entropy: Entropy = "none", values: Literal[False] = False
    ) -> tuple[Tensor, Tensor | None]: ...

    @overload
    def __call__(self, batch: Batch, entropy: Entropy, values: bool) -> tuple[Any, ...]: ...

    def __call__(self, batch: Batch, entropy: Entropy = "none", values: bool = False) -> tuple[Any, ...]:
        """``logp_BT`` and ``entropy_BT`` (None for ``"none"``), float32, 0 where ``loss_mask_BT`` is False.

        Rows are right-padded, so under causal attention no real token sees padding and positions count from 0. Rows
        that ``pack_B`` puts end to end give the same numbers: :class:`alignment.engines.packing.Layout`.

        Args:
            batch: On the model's device.
            entropy: ``"value"`` computes it without a gradient, ``"gradient"`` with one; ``"drift"`` without one, and
                beside it ``sum_v p_v^2 (log p_v + H)``: in its place is ``[B, T, 2]``.
            values: What the value head puts out for the state after each token comes third, from the same pass.
        """
        trained = Trained.of(batch, self.body, whole=values)
        device, output = batch.ids_BT.device.type, None
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.autocast):
            hidden_BTH = None if self.slow_reason and not values else self.body(**trained.inputs).last_hidden_state
            if self.slow_reason is not None:
                logits_NV = self.module(**trained.inputs).logits[trained.place_N]
                parts = [_score(logits_NV, trained.token_N, trained.temperature_N, entropy)]
            else:
                assert hidden_BTH is not None
                hidden_NH = hidden_BTH[trained.place_N]
                parts = list(self.score_hidden(hidden_NH, trained.token_N, trained.temperature_N, entropy))
            if values:
                assert self.value_head is not None, "it was made without a value head"
                assert hidden_BTH is not None
                apart_BTH = hidden_BTH if trained.layout is None else trained.layout.apart(hidden_BTH)
                output = self.value_head(apart_BTH, batch.ids_BT)
        logp_BT, entropy_BT = trained.spread(torch.cat([logp for logp, _ in parts])), None
        if entropy != "none":
            entropy_BT = trained.spread(torch.cat([e for _, e in parts if e is not None]))
        return (logp_BT, entropy_BT, output) if values else (logp_BT, entropy_BT)

    def run(self, asked: "Batch | Callable[[LogProbs], T]", *args: Any) -> Any:
        """Log-probabilities of a batch; or another pass through the model, which is given these."""
        return self(asked, *args) if isinstance(asked, Batch) else asked(self)

    def with_head(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)``, which uses :attr:`logits_of`. Tensors with gradient are among ``args``."""
        return function(*args)

    @property
    def logits_of(self) -> Callable[[Tensor], Tensor]:
        """The output embeddings."""
        assert self.head is not None
        return self.head

    def chunk_of(self, token_bytes: float) -> int:
        """Most tokens whose logits exist at once, at so many bytes each."""
        return min(max(1, int(self.chunk_mb * 2**20 / token_bytes)), MOST_CHUNK_TOKENS)

    @property
    def plain_head(self) -> bool:
        """Whether the output embeddings are a linear layer and nothing else."""
        return self.head is not None and _is_plain(self.head)

    def score_hidden(
        self, hidden_NH: Tensor, token_N: Tensor, temperature_N: Tensor, entropy: Entropy
    ) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Log-probabilities and entropies of ``token_N``, in parts, from what the output embeddings are applied to."""
        assert self.head is not None
        weight: Any = self.head.weight
        dtype = torch.bfloat16 if self.autocast else weight.dtype
        chunk = self.chunk_of(dtype.itemsize * weight.shape[0])
        if self.plain_head:
            yield ChunkedHead.apply(hidden_NH, weight, token_N, temperature_N, chunk, dtype, entropy)  # pyright: ignore[reportReturnType]
            return
        # With one chunk its logits are all there is in either case: computing them again would save nothing.
        again = torch.is_grad_enabled() and len(token_N) > chunk
        for start in range(0, max(1, len(token_N)), chunk):
            part = slice(start, start + chunk)
            args = (self.logits_of, hidden_NH[part], token_N[part], temperature_N[part], entropy)
            if again:
                yield checkpoint(_score_hidden, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
            else:
                yield _score_hidden(*args)


def body_of(module: nn.Module) -> nn.Module:
    """What of a causal language model of transformers, possibly wrapped by peft, gives hidden states."""
    return _without_adapter(module).base_model


def _without_adapter(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _is_plain(head: nn.Module) -> bool:
    """Whether ``head(x)`` is ``x`` times its weight, without a bias, an adapter or anything hooked onto it."""
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return type(head) is nn.Linear and head.bias is None and not hooks


def _score_hidden(
    logits_of: Callable[[Tensor], Tensor], hidden_NH: Tensor, token_N: Tensor, temperature_N: Tensor, entropy: Entropy
) -> tuple[Tensor, Tensor | None]:
    return _score(logits_of(hidden_NH), token_N, temperature_N, entropy)


def _score(logits_NV: Tensor, token_N: Tensor, temperature_N: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor | None]:
    """Log-probability of ``token_N`` and entropy ``-sum p log p``, both under ``softmax(logits / temperature)``."""
    logits_NV = logits_NV.float() / temperature_N[:, None]
    normaliser_N = logits_NV.logsumexp(-1)
    logp_N = logits_NV.gather(-1, token_N[:, None])[:, 0] - normaliser_N
    if entropy == "none":
        return logp_N, None
    with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
        probability_NV = (logits_NV - normaliser_N[:, None]).exp()
        entropy_N = normaliser_N - (probability_NV * logits_NV).sum(-1)
        if entropy != "drift":
            return logp_N, entropy_N
        shifted_NV = logits_NV - (normaliser_N - entropy_N)[:, None]
        return logp_N, torch.stack([entropy_N, (probability_NV.square() * shifted_NV).sum(-1)], -1)


def _why_not_split(module: nn.Module, body: nn.Module, head: nn.Module | None) -> str | None:
    """Why the model's logits are not ``head(body(ids))``, or None if they are.

    The head's output is replaced by large random numbers on the way. Comparing ordinary logits would miss a cap at
    30 in a model whose logits are still near 0.
    """
    if head is None or body is module:
        return "it has no output embeddings apart from its body"
    device = next(module.parameters()).device
    ids_BT = torch.arange(6, device=device).reshape(2, 3) % head.weight.shape[0]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    seen: list[tuple[Tensor, Tensor]] = []

    def replace_output(_head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        random = 50 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        seen.append((inputs[0], random.to(output)))
        return seen[-1][1]

    with torch.no_grad(), evaluating(module):
        hidden = getattr(body(input_ids=ids_BT, use_cache=False), "last_hidden_state", None)
        hook = head.register_forward_hook(replace_output)
        try:
            logits = module(input_ids=ids_BT, use_cache=False).logits
        finally:
            hook.remove()
    if len(seen) != 1 or hidden is None:
        return "it does not apply its output embeddings once to the hidden states of its body"
    if not _same(seen[0][0], hidden):
        return "it changes hidden states between its body and its output embeddings"
    if not _same(seen[0][1], logits):
        return "it changes logits after its output embeddings"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)
