"""Critics, value models and prompt value models as roles of a learner."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment.algorithms.value_losses import ValueObjective
from alignment.algorithms.values import state_mask
from alignment.engines.backend import Backend
from alignment.engines.optimizer import Slot
from alignment.engines.roles import Role, TrainedRole
from alignment.engines.steering import check_vocabulary, compare_vocabularies
from alignment.engines.value_model import (
    ValueHead,
    ValueModel,
    ValueShape,
    is_value_model,
    load_value_model,
    locate_value_model,
)
from alignment.errors import UserError
from alignment.models import Model
from alignment.origin import Origin
from alignment.types import Batch


class ValueRole:
    """A value model of its own, fitted to ``returns_BT``.

    Args:
        backend: Of a :class:`ValueModel`.
        slot: Its optimizer.
        shape: What its head puts out.
        epochs: Passes over each batch.
        minibatches: Optimizer steps per pass.
        of_prompts: It is asked about, and fitted to, ends of prompts alone.
    """

    def __init__(
        self, backend: Backend, slot: Slot, shape: ValueShape, epochs: int, minibatches: int, of_prompts: bool
    ) -> None:
        self.backend, self.shape, self.of_prompts = backend, shape, of_prompts
        self.slot: Slot | None = slot
        self.epochs, self.minibatches = epochs, minibatches
        self.objective = ValueObjective(shape.loss)

    @property
    def provides(self) -> tuple[str, ...]:
        """Values of the states of a batch, if it is trained on batches."""
        return () if self.of_prompts else ("values",)

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        """``values_BT`` of the states that sampled tokens lead to or start from; 0 elsewhere."""
        return _readout(self.backend.forward(micro.ids_BT), self.shape, micro)

    def prepare(self, minibatch: Batch) -> Batch:
        """See :class:`ValueObjective`."""
        return self.objective.prepare(minibatch)

    def loss(self, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`ValueObjective`."""
        output = self.backend.forward(micro.ids_BT)
        if not micro.loss_mask_BT.any():  # a row that stands in where a rank has none: all ranks go backward together
            return nothing_of(output), {}
        return self.objective.loss(output, micro)

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """See :class:`ValueObjective`."""
        return self.objective.finish(sums)


