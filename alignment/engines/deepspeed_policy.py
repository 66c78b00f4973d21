"""A policy's log-probabilities as a module, so that DeepSpeed sees where each weight is used."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alignment.engines.logprobs import Entropy, LogProbs
from alignment.types import Batch

T = TypeVar("T")


class ZeroPolicy(nn.Module):
    """:meth:`LogProbs.run` of a language model.

    Args:
        module: The model.
        chunk_mb: As of :class:`LogProbs`.
        head: A value head on its hidden states.
        packing: As of :class:`LogProbs`.
    """

    def __init__(self, module: nn.Module, chunk_mb: float, head: nn.Module | None, packing: bool) -> None:
        super().__init__()
        self.module, self.head = module, head
        self.logprobs = _ScoringLogProbs(module, chunk_mb, head, packing)
        self.scorer = self.logprobs.scorer

    def forward(self, asked: Batch | Callable[[LogProbs], Any], *args: Any) -> Any:
        return self.logprobs.run(asked, *args)


class _ScoringLogProbs(LogProbs):
    """Scores hidden states inside a module that holds the output embeddings: at stage 3 they are whole only there.

    Ranks have unlike numbers of tokens, so of chunks, and at stage 3 go through modules as often as each other: none is
    called for a chunk.
    """

    def __init__(self, module: nn.Module, chunk_mb: float, value_head: nn.Module | None, packing: bool) -> None:
        super().__init__(module, chunk_mb, value_head=value_head, packing=packing)
        self._plain_head = super().plain_head  # before DeepSpeed hooks onto it
        self.scorer = _WithHead(self.head)

    @property
    def plain_head(self) -> bool:
        return self._plain_head

    def score_hidden(
        self, hidden_NH: Tensor, token_N: Tensor, temperature_N: Tensor, entropy: Entropy
    ) -> Sequence[tuple[Tensor, Tensor | None]]:
        return [self.with_head(self._score, hidden_NH, token_N, temperature_N, entropy)]

    def _score(
        self, hidden_NH: Tensor, token_N: Tensor, temperature_N: Tensor, entropy: Entropy
    ) -> tuple[Tensor, Tensor | None]:
        parts = list(super().score_hidden(hidden_NH, token_N, temperature_N, entropy))
        logp_N = torch.cat([logp for logp, _ in parts])
        return logp_N, None if entropy == "none" else torch.cat([e for _, e in parts if e is not None])

    def with_head(self, function: Callable[..., T], *args: Any) -> T:
        return self.scorer(function, *args)

    @property
    def logits_of(self) -> Callable[[Tensor], Tensor]:
        assert self.head is not None
        return self.head if _has_parts(self.head) else self.head.forward

    def chunk_of(self, token_bytes: float) -> int:
        in_parts = self.head is not None and any(hasattr(p, "ds_id") for p in self.head.parameters())
        return sys.maxsize if in_parts and _has_parts(self.head) else super().chunk_of(token_bytes)


class _WithHead(nn.Module):
    """Runs a function while it holds the parameters of output embeddings."""

    def __init__(self, head: nn.Module | None) -> None:
        super().__init__()
        for name, p in head.named_parameters(recurse=False) if head is not None else ():
            self.register_parameter(name, p)

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)


def _has_parts(module: nn.Module | None) -> bool:
    """Whether it calls other modules, such as those of an adapter."""
    return module is not None and next(module.children(), None) is not None


__all__ = ["ZeroPolicy"]
