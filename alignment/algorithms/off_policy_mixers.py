"""Mixers whose demonstrations are judged in the group of the policy's rollouts, by the rewards that they earn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from alignment.algorithms.demonstrations import is_demonstration, is_imitated
from alignment.algorithms.mixers import Joining, mixers
from alignment.registry import option
from alignment.types import Batch, Rollout


@mixers.register(
    "luffy",
    source="Learning to Reason under Off-Policy Guidance (arXiv 2504.14945)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Luffy(Joining):
    """LUFFY: every prompt's demonstrations join its group, are judged there, and are learned with policy shaping.

    The advantage is that of the group, demonstrations included. Nobody knows what distribution a demonstration was
    drawn from, so its ratio divides by 1, and its loss is ``-A p / (p + shaping)`` with p the policy's probability of
    the token, not clipped; rollouts have the recipe's policy loss. ``shaping`` is 0.1 in the published code; null
    leaves ``-A p`` to the policy loss. One mean runs over rollouts and demonstrations together.

    A demonstration's reward is what the recipe's rewards give it, like a rollout's, not an assumed success: a wrong one
    is pushed down, and one whose reward fails is left out. A prompt that the policy always solves has no advantage to
    give, demonstration or not. As HPT's code runs it: no std, no clip, a constant length as normaliser, an entropy
    bonus of 0.001 (``dr_grpo``, ``reinforce``, ``{name: constant, length: 8192}``), lr 1e-6. That one of its 8 samples
    per prompt is the demonstration (``group_size: 7``) is from memory.
    """

    needs: ClassVar[tuple[str, ...]] = ("demonstrations", "demonstration_rewards")

    shaping: Annotated[float | None, option("gamma of p / (p + gamma); null: p itself", gt=0)] = 0.1
    demonstrations_per_prompt: Annotated[int, option("demonstrations that join a group, at most", ge=1)] = 1

    def joins(self, shown: Sequence[Rollout]) -> Sequence[Rollout]:
        return [judged(rollout) for rollout in shown[: self.demonstrations_per_prompt]]

    def coefficients(self, state: Any, batch: Batch) -> None:
        return None


@mixers.register(
    "srft",
    source="SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning "
    "(arXiv 2506.19767), by way of the code of HPT",
    evidence="end to end",
)
@dataclass(frozen=True)
class Srft(Joining):
    """SRFT: imitation, off-policy and on-policy terms at once, weighed by the entropy of each sequence.

    ``H`` is the mean entropy of a sequence's tokens under the policy before the update, in nats, without gradient:

    - the demonstration imitated: ``sft exp(-H)`` (0.5): little where the policy is undecided;
    - the demonstration judged in its group, as in LUFFY: weight 1;
    - rollouts: ``rl exp(H)`` (0.1) for correct ones and -1 for others, in place of the recipe's advantage.

    Correct is a value of at least 1 of the first reward component. Known from the code of HPT alone, which has SRFT as
    a baseline, with LUFFY's ``shaping`` of the judged demonstration, no std, no clip, a constant length and an entropy
    bonus of 0.001; the paper was not at hand. There the term of rollouts is ``log p`` without a ratio, which
    ``policy_loss: reinforce`` is at the first update of a batch, and H is that of the policy as it is updated.
    ``exp(H)`` has no bound.
    """

    needs: ClassVar[tuple[str, ...]] = ("demonstrations", "demonstration_rewards", "entropy")

    sft: Annotated[float, option("of exp(-H), for imitated demonstrations", ge=0)] = 0.5
    rl: Annotated[float, option("of exp(H), for correct rollouts", ge=0)] = 0.1
    shaping: Annotated[float | None, option("gamma of p / (p + gamma); null: p itself", gt=0)] = 0.1

    def joins(self, shown: Sequence[Rollout]) -> Sequence[Rollout]:
        return [*shown[:1], *map(judged, shown[:1])]

    def advantages(self, state: Any, batch: Batch) -> Tensor:
        """1 and -1 for rollouts."""
        assert batch.adv_BT is not None, "credit sets it first"
        sign_B = torch.where(_correct(batch), 1.0, -1.0)
        return torch.where(is_demonstration(batch)[:, None], batch.adv_BT, sign_B[:, None])

    def coefficients(self, state: Any, batch: Batch) -> Tensor:
        entropy_B = sequence_entropy(batch)
        rollout_B = torch.where(_correct(batch), self.rl * entropy_B.exp(), 1.0)
        shown_B = torch.where(is_imitated(batch), self.sft * (-entropy_B).exp(), 1.0)
        return torch.where(is_demonstration(batch), shown_B, rollout_B)


def judged(rollout: Rollout) -> Rollout:
    """A demonstration that is judged in its group, its ratio dividing by 1."""
    return replace(rollout, ratio_base="one")


def sequence_entropy(batch: Batch) -> Tensor:
    """``[B]``: the mean entropy of each row's trained tokens, in nats; 0 for rows without any."""
    assert batch.entropy_BT is not None, "annotate with 'entropy'"
    tokens_B = batch.loss_mask_BT.sum(1).clamp(min=1)
    return torch.where(batch.loss_mask_BT, batch.entropy_BT, 0.0).sum(1) / tokens_B


def _correct(batch: Batch) -> Tensor:
    return batch.rewards_BK[:, 0] >= 1
