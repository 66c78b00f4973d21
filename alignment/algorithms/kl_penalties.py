"""KL penalties: single-sample estimates of the divergence from the reference, in the loss or in the reward.

With ``d = log pi - log pi_ref`` of a token sampled from pi, ``k1``, ``k3`` and ``k3_straight_through`` have the mean
``KL(pi || pi_ref)``; ``k2`` is biased. As a *loss* only their gradients count, and these differ: ``k2`` and
``k3_straight_through`` follow the gradient of ``KL(pi || pi_ref)``, ``k3`` that of ``KL(pi_ref || pi)``, and the mean
gradient of ``k1`` is zero, so ``k1`` belongs in the reward. All from Approximating KL Divergence (Schulman 2020).

The coefficient is fixed, or, with ``target``, steered (Fine-Tuning Language Models from Human Preferences,
arXiv 1909.08593): ``coefficient *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon`` after each batch of n rows.
Deviation: KL is the mean per sampled token, not the sum over a sequence. Unverified: the constants of this rule.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from alignment.errors import UserError
from alignment.registry import Registry, option
from alignment.types import Signals

ApplyTo = Annotated[Literal["loss", "reward"], option("add it to the loss, or subtract it from the reward")]


@runtime_checkable
class KLPenalty(Protocol):
    """An estimate of the divergence per token, and how much it weighs."""

    @property
    def apply_to(self) -> Literal["loss", "reward"]:
        """Where the penalty goes."""
        ...

    def __call__(self, logp_BT: Tensor, ref_BT: Tensor) -> Tensor:
        """``kl_BT`` in nats, from log-probabilities of the sampled tokens."""
        ...

    def coefficient_now(self, state: Any) -> float:
        """The coefficient to use, given the component's state."""
        ...


kl_penalties: Registry[KLPenalty] = Registry("kl_penalties", KLPenalty, "How far from the reference, and what it costs")


def k1_estimate(logp_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """``d``."""
    return logp_BT - ref_BT


def k2_estimate(logp_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """``d^2 / 2``."""
    return (logp_BT - ref_BT).square() / 2


def k3_estimate(logp_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """``exp(-d) - 1 + d >= 0``, with -d clamped to +-20 before the exponential and the whole to at most 10.

    Where a clamp acts there is no gradient.
    """
    minus_d_BT = (ref_BT - logp_BT).clamp(-20.0, 20.0)
    return (minus_d_BT.exp() - 1 - minus_d_BT).clamp(max=10.0)


@dataclass(frozen=True)
class _Steered:
    """The options and the state that the estimators below share."""

    coefficient: Annotated[float, option("weight of the penalty; where it starts when a target is set", ge=0)] = 0.001
    apply_to: ApplyTo = "loss"
    target: Annotated[
        float | None, option("KL to steer the coefficient to; null: fixed", unit="nats per token", gt=0)
    ] = None
    horizon: Annotated[float, option("rows over which the steered coefficient adapts", unit="rows", gt=0)] = 10_000.0

    def __post_init__(self) -> None:
        if self.target is not None and self.coefficient == 0:
            raise UserError("a coefficient of 0 stays 0: give a target a coefficient above 0 to start from")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference", "old_logp") if self.apply_to == "reward" else ("reference",)

    def init(self) -> dict[str, float]:
        return {} if self.target is None else {"coefficient": self.coefficient}

    def coefficient_now(self, state: Any) -> float:
        return self.coefficient if self.target is None else float(state["coefficient"])

    def observe(self, state: Any, signals: Signals) -> Any:
        kl = signals.metrics.get("kl")
        if self.target is None or kl is None:  # none: no sampled token was trained on
            return state
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # A batch of more rows than the horizon must not make the coefficient negative, which would reward divergence.
        factor = max(0.5, 1 + error * len(signals.batch) / self.horizon)
        return {"coefficient": state["coefficient"] * factor}


_SCHULMAN = "Approximating KL Divergence (Schulman 2020)"


@kl_penalties.register("k1", source=_SCHULMAN, evidence="end to end")
@dataclass(frozen=True)
class K1(_Steered):
    """``d``: unbiased, of either sign. For the reward; in the loss its mean gradient is zero."""

    apply_to: ApplyTo = "reward"

    def __call__(self, logp_BT: Tensor, ref_BT: Tensor) -> Tensor:
        return k1_estimate(logp_BT, ref_BT)


@kl_penalties.register("k2", source=_SCHULMAN, evidence="end to end")
@dataclass(frozen=True)
class K2(_Steered):
    """``d^2 / 2``: biased as a value, but its gradient is that of KL(pi || pi_ref)."""

    def __call__(self, logp_BT: Tensor, ref_BT: Tensor) -> Tensor:
        return k2_estimate(logp_BT, ref_BT)


@kl_penalties.register("k3", source=_SCHULMAN, evidence="end to end")
@dataclass(frozen=True)
class K3(_Steered):
    """``exp(-d) - 1 + d``: unbiased, never negative, low variance; its gradient is that of KL(pi_ref || pi).

    Deviation: clamped, see :func:`k3_estimate`.
    """

    def __call__(self, logp_BT: Tensor, ref_BT: Tensor) -> Tensor:
        return k3_estimate(logp_BT, ref_BT)


@kl_penalties.register(
    "k3_straight_through", source=f"{_SCHULMAN}; the combination is known from verl", evidence="end to end"
)
@dataclass(frozen=True)
class K3StraightThrough(_Steered):
    """The value of ``k3`` with the gradient of ``k2``: unbiased as a number and as a direction."""

    def __call__(self, logp_BT: Tensor, ref_BT: Tensor) -> Tensor:
        gradient_BT = k2_estimate(logp_BT, ref_BT)
        return k3_estimate(logp_BT, ref_BT).detach() + (gradient_BT - gradient_BT.detach())
