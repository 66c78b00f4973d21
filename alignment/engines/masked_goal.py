"""The goal of preferences with masks of tokens: reference and policy are compared over the whole vocabulary.

A micro-batch goes through the reference first, whose logits before the trained tokens stay in memory until it is done:
``4 V`` bytes a token. The policy's exist a chunk at a time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignment.algorithms.masked_preferences import LearnedMasks, activation_mask
from alignment.engines.activations import Kind, taken
from alignment.engines.backend import OneProcess
from alignment.engines.logprobs import LogProbs, Trained, evaluating
from alignment.engines.policy_goal import PolicyGoal
from alignment.engines.token_masks import MaskRole
from alignment.types import Batch

ACTIVE: tuple[Kind, ...] = ("mlp", "attention", "residual")
"""Beside the logits, what :class:`~alignment.algorithms.masked_preferences.Mapo` takes masks from."""
READ: tuple[Kind, ...] = ("residual",)
"""What networks make masks of."""


@dataclass(frozen=True)
class MaskedGoal(PolicyGoal):
    """:class:`PolicyGoal` of an objective that has ``token_masks``."""

    reference: Callable[[], AbstractContextManager[None]] = field(kw_only=True)
    """The policy's module is the reference inside."""
    masks: MaskRole | None = field(kw_only=True, default=None)
    """What learns masks, for an objective whose masks are learned."""

    def loss(self, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if not micro.loss_mask_BT.any():
            return super().loss(micro)
        assert isinstance(self.backend, OneProcess) and self.backend.logprobs is not None
        logprobs, trained = self.backend.logprobs, Trained.of(micro, self.backend.logprobs.body)
        learned = isinstance(self.objective.token_masks, LearnedMasks)  # pyright: ignore[reportAttributeAccessIssue]
        kinds, reduce = (READ, _whole) if learned else (ACTIVE, _mean_feature)
        with torch.no_grad(), evaluating(self.backend.module), self.reference():
            with taken(logprobs.body, trained.place_N, kinds, reduce) as found:
                reference_NV = _logits(logprobs, trained)
        if learned:
            assert self.masks is not None, "an objective whose masks are learned goes with what learns them"
            mask_N2 = self.masks.backend.module(found["residual"])  # in float32
        else:
            mask_N = activation_mask([*found.values(), [_mean_feature(reference_NV)]], trained.row_N)
            mask_N2 = mask_N[:, None].expand(-1, 2)
        entropy = self.objective.entropies != "none"
        logp_N, divergence_N, entropy_N = compared(logprobs, trained, reference_NV, entropy)
        masks_BT2, divergence_BT = trained.spread(mask_N2), trained.spread(divergence_N)
        micro = replace(micro, masks_BT2=masks_BT2, divergence_BT=divergence_BT)
        return self.objective.loss(
            trained.spread(logp_N), None if entropy_N is None else trained.spread(entropy_N), micro
        )


def compared(
    logprobs: LogProbs, trained: Trained, reference_NV: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each trained token the log-probability under the policy, ``KL(reference || policy)`` before it, and entropy.

    All at the temperature of its row, float32, the first two with gradient.

    Args:
        logprobs: Of the policy.
        trained: Its tokens.
        reference_NV: Logits of the reference.
        entropy: Whether that of the policy is computed.
    """
    with torch.autocast(reference_NV.device.type, dtype=torch.bfloat16, enabled=logprobs.autocast):
        head, source_NX = _source(logprobs, trained)
        size = min(2048, max(1, int(logprobs.chunk_mb * 2**20 / (4 * reference_NV.shape[1]))))
        parts = list[tuple[Tensor, ...]]()
        for start in range(0, len(source_NX), size):
            part = slice(start, start + size)
            args = (head, source_NX[part], trained.token_N[part], trained.temperature_N[part], reference_NV[part])
            parts.append(checkpoint(_compare, *args, entropy, use_reentrant=False, preserve_rng_state=False))  # pyright: ignore[reportArgumentType]
    logp_N, divergence_N, *entropy_N = (torch.cat(values) for values in zip(*parts, strict=True))
    return logp_N, divergence_N, entropy_N[0] if entropy_N else None


def _compare(
    head: nn.Module, source_NX: Tensor, token_N: Tensor, temperature_N: Tensor, reference_NV: Tensor, entropy: bool
) -> tuple[Tensor, ...]:
    logp_NV = (head(source_NX).float() / temperature_N[:, None]).log_softmax(-1)
    ref_NV = (reference_NV.float() / temperature_N[:, None]).log_softmax(-1)
    logp_N = logp_NV.gather(-1, token_N[:, None])[:, 0]
    divergence_N = (ref_NV.exp() * (ref_NV - logp_NV)).sum(-1)
    if not entropy:
        return logp_N, divergence_N
    return logp_N, divergence_N, -(logp_NV.detach().exp() * logp_NV.detach()).sum(-1)


def _source(logprobs: LogProbs, trained: Trained) -> tuple[nn.Module, Tensor]:
    """What gives logits, and what it is applied to: hidden states, or the logits themselves where the model has its own
    way from the one to the other."""
    if logprobs.slow_reason is not None:
        return nn.Identity(), logprobs.module(**trained.inputs).logits[trained.place_N]
    assert logprobs.head is not None
    return logprobs.head, logprobs.body(**trained.inputs).last_hidden_state[trained.place_N]


def _logits(logprobs: LogProbs, trained: Trained) -> Tensor:
    with torch.autocast(trained.token_N.device.type, dtype=torch.bfloat16, enabled=logprobs.autocast):
        head, source_NX = _source(logprobs, trained)
        return head(source_NX).float()


def _whole(value_NH: Tensor) -> Tensor:
    return value_NH


def _mean_feature(value_NH: Tensor) -> Tensor:
    return value_NH.float().mean(-1)
