"""Losses of preferences: which of two completions of a prompt was preferred, or whether one was wanted at all.

Suffixes beside the legend of :mod:`alignment.types`: P pairs, R rows. ``ratio`` is ``log pi(y|x) - log pi_ref(y|x)``,
summed over the completion's tokens, in nats; ``h`` the ratio of the preferred completion less that of the other one.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.errors import UserError
from alignment.registry import Registry, option


@dataclass(frozen=True)
class Masked:
    """Sums over each completion's tokens, weighted by masks ``m``: one for ratios and one for divergences."""

    ratio_R: Tensor
    """``sum_t m^u_t (log pi(y_t) - log pi_ref(y_t))``, in nats."""
    divergence_R: Tensor
    """``sum_t m^d_t KL(pi_ref(.|s_t) || pi(.|s_t))`` over the whole vocabulary, in nats."""
    size_R2: Tensor
    """``sum_t m^u_t`` and ``sum_t m^d_t``."""


@dataclass(frozen=True)
class Rows:
    """Completions, each one row of a batch."""

    logp_R: Tensor
    """Of the whole completion, in nats, with gradient."""
    ref_logp_R: Tensor | None
    """The same under the reference; None where no loss asks."""
    length_R: Tensor
    """Tokens of the completion."""
    wanted_R: Tensor
    """bool: the preferred one, or one that was called good."""
    shift_R: Tensor
    """What :class:`Kto` compares its ratio with."""
    masked: Masked | None = None
    """Where a loss has ``token_masks``."""

    @property
    def ratio_R(self) -> Tensor:
        """``log pi - log pi_ref``."""
        assert self.ref_logp_R is not None, "a loss that compares with a reference needs 'reference'"
        return self.logp_R - self.ref_logp_R

    @property
    def mean_logp_R(self) -> Tensor:
        """Per token."""
        return self.logp_R / self.length_R

    def take(self, index: Tensor) -> "Rows":
        """The rows ``index``, in that order."""
        ref = None if self.ref_logp_R is None else self.ref_logp_R[index]
        m = self.masked
        masked = None if m is None else Masked(m.ratio_R[index], m.divergence_R[index], m.size_R2[index])
        return Rows(self.logp_R[index], ref, self.length_R[index], self.wanted_R[index], self.shift_R[index], masked)


@dataclass(frozen=True)
class Pairs:
    """Preferred completions and, in the same order, those that they were preferred to."""

    chosen: Rows
    rejected: Rows
    gap_P: Tensor
    """The score of the chosen one less that of the other; NaN where there are no scores."""

    @property
    def h_P(self) -> Tensor:
        """The chosen ratio less the rejected."""
        return self.chosen.ratio_R - self.rejected.ratio_R


@runtime_checkable
class PreferenceLoss(Protocol):
    """Has one of two methods: ``pair_loss(state, pairs) -> loss_P``, of which the mean over pairs is taken, or
    ``row_loss(state, rows) -> loss_R``, of which the mean over rows is.

    Optional on the class: ``needs``, with ``"reference"`` if it looks at ratios; ``mismatched = True`` if it asks for
    rows in which each prompt is followed by another one's completion; ``token_masks``, where the masks of
    ``Rows.masked`` come from, if it looks at them; ``init`` and ``observe``, if it remembers.
    """

    @property
    def weight(self) -> float:
        """Of the loss in the sum."""
        ...


preference_losses: Registry[PreferenceLoss] = Registry(
    "preference_losses",
    PreferenceLoss,
    "How a policy learns from pairs: a weighted list",
    any_of=("pair_loss", "row_loss", "token_loss"),
)

REFERENCE = ("reference",)
Weight = Annotated[float, option("of this loss in the sum", gt=0)]
Beta = Annotated[
    float, option("inverse temperature of the implicit reward: larger stays nearer to the reference", gt=0)
]


