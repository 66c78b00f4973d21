"""Imports what a recipe names: plugins, which register components, and modules of reward functions."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignment.recipe_errors import did_you_mean
from alignment.recipe_sections import PATH_PATTERN
from alignment.recipe_tree import Node, Place, Problem

_HEAVY = ("transformers", "trl", "peft", "datasets")
"""Checking a recipe must stay fast: of these, only whether they are installed is looked at."""


def import_problems(root: Node, folders: Sequence[Path]) -> list[Problem]:
    """Imports the recipe's plugins and looks its reward functions up; what fails, and why.

    ``folders`` join the end of ``sys.path``, so that a module beside a recipe can be imported but never takes the
    place of an installed one: a module that is hidden that way is a problem of its own.
    """
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    importlib.invalidate_caches()
    problems = [Problem(root.mark, (), message)] if (message := _shipped_rewards()) else []
    for place, node in _named(root):
        message = _plugin(node.value, folders) if place[0] == "plugins" else _function(node.value, folders)
        if message:
            problems.append(Problem(node.mark, place, message))
    return problems


def _named(root: Node) -> Iterator[tuple[Place, Node]]:
    """Plugins and dotted paths of functions; what is no text is left to the schema."""
    plugins, rewards = root.value.get("plugins"), root.value.get("rewards")
    for index, node in enumerate(plugins.value if plugins and isinstance(plugins.value, list) else []):
        if isinstance(node.value, str):
            yield ("plugins", index), node
    for index, node in enumerate(rewards.value if rewards and isinstance(rewards.value, list) else []):
        function = node.value.get("function") if isinstance(node.value, dict) else None
        if function and isinstance(function.value, str):
            yield ("rewards", index, "function"), function


def _shipped_rewards() -> str | None:
    """Registers the rewards that ship with this project; why that failed, if it did."""
    spec = importlib.util.find_spec("rewards")
    if spec is None or spec.submodule_search_locations is None:
        found = spec.origin if spec else "no module"
        return (
            f"'rewards' is the package of rewards that ships with alignment, but {found} comes before it on sys.path; "
            f"rename that file, e.g. to my_rewards.py"
        )
    importlib.import_module("rewards")
    return None


def _plugin(name: str, folders: Sequence[Path]) -> str | None:
    if not all(part.isidentifier() for part in name.split(".")):
        return f"'{name}' is not the name of a module; write it as in 'import my_lab.rewards', without .py"
    return _hidden(name, folders) or _import(name, folders)


def _function(dotted: str, folders: Sequence[Path]) -> str | None:
    module, _, attribute = dotted.rpartition(".")
    if re.fullmatch(PATH_PATTERN, dotted) is None:
        return None  # the schema tells what a dotted path looks like
    root = module.partition(".")[0]
    if root in _HEAVY:
        return None if _origin(root) else f"'{root}' is not installed"
    failed = _hidden(module, folders) or _import(module, folders)
    if failed:
        return failed
    found = getattr(sys.modules[module], attribute, None)
    if callable(found):
        return None
    names = [name for name, value in vars(sys.modules[module]).items() if callable(value) and not name.startswith("_")]
    if found is not None:
        return f"'{dotted}' is not a function"
    return f"module '{module}' has no function '{attribute}'{did_you_mean(attribute, names)}"


def _import(name: str, folders: Sequence[Path]) -> str | None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            return f"cannot import '{name}': {error}"
        beside = [path.stem for folder in folders for path in folder.glob("*.py")]
        where = ", ".join(str(folder) for folder in folders)
        return f"there is no module '{name}', neither installed nor in {where}{did_you_mean(name, beside)}"
    except (Exception, SystemExit) as error:  # whatever a user's module may do when it is imported
        return f"cannot import '{name}': {type(error).__name__}: {error}"
    return None


def _hidden(name: str, folders: Sequence[Path]) -> str | None:
    """Why a module beside the recipe is not the one that its name imports, if so."""
    root = name.partition(".")[0]
    origin = _origin(root)
    for folder in folders:
        own = next((p for p in (folder / f"{root}.py", folder / root / "__init__.py") if p.is_file()), None)
        if own is not None and origin is not None and origin.resolve() != own.resolve():
            remedy = f"my_{root}" if not root.startswith("my_") else f"{root}_2"
            return (
                f"{own} cannot be imported: the name '{root}' belongs to {origin}; rename the file, "
                f"e.g. to {own.with_name(remedy + '.py').name if own.name != '__init__.py' else remedy}, "
                f"and the recipe's '{name}' with it"
            )
    return None


def _origin(root: str) -> Path | None:
    """The file that ``import root`` loads, without loading it; the name itself for a built-in module."""
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):  # ValueError: a module without a spec, such as __main__
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None
