"""The checkpoint that ``align eval`` measures: a model folder, a hub id, or a run of this project."""

from pathlib import Path
from typing import Literal

import torch

from alignment.data.hub import names_folder
from alignment.durable import digest
from alignment.errors import UserError
from alignment.export import load_run
from alignment.models import Model, load_model
from alignment.recipe_sections import ModelConfig
from alignment.runs import resolve
from alignment.tensorfile import digest as digest_of_tensors
from alignment.tensorfile import weights_of

Dtype = Literal["float32", "bfloat16"]


def open_checkpoint(address: str, dtype: Dtype | None = None) -> Model:
    """The model at ``address``, on the GPU if there is one.

    Args:
        address: A folder that transformers can load, ``RUN[@step|@best]``, or a hub id, in this order.
        dtype: Of the parameters; None is float32 for folders and hub ids, and what the recipe said for runs.

    Raises:
        UserError: It is none of the three, or cannot be loaded.
        CheckpointDamaged: The run's checkpoint is not what was written.
    """
    model = _load(address, dtype)
    model.module.to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def dtype_of(model: Model) -> str:
    """In which numbers the model computes: ``float32``."""
    return str(next(model.module.parameters()).dtype).removeprefix("torch.")


def fingerprint(model: Model) -> str:
    """sha256 of all that decides what the model writes: weights, vocabulary, chat template."""
    tokenizer = model.tokenizer
    known = {"vocabulary": tokenizer.get_vocab(), "chat_template": str(tokenizer.chat_template)}
    return digest({**known, "weights": digest_of_tensors(weights_of(model.module))})


def _load(address: str, dtype: Dtype | None) -> Model:
    if not address.strip():
        raise UserError("the checkpoint is an empty text; give a model folder, a hub id or RUN[@STEP|@best]")
    config = ModelConfig(path=address, dtype=dtype or "float32")
    folder = Path(address).expanduser()
    if (folder / "config.json").is_file():
        return load_model(config, 0)
    try:
        resolve(address)
    except UserError as no_run:
        if "@" in folder.name:
            raise
        if names_folder(address) and not folder.exists():
            raise UserError(f"there is no model folder {address}, and {no_run}") from no_run
        try:
            return load_model(config, 0)
        except UserError as error:
            raise UserError(f"{error}\nIt is no run of this project either: {no_run}") from error
    return load_run(address, dtype=dtype)
