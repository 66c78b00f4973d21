"""Where a model comes from, so that any process can make the same one."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from alignment.adapters import mark_merged
from alignment.errors import UserError
from alignment.models import Model, load_model
from alignment.tensorfile import copy_into, digest, read_tensors, weights_of

if TYPE_CHECKING:
    from alignment.recipe_sections import ModelConfig


@dataclass(frozen=True)
class Origin:
    """What :func:`alignment.models.load_model` needs, and a checkpoint whose policy is laid over it."""

    config: "ModelConfig"
    """Its ``path``, if it is a folder, in full."""
    seed: int
    policy: Path | None = None
    """A verified checkpoint, which every process that makes the model can read."""

    def make(self, weights: bool = True) -> Model:
        """The model, on the CPU; ``weights=False`` gives shapes alone.

        Raises:
            UserError: It cannot be loaded, or the policy does not fit.
        """
        model = load_model(self.config, self.seed, weights)
        if weights and self.policy is not None:
            copy_policy(self.policy, model.module)
        return replace(model, origin=self)


def policy_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What training changed of the policy, by parameter name: all weights, or those of the adapter under LoRA."""
    return read_tensors(checkpoint / "learner" / "policy.safetensors")


def copy_policy(checkpoint: Path, module: nn.Module) -> None:
    """Lays the policy of a verified checkpoint over the weights of ``module``, which is a model of the same kind.

    Where adapters were merged into the base, the checkpoint has what became of it, and ``module`` remembers that.

    Raises:
        UserError: Names or shapes differ, or the weights that were not trained are not the ones of that run.
    """
    own, new = weights_of(module), policy_weights(checkpoint)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    if odd := (new.keys() - own.keys()) | (trained - new.keys()):
        raise UserError(f"{checkpoint} is of a model with other weights: {', '.join(sorted(odd)[:5])}")
    if odd := [n for n, t in new.items() if t.shape != own[n].shape]:
        raise UserError(f"{checkpoint} is of a model of another size: {', '.join(sorted(odd)[:5])}")
    record = json.loads((checkpoint / "learner" / "learner.json").read_text(encoding="utf-8"))
    if record["frozen"] != digest({name: t for name, t in own.items() if name not in new}):
        raise UserError(f"{checkpoint} was trained on another base model: set model.path (and revision) to that one")
    copy_into({name: own[name] for name in new}, new)
    if record.get("merged"):
        mark_merged(module, record["merged"])
