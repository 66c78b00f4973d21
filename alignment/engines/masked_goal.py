"""The goal of preferences with masks of tokens: reference and policy are compared over the whole vocabulary.

A micro-batch goes through the reference first, whose logits before the trained tokens stay in memory until it is done:
``4 V`` bytes a token. The policy's exist a chunk at a time. The loss goes backward through the policy as far as the
masks, and then through the networks that made them: they have a backend of their own, and ZeRO's engines go backward
one at a time.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignment.algorithms.masked_preferences import LearnedMasks, activation_mask
from alignment.engines.activations import Kind, taken
from alignment.engines.gradients import Part
from alignment.engines.logprobs import LogProbs, Trained, body_of, evaluating
from alignment.engines.policy_goal import PolicyGoal
from alignment.engines.roles import Role
from alignment.engines.token_masks import ACTIVE, MASKS, READ, MaskRole
from alignment.engines.value_roles import nothing_of
from alignment.types import Batch


@dataclass(frozen=True)
class MaskedGoal(PolicyGoal):
    """:class:`PolicyGoal` of an objective that has ``token_masks``."""

    reference: Callable[[], AbstractContextManager[None]] = field(kw_only=True)
    """The policy's module is the reference inside."""
    masks: MaskRole | None = field(kw_only=True, default=None)
    """What learns masks, for an objective whose masks are learned: from the same gradients, with a step after the
    policy's."""

    def begin(self) -> None:
        assert self.epochs == self.minibatches == 1, "one step of the policy, and so one of the masks"
        if self.masks is not None:
            self.masks.begin(self.objective.lr_factor)

    def end(self, found: Mapping[str, float]) -> dict[str, float]:
        if self.masks is None or not found["optimizer_steps"]:
            return {}
        return {f"{MASKS}/grad_norm": self.masks.step(found["loss"])}

    def loss(self, micro: Batch) -> Part:
        learned = isinstance(self.objective.token_masks, LearnedMasks)  # pyright: ignore[reportAttributeAccessIssue]
        trained = Trained.of(micro, body_of(self.backend.module))
        inside = Inside(trained, READ if learned else ACTIVE, _whole if learned else _mean_feature)
        with torch.no_grad(), evaluating(self.backend.module), self.reference():
            found, reference_NV = self.backend.forward(inside)
        leaf_N2, beyond = None, list[Callable[[bool], None]]()
        if learned:
            assert self.masks is not None, "an objective whose masks are learned goes with what learns them"
            made_N2 = self.masks.backend.forward(found["residual"])
            leaf_N2 = made_N2.detach().requires_grad_()
            beyond.append(partial(self.masks.backward, made_N2, leaf_N2, self.backend.share.ranks))
        compared = Compared(trained, reference_NV, self.objective.entropies != "none")
        logp_N, divergence_N, *entropy_N = self.backend.forward(compared)
        if not len(trained.token_N):  # as in PolicyGoal
            outputs = [logp_N, divergence_N, *([] if leaf_N2 is None else [leaf_N2])]
            return sum(map(nothing_of, outputs), start=logp_N.new_zeros(())), {}, *beyond
        if leaf_N2 is None:
            mask_N = activation_mask([*found.values(), [_mean_feature(reference_NV)]], trained.row_N)
            leaf_N2 = mask_N[:, None].expand(-1, 2)
        micro = replace(micro, masks_BT2=trained.spread(leaf_N2), divergence_BT=trained.spread(divergence_N))
        entropy_BT = trained.spread(entropy_N[0]) if entropy_N else None
        loss, sums = self.objective.loss(trained.spread(logp_N), entropy_BT, micro)
        return loss, sums, *beyond


def goal_of(
    goal: PolicyGoal, reference: Callable[[], AbstractContextManager[None]], roles: Mapping[str, Role]
) -> PolicyGoal:
    """``goal``, or :class:`MaskedGoal` in its place if its objective has ``token_masks``."""
    if getattr(goal.objective, "token_masks", None) is None:
        return goal
    masks = roles.get(MASKS)
    assert masks is None or isinstance(masks, MaskRole)
    assert goal.head is None, "a stage of preferences has no critic"
    return MaskedGoal(goal.backend, goal.objective, goal.annotate, goal.counts, reference=reference, masks=masks)


@dataclass(frozen=True)
class Inside:
    """A pass that looks inside the model: activations before the trained tokens as :func:`taken` has them, and logits
    ``[N, V]``, float32."""

    trained: Trained
    kinds: tuple[Kind, ...]
    reduce: Callable[[Tensor], Tensor]

    def __call__(self, logprobs: LogProbs) -> tuple[dict[Kind, list[Tensor]], Tensor]:
        with taken(logprobs.body, self.trained.place_N, self.kinds, self.reduce) as found:
            logits_of, source_NX = _source(logprobs, self.trained)
            return found, logprobs.with_head(logits_of, source_NX).float()


@dataclass(frozen=True)
class Compared:
    """A pass that compares a model with logits of a reference.

    It gives of each trained token the log-probability under the model, ``KL(reference || model)`` before it and, if
    asked, the model's entropy there; all at the temperature of the token's row, float32, the first two with gradient.
    """

    trained: Trained
    reference_NV: Tensor
    entropy: bool

    def __call__(self, logprobs: LogProbs) -> tuple[Tensor, ...]:
        logits_of, source_NX = _source(logprobs, self.trained)
        chunk = logprobs.chunk_of(self.reference_NV.element_size() * self.reference_NV.shape[1])
        return logprobs.with_head(self._compare_chunks, source_NX, logits_of, chunk)

    def _compare_chunks(
        self, source_NX: Tensor, logits_of: Callable[[Tensor], Tensor], chunk: int
    ) -> tuple[Tensor, ...]:
        parts = list[tuple[Tensor, ...]]()
        for start in range(0, max(1, len(source_NX)), chunk):
            of = slice(start, start + chunk)
            token_N, temperature_N = self.trained.token_N[of], self.trained.temperature_N[of]
            args = (logits_of, source_NX[of], token_N, temperature_N, self.reference_NV[of], self.entropy)
            parts.append(checkpoint(_compare, *args, use_reentrant=False, preserve_rng_state=False))  # pyright: ignore[reportArgumentType]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _compare(
    logits_of: Callable[[Tensor], Tensor],
    source_NX: Tensor,
    token_N: Tensor,
    temperature_N: Tensor,
    reference_NV: Tensor,
    entropy: bool,
) -> tuple[Tensor, ...]:
    logp_NV = (logits_of(source_NX).float() / temperature_N[:, None]).log_softmax(-1)
    ref_NV = (reference_NV / temperature_N[:, None]).log_softmax(-1)
    logp_N = logp_NV.gather(-1, token_N[:, None])[:, 0]
    divergence_N = (ref_NV.exp() * (ref_NV - logp_NV)).sum(-1)
    if not entropy:
        return logp_N, divergence_N
    return logp_N, divergence_N, -(logp_NV.detach().exp() * logp_NV.detach()).sum(-1)


def _source(logprobs: LogProbs, trained: Trained) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What gives logits, and what it is applied to: hidden states, or the logits themselves where the model has its own
    way from the one to the other."""
    if logprobs.slow_reason is not None:
        return nn.Identity(), logprobs.module(**trained.inputs).logits[trained.place_N]
    return logprobs.logits_of, logprobs.body(**trained.inputs).last_hidden_state[trained.place_N]


def _whole(value_NH: Tensor) -> Tensor:
    return value_NH


def _mean_feature(value_NH: Tensor) -> Tensor:
    return value_NH.float().mean(-1)
