"""Value losses: what a value head puts out, how a value is read from it, and its loss against a return.

Suffix beside the legend of :mod:`alignment.types`: M numbers that a head puts out per state. ``...`` are any leading
dimensions, such as ``[B, T]``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignment.algorithms.values import state_mask
from alignment.errors import UserError
from alignment.registry import Registry, option
from alignment.types import Batch


@runtime_checkable
class ValueLoss(Protocol):
    """A regression of values on returns."""

    @property
    def outputs(self) -> int:
        """M, what a head puts out per state."""
        ...

    def readout(self, output: Tensor) -> Tensor:
        """``[...]`` values from ``output`` ``[..., M]``."""
        ...

    def outside(self, target: Tensor) -> Tensor:
        """``[...]`` bool: returns that the loss takes for smaller or larger ones than they are."""
        ...

    def __call__(self, output: Tensor, target: Tensor, old: Tensor | None = None) -> Tensor:
        """``[...]`` losses of ``output`` ``[..., M]``.

        Args:
            output: With gradient.
            target: ``[...]`` returns, finite.
            old: ``[...]`` values before the first update on this batch, for a loss that stays near them.
        """
        ...


value_losses: Registry[ValueLoss] = Registry("value_losses", ValueLoss, "How a value model is fitted to returns")

_STOP_REGRESSING = (
    "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL (arXiv 2403.03950)"
)


@value_losses.register(
    "scalar", source="Proximal Policy Optimization Algorithms (arXiv 1707.06347), its value loss", evidence="end to end"
)
@dataclass(frozen=True)
class Scalar:
    """Half the squared error of one number.

    ``0.5 (V - R)^2``; with ``clip`` c, as PPO's reference code has it, ``0.5 max((V - R)^2, (V' - R)^2)`` where ``V'``
    is ``V`` kept within ``c`` of the value before the update.
    """

    clip: Annotated[float | None, option("distance that a value may move in one batch; null: any", gt=0)] = field(
        default=None, compare=False
    )  # no part of what a head puts out means something else with it

    @property
    def outputs(self) -> int:
        return 1

    def readout(self, output: Tensor) -> Tensor:
        return output[..., 0].float()

    def outside(self, target: Tensor) -> Tensor:
        return torch.zeros_like(target, dtype=torch.bool)

    def __call__(self, output: Tensor, target: Tensor, old: Tensor | None = None) -> Tensor:
        value = self.readout(output)
        loss = 0.5 * (value - target).square()
        if self.clip is None or old is None:
            return loss
        near = old + (value - old).clamp(-self.clip, self.clip)
        return torch.maximum(loss, 0.5 * (near - target).square())


@value_losses.register("two_hot", source=_STOP_REGRESSING, evidence="end to end")
@dataclass(frozen=True)
class TwoHot:
    """Cross-entropy with the two supports next to the return, weighted so that their mean is the return.

    The supports are ``bins + 1`` points from ``low`` to ``high``, ends included. For ``z_k <= y <= z_{k+1}``:
    ``p_{k+1} = (y - z_k) / (z_{k+1} - z_k)`` and ``p_k = 1 - p_{k+1}``. Returns outside count as the nearest end.
    """

    low: Annotated[float, option("smallest return that is told apart from smaller ones")] = 0.0
    high: Annotated[float, option("largest return that is told apart from larger ones")] = 1.0
    bins: Annotated[int, option("bins between low and high", ge=2)] = 51

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    @property
    def width(self) -> float:
        """Of a bin."""
        return (self.high - self.low) / self.bins

    @cached_property
    def centres_M(self) -> Tensor:
        """float64 supports."""
        return torch.linspace(self.low, self.high, self.bins + 1, dtype=torch.float64)

    @property
    def outputs(self) -> int:
        return len(self.centres_M)

    def readout(self, output: Tensor) -> Tensor:
        return _mean(output, self.centres_M)

    def outside(self, target: Tensor) -> Tensor:
        return (target < self.low) | (target > self.high)

    def target(self, value: Tensor) -> Tensor:
        """``[..., M]`` float64 distribution that stands for ``value``."""
        place = ((value.double().clamp(self.low, self.high) - self.low) / self.width).clamp(0, self.bins)
        below = place.floor().clamp(max=self.bins - 1).long()
        share = (place - below)[..., None]
        wanted = torch.zeros(*value.shape, self.outputs, dtype=torch.float64, device=value.device)
        wanted.scatter_(-1, below[..., None], 1 - share)
        return wanted.scatter_(-1, below[..., None] + 1, share)

    def __call__(self, output: Tensor, target: Tensor, old: Tensor | None = None) -> Tensor:
        return _cross_entropy(output, self.target(target))


@value_losses.register("hl_gauss", source=_STOP_REGRESSING, evidence="end to end")
@dataclass(frozen=True)
class HlGauss:
    """Cross-entropy with a Gaussian around the return, as a histogram.

    ``p_i = [Phi((e_i - y) / sigma) - Phi((e_{i-1} - y) / sigma)] / [Phi((e_m - y) / sigma) - Phi((e_0 - y) / sigma)]``
    over bin edges ``e``, with ``sigma = sigma_ratio`` times a bin's width; the value is the mean of bin centres.
    A Gaussian that the ends of the support cut off has its mean pulled inward. Returns of verifiable rewards lie
    exactly at the ends, so the support goes on for ``pad_sigmas`` beyond ``low`` and ``high``, in whole bins more.

    Unverified: that most of the mass in about six bins is what the paper recommends 0.75 for.
    """

    low: Annotated[float, option("smallest return that is told apart from smaller ones")] = 0.0
    high: Annotated[float, option("largest return that is told apart from larger ones")] = 1.0
    bins: Annotated[int, option("bins between low and high", ge=2)] = 51
    sigma_ratio: Annotated[float, option("standard deviation of the Gaussian, in widths of a bin", gt=0)] = 0.75
    pad_sigmas: Annotated[float, option("how far the support goes beyond low and high", unit="sigmas", ge=0)] = 4.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    @property
    def width(self) -> float:
        """Of a bin."""
        return (self.high - self.low) / self.bins

    @property
    def sigma(self) -> float:
        """In the unit of returns."""
        return self.sigma_ratio * self.width

    @cached_property
    def edges(self) -> Tensor:
        """float64 edges of all bins, those of the padding included."""
        more = math.ceil(self.pad_sigmas * self.sigma_ratio - 1e-9)
        steps = torch.arange(-more, self.bins + more + 1, dtype=torch.float64)
        return self.low + steps * self.width

    @cached_property
    def centres_M(self) -> Tensor:
        """float64 centres of all bins."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    @property
    def outputs(self) -> int:
        return len(self.centres_M)

    def readout(self, output: Tensor) -> Tensor:
        return _mean(output, self.centres_M)

    def outside(self, target: Tensor) -> Tensor:
        return (target < self.low) | (target > self.high)

    def target(self, value: Tensor) -> Tensor:
        """``[..., M]`` float64 distribution that stands for ``value``."""
        value = value.double().clamp(self.low, self.high)[..., None]
        below = torch.special.ndtr((self.edges.to(value.device) - value) / self.sigma)
        return (below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])

    def __call__(self, output: Tensor, target: Tensor, old: Tensor | None = None) -> Tensor:
        return _cross_entropy(output, self.target(target))


