"""The choice of components that makes an algorithm: the ``algorithm:`` mapping of an online stage."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from alignment.algorithms import (  # noqa: F401 - they register components
    covariance,
    ensembles,
    experimental_mixers,
    gradient_weights,
    grpo_guard,
    hypervolume,
    lagrangian,
    normalised_sum,
    off_policy_mixers,
    recap,
    shuffled,
    steer,
)
from alignment.algorithms.advantages import Advantage, Grpo, advantages
from alignment.algorithms.aggregations import Aggregation, TokenMean, aggregations
from alignment.algorithms.corrections import Correction, Tis, corrections
from alignment.algorithms.entropy_controls import EntropyControl
from alignment.algorithms.entropy_controls import entropy_controls as controls
from alignment.algorithms.kl_penalties import KLPenalty, kl_penalties
from alignment.algorithms.mixers import Mixer, NoMix, mixers
from alignment.algorithms.policy_losses import Clip, PolicyLoss, policy_losses
from alignment.algorithms.state import annotations
from alignment.algorithms.weightings import Fixed, Weighting, weightings
from alignment.errors import UserError
from alignment.registry import component, option


@dataclass(frozen=True)
class Algorithm:
    """From rewards to the loss. The defaults are GRPO with a clipped loss, a token mean and no reference."""

    advantage: Annotated[Advantage, component(advantages)] = Grpo()
    policy_loss: Annotated[PolicyLoss, component(policy_losses)] = Clip()
    aggregation: Annotated[Aggregation, component(aggregations)] = TokenMean()
    weighting: Annotated[Weighting, component(weightings)] = Fixed()
    kl: Annotated[KLPenalty, component(kl_penalties)] | None = None
    entropy_controls: tuple[Annotated[EntropyControl, component(controls)], ...] = ()
    correction: Annotated[Correction, component(corrections)] | None = Tis()
    mixer: Annotated[Mixer, component(mixers)] = NoMix()
    positive_nll: Annotated[
        float, option("of the negative log-likelihood of correct rollouts, added to the loss (VAPO: 0.1)", ge=0)
    ] = 0.0
    epochs: Annotated[int, option("times that each batch is gone through", ge=1)] = 1
    minibatches: Annotated[int, option("optimizer updates per epoch", ge=1)] = 1

    __pydantic_config__: ClassVar[Any] = {
        "extra": "forbid",
        "validate_default": True,
        "arbitrary_types_allowed": True,
    }

    def __post_init__(self) -> None:
        if self.kl is not None and self.kl.apply_to == "reward" and getattr(self.weighting, "streams", False):
            raise UserError(
                "kl.apply_to 'reward' has no stream to go to when the weighting mixes advantages of separate "
                "components; set kl.apply_to to 'loss'"
            )

    def components(self) -> dict[str, Any]:
        """Its components by their place in the recipe, which is where their state is kept."""
        several = {f"entropy_controls.{i}": control for i, control in enumerate(self.entropy_controls)}
        single = ("advantage", "policy_loss", "aggregation", "weighting", "kl", "correction", "mixer")
        named = {name: getattr(self, name) for name in single}
        return {name: c for name, c in {**named, **several}.items() if c is not None}

    @property
    def needs(self) -> frozenset[str]:
        """What its components ask to have computed; the number of updates per batch may add ``old_logp``."""
        return annotations(self.components().values())
