"""The folder of an evaluation: what was measured, every sample, and the scores. It survives a kill at any moment.

::

    config.json               the checkpoint's fingerprint, the decoding, the seed, and each task as it was run
    TASK/samples.jsonl        one line per problem, in the task's order; grows by whole chunks
    results.json              the config, and the scores of the tasks that are complete
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.durable import replace_file, sync
from alignment.errors import UserError
from alignment.evaluation.decoding import decoding_identity
from alignment.evaluation.results import Record
from alignment.jsonl import to_json
from alignment.recipe_values import differences
from alignment.runs import LOCK, Run

TASK = {
    "data": {"sha256": None, "origin": None},
    "source": {},
    "sampling": {},
    **dict.fromkeys(("chat", "reward", "samples")),
}
KEYS = {"checkpoint": {"address": None, "fingerprint": None}, "seed": None, "tasks": {"*": TASK}}
"""What is read of the files: without it nothing can go on or be compared."""
CONFIG, SAMPLES, RESULTS = "config.json", "samples.jsonl", "results.json"


@dataclass(frozen=True)
class Store:
    """The folder of one evaluation."""

    folder: Path
    config: Mapping[str, Any]
    """``checkpoint``, ``seed`` and ``tasks``: of this command, and of earlier ones in this folder."""

    def finished(self, task: str, problems: Sequence[str], chunk: int) -> list[Record]:
        """The problems of ``task`` that are done: a whole number of chunks, or all. What is beyond them is dropped,
        so that an interrupted evaluation samples in the same company as one that was not.

        Args:
            task: Its name.
            problems: Names of its problems, in order.
            chunk: Problems that are sampled together.

        Raises:
            UserError: The file is not what was written.
        """
        path = self.folder / task / SAMPLES
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        count = len(whole) if len(whole) == len(problems) else len(whole) // chunk * chunk
        records = [_parsed(line, f"{path}:{number}") for number, line in enumerate(whole[:count], start=1)]
        if [r["problem"] for r in records] != list(problems[:count]):
            raise UserError(f"{path} holds other problems than {task} has; move it away, or choose another --output")
        if len(lines) > count:
            replace_file(path, b"".join(whole[:count]))
        return records

    def append(self, task: str, records: Sequence[Record]) -> None:
        """Adds a chunk; it is on the disk when this returns."""
        path = self.folder / task / SAMPLES
        new = not path.exists()
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            file.write(b"".join(to_json(r).encode() + b"\n" for r in records))
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(path.parent)

    def write_results(self, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Writes and returns ``results.json``: the config and, for complete tasks, their scores.

        Tasks that earlier commands completed in this folder stay.
        """
        path = self.folder / RESULTS
        known = read_json(path)["tasks"] if path.exists() else {}
        known = {**known, **{name: {**self.config["tasks"][name], **scores} for name, scores in tasks.items()}}
        ordered = {name: known[name] for name in self.config["tasks"] if name in known}
        results = json.loads(to_json({**self.config, "tasks": ordered}))
        replace_file(path, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
        return results


@contextmanager
def open_store(folder: Path, config: Mapping[str, Any]) -> Iterator[Store]:
    """The folder, made if need be, for this process alone.

    Raises:
        UserError: It holds another evaluation or something else, cannot be made, or another process writes it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder}: {error.strerror or error}; choose another --output"
        ) from error
    with Run(folder).locked("choose another --output"):
        path = folder / CONFIG
        if path.exists():
            config = _merged(folder, read_json(path), config)
        elif any(entry.name != LOCK for entry in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no evaluation; choose another --output")
        replace_file(path, (json.dumps(json.loads(to_json(config)), indent=2, ensure_ascii=False) + "\n").encode())
        yield Store(folder, config)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of this folder.

    Raises:
        UserError: It cannot be read, or is not what was written.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} was changed and is no JSON any more: {error}") from error
    if not isinstance(found, dict) or "tasks" not in found:
        raise UserError(f"{path} is not what an evaluation writes: it has no 'tasks'")
    if missing := _missing(found, KEYS):
        raise UserError(
            f"{path} was changed and lacks {', '.join(missing)}; put it back, or evaluate again into another --output"
        )
    return found


def _missing(found: Any, keys: Mapping[str, Any], place: str = "") -> list[str]:
    """Dotted names of the keys that ``found`` lacks; ``*`` stands for every key that it has."""
    if not isinstance(found, dict):
        return [f"a mapping at {place.rstrip('.')!r}"]
    missing: list[str] = []
    for key, inner in keys.items():
        for name in [*found] if key == "*" else [key]:
            if name not in found:
                missing.append(repr(place + name))
            elif inner is not None:
                missing += _missing(found[name], inner, f"{place}{name}.")
    return missing


def read_records(folder: Path, task: str) -> list[Record]:
    """All records of a task.

    Raises:
        UserError: There is no such file, or it is not what was written.
    """
    path = folder / task / SAMPLES
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay the same for an evaluation to go on: not where the checkpoint and the data are, but what is in
    them."""
    tasks = {
        name: {
            "data": task["data"]["sha256"],
            **{key: task[key] for key in ("chat", "reward", "samples", "sampling")},
        }
        for name, task in config["tasks"].items()
    }
    checkpoint = config["checkpoint"]
    return {
        "checkpoint": checkpoint["fingerprint"],
        "dtype": checkpoint.get("dtype"),
        "decoding": decoding_identity(config.get("decoding")),
        "seed": config["seed"],
        "tasks": tasks,
    }


def _merged(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the folder with tasks that are new; those that it has must be the same."""
    before = identity(old)
    after = identity(json.loads(to_json(new)))
    before["tasks"] = {name: task for name, task in before["tasks"].items() if name in after["tasks"]}
    after["tasks"] = {name: task for name, task in after["tasks"].items() if name in before["tasks"]}
    changed = [f"  {path}: {a!r} there, {b!r} now" for path, a, b, _ in differences(before, after)]
    if changed:
        there = old["checkpoint"]["address"]
        raise UserError(
            f"{folder} holds an evaluation of {there} that differs:\n" + "\n".join(changed) + "\n"
            "Repeat that command to continue it, or choose another --output"
        )
    return {**old, "tasks": {**old["tasks"], **{n: t for n, t in new["tasks"].items() if n not in old["tasks"]}}}


def _parsed(line: bytes, place: str) -> Record:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: no JSON ({error}); move the file away to sample again") from error
    if not isinstance(found, dict) or not {"problem", "samples"} <= found.keys():
        raise UserError(f"{place}: not what an evaluation writes; move the file away to sample again")
    return found