def _check_range(low: float, high: float) -> None:
    if not low < high:
        raise UserError(f"low ({low}) must be below high ({high}), the range of returns")


def _mean(output: Tensor, centres_M: Tensor) -> Tensor:
    """The mean of the distribution over ``centres_M`` whose logits are ``output``."""
    return (output.double().softmax(-1) * centres_M.to(output.device)).sum(-1).float()


def _cross_entropy(output: Tensor, wanted: Tensor) -> Tensor:
    """Of the distribution whose logits are ``output``, against ``wanted``, which has no gradient."""
    return -(wanted.detach().float() * output.float().log_softmax(-1)).sum(-1)


@dataclass(frozen=True)
class ValueObjective:
    """The mean of a value loss over the states that have a target; like the policy's, it is reduced once."""

    value_loss: ValueLoss

    @torch.no_grad()
    def prepare(self, minibatch: Batch) -> Batch:
        """``minibatch`` with ``value_scale_BT``, which needs all of it: one over the number of targets."""
        assert minibatch.returns_BT is not None, "the advantage makes returns"
        has_BT = has_target(minibatch)
        return replace(minibatch, value_scale_BT=has_BT.float() / has_BT.sum().clamp(min=1))

    def loss(self, output: Tensor, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that the rows of ``micro`` make, and sums for :meth:`finish`.

        Args:
            output: ``[B, T, M]``, or ``[B, T, K, M]``: what the head puts out for the state after each token.
            micro: Rows of a batch that :meth:`prepare` returned, with values from before if the loss looks at them.
        """
        target, scale_BT = micro.returns_BT, micro.value_scale_BT
        assert target is not None and scale_BT is not None, "prepare the whole mini-batch first"
        has_BT = has_target(micro)
        mask = has_BT if target.dim() == 2 else has_BT[..., None].expand_as(target)
        scale = scale_BT if target.dim() == 2 else scale_BT[..., None].expand_as(target)
        target = torch.where(mask, target, 0.0).float()
        old = None if micro.values_BT is None else torch.where(mask, micro.values_BT, 0.0)
        # Where there is no target the output may be anything, even not finite: it is replaced, not multiplied by 0.
        loss = torch.where(mask, self.value_loss(torch.where(mask[..., None], output, 0.0), target, old), 0.0)
        total = (scale * loss).sum()
        sums = {
            "states": has_BT.sum(),
            "value_loss": (loss.detach().sum(-1) if target.dim() == 3 else loss.detach()).sum(),
            "outside_support": (self.value_loss.outside(target) & mask).sum(),
        }
        return total, sums

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """``states`` with a target, and per state ``value_loss`` and the share that is ``outside_support``."""
        states = float(sums["states"])
        named = {name: float(sums[name]) / max(1.0, states) for name in ("value_loss", "outside_support")}
        return {"states": states, **named}


def has_target(batch: Batch) -> Tensor:
    """``[B, T]`` bool: states with a return to learn from."""
    assert batch.returns_BT is not None
    known = ~batch.returns_BT.isnan()
    return (known if known.dim() == 2 else known.all(-1)) & state_mask(batch.loss_mask_BT)
