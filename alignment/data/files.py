"""Prompts read from files and from the hub."""

import datetime
import decimal
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from alignment.data.hub import load_rows, names_folder
from alignment.data.rows import Columns, Layout, RawRow, template_columns, to_dataset
from alignment.data.sources import Dataset, sources
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import keyed_seed

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Words at the start of a file's name that say which split it holds."""


@sources.register("dataset", source="this project", evidence="end to end")
@dataclass(frozen=True)
class DatasetSource:
    """Rows of a local file, of a folder of files, or of a data set on the hub; see ``docs/data.md``."""

    path: Annotated[
        str,
        option(
            "a .jsonl, .jsonl.gz, .json or .parquet file, a folder of such files, or a hub id; a relative path starts "
            "at the recipe's folder",
            min_length=1,
        ),
    ]
    config: Annotated[str | None, option("configuration of a hub data set")] = None
    split: Annotated[str | None, option("split of a hub data set; in a folder, the files whose names begin so")] = None
    revision: Annotated[str | None, option("branch, tag or commit of a hub data set")] = None
    files: Annotated[
        str | None, option("files of a hub data set that has no configurations, such as hard/train.parquet; * is any")
    ] = None
    layout: Annotated[Layout, option("whose columns it has: those of field_map alone, verl's or OpenRLHF's")] = "plain"
    field_map: Annotated[
        dict[str, str],
        option(
            "our column: the file's column, such as prompt: question; dots reach into nested columns, such as answer: "
            "reward_model.ground_truth; each must be in every row"
        ),
    ] = field(default_factory=dict)
    prompt: Annotated[
        str | None, option("template of the prompt: {name} is a column, {{ and }} are braces, {} stays as it is")
    ] = None
    chat: Annotated[bool, option("make the text of a prompt one user message, for the model's chat template")] = False
    system: Annotated[str | None, option("system message before prompts that have none", min_length=1)] = None
    size: Annotated[
        int | None, option("how many rows, picked by seed and in the file's order; null: all", unit="rows", ge=1)
    ] = None
    seed: Annotated[int, option("which rows are picked when size is given")] = 0

    def __post_init__(self) -> None:
        if self.prompt is not None and not template_columns(self.prompt):
            raise UserError(f"prompt {self.prompt!r} names no column; write {{question}} where a column's text goes")

    def load(self, base: Path) -> Dataset:
        """Its rows; those that cannot be used are named by file and line in ``bad``.

        Raises:
            UserError: It cannot be found or read, has fewer rows than ``size``, or no row can be used.
        """
        path = base / Path(self.path).expanduser()
        columns = Columns(self.layout, self.field_map, self.prompt, self.chat, self.system)
        if not self.is_on_hub(base):
            raws, origin = list(self._local(path, base)), str(path)
        else:
            raws, origin = load_rows(self.path, self.config, self.split, self.revision, base, self.files)
            raws = [_plain_row(raw.origin, raw.value) for raw in raws]
        return to_dataset(self._picked(raws, origin), columns, origin)

    def is_on_hub(self, base: Path) -> bool:
        """Whether ``path`` is a hub id: nothing beside the recipe, in ``base``, is called so."""
        return _may_be_hub_id(self.path) and not (base / Path(self.path).expanduser()).exists()

    @property
    def hub_name(self) -> str:
        """The hub id with configuration, files, split and revision, as far as they are given."""
        chosen = ", ".join(filter(None, (self.config, self.files, self.split)))
        return self.path + (f" ({chosen})" if chosen else "") + (f" at {self.revision}" if self.revision else "")

    def _local(self, path: Path, base: Path) -> Iterator[RawRow]:
        given = {"config": self.config, "revision": self.revision, "files": self.files}
        given["split"] = None if path.is_dir() else self.split
        for name, value in given.items():
            if value is not None:
                raise UserError(f"{name} {value!r} is for data sets on the hub, but {path} is here; leave it out")
        if not path.exists():
            where = "" if Path(self.path).is_absolute() else f" (a relative path starts at {base})"
            raise UserError(f"cannot read {path}: there is no such file or folder{where}")
        for file in _files(path, self.split) if path.is_dir() else [path]:
            reader = _reader(file)
            if reader is None:
                raise UserError(f"cannot read {file}: its name must end in {', '.join(READERS)}")
            try:
                yield from reader(file)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error

    def _picked(self, raws: list[RawRow], origin: str) -> list[RawRow]:
        if self.size is None or self.size == len(raws):
            return raws
        if self.size > len(raws):
            raise UserError(f"{origin} has {len(raws)} rows, fewer than the {self.size} asked for; lower size")
        order = sorted(range(len(raws)), key=lambda number: keyed_seed(self.seed, "row", number))
        return [raws[number] for number in sorted(order[: self.size])]


