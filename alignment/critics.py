"""Critics: what a recipe says of the value models of a stage. Light: their weights are made where the learner is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from alignment.algorithms.value_losses import Scalar, ValueLoss, value_losses
from alignment.engines.roles import RoleSpec
from alignment.errors import UserError
from alignment.origin import Origin
from alignment.recipe_sections import ModelConfig, folder_beside
from alignment.registry import Registry, component, option
from alignment.types import keyed_seed

Head = Literal["state", "vocabulary"]


@dataclass(frozen=True)
class Circumstances:
    """What the value models of a stage are made for."""

    policy: Origin
    """How the policy was made: a value model without a ``model`` of its own begins from the same weights."""
    folder: Path
    """Where relative paths start: the recipe's."""
    name: str
    """Of the role."""
    streams: Sequence[str] = ()
    """Reward components that have values of their own; empty: one value for all."""
    epochs: int = 1
    minibatches: int = 1
    ahead: int = 0
    """Updates that they have before the policy's first."""


@runtime_checkable
class Critic(Protocol):
    """A value model beside the policy, or a view of one."""

    def role(self, circumstances: Circumstances) -> RoleSpec | str:
        """What the learner makes; a text is another name for a role that it has."""
        ...


critics: Registry[Critic] = Registry("critics", Critic, "What predicts returns: for advantages, curricula and decoding")


@critics.register(
    "model",
    source="Proximal Policy Optimization Algorithms (arXiv 1707.06347), its value function",
    evidence="end to end",
)
@dataclass(frozen=True)
class ModelCritic:
    """A value model of its own: a body, a head that begins at zero, an optimizer.

    Its body is the policy's start, another model, or a value model that was saved before (``align export``), whose
    head comes with it. Everything of the learner that is not set here is as for the policy.
    """

    model: Annotated[ModelConfig | None, option("its body; null: as the policy begins")] = None
    start: Annotated[str | None, option("folder of a saved value model to go on from")] = None
    loss: Annotated[ValueLoss, component(value_losses), option("how it is fitted to returns")] = Scalar()
    head: Annotated[
        Head, option("value of a state, or of every next token at once (for decoding; only with the loss scalar)")
    ] = "state"
    lr: Annotated[float | None, option("learning rate; null: the policy's", gt=0)] = None
    warmup_steps: Annotated[
        int | None, option("over which its rate rises; null: as the policy's", unit="updates", ge=0)
    ] = None
    epochs: Annotated[int | None, option("times that each batch is gone through; null: as the policy", ge=1)] = None
    minibatches: Annotated[int | None, option("updates per epoch; null: as the policy", ge=1)] = None
    pretraining_steps: Annotated[
        int, option("first steps of the stage in which it learns and the policy rests", unit="steps", ge=0)
    ] = 0

    def __post_init__(self) -> None:
        if self.model is not None and self.start is not None:
            raise UserError("takes one of 'model' and 'start'; both are given")
        if self.model is not None and (self.model.path is None) == (self.model.build is None):
            found = "neither is given" if self.model.path is None else "both are given"
            raise UserError(f"model takes one of 'path' (a folder or a hub id) and 'build' (a new model); {found}")
        if self.head == "vocabulary" and self.loss.outputs > 1:
            raise UserError("head 'vocabulary' has one number per token, so its loss must be 'scalar'")

    def role(self, circumstances: Circumstances) -> RoleSpec:
        """See :class:`Critic`."""
        from alignment.engines.value_model import ValueShape
        from alignment.engines.value_roles import ValueRoleSpec

        here = circumstances
        origin = here.policy
        if self.model is not None:
            origin = Origin(self.model.located(here.folder), keyed_seed(here.policy.seed, here.name))
        options: dict[str, Any] = {"lr": self.lr, "warmup_steps": self.warmup_steps}
        return ValueRoleSpec(
            shape=ValueShape(self.loss, self.head, len(here.streams)),
            origin=origin,
            start=None if self.start is None else folder_beside(self.start, here.folder),
            options={name: value for name, value in options.items() if value is not None},
            epochs=self.epochs or here.epochs,
            minibatches=self.minibatches or here.minibatches,
            ahead=here.ahead,
            of_prompts=here.name == "prompt_value",
        )


@critics.register("head", source="this project", evidence="end to end")
@dataclass(frozen=True)
class HeadCritic:
    """A value head on the policy's own hidden states: one forward pass, one loss, one optimizer with the policy.

    ``loss = policy loss + coefficient * value loss``. The head is no part of what is published or exported.
    """

    loss: Annotated[ValueLoss, component(value_losses), option("how it is fitted to returns")] = Scalar()
    coefficient: Annotated[float, option("of the value loss beside the policy's", gt=0)] = 0.1
    lr_ratio: Annotated[float, option("learning rate of the head over the policy's", gt=0)] = 1.0

    def role(self, circumstances: Circumstances) -> RoleSpec:
        """See :class:`Critic`."""
        from alignment.engines.value_model import ValueShape
        from alignment.engines.value_roles import HeadRoleSpec

        return HeadRoleSpec(ValueShape(self.loss, "state", len(circumstances.streams)), self.coefficient, self.lr_ratio)


@critics.register("read_out", source="this project", evidence="end to end")
@dataclass(frozen=True)
class ReadOut:
    """The stage's critic as a prompt value model: its value at the end of the prompt. It learns with the critic."""

    def role(self, circumstances: Circumstances) -> str:
        """See :class:`Critic`."""
        return "critic"
