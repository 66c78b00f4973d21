"""Entropy controls: what keeps the policy from becoming certain too early.

The contract, the registry, and the controls that look at entropies alone; :mod:`~alignment.algorithms.steer` and
:mod:`~alignment.algorithms.covariance` have the others.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from alignment.algorithms.tokens import in_order, largest, placed, sampled_tokens, share_up
from alignment.errors import UserError
from alignment.registry import Registry, option
from alignment.types import Batch, Signals


@dataclass(frozen=True, slots=True)
class PenaltyView:
    """What a penalty sees of some rows of a mini-batch; 0 outside the loss mask."""

    logp_BT: Tensor
    """With gradient."""
    old_logp_BT: Tensor
    """Of the policy before this batch's first update; the current one where nobody annotated it."""
    entropy_BT: Tensor | None
    """In nats, with gradient; None unless the control says ``entropy_gradient``."""
    mark_BT: Tensor | None
    """What the control's ``mark`` set aside for these rows; None if it has none."""


@runtime_checkable
class EntropyControl(Protocol):
    """A weight on the policy loss, a term of the loss, or both; None for the one that it does not use.

    Optional on the class:

    - ``needs``: among others ``entropy`` and ``entropy_drift`` of the policy before the batch's first update, and
      ``logp`` of the policy before this very mini-batch's step, which is ``minibatch.logp_BT`` in ``prepare``.
    - ``entropy_gradient: bool`` (an attribute or property, default False): whether ``penalty`` is to be given
      entropies. They carry a gradient only if some control says so.
    - ``mark(state, minibatch) -> mark_BT``: a number per token for ``penalty``, which sees a part of the rows only.
      Called once per mini-batch, like ``prepare``.
    - ``several_updates: bool``: that it does nothing in the first update of a batch, so a recipe with one update per
      batch is warned of.
    - ``unit_scale: tuple[str, ...]``: options whose values are for advantages that deviate by about 1, so a recipe with
      others is warned of.
    """

    def prepare(self, state: Any, minibatch: Batch) -> Tensor | None:
        """``weight_BT`` that multiplies the policy loss: once per mini-batch, whole and detached, before any split."""
        ...

    def penalty(self, state: Any, view: PenaltyView) -> Tensor | None:
        """``penalty_BT``, minimised with the loss."""
        ...


entropy_controls: Registry[EntropyControl] = Registry(
    "entropy_controls", EntropyControl, "How the policy is kept from becoming certain too early"
)


@entropy_controls.register(
    "bonus", source="Asynchronous Methods for Deep Reinforcement Learning (arXiv 1602.01783)", evidence="end to end"
)
@dataclass(frozen=True)
class Bonus:
    """A fixed bonus for entropy: the loss gets ``-coefficient H`` at each trained token, aggregated like the rest.

    H is the entropy over the whole vocabulary, with its gradient.
    """

    coefficient: Annotated[float, option("weight of the entropy", ge=0)] = 0.001

    @property
    def entropy_gradient(self) -> bool:
        """Whether there is a penalty at all."""
        return self.coefficient > 0

    def prepare(self, state: Any, minibatch: Batch) -> None:
        return None

    def penalty(self, state: Any, view: PenaltyView) -> Tensor | None:
        return None if view.entropy_BT is None else -self.coefficient * view.entropy_BT


