"""The decoding of an evaluation: what ``align eval --decoding`` means, and what the results keep of it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from alignment.algorithms.decodings import Decoding, Plain, decodings
from alignment.durable import digest
from alignment.engines.steering import locate_models, positions_of
from alignment.errors import UserError
from alignment.models import Model
from alignment.positions import max_positions
from alignment.recipe_errors import did_you_mean

ADDRESSES = ("models", "model", "tuned", "base")
"""Options that say where models are."""
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "value_model.json", "tokenizer.json", "tokenizer.model")


def choose_decoding(given: str | Mapping[str, Any] | None, options: Mapping[str, Any]) -> Decoding | None:
    """The decoding that the command asks for; None for the policy's own distribution.

    Args:
        given: A name, or a mapping with ``name`` and options.
        options: Further options, which win.

    Raises:
        UserError: There is no such decoding, or an option is unknown, missing or has a bad value.
    """
    if given is None:
        if options:
            raise UserError(f"--set decoding.{next(iter(options))}: give --decoding NAME as well")
        return None
    asked = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = asked.get("name")
    if not isinstance(name, str) or name not in decodings.names():
        near = did_you_mean(str(name), decodings.names())
        raise UserError(f"--decoding: there is no decoding '{name}'{near} (available: {', '.join(decodings.names())})")
    known = [option["name"] for option in decodings[name].options()]
    asked |= options
    for key in asked.keys() - {"name", *known}:
        near = did_you_mean(key, known)
        raise UserError(f"decoding.{key}: '{name}' has no option '{key}'{near} (options: {', '.join(known) or 'none'})")
    try:
        found = decodings.build(asked)
    except ValidationError as error:
        # Of an option that may be one thing or several there is an error for each; the place is the option's.
        raise UserError("\n".join(dict.fromkeys(_told(name, dict(e)) for e in error.errors()))) from error
    except PydanticCustomError as error:
        raise UserError(f"--decoding {name}: {error.message()}") from error
    return None if isinstance(found, Plain) else found


def describe_decoding(decoding: Decoding | None) -> dict[str, Any] | None:
    """For ``config.json``: name, options, and a digest of the weights of each model, in the order of their addresses.

    Raises:
        UserError: A model is missing.
    """
    if decoding is None:
        return None
    return {**decodings.dump(decoding), "weights": [_digest(folder) for folder in locate_models(decoding)]}


def decoding_identity(described: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What completions depend on: not where models are, but what is in them."""
    return None if described is None else {k: v for k, v in described.items() if k not in ADDRESSES}


def shown_decoding(described: Mapping[str, Any] | None) -> str:
    """In one line: ``value_augmented (beta 3.0, top_k 20)``."""
    if described is None:
        return "plain"
    options = ", ".join(f"{k} {v}" for k, v in described.items() if k not in ("name", "weights"))
    return f"{described['name']} ({options})"


def longest_row(model: Model, decoding: Decoding | None) -> int | None:
    """Tokens of the longest row that the policy and all models of the decoding can take; None where none says."""
    folders = [] if decoding is None else locate_models(decoding)
    limits = [max_positions(model.module), *map(positions_of, folders)]
    return min((n for n in limits if n is not None), default=None)


def _told(name: str, error: Mapping[str, Any]) -> str:
    place = next((str(part) for part in error["loc"]), "")
    if error["type"] == "missing":
        return f"decoding.{place}: '{name}' needs it; give --set decoding.{place}=..."
    message = error["msg"].removeprefix("Value error, ")
    return f"decoding.{place}: {message}, not {error['input']!r}" if place else f"decoding: {message}"


def _digest(folder: Path) -> str:
    """sha256 over the files that decide what a model says."""
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    sums: dict[str, str] = {}
    for file in files:
        with file.open("rb") as opened:
            sums[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digest(sums)
