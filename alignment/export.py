"""Turns a checkpoint into an ordinary Hugging Face folder: configuration, safetensors and tokenizer."""

import logging
import shutil
from pathlib import Path
from typing import Literal, TypeAlias
from uuid import uuid4

import torch
from pydantic import ValidationError

from alignment.adapters import merged_names
from alignment.checkpoint import Checkpoints
from alignment.errors import UserError
from alignment.model_saving import save_model
from alignment.models import Model, load_model
from alignment.origin import copy_policy
from alignment.recipe_sections import ModelConfig
from alignment.runs import Run, resolve
from alignment.types import keyed_seed

log = logging.getLogger(__name__)
Form: TypeAlias = Literal["auto", "adapter", "merged"]


def export(run: str, folder: str | Path, form: Form = "auto", output: str | Path = "runs") -> Path:
    """Writes the policy of a checkpoint, which is verified first, into ``folder``.

    Args:
        run: ``RUN[@step|@best]``.
        folder: Must be empty or not exist. It appears with all its files or not at all.
        form: ``adapter``: the LoRA adapter alone. ``merged``: whole weights, with a LoRA adapter added to them.
            ``auto``: the adapter where there is one and its base can be loaded by path, whole weights otherwise, also
            where earlier adapters were merged into the base.
        output: Where names of runs are looked up.

    Returns:
        ``folder``.

    Raises:
        UserError: There is no such run or step, ``folder`` is in use, or there is no adapter to write.
        CheckpointDamaged: The checkpoint is not what was written.
    """
    found, which = resolve(run, output)
    source = Run(found)
    config, seed = model_of(source)
    _refuse_adapter(form, config)
    target = empty_target(folder)
    saved = Checkpoints(source.checkpoints).load(which, log.warning)

    model = load_model(config, seed)
    copy_policy(saved.folder, model.module)
    alone = config.lora is not None and config.path is not None and not merged_names(model.module)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".tmp-{target.name}-{uuid4().hex}")
    try:
        save_model(model, staging, merge=not alone if form == "auto" else form == "merged")
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def load_run(run: str, output: str | Path = "runs", dtype: Literal["float32", "bfloat16"] | None = None) -> Model:
    """The model of ``RUN[@step|@best]`` with the policy of that checkpoint, which is verified first.

    Args:
        run: ``RUN[@step|@best]``.
        output: Where names of runs are looked up.
        dtype: Of the parameters, in place of the run's own.

    Raises:
        UserError: There is no such run or step, or its base model cannot be loaded.
        CheckpointDamaged: The checkpoint is not what was written.
    """
    found, which = resolve(run, output)
    config, seed = model_of(Run(found))
    saved = Checkpoints(Run(found).checkpoints).load(which, log.warning)
    model = load_model(config, seed)
    copy_policy(saved.folder, model.module)
    if dtype is not None:
        model.module.to(getattr(torch, dtype))
    return model


def load_policy(model: Model, run: str, output: str | Path = "runs") -> None:
    """Copies the policy of ``RUN[@step|@best]`` into a model of the same kind; the checkpoint is verified first.

    Raises:
        UserError: There is no such run or step, the model has other weights, or those that were not trained are not
            the ones of that run.
        CheckpointDamaged: The checkpoint is not what was written.
    """
    source, which = resolve(run, output)
    copy_policy(Checkpoints(Run(source).checkpoints).load(which, log.warning).folder, model.module)


def empty_target(folder: str | Path) -> Path:
    """A folder to write to.

    Raises:
        UserError: It has something in it.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not an empty folder; choose another one, nothing is overwritten")
    return target


def model_of(run: Run) -> tuple[ModelConfig, int]:
    """The model of a run's recipe, and the seed that its fresh weights were drawn with."""
    recipe = run.read_recipe()
    try:
        config = ModelConfig.model_validate(recipe["model"]).located(run.beside)
        return config, keyed_seed(recipe["run"]["seed"], "model")
    except (ValidationError, KeyError) as error:
        raise UserError(f"{run.recipe}: its model is not what this program writes: {error}") from error


def _refuse_adapter(form: Form, config: ModelConfig) -> None:
    if form == "adapter" and config.lora is None:
        raise UserError("--adapter: the run has no model.lora, so there is no adapter; use --merged")
    if form == "adapter" and config.path is None:
        raise UserError("--adapter: its base was built by the recipe and is in no folder to load it from; use --merged")
