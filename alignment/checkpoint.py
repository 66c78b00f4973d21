"""Checkpoints that survive a kill at any moment, and that are known to be whole before they are used.

A run's ``checkpoints`` folder holds::

    step_00000050/            what the loop wrote, and manifest.json: size and sha256 of every file
    step_00000100/
    LATEST                    the name of the newest one, for people and other tools
    BEST                      the step of the best evaluation, and its value
    .tmp-*                    work of a process that died; nothing reads it, the next save removes it
    .replaced-step_*          the old one while a step is saved again; read only while the new one is not there

A save stages everything in a ``.tmp-`` folder, syncs it to disk, and gives it its name with one rename. So a folder
named ``step_N`` is complete, a flipped bit in it is noticed by its hash, and older ones go only after it is in place.
Nothing here unpickles: manifests and states are JSON, weights are safetensors.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias
from uuid import uuid4

from safetensors import SafetensorError

from alignment.durable import (
    JSON,
    MANIFEST,
    StorageError,
    check_json,
    parse,
    problems_of,
    render,
    replace_file,
    seal,
    sync,
)
from alignment.errors import UserError
from alignment.types import TrainState

Which: TypeAlias = int | Literal["latest", "best"]
STATE, LATEST, BEST = "state.json", "LATEST", "BEST"
META = frozenset({"config_hash", "world_size"})
"""What a manifest says at least beside the files: which recipe and how many processes wrote it."""
FOLDER = re.compile(r"step_(\d{8,})")
REPLACED = re.compile(r"\.replaced-step_(\d{8,})-[0-9a-f]{32}")


class CheckpointFailed(StorageError):
    """A checkpoint could not be written; those from before are untouched."""


class CheckpointDamaged(StorageError):
    """The checkpoint that was asked for, or every one there is, is not what was written."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose every file was found to be what was written."""

    step: int
    folder: Path
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Best:
    """The best evaluation so far that has a checkpoint."""

    step: int
    value: float


