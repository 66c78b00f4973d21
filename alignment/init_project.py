"""The starting point that ``align init`` writes: a recipe, a reward function, data and a test."""

import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

from alignment.errors import UserError

_NAME = "PROJECT_NAME"


def write_scaffold(folder: Path) -> list[Path]:
    """Writes the starting files into ``folder``.

    Returns:
        What was written.

    Raises:
        UserError: One of the files is there already, or the folder cannot be written.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:100] or "my-run"
    # Templates carry .txt so that no tool takes them for code of this project.
    contents = {
        folder / path.with_suffix("") if path.suffix == ".txt" else folder / path: template.read_text(encoding="utf-8")
        for path, template in _templates(files("alignment") / "scaffold", PurePosixPath())
    }
    there = sorted(str(path) for path in contents if path.exists())
    if there:
        raise UserError(f"{', '.join(there)} would be overwritten; choose a folder that is empty or does not exist")
    try:
        for path, text in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(_NAME, name), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    return list(contents)


def _templates(folder: Traversable, place: PurePosixPath) -> Iterator[tuple[PurePosixPath, Traversable]]:
    for item in sorted(folder.iterdir(), key=lambda i: i.name):
        if item.is_dir():
            yield from _templates(item, place / item.name)
        else:
            yield place / item.name, item
