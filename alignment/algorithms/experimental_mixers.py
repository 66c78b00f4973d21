"""Mixers whose published results should not be relied on: AMFT and GRAO. Each docstring says what is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from alignment.algorithms.demonstrations import is_demonstration, is_imitated
from alignment.algorithms.mixers import Demonstrations, Joining, drawn, mixers
from alignment.algorithms.weightings import weighted_sum
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import Batch, Context, Group, Rollout, Signals


def meta_gradient(val_P: Tensor, sft_P: Tensor, rl_P: Tensor, lr: float, cosine: bool = False) -> float:
    """``d U / d mu = lr <g_val, g_sft - g_rl>`` for the utility ``U = -L_val``, one step ahead.

    With ``theta' = theta - lr ((1 - mu) g_rl + mu g_sft)``: moving ``mu`` moves ``theta'`` by ``-lr (g_sft - g_rl)``,
    and U by minus ``g_val`` times that. The published code has the other sign and then adds it. ``cosine`` takes unit
    vectors for ``g_val`` and the difference, without ``lr``: at usual learning rates the product as it stands is about
    1e-10 of what would move ``mu``.
    """
    difference_P = sft_P - rl_P
    if not cosine:
        return lr * float(val_P @ difference_P)
    size = float(val_P.norm() * difference_P.norm())
    return float(val_P @ difference_P) / size if size > 0 else 0.0


@mixers.register(
    "amft",
    source="AMFT: Aligning LLM Reasoners by Meta-Learning the Optimal Imitation-Exploration Balance (arXiv 2508.06944)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Amft:
    """Experimental. AMFT's entropy controller: ``(1 - mu) L_RL + mu L_SFT``, with ``mu`` moved to hold the entropy.

    ``mu <- clip(mu + entropy_rate (H - H*) + meta_rate g, low, high)`` after each step, ``H`` being the mean entropy of
    the rollouts' tokens before the update, in nats, and ``H*`` either ``target_entropy`` or that of the stage's first
    step, which is meant to follow a supervised stage. More imitation when the policy is too random: this is what the
    text says; the printed formula has the opposite sign (``sign: printed``).

    ``g`` is :func:`meta_gradient`, and **is not wired**: no learner computes the gradient of a validation loss, so
    ``mu`` follows the entropy alone, and this is not the method as published. :meth:`moved` takes ``g`` for whoever
    has it.

    What is known of the paper: its third version on arXiv carries the remark that it is under investigation for
    academic misconduct and that its authors asked to withdraw it; its public code returns random numbers for rollouts,
    and its meta-gradient has the wrong sign. Its numbers should not be quoted. Defaults are those of that code;
    ``rows`` demonstrations are drawn per step as ``blend`` does (ours).
    """

    needs: ClassVar[tuple[str, ...]] = ("demonstrations", "entropy")

    rows: Annotated[int, option("demonstrations per step", ge=1)] = 16
    start: Annotated[float, option("mu at the first step", ge=0, le=1)] = 0.8
    low: Annotated[float, option("smallest mu", ge=0, le=1)] = 0.05
    high: Annotated[float, option("largest mu", ge=0, le=1)] = 0.95
    entropy_rate: Annotated[float, option("of the entropy term", ge=0)] = 5e-4
    meta_rate: Annotated[float, option("of the meta-gradient, which runs do not have", ge=0, le=1)] = 1e-4
    target_entropy: Annotated[float | None, option("H*; null: that of the first step", unit="nats", ge=0)] = None
    sign: Annotated[Literal["intent", "printed"], option("H - H*, as the text means it, or H* - H")] = "intent"

    def __post_init__(self) -> None:
        if not self.low <= self.start <= self.high:
            raise UserError(f"amft: start ({self.start:g}) must lie from low ({self.low:g}) to high ({self.high:g})")

    def init(self) -> dict[str, Any]:
        """The first mixing weight."""
        return {"mu": self.start, "target": self.target_entropy}

    def moved(self, mu: float, entropy_term: float, meta_term: float = 0.0) -> float:
        """``mu`` after a step."""
        step = self.entropy_rate * entropy_term + self.meta_rate * meta_term
        return min(max(mu + step, self.low), self.high)

    def observe(self, state: Mapping[str, Any], signals: Signals) -> dict[str, Any]:
        """Moves ``mu`` by the entropy of the batch's rollouts; the first one sets the target, if none is given."""
        batch = signals.batch
        assert batch.entropy_BT is not None, "annotate with 'entropy'"
        sampled_BT = batch.loss_mask_BT & ~is_demonstration(batch)[:, None]
        if not sampled_BT.any():
            return dict(state)
        entropy = float(batch.entropy_BT[sampled_BT].mean())
        target = entropy if state["target"] is None else state["target"]
        term = entropy - target if self.sign == "intent" else target - entropy
        return {"mu": self.moved(state["mu"], term), "target": target}

    def metrics(self, state: Mapping[str, Any]) -> dict[str, float]:
        """The mixing weight of the next step and the entropy that is aimed at."""
        return {"mu": state["mu"]} | ({} if state["target"] is None else {"target_entropy": state["target"]})

    def route(
        self, state: Any, groups: Sequence[Group], demonstrations: Demonstrations, context: Context
    ) -> Mapping[str, list[Group]]:
        return {"rl": [*groups, *drawn(demonstrations, self.rows, context)]}

    def coefficients(self, state: Mapping[str, Any], batch: Batch) -> Tensor:
        return torch.where(is_imitated(batch), state["mu"], 1.0 - state["mu"])


