"""Where prompts come from: procedural tasks and files.

A row's ``prompt`` is text or chat messages; ``answer`` is for rewards, ``completion`` for demonstrations, and any other
column reaches reward functions by its name.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from alignment.errors import UserError
from alignment.registry import Registry, option
from alignment.tasks.arithmetic import Operator, Problem, Split, problems
from alignment.types import Prompt

SHOWN_BAD_ROWS = 20


@runtime_checkable
class Source(Protocol):
    """A data set that is read when a run starts."""

    def load(self, base: Path) -> list[Prompt]:
        """Its prompts, always the same and in the same order. ``base`` is the recipe's folder.

        Raises:
            UserError: It cannot be read, or holds less than was asked for.
        """
        ...


sources: Registry[Source] = Registry("sources", Source, "Where prompts come from")


def describe(prompts: Sequence[Prompt]) -> dict[str, float]:
    """What to know before reading an accuracy: how much there is, and what answering always the same would score.

    Returns:
        ``prompts`` (rows), ``distinct`` (different prompts) and ``floor``: the share of the most frequent answer among
        the rows that have one, 0 where none has.
    """
    answers = Counter(str(p.row["answer"]) for p in prompts if p.row.get("answer") is not None)
    return {
        "prompts": len(prompts),
        "distinct": len({json.dumps(p.row["prompt"], sort_keys=True) for p in prompts}),
        "floor": max(answers.values()) / answers.total() if answers else 0.0,
    }


@sources.register("arithmetic", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Arithmetic:
    """Sums, differences and products of two whole numbers; the three splits never share a problem."""

    split: Annotated[Split, option("train (60 % of all problems), demonstrations (20 %) or eval (20 %)")]
    max_operand: Annotated[int, option("largest operand", ge=1, le=999)] = 49
    operators: Annotated[tuple[Operator, ...], option("which operations occur", min_length=1)] = ("+",)
    size: Annotated[int | None, option("how many problems; all of the split when null", unit="prompts", ge=1)] = None
    seed: Annotated[int, option("which problems are taken, and their order")] = 0

    def load(self, base: Path) -> list[Prompt]:
        """``size`` different problems with ``prompt``, ``answer``, ``completion``, ``operator`` and ``operands``.

        Raises:
            UserError: The split has fewer than ``size`` problems.
        """
        found = problems(self.operators, self.max_operand, self.split, self.seed)
        if len(found) < (self.size or 1):
            raise UserError(
                f"arithmetic has {len(found)} different problems for split {self.split!r} with operands up to "
                f"{self.max_operand} and operators {' '.join(self.operators)}, fewer than the {self.size or 1} asked "
                f"for; lower size or raise max_operand"
            )
        return [Prompt(f"arithmetic/{p.text}", _row(p)) for p in found[: self.size]]


def _row(problem: Problem) -> dict[str, Any]:
    return {
        "prompt": problem.text,
        "answer": problem.answer,
        "completion": problem.answer,
        "operator": problem.symbol,
        "operands": [problem.left, problem.right],
    }


@sources.register("jsonl", source="this project")
@dataclass(frozen=True)
class Jsonl:
    """A file with one JSON object per line. A row's id hangs on its content, so adding rows renames none."""

    path: Annotated[str, option("the file; a relative path starts at the recipe's folder", min_length=1)]
    field_map: Annotated[
        dict[str, str], option("our column: the file's column, such as prompt: question; each must be in every row")
    ] = field(default_factory=dict)

    def load(self, base: Path) -> list[Prompt]:
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
        return [Prompt(key, row) for key, row in zip(_ids(rows), rows, strict=True)]

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