@preference_losses.register(
    "dpo",
    source="Direct Preference Optimization (arXiv 2305.18290); with label smoothing, conservative DPO (Mitchell)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Dpo:
    """``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)``; with ``e`` above 0 it is conservative DPO."""

    beta: Beta = 0.1
    label_smoothing: Annotated[float, option("e: share of the pairs that are presumed to be flipped", ge=0, lt=0.5)] = (
        0.0
    )
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        return _smoothed(self.beta * pairs.h_P, self.label_smoothing)


@preference_losses.register("robust_dpo", source="Provably Robust DPO (arXiv 2403.00409)", evidence="end to end")
@dataclass(frozen=True)
class RobustDpo:
    """DPO's loss, unbiased under flipped labels: ``[-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2 e)``."""

    beta: Beta = 0.1
    label_smoothing: Annotated[float, option("e: share of the pairs that are flipped", ge=0, lt=0.5)] = 0.1
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        z_P, e = self.beta * pairs.h_P, self.label_smoothing
        return (-(1 - e) * logsigmoid(z_P) + e * logsigmoid(-z_P)) / (1 - 2 * e)


@preference_losses.register(
    "ipo", source="A General Theoretical Paradigm to Understand Learning from Human Preferences (arXiv 2310.12036)",
    evidence="end to end",
)  # fmt: skip
@dataclass(frozen=True)
class Ipo:
    """``(h - 1 / (2 tau))^2``.

    The paper's ratios are of whole completions. TRL, which says that its authors confirm it, divides each by its number
    of tokens, so that the loss does not grow with length: so does this, unless ``length_normalize`` is false.
    """

    tau: Annotated[float, option("strength of the pull to the reference", gt=0)] = 0.1
    length_normalize: Annotated[bool, option("ratios per token")] = True
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        h_P = _per_token(pairs) if self.length_normalize else pairs.h_P
        return (h_P - 1 / (2 * self.tau)).square()


@preference_losses.register(
    "hinge", source="SLiC-HF (arXiv 2305.10425), with ratios to a reference as in RSO (arXiv 2309.06657)",
    evidence="end to end",
)  # fmt: skip
@dataclass(frozen=True)
class Hinge:
    """``max(0, 1 - beta h)``."""

    beta: Beta = 0.1
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        return (1 - self.beta * pairs.h_P).clamp(min=0)


@preference_losses.register("length_normalized_dpo", source="Tulu 3 (arXiv 2411.15124)", evidence="end to end")
@dataclass(frozen=True)
class LengthNormalizedDpo:
    """DPO's loss with ratios per token: ``-log sigmoid(beta (ratio_w / |y_w| - ratio_l / |y_l|))``.

    Of two completions of ``T`` tokens it is DPO's at ``beta / T``.
    """

    beta: Beta = 5.0
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        return -logsigmoid(self.beta * _per_token(pairs))


@preference_losses.register("simpo", source="SimPO (arXiv 2405.14734)", evidence="end to end")
@dataclass(frozen=True)
class Simpo:
    """``-log sigmoid(beta (l_w - l_l) - gamma)`` with log-probabilities per token ``l``: without a reference."""

    beta: Annotated[float, option("of the log-probability per token", gt=0)] = 2.0
    gamma: Annotated[float, option("margin that the chosen one is to be ahead by", ge=0)] = 1.0
    weight: Weight = 1.0

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        return -logsigmoid(self.beta * (pairs.chosen.mean_logp_R - pairs.rejected.mean_logp_R) - self.gamma)


@preference_losses.register("orpo", source="ORPO (arXiv 2403.07691)", evidence="end to end")
@dataclass(frozen=True)
class Orpo:
    """``-l_w - lambda log sigmoid(log odds_w - log odds_l)`` of probabilities per token: without a reference or SFT.

    TRL takes the first term over the prompt's tokens as well, as a mean over all tokens of the batch; here, as in the
    paper, it is the chosen completion's alone, and a mean over its tokens.
    """

    lam: Annotated[float, option("lambda, of the odds ratio", gt=0)] = 0.1
    weight: Weight = 1.0

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        chosen_P, rejected_P = pairs.chosen.mean_logp_R, pairs.rejected.mean_logp_R
        log_odds_P = chosen_P - rejected_P - (_log1mexp(chosen_P) - _log1mexp(rejected_P))
        return -chosen_P - self.lam * logsigmoid(log_odds_P)


@preference_losses.register(
    "mm_dpo", source="MM-RLHF (arXiv 2502.10391): dynamic reward scaling", evidence="end to end"
)
@dataclass(frozen=True)
class MmDpo:
    """DPO's loss with a beta for each pair: ``beta (1 + w (1 - exp(-k gap)))``, kept within ``[beta, (1 + w) beta]``.

    ``gap`` is the score of the chosen completion less that of the other, by a reward. The released code has another
    branch, with the implicit reward in place of a reward model's; the paper argues against that one.
    """

    beta: Beta = 0.1
    w: Annotated[float, option("how much larger beta can get", ge=0)] = 0.5
    k: Annotated[float, option("how soon it does, per unit of the gap", gt=0)] = 0.5
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE
    scores: ClassVar[bool] = True

    def scaled(self, gap_P: Tensor) -> Tensor:
        """``[P]`` beta of each pair."""
        return (self.beta * (1 + self.w * (1 - (-self.k * gap_P).exp()))).clamp(self.beta, (1 + self.w) * self.beta)

    def pair_loss(self, state: None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        return -logsigmoid(self.scaled(pairs.gap_P) * pairs.h_P)


@preference_losses.register(
    "nll", source="Iterative Reasoning Preference Optimization (arXiv 2404.19733), its NLL term", evidence="end to end"
)
@dataclass(frozen=True)
class Nll:
    """Negative log-likelihood of what is preferred, to hold it up: ``-log pi(y_w|x) / |y_w|``.

    With ``mean: token`` it is a mean over all tokens of the mini-batch, as TRL's ``sft``. With ``of: ground_truth`` it
    is of the prompt's demonstration in place of the chosen completion: guided DPO (MrDPO, arXiv 2410.06682, at 0.1).
    """

    weight: Weight = 1.0
    mean: Annotated[Literal["row", "token"], option("a mean over each completion's tokens first, or over all")] = "row"
    of: Annotated[Literal["chosen", "ground_truth"], option("whose likelihood")] = "chosen"

    def token_loss(self, logp_BT: Tensor, scale_BT: Tensor) -> Tensor:
        """The sum over the tokens of a micro-batch; ``scale_BT`` is :meth:`scale` of the whole mini-batch."""
        return -(scale_BT * logp_BT).sum()

    def scale(self, mask_BT: Tensor) -> Tensor:
        """``[B, T]``: what each of the tokens in ``mask_BT`` counts."""
        if self.mean == "token":
            return mask_BT.float() / mask_BT.sum().clamp(min=1)
        length_B1 = mask_BT.sum(1, keepdim=True)
        return mask_BT.float() / length_B1.clamp(min=1) / (length_B1 > 0).sum().clamp(min=1)


def check_losses(losses: tuple[Any, ...]) -> None:
    """Refuses a list that cannot be summed.

    Raises:
        UserError: It is empty, or has no loss that compares completions.
    """
    if not losses:
        raise UserError("losses is empty: give at least one, such as dpo")
    kinds = [(type(loss), getattr(loss, "of", None)) for loss in losses]
    if len(set(kinds)) < len(kinds):
        raise UserError("losses has the same one twice: keep one, with the sum of their weights")
    if sum(getattr(loss, "token_masks", None) is not None for loss in losses) > 1:
        raise UserError("losses has two with masks of tokens, and there is one mask: keep one of them")
    if all(hasattr(loss, "token_loss") for loss in losses):
        raise UserError("losses has nothing that learns from a preference; add one such as dpo, or use a stage 'sft'")


def _smoothed(z_P: Tensor, e: float) -> Tensor:
    return -logsigmoid(z_P) if not e else -(1 - e) * logsigmoid(z_P) - e * logsigmoid(-z_P)


def _per_token(pairs: Pairs) -> Tensor:
    """``h`` of ratios per token."""
    chosen, rejected = pairs.chosen, pairs.rejected
    return chosen.ratio_R / chosen.length_R - rejected.ratio_R / rejected.length_R


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0``, precise at both ends."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())