class Checkpoints:
    """The checkpoints of one run. Any process may read; one at a time may write (the run's lock sees to it).

    Args:
        root: The folder that holds them; made by the first save.
        keep_last: How many of the newest are kept, at least 1. The best one is kept beside them.

    Raises:
        ValueError: ``keep_last`` is below 1.
    """

    def __init__(self, root: Path, keep_last: int = 1) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; it must be at least 1, or there is nothing to resume from")
        self.root, self.keep_last = root, keep_last

    def save(self, step: int, write: Callable[[Path], None], meta: Mapping[str, JSON]) -> Path:
        """Makes the checkpoint of ``step`` from the files that ``write(folder)`` puts into an empty folder.

        One that exists for this step is replaced. After that, all but the newest ``keep_last`` and the best are
        deleted. So are steps beyond ``step``: the run fell back behind them, and must not return to them later.

        Args:
            step: Optimizer batches so far.
            write: Gets a staging folder; whatever it raises leaves earlier checkpoints as they were.
            meta: JSON values for the manifest, among them ``config_hash`` and ``world_size``.

        Returns:
            Its folder.

        Raises:
            CheckpointFailed: The disk is full or failed. Checkpoints from before are intact, and no half one is left.
        """
        assert step >= 0 and meta.keys() >= META, f"step {step}: a manifest needs {sorted(META)}, not only {list(meta)}"
        best = self.best
        name = f"step_{step:08d}"
        staging = self.root / f".tmp-{name}-{uuid4().hex}"
        try:
            if not self.root.exists():
                self.root.mkdir(parents=True)
                sync(self.root.parent)
            self._clean()
            staging.mkdir()
            write(staging)
            seal(staging, {"step": step, "meta": dict(meta)})
            self._publish(staging, name)
            replace_file(self.root / LATEST, f"{name}\n".encode())
            self._prune(step, best)
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)  # room for the next attempt
            there = ", ".join(map(str, self.steps())) or "none"
            message = f"saving step {step} in {self.root} failed: {error}. Complete checkpoints there: {there}"
            if isinstance(error, OSError | SafetensorError):
                raise CheckpointFailed(f"{message}. Once the disk is well, the same command resumes") from error
            error.add_note(message)
            raise
        return self.root / name

    def folder_of(self, step: int) -> Path:
        """The folder of a step that has a checkpoint; whether it verifies is not looked at."""
        return self._found()[step]

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; whether they verify is not looked at."""
        return sorted(self._found())

    def latest(self, report: Callable[[str], None]) -> Saved | None:
        """The newest checkpoint that verifies, or None when none was ever made.

        Args:
            report: Is told of each newer one that is not used: its name and what is wrong with it.

        Raises:
            CheckpointDamaged: There are checkpoints, and none of them verifies. A run never starts over by itself.
        """
        found = self._found()
        bad = self._pointer_problems(found)
        for problem in bad:
            report(problem)
        for step in sorted(found, reverse=True):
            problems = verify(found[step])
            if not problems:
                return _opened(found[step])
            bad.append(f"checkpoint {found[step]} is damaged and is not used: {_short(problems)}")
            report(bad[-1])
        if bad:
            reasons = "; ".join(bad)
            raise CheckpointDamaged(
                f"no checkpoint in {self.root} can be used, and --fresh would start over: {reasons}"
            )
        return None

    def load(self, which: Which, report: Callable[[str], None]) -> Saved:
        """The checkpoint of a step, the best or the latest one, verified.

        Raises:
            UserError: There is no such checkpoint; the message lists the steps that there are.
            CheckpointDamaged: It does not verify. Only "latest" falls back to another one.
        """
        steps = self.steps()
        there = f"steps with a checkpoint: {', '.join(map(str, steps))}" if steps else "there is no checkpoint"
        if which == "latest":
            if (newest := self.latest(report)) is None:
                raise UserError(f"{self.root}: {there}")
            return newest
        if which == "best":
            if (best := self.best) is None:
                raise UserError(f"{self.root}: no step is marked as best, because none was evaluated; {there}")
            which = best.step
        folder = self._found().get(which)
        if folder is None:
            raise UserError(f"{self.root}: step {which} has no checkpoint; {there}")
        if problems := verify(folder):
            raise CheckpointDamaged(f"checkpoint {folder} is damaged: {_short(problems)}; {there}")
        return _opened(folder)

    def mark_best(self, step: int, value: float) -> None:
        """Names ``step``, which must have a checkpoint, as the best; a save may then delete the one before it."""
        assert step in self._found(), f"step {step} has no checkpoint"
        replace_file(self.root / BEST, render({"step": step, "value": value}))

    @property
    def best(self) -> Best | None:
        """What :meth:`mark_best` said last.

        Raises:
            CheckpointDamaged: The file is not what was written.
        """
        path = self.root / BEST
        if not path.exists():
            return None
        try:
            return Best(**parse(path))
        except (OSError, ValueError) as error:
            raise CheckpointDamaged(f"{path} {error}; delete it, and the next best step is marked anew") from error

    def _found(self) -> dict[int, Path]:
        names = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
        # "." sorts first, so the proper name of a step wins over what it replaced.
        matches = [match for name in names if (match := REPLACED.fullmatch(name) or FOLDER.fullmatch(name))]
        return {int(match[1]): self.root / match[0] for match in matches}

    def _pointer_problems(self, found: Mapping[int, Path]) -> list[str]:
        path = self.root / LATEST
        if not path.exists():
            return []
        match = re.fullmatch(rb"step_(\d{8,})\n", path.read_bytes())
        if match is None:
            return [f"{path} is damaged: it does not hold the name of a checkpoint"]
        named = f"step_{match[1].decode()}"
        return [] if int(match[1]) in found else [f"checkpoint {self.root / named}, named by {LATEST}, is missing"]

    def _clean(self) -> None:
        """Removes what dead processes left, and finishes or takes back a replacement that one of them began."""
        for path in sorted(self.root.iterdir()):
            if match := REPLACED.fullmatch(path.name):
                name = f"step_{match[1]}"
                if (self.root / name).exists():
                    self._remove(path)
                else:
                    path.rename(self.root / name)
            elif path.name.startswith(".tmp-"):
                _delete(path)
        sync(self.root)

    def _publish(self, staging: Path, name: str) -> None:
        final = self.root / name
        if final.exists():  # a folder cannot be renamed onto one that holds files
            final.rename(self.root / f".replaced-{name}-{uuid4().hex}")
        staging.rename(final)
        sync(self.root)

    def _prune(self, step: int, best: Best | None) -> None:
        found = self._found()
        keep = set(sorted(s for s in found if s <= step)[-self.keep_last :]) | ({best.step} if best else set())
        for old in sorted(found.keys() - keep):
            self._remove(found[old])
        self._clean()

    def _remove(self, folder: Path) -> None:
        """Deletes a checkpoint such that half of it is never seen under its name."""
        doomed = self.root / f".tmp-removed-{folder.name.lstrip('.')}-{uuid4().hex}"
        folder.rename(doomed)
        _delete(doomed)


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint: each problem begins with the name of the file. Empty when all is well.

    Names, sizes and sha256 of all files are compared with the manifest, and its step with the folder's name.
    """
    problems = problems_of(folder)
    if not any(problem.startswith(f"{MANIFEST}: ") for problem in problems):
        step = parse(folder / MANIFEST)["step"]
        if f"step_{step:08d}" not in folder.name:
            problems.append(f"{MANIFEST}: is of step {step}, which is not what the folder's name says")
    return problems


def save_state(folder: Path, state: TrainState) -> None:
    """Writes ``state.json``. Floats keep every bit, integers every digit, mappings their order.

    Raises:
        ValueError: A value would not come back as it is, such as a tuple, a set or a tensor; the message names the
            component and the place in its state.
    """
    plain = {f.name: getattr(state, f.name) for f in fields(state)}
    plain["components"], plain["counters"] = dict(state.components), dict(state.counters)
    for name, value in plain["components"].items():
        check_json(f"the state of component {name!r}", value)
    check_json("the training state", plain)
    (folder / STATE).write_text(json.dumps(plain), encoding="utf-8")


def load_state(folder: Path) -> TrainState:
    """The state that :func:`save_state` wrote.

    Raises:
        ValueError: It was written by another version of the program, whose state had other fields.
    """
    plain = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if odd := plain.keys() ^ {f.name for f in fields(TrainState)}:
        raise ValueError(f"{folder / STATE}: this program does not have the same fields: {', '.join(sorted(odd))}")
    return TrainState(**plain)


def _opened(folder: Path) -> Saved:
    manifest = parse(folder / MANIFEST)
    return Saved(manifest["step"], folder, manifest["meta"])


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _short(problems: list[str], limit: int = 5) -> str:
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more
