"""Files that are either whole or noticed: atomic replacement, syncing to disk, and folders sealed by a manifest.

A sealed folder has a ``manifest.json`` with the size and sha256 of every other file in it, and a sha256 of itself.
A marker file would not do: one flipped bit in a tensor loads without complaint.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

JSON: TypeAlias = "Mapping[str, JSON] | list[JSON] | str | int | float | bool | None"
MANIFEST = "manifest.json"
SCHEMA = 1


class StorageError(OSError):
    """The disk failed the run: it is full, unreadable, or holds something else than what was written to it."""

    exit_code = 74
    """``EX_IOERR`` of ``sysexits.h``."""


def digest(value: JSON) -> str:
    """sha256 of the canonical JSON text of ``value``: the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Writes a file such that, whatever happens, ``path`` holds either all of the new content or all of the old.

    Without ``synced`` that is promised for as long as the machine runs, and nobody waits for the disk.
    """
    staged = path.with_name(f".tmp-{path.name}-{uuid4().hex}")
    try:
        staged.write_bytes(data)
        if synced:
            sync(staged)
        os.replace(staged, path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    if synced:
        sync(path.parent)


def render(body: Mapping[str, Any]) -> bytes:
    """JSON that carries a sha256 of itself; :func:`parse` is the inverse."""
    return json.dumps({**body, "sha256": digest(body)}, indent=1, sort_keys=True).encode()


def parse(path: Path) -> dict[str, Any]:
    """What :func:`render` made.

    Raises:
        ValueError: The file is not byte for byte what was written.
    """
    raw = path.read_bytes()
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"is not readable as JSON ({error})") from error
    if not isinstance(body, dict) or "sha256" not in body:
        raise ValueError("is not what was written (it has no sha256 of itself)")
    del body["sha256"]
    if render(body) != raw:
        raise ValueError("is not what was written (its own sha256 differs)")
    return body


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Syncs all that ``folder`` holds, then adds the manifest: ``about`` and each file's size and sha256.

    Raises:
        ValueError: ``about`` does not come back from JSON as it is, or there is a link among the files.
    """
    check_json("the manifest", dict(about))
    paths = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    assert MANIFEST not in paths, f"{MANIFEST} is written here, and by nobody else"
    for path in [*paths.values(), *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    files = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in paths.items()}
    (folder / MANIFEST).write_bytes(render({"schema": SCHEMA, **about, "files": files}))
    sync(folder / MANIFEST)
    sync(folder)


def problems_of(folder: Path) -> list[str]:
    """How a sealed folder differs from its manifest; each problem begins with the file's name. Empty: it does not."""
    try:
        manifest = parse(folder / MANIFEST)
        paths = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {error}"]
    if manifest.get("schema") != SCHEMA:
        return [f"{MANIFEST}: has schema version {manifest.get('schema')!r}, this program reads version {SCHEMA}"]
    problems = []
    for name, expected in manifest["files"].items():
        path = paths.pop(name, None)
        if problem := "missing" if path is None else _difference(path, expected):
            problems.append(f"{name}: {problem}")
    return problems + [f"{name}: not in the manifest" for name in sorted(paths) if name != MANIFEST]


def check_json(what: str, value: Any) -> None:
    """Raises ``ValueError`` naming ``what`` and the place, if JSON would bring ``value`` back as something else."""
    try:
        place = _changed(value, json.loads(json.dumps(value)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be saved as JSON: {error}") from error
    if place is not None:
        allowed = "dict (with str keys), list, str, int, float, bool and None do"
        raise ValueError(f"{what} does not come back from JSON as it is: {place}; {allowed}")


def _changed(value: Any, back: Any, place: str = "value") -> str | None:
    if isinstance(value, dict) and isinstance(back, dict) and list(value) == list(back):
        parts = ((value[key], back[key], f"{place}[{key!r}]") for key in value)
    elif isinstance(value, list) and isinstance(back, list):
        parts = ((a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(value, back, strict=True)))
    elif value == back or (isinstance(value, float) and repr(value) == repr(back)):  # repr: NaN does not equal itself
        return None
    else:
        return f"{place} is {value!r} and becomes {back!r}"
    return next((found for part in parts if (found := _changed(*part))), None)


def _files(folder: Path) -> list[Path]:
    """All that is not a folder. A link would let the content change after it was hashed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    if links := [path.relative_to(folder).as_posix() for path in paths if path.is_symlink()]:
        raise ValueError(f"links instead of files: {', '.join(links)}")
    return paths


def _difference(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {size} bytes, {expected['size']} were written"
        return None if _sha256(path) == expected["sha256"] else "is not what was written (its sha256 differs)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