@mixers.register(
    "grao",
    source="Learning to Align, Aligning to Learn: A Unified Approach for Self-Optimized Alignment (arXiv 2508.07750)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Grao(Joining):
    """Experimental. GRAO: rollouts and a demonstration, each by its own normalised advantage.

    Maximised, with ``l(z)`` the mean log-probability of a sequence, over the G rollouts ``o_i`` and the demonstration
    ``y`` of a prompt: ``1/G sum_i [A_i l(o_i) + beta A_y l(y) + lam A_i (l(o_i) - l(y))]``, ``A = (R - mean) / std``
    with the population's std, 0 where it is 0. The last term adds nothing of its own: the A_i of the rollouts alone
    add up to 0, so the whole is ``(1 + lam)`` times REINFORCE plus ``beta A_y l(y)``; with the demonstration among the
    statistics they add up to ``-A_y``, and it is ``(beta + lam / G) A_y l(y)``. This is how it is computed: with
    ``policy_loss: reinforce`` and ``aggregation: sequence_mean``, which the method asks for, exactly so where all
    prompts have a demonstration and these are equally long (over demonstrations it is a token mean). The recipe's
    advantage is not used.

    ``statistics``: the text prints mean and std over the rollouts, and also says that ``A_y`` is computed in one group
    with them. With ``rollouts`` a prompt that all of them fail alike teaches nothing, demonstration or not. R is the
    sum of the rewards by the recipe's weights; the demonstration is scored like a rollout.

    What is known of the paper: it was withdrawn from ICLR 2026 with scores of 0, 2, 4 and 2, and does not define its
    reward.
    """

    needs: ClassVar[tuple[str, ...]] = ("demonstrations", "demonstration_rewards")

    beta: Annotated[float, option("of the demonstration", ge=0)] = 0.5
    lam: Annotated[float, option("of the alignment term", ge=0)] = 0.6
    statistics: Annotated[
        Literal["rollouts", "all"], option("whose rewards make mean and std: without the demonstration, or with it")
    ] = "rollouts"

    def teaches(self, solved: int, of: int) -> bool:
        """Of rollouts that are all wrong alike, the deviation is 0 without the demonstration."""
        return solved > 0 or self.statistics == "all"

    def joins(self, shown: Sequence[Rollout]) -> Sequence[Rollout]:
        return shown[:1]

    def advantages(self, state: Any, batch: Batch) -> Tensor:
        """``(1 + lam) A_i`` of rollouts and ``beta A_y``, or ``(beta + lam / G) A_y``, of demonstrations."""
        shown_B, reward_B = is_imitated(batch), weighted_sum(batch).double()
        known_B = batch.scored_B & ~reward_B.isnan()
        adv_B = torch.zeros_like(reward_B)
        for group in batch.group_B.unique().tolist():
            own_B = (batch.group_B == group) & known_B
            counted_B = own_B & ~shown_B if self.statistics == "rollouts" else own_B
            if not counted_B.any():
                continue
            std = float(reward_B[counted_B].std(correction=0))
            if std > 0:
                of_y = self.lam / max(1, int((own_B & ~shown_B).sum())) if self.statistics == "all" else 0.0
                factor_B = torch.where(shown_B, self.beta + of_y, 1.0 + self.lam)
                adv_B = torch.where(own_B, factor_B * (reward_B - reward_B[counted_B].mean()) / std, adv_B)
        return adv_B.float()[:, None].expand(batch.loss_mask_BT.shape)

    def coefficients(self, state: Any, batch: Batch) -> None:
        return None
