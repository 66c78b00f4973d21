"""The files that a study follows from, beside its claim: its recipe, and what it brings of its own."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

OURS = {"alignment", "rewards", "launch"}


def sources(recipe_file: Path) -> dict[str, str]:
    """SHA-256 of the recipe, and of all modules beside it that its arms have loaded, by path from there."""
    beside = recipe_file.resolve().parent
    files = {recipe_file.resolve()}
    for name, module in [*sys.modules.items()]:
        if "." not in name and name not in OURS:
            files |= {path for path in _files(module, beside)}
    return {str(path.relative_to(beside)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def _files(module: ModuleType, beside: Path) -> Iterator[Path]:
    """Of a module in the folder ``beside``, its file, or all files of a package."""
    if hasattr(module, "__path__"):
        folders = [Path(folder).resolve() for folder in module.__path__]
        yield from (path for folder in folders if folder.parent == beside for path in folder.rglob("*.py"))
    elif getattr(module, "__file__", None) and (path := Path(str(module.__file__)).resolve()).parent == beside:
        yield path