def _may_be_hub_id(path: str) -> bool:
    return not names_folder(path) and _reader(Path(path)) is None and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path))


def _files(folder: Path, split: str | None) -> list[Path]:
    """The files of a folder, sorted by name; those of one split if its names say which they hold."""
    readable = sorted(file for file in folder.iterdir() if _reader(file) is not None)
    if not readable:
        there = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
        raise UserError(f"{folder} has no file that ends in {', '.join(READERS)}; it has {', '.join(there) or 'none'}")
    words = {file: re.split(r"[^A-Za-z0-9]", file.name)[0].lower() for file in readable}
    if split is not None:
        found = [file for file in readable if words[file] == split.lower()]
        if not found:
            raise UserError(f"{folder} has no file of split {split!r}; it has {', '.join(f.name for f in readable)}")
        return found
    if len(named := sorted(set(words.values()) & set(SPLIT_NAMES))) > 1:
        raise UserError(f"{folder} has files of several splits; choose one with split: {' or '.join(named)}")
    return readable


def _reader(path: Path) -> Callable[[Path], Iterator[RawRow]] | None:
    return next((read for suffix, read in READERS.items() if path.name.lower().endswith(suffix)), None)


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    data = path.read_bytes()
    content = gzip.decompress(data) if path.name.lower().endswith(".gz") else data
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield _parsed(f"{path}:{number}", line)


def _parsed(origin: str, line: bytes) -> RawRow:
    try:
        return RawRow(origin, json.loads(line.decode(), parse_constant=_refuse))
    except UnicodeDecodeError as error:
        return RawRow(origin, fault=f"not UTF-8 at byte {error.start + 1} of the line")
    except (ValueError, RecursionError) as error:
        return RawRow(origin, fault=f"not JSON: {error}")


def _read_json(path: Path) -> Iterator[RawRow]:
    whole = _parsed(str(path), path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if whole.fault or not isinstance(whole.value, list):
        fault = whole.fault or f"holds {type(whole.value).__name__} where a list of objects is expected"
        raise UserError(f"cannot read {path}: {fault}; a file with one object in each line is called .jsonl")
    for number, value in enumerate(whole.value, start=1):
        yield RawRow(f"{path}: row {number}", value)


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield _plain_row(f"{path}: row {number}", value)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {error}") from error


READERS: Mapping[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _plain_row(origin: str, row: Mapping[str, Any]) -> RawRow:
    """A row of a table, its values as JSON has them."""
    try:
        return RawRow(origin, {name: _plain(value, name) for name, value in row.items()})
    except UserError as error:
        return RawRow(origin, fault=str(error))


def _plain(value: Any, column: str) -> Any:
    """Tables mark a missing number with NaN, which becomes null as in JSON; exact decimals and dates become text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and not math.isinf(value):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, column) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, column) for item in value]
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    what = "an infinite number" if isinstance(value, float) else type(value).__name__
    raise UserError(f"column {column!r} holds {what}, which JSON cannot; take the column out of the file")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