@entropy_controls.register(
    "adaptive_bonus", source="Skywork Open Reasoner 1 Technical Report (arXiv 2505.22312)", evidence="end to end"
)
@dataclass(frozen=True)
class AdaptiveBonus:
    """A bonus for entropy while the mean entropy is at most ``target``, with a coefficient that looks for it.

    In a mini-batch of mean entropy Hbar the loss gets ``-c H`` if ``Hbar <= target`` and nothing above it. After each
    batch, ``c <- clip(c + delta, minimum, maximum)`` if the batch's ``Hbar <= target``, else ``c - delta`` likewise:
    the coefficient applied is the one before this. Hbar is over the tokens that a policy sampled, before the batch's
    first update; it is annotated, so that a part of a mini-batch knows the whole's.

    The rule and its defaults are those of TRL's implementation, which names the report. There the coefficient moves
    with every optimizer step, here with every batch. A target of 0.2 nats is rarely met: set it near the entropy of
    early training.
    """

    target: Annotated[float, option("mean entropy to hold", unit="nats per token", ge=0)] = 0.2
    delta: Annotated[float, option("change of the coefficient per batch", gt=0)] = 0.005
    coefficient: Annotated[float, option("the coefficient to start from", ge=0)] = 0.0
    minimum: Annotated[float, option("least coefficient", ge=0)] = 0.0
    maximum: Annotated[float, option("largest coefficient", gt=0)] = 1.0
    needs: ClassVar[tuple[str, ...]] = ("entropy",)
    entropy_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.minimum <= self.coefficient <= self.maximum:
            raise UserError(
                f"the coefficient starts at {self.coefficient:g}, which is not between minimum {self.minimum:g} and "
                f"maximum {self.maximum:g}"
            )

    def init(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def observe(self, state: Any, signals: Signals) -> dict[str, float]:
        entropy = mean_entropy(signals.batch)
        if entropy is None:
            return state
        moved = state["coefficient"] + (self.delta if entropy <= self.target else -self.delta)
        return {"coefficient": min(max(moved, self.minimum), self.maximum)}

    def prepare(self, state: Any, minibatch: Batch) -> None:
        return None

    def mark(self, state: Any, minibatch: Batch) -> Tensor:
        """The coefficient of this mini-batch, at every trained token."""
        entropy = mean_entropy(minibatch)
        coefficient = state["coefficient"] if entropy is not None and entropy <= self.target else 0.0
        return coefficient * minibatch.loss_mask_BT.float()

    def penalty(self, state: Any, view: PenaltyView) -> Tensor:
        assert view.entropy_BT is not None and view.mark_BT is not None
        return -view.mark_BT * view.entropy_BT


def mean_entropy(batch: Batch) -> float | None:
    """Mean annotated entropy of the tokens that a policy sampled; None where there is none, or it is not annotated.

    The latter is so where the policy rests, such as while a critic learns first.
    """
    if batch.entropy_BT is None:
        return None
    entropy_N = batch.entropy_BT[in_order(batch, sampled_tokens(batch))].double()
    return float(entropy_N.mean()) if len(entropy_N) else None


@entropy_controls.register(
    "high_entropy",
    source="Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM "
    "Reasoning (arXiv 2506.01939)",
    evidence="end to end",
)
@dataclass(frozen=True)
class HighEntropy:
    """Only the tokens of highest entropy are trained on: the top ``share`` of the mini-batch.

    Of the N tokens that a policy sampled, ``ceil(share N)`` keep their policy loss; among equal entropies the first
    by (rollout key, position). Entropies are of the policy before the batch's first update. KL, bonuses and
    demonstrations are left as they are.

    With ``denominator: kept`` the kept tokens weigh ``N / kept``, so that under ``token_mean`` the loss is their mean;
    under other aggregations it is that factor and nothing more. ``all`` leaves the aggregation's counts alone.
    Unverified: that the paper divides by the kept ones.
    """

    share: Annotated[float, option("of the tokens that are kept", gt=0, le=1)] = 0.2
    denominator: Annotated[Literal["kept", "all"], option("tokens that token_mean divides by")] = "kept"
    needs: ClassVar[tuple[str, ...]] = ("entropy",)

    def prepare(self, state: Any, minibatch: Batch) -> Tensor | None:
        assert minibatch.entropy_BT is not None, "annotate with what the objective needs"
        places = in_order(minibatch, sampled_tokens(minibatch))
        entropy_N = minibatch.entropy_BT[places]
        if not len(entropy_N):
            return None
        kept = share_up(self.share, len(entropy_N))
        weight_N = entropy_N.new_zeros(len(entropy_N))
        weight_N[largest(entropy_N, kept)] = len(entropy_N) / kept if self.denominator == "kept" else 1.0
        return placed(minibatch, places, weight_N, 1.0)

    def penalty(self, state: Any, view: PenaltyView) -> None:
        return None
