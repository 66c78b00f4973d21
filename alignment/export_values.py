"""Turns the value model of a run's checkpoint into a folder that critics, decodings and evaluations read."""

import logging
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from alignment.adapters import merged_weights
from alignment.checkpoint import Checkpoints, load_state
from alignment.control import share_control_tokens
from alignment.engines.config import Site
from alignment.engines.optimizer import HEAD
from alignment.engines.reward_roles import RewardRoleSpec
from alignment.engines.value_model import ValueModel, save_value_model
from alignment.engines.value_roles import HeadRoleSpec, ValueRoleSpec
from alignment.errors import UserError
from alignment.export import empty_target, model_of
from alignment.models import Tokenizer
from alignment.origin import Origin, copy_policy
from alignment.recipe import load
from alignment.runs import Run, resolve
from alignment.tensorfile import copy_into, read_tensors, weights_of

log = logging.getLogger(__name__)


def export_value_model(run: str, folder: str | Path, role: str = "critic", output: str | Path = "runs") -> Path:
    """Writes the value model of a checkpoint, which is verified first, into ``folder``.

    Args:
        run: ``RUN[@step|@best]``; the stage that the checkpoint is of must have the model.
        folder: Must be empty or not exist. It appears with all its files or not at all.
        role: ``critic`` (also the value model of a stage ``value``) or ``prompt_value``.
        output: Where names of runs are looked up.

    Returns:
        ``folder``.

    Raises:
        UserError: There is no such run, step or model, or ``folder`` is in use.
        CheckpointDamaged: The checkpoint is not what was written.
    """
    target = empty_target(folder)
    model, tokenizer = load_run_values(run, role, output)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".tmp-{target.name}-{uuid4().hex}")
    try:
        save_value_model(model, tokenizer, staging)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def load_run_values(run: str, role: str = "critic", output: str | Path = "runs") -> tuple[ValueModel, Tokenizer]:
    """The value model of ``RUN[@step|@best]`` and the policy's tokenizer; adapters are added to the weights.

    Raises:
        UserError: As :func:`export_value_model`.
        CheckpointDamaged: The checkpoint is not what was written.
    """
    place, which = resolve(run, output)
    source = Run(place)
    saved = Checkpoints(source.checkpoints).load(which, log.warning)
    recipe = load([source.recipe], beside=source.beside)
    stage = recipe.stages[load_state(saved.folder).stage]
    config, seed = model_of(source)
    policy = Origin(config, seed).make()
    site = Site(policy, folders=tuple(map(str, recipe.plugin_folders)))
    roles = stage.roles(site, tuple(s.column for s in recipe.reward_specs))
    if role not in roles or isinstance(roles[role], str):
        has = [name for name, spec in roles.items() if not isinstance(spec, str)]
        raise UserError(
            f"{run}: its stage '{stage.name}' has no model '{role}' to export; it has {', '.join(has) or 'none'}"
        )
    spec, file = roles[role], saved.folder / "learner" / f"role-{role}.safetensors"
    if isinstance(spec, HeadRoleSpec):
        copy_policy(saved.folder, policy.module)
        model = ValueModel(_merged(policy.module).base_model, spec.shape)  # pyright: ignore[reportArgumentType]
        copy_into(dict(model.head.named_parameters()), _without_prefix(read_tensors(file), HEAD))
        return model.eval(), policy.tokenizer
    spec = spec.as_values if isinstance(spec, RewardRoleSpec) else spec
    assert isinstance(spec, ValueRoleSpec)
    model = _own(spec, file)
    share_control_tokens(model, policy.module)
    return model, policy.tokenizer  # it was trained on the policy's tokens


def _own(spec: ValueRoleSpec, file: Path) -> ValueModel:
    """A value model with weights of its own."""
    model, language_model = spec.make()
    own, new = weights_of(model), read_tensors(file)
    if odd := [n for n, t in new.items() if n not in own or own[n].shape != t.shape]:
        raise UserError(f"{file} is of a value model with other weights: {', '.join(sorted(odd)[:3])}")
    copy_into({name: own[name] for name in new}, new)
    if language_model is not None:
        merged = ValueModel(_merged(language_model).base_model, spec.shape)  # pyright: ignore[reportArgumentType]
        merged.head = model.head
        model = merged
    return model.eval()


def _merged(module: nn.Module) -> Any:
    """The language model without adapters, which are added to its weights."""
    if not hasattr(module, "get_base_model"):
        return module
    weights, wrapped = merged_weights(module), module
    base: Any = wrapped.unload()  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        base.load_state_dict(weights)
    return base


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
