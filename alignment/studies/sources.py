"""The files that a study follows from, beside its claim: its recipe, and what it brings of its own."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from alignment.recipe import Recipe


def sources(recipe_file: Path, recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the recipe, and of the modules of plugins and rewards that stand beside it, by path from there."""
    beside = recipe_file.resolve().parent
    named = [*recipe.plugins, *(spec.function for spec in recipe.reward_specs if isinstance(spec.function, str))]
    files = {recipe_file.resolve(), *(path for name in named for path in _files(name) if beside in path.parents)}
    return {str(path.relative_to(beside)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def _files(module: str) -> Iterator[Path]:
    """Of a module, which is loaded, all files of the package that it is in."""
    root = sys.modules.get(module.partition(".")[0])
    if root is not None and hasattr(root, "__path__"):
        yield from (path.resolve() for folder in root.__path__ for path in Path(folder).rglob("*.py"))
    elif root is not None and root.__file__ is not None:
        yield Path(root.__file__).resolve()
