"""Prompts read from files."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from alignment.errors import UserError
from alignment.registry import option
from alignment.sources import Dataset, sources
from alignment.types import Prompt

SHOWN_BAD_ROWS = 20


@sources.register("jsonl", source="this project")
@dataclass(frozen=True)
class Jsonl:
    """A file with one JSON object per line. A row's id hangs on its content, so adding rows renames none."""

    path: Annotated[str, option("the file; a relative path starts at the recipe's folder", min_length=1)]
    field_map: Annotated[
        dict[str, str], option("our column: the file's column, such as prompt: question; each must be in every row")
    ] = field(default_factory=dict)

    def load(self, base: Path) -> Dataset:
        """Its rows, columns renamed.

        Raises:
            UserError: No such file, an empty one, or bad rows: each is named with its line.
        """
        path = base / Path(self.path).expanduser()
        try:
            lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        except OSError as error:
            where = "" if Path(self.path).is_absolute() else f" (a relative path starts at {base})"
            raise UserError(f"cannot read {path}: {error.strerror or error}{where}") from error
        rows: list[dict[str, Any]] = []
        bad: list[str] = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row, faults = self._parse(line)
                rows.append(row)
                bad += [f"{path}:{number}: {fault}" for fault in faults]
        if bad:
            more = [f"and {len(bad) - SHOWN_BAD_ROWS} more"] if len(bad) > SHOWN_BAD_ROWS else []
            raise UserError("\n".join([*bad[:SHOWN_BAD_ROWS], *more]))
        if not rows:
            raise UserError(f"{path} has no rows; each line must be a JSON object such as {{'prompt': '1+1='}}")
        return Dataset([Prompt(key, row) for key, row in zip(_ids(rows), rows, strict=True)], str(path))

    def _parse(self, line: bytes) -> tuple[dict[str, Any], list[str]]:
        """The row and what is wrong with it."""
        try:
            raw = json.loads(line.decode(), parse_constant=_refuse)
        except UnicodeDecodeError as error:
            return {}, [f"not UTF-8 at byte {error.start + 1} of the line"]
        except (ValueError, RecursionError) as error:
            return {}, [f"not JSON: {error}"]
        if not isinstance(raw, Mapping):
            return {}, [f"must be a JSON object, not {type(raw).__name__}"]
        columns = self.field_map
        missing = [f"has no {column!r} (field_map.{ours})" for ours, column in columns.items() if column not in raw]
        renamed = {ours: raw[column] for ours, column in columns.items() if column in raw}
        row = {name: value for name, value in raw.items() if name not in columns.values()} | renamed
        return row, missing or list(_faults(row))


def _faults(row: Mapping[str, Any]) -> Iterator[str]:
    if "prompt" not in row:
        yield f"has no 'prompt'; its columns are {', '.join(row) or 'none'}: name the right one in field_map"
    elif not _is_text(row["prompt"]) and not _are_messages(row["prompt"]):
        yield "'prompt' must be text or a list of messages {role, content}, and not empty"
    if "answer" in row and row["answer"] is None:
        yield "'answer' is null; leave the column out of rows without one"
    if "completion" in row and not _is_text(row["completion"]):
        yield "'completion' must be text, and not empty"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _are_messages(value: Any) -> bool:
    def is_message(item: Any) -> bool:
        return isinstance(item, Mapping) and _is_text(item.get("role")) and isinstance(item.get("content"), str)

    return isinstance(value, list) and bool(value) and all(is_message(item) for item in value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _ids(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A hash of each row's content; the second of equal rows gets ``-1``, the third ``-2``."""
    seen: Counter[str] = Counter()
    for row in rows:
        digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
        yield f"{digest}-{seen[digest]}" if seen[digest] else digest
        seen[digest] += 1
