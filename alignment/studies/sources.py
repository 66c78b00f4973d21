"""What a study follows from, beside its claim: its recipe, the modules that it brings of its own, and its data."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from alignment.data.load import SECTIONS, read_section
from alignment.recipe import Recipe

OURS = {"alignment", "rewards", "launch"}


def sources(recipe_file: Path) -> dict[str, str]:
    """SHA-256 of the recipe, and of all modules beside it that its arms have loaded, by path from there."""
    beside = recipe_file.resolve().parent
    files = {recipe_file.resolve()}
    for name, module in [*sys.modules.items()]:
        if "." not in name and name not in OURS:
            files |= {path for path in _files(module, beside)}
    return {str(path.relative_to(beside)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def data_of(recipes: Iterable[Recipe]) -> dict[str, list[str]]:
    """SHA-256 of the rows of every section of ``data``, as a run keeps it; several where recipes differ in it.

    Raises:
        UserError: One cannot be read.
    """
    distinct: dict[tuple[str, str], Recipe] = {}
    for recipe in recipes:
        said = recipe.resolved()["data"]
        distinct |= {(name, json.dumps(said[name], sort_keys=True)): recipe for name in SECTIONS}
    found: dict[str, list[str]] = {}
    for (name, _), recipe in sorted(distinct.items(), key=lambda item: item[0]):
        if (section := read_section(recipe, name)) is not None:
            found.setdefault(name, []).append(section.digest)
    return found


def _files(module: ModuleType, beside: Path) -> Iterator[Path]:
    """Of a module in the folder ``beside``, its file, or all files of a package."""
    if hasattr(module, "__path__"):
        folders = [Path(folder).resolve() for folder in module.__path__]
        yield from (path for folder in folders if folder.parent == beside for path in folder.rglob("*.py"))
    elif getattr(module, "__file__", None) and (path := Path(str(module.__file__)).resolve()).parent == beside:
        yield path