class HeadRole:
    """A value head on the policy's hidden states, trained in the policy's own steps: one loss, one pass, one optimizer.

    Args:
        backend: The policy's, which has the head.
        shape: What the head puts out.
        coefficient: Of the value loss, which is added to the policy's.
    """

    of_prompts = False
    provides = ("values",)
    slot: Slot | None = None

    def __init__(self, backend: Backend, shape: ValueShape, coefficient: float) -> None:
        self.backend, self.shape, self.coefficient = backend, shape, coefficient
        self.objective = ValueObjective(shape.loss)

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        """``values_BT``, by a pass through the policy; the learner takes them from a pass that it makes anyway."""
        return self.read(self.backend.forward(micro, "none", True)[2], micro)

    def read(self, output: Tensor, micro: Batch) -> dict[str, Tensor]:
        """``values_BT`` from what the head put out."""
        return _readout(output, self.shape, micro)

    def prepare(self, minibatch: Batch, prepared: Batch) -> Batch:
        """``prepared``, a mini-batch that the policy's objective has prepared, with what the value loss needs."""
        scaled = self.objective.prepare(minibatch)
        names = ("values_BT", "returns_BT", "value_scale_BT")  # the policy's objective clears what it does not read
        return replace(prepared, **{name: getattr(scaled, name) for name in names})

    def loss(self, output: Tensor, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted value loss of these rows, and sums under ``critic/``."""
        loss, sums = self.objective.loss(output, micro)
        return self.coefficient * loss, {f"critic/{name}": value for name, value in sums.items()}

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics under ``critic/``."""
        own = {name.removeprefix("critic/"): value for name, value in sums.items() if name.startswith("critic/")}
        return {f"critic/{name}": value for name, value in self.objective.finish(own).items()}


@dataclass(frozen=True)
class ValueRoleSpec:
    """A value model of its own. Where its body comes from: ``start``, or else ``origin``."""

    shape: ValueShape
    origin: Origin
    start: Any = None
    """Folder of a saved value model, which then also gives the head; or None."""
    options: Mapping[str, Any] | None = None
    """Of the learner, where they are others than the policy's: ``lr``, ``warmup_steps`` and the like."""
    epochs: int = 1
    minibatches: int = 1
    ahead: int = 0
    """Updates that it has before the policy's first, and its schedule more than the policy's."""
    of_prompts: bool = False

    def build(self, backend: Backend, config: Any, total_updates: int) -> ValueRole:
        """The role, in the processes of ``backend``.

        Raises:
            UserError: The saved value model puts out something else.
        """
        model, _ = self.make()
        own = backend.beside(model, replace(config, **(self.options or {})))
        slot = own.slot(total_updates + self.ahead)
        return ValueRole(own, slot, self.shape, self.epochs, self.minibatches, self.of_prompts)

    def check(self, policy: Model) -> None:
        """Whether it reads tokens as ``policy`` does. Rows of embeddings that no token has do not matter.

        Raises:
            UserError: Its tokenizer is another one, or cannot be read.
        """
        if self.start is not None:
            check_vocabulary(policy, locate_value_model(str(self.start)))
        elif policy.origin is None or self.origin.config != policy.origin.config:
            compare_vocabularies(policy, self.origin.make(weights=False).tokenizer, "the value model")

    def make(self) -> tuple[ValueModel, nn.Module | None]:
        """The value model as it begins, and the language model that its body is of, unless it was saved as one.

        Raises:
            UserError: The saved value model puts out something else.
        """
        if self.start is not None and is_value_model(self.start):
            model = load_value_model(self.start)
            if model.shape != self.shape:
                raise UserError(f"{self.start} is a value model with {model.shape}; the recipe asks for {self.shape}")
            return model, None
        language_model = self.origin.make().module
        return ValueModel.of(language_model, self.shape), language_model


@dataclass(frozen=True)
class HeadRoleSpec:
    """A value head on the policy's hidden states. The learner's backend has it already."""

    shape: ValueShape
    coefficient: float
    lr_ratio: float = 1.0
    """Its learning rate over the policy's."""

    def check(self, policy: Model) -> None:
        """It reads what the policy does."""

    def head(self, config: Any) -> ValueHead:
        """The head for a language model of this configuration of transformers."""
        text = config.get_text_config()
        return ValueHead(text.hidden_size, text.vocab_size, self.shape, self.lr_ratio)

    def build(self, backend: Backend, config: Any, total_updates: int) -> HeadRole:
        """The role of the head that ``backend`` has."""
        assert backend.head is not None, "the backend is made with the head"
        return HeadRole(backend, self.shape, self.coefficient)


def shared_head(roles: Mapping[str, Any] | None, config: Any) -> ValueHead | None:
    """The head that a learner's backend is to be made with; ``config`` is the policy's, of transformers."""
    spec = next((spec for spec in (roles or {}).values() if isinstance(spec, HeadRoleSpec)), None)
    return None if spec is None else spec.head(config)


class Roles(dict[str, Role]):
    """The roles of a learner by name, and other names that a recipe gave some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}

    def add(self, name: str, role: Role) -> None:
        """Adds a role.

        Raises:
            ValueError: The name is taken, or the role is to be trained and has no slot.
        """
        if name in self:
            raise ValueError(f"there is a role {name!r} already")
        if isinstance(role, TrainedRole) and role.slot is None:
            raise ValueError(f"role {name!r} has a loss but no slot to train with")
        self[name] = role

    def named(self, name: str) -> Role:
        """The role of that name, its own or another one."""
        return self[self.names.get(name, name)]

    @property
    def head(self) -> HeadRole | None:
        """A critic on the policy's own hidden states, if there is one."""
        return next((role for role in self.values() if isinstance(role, HeadRole)), None)

    @property
    def of_prompts(self) -> tuple[str, ...]:
        """Names under which roles may be asked about prompts."""
        return (*(name for name, role in self.items() if role.of_prompts), *self.names)


def prompt_batch(prompts: Sequence[Sequence[int]], targets: Tensor | None = None) -> Batch:
    """Prompts as rows, of which the state after the last token is asked for, or has ``targets`` ``[len(prompts)]``."""
    rows, width = len(prompts), max(map(len, prompts))
    ids_BT = torch.zeros(rows, width, dtype=torch.int64)
    for row, ids in zip(ids_BT, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    length_B = torch.tensor([len(ids) for ids in prompts])
    mask_BT = torch.arange(width) == length_B[:, None] - 1
    zeros_B, ones_B = torch.zeros(rows), torch.ones(rows)
    returns_BT = None
    if targets is not None:
        returns_BT = torch.where(mask_BT, targets.float()[:, None], torch.nan)
    return Batch(
        ids_BT=ids_BT,
        loss_mask_BT=mask_BT,
        length_B=length_B,
        group_B=torch.arange(rows),
        source_B=zeros_B.to(torch.int8),
        ratio_base_B=zeros_B.to(torch.int8),
        temperature_B=ones_B,
        behaviour_logp_BT=torch.zeros(rows, width),
        rewards_BK=torch.zeros(rows, 0),
        weights_K=torch.zeros(0),
        scored_B=ones_B.bool(),
        truncated_B=zeros_B.bool(),
        key_B=torch.arange(rows),
        returns_BT=returns_BT,
    )


def nothing_of(output: Tensor) -> Tensor:
    """0, whose gradient is 0 and goes all the way back, whatever ``output`` holds."""
    return torch.where(torch.zeros_like(output, dtype=torch.bool), output, 0.0).sum()


def _readout(output: Tensor, shape: ValueShape, micro: Batch) -> dict[str, Tensor]:
    values, mask_BT = shape.loss.readout(output), state_mask(micro.loss_mask_BT)
    return {"values_BT": torch.where(mask_BT if values.dim() == 2 else mask_BT[..., None], values, 0.0)}
