"""The folder of a run: what is in it, who may write it, and how to address one of its checkpoints.

``RUN`` is a run folder, or the name of one under ``runs``. ``RUN@300`` is its checkpoint of step 300, ``RUN@best`` the
one of its best evaluation, plain ``RUN`` the newest.
"""

import errno
import fcntl
import io
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from alignment.checkpoint import Checkpoints, Which
from alignment.durable import replace_file, sync
from alignment.errors import UserError
from alignment.jsonl import to_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RECIPE, BESIDE, START, LOCK = "recipe.yaml", ".recipe_folder", ".init_from", ".lock"
_held: set[Path] = set()


@dataclass(frozen=True)
class Run:
    """A run's folder and the names of what is in it."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe that the run was started with."""
        return self.folder / RECIPE

    @property
    def checkpoints(self) -> Path:
        """Folder of :class:`alignment.checkpoint.Checkpoints`."""
        return self.folder / "checkpoints"

    @property
    def result(self) -> Path:
        """What came out, once the run has ended."""
        return self.folder / "result.json"

    @property
    def flight(self) -> Path:
        """Folder of the flight recorder."""
        return self.folder / "flight"

    def write_recipe(self, resolved: Mapping[str, Any], beside: Path) -> None:
        """Writes ``recipe.yaml``: JSON values, in their order; and where its data and modules are found."""
        yaml, text = YAML(), io.StringIO()
        yaml.width = 120
        yaml.dump(json.loads(json.dumps(resolved)), text)
        replace_file(self.recipe, text.getvalue().encode())
        replace_file(self.folder / BESIDE, f"{beside.resolve()}\n".encode())

    def write_start(self, init_from: str | None) -> None:
        """Remembers which run's policy this one was started from; a later call without one changes nothing."""
        if init_from is not None:
            replace_file(self.folder / START, f"{init_from}\n".encode())

    def read_start(self) -> str | None:
        """What :meth:`write_start` remembered."""
        path = self.folder / START
        return path.read_text(encoding="utf-8").rstrip("\n") if path.exists() else None

    @property
    def beside(self) -> Path:
        """The folder of the recipe that the run was started with.

        Raises:
            UserError: The run does not say.
        """
        try:
            return Path((self.folder / BESIDE).read_text(encoding="utf-8").rstrip("\n"))
        except FileNotFoundError as error:
            message = f"{self.folder} has no {BESIDE}, the file that names its recipe's folder; copy hidden files too"
            raise UserError(message) from error

    def read_recipe(self) -> dict[str, Any]:
        """What :meth:`write_recipe` wrote.

        Raises:
            UserError: The folder has no recipe, so it is no run; or the file is not what was written.
        """
        try:
            text = self.recipe.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise UserError(f"{self.folder} has no {RECIPE}: it is not the folder of a run") from error
        try:
            return YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            raise UserError(f"{self.recipe} was changed and is no YAML any more: {error}") from error

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes ``result.json``; what is not a finite number becomes null."""
        replace_file(self.result, (json.dumps(json.loads(to_json(result)), indent=2) + "\n").encode())

    def read_result(self) -> dict[str, Any]:
        """What :meth:`write_result` wrote."""
        return json.loads(self.result.read_text(encoding="utf-8"))

    @contextmanager
    def locked(self, remedy: str = "give this run another run.name") -> Iterator[None]:
        """Holds the folder's lock: two processes that write one run would ruin it.

        The lock is the operating system's and goes with the process, however it dies. It is not inherited by forked
        workers, which may outlive a killed parent.

        Args:
            remedy: What else than stopping the other process would help, for the message.

        Raises:
            UserError: Another process, or this one, has it already; the message says which.
        """
        path = (self.folder / LOCK).resolve()
        # Closing any descriptor of a locked file gives this process's lock away, so it must not be opened twice.
        if path in _held:
            raise UserError(f"{self.folder} is already open in this process")
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(f"{self.folder} is being written by {holder}; stop it, or {remedy}") from None
            _held.add(path)
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                yield
            finally:
                _held.discard(path)


@contextmanager
def open_run(output: str | Path, name: str, *, fresh: bool = False) -> Iterator[Run]:
    """The run ``name`` in the folder ``output``, made if it is not there, locked for writing inside the context.

    Args:
        output: Holds the folders of runs.
        name: Letters, digits, ``.``, ``_`` and ``-``.
        fresh: An earlier run of this name is put aside as ``NAME.1``, ``NAME.2``...; nothing is deleted.

    Raises:
        UserError: The name cannot be a folder inside ``output``, the folder cannot be made, or another process
            writes the run.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"run.name {name!r}: use up to 100 letters, digits, '.', '_' and '-', beginning with one of the first two"
        )
    run = Run(Path(output) / name)
    if run.folder.is_symlink() or (run.folder.exists() and not run.folder.is_dir()):
        raise UserError(f"{run.folder} is not a folder inside run.output {output}; choose another run.name")
    if fresh and run.folder.exists():
        with run.locked():
            if any(path.name != LOCK for path in run.folder.iterdir()):
                free = (run.folder.with_name(f"{name}.{i}") for i in count(1))
                run.folder.rename(next(path for path in free if not path.exists()))
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot make the folder {run.folder}: {reason}; choose another run.output") from error
    with run.locked():
        yield run


def resolve(address: str, output: str | Path = "runs") -> tuple[Path, Which]:
    """The run folder, and which checkpoint of it, that ``RUN[@step|@best]`` means.

    Args:
        address: ``RUN`` is a path, or a name inside ``output``.
        output: Where names are looked up.

    Raises:
        UserError: There is no such run or no such step; the message lists those that there are.
    """
    if (folder := _folder(address, Path(output))) is not None:
        return folder, "latest"
    text, _, suffix = address.rpartition("@")
    if not text:
        text, suffix = address, ""
    folder = _folder(text, Path(output))
    if folder is None:
        names = sorted(p.name for p in Path(output).iterdir() if (p / BESIDE).exists()) if Path(output).is_dir() else []
        there = f"runs in {output}: {', '.join(names)}" if names else f"there are no runs in {output}"
        raise UserError(f"there is no run {text}; {there}")
    steps = Checkpoints(Run(folder).checkpoints).steps()
    there = f"its steps with a checkpoint: {', '.join(map(str, steps)) or 'none'}"
    if suffix in ("best", "latest"):
        return folder, "best" if suffix == "best" else "latest"
    if not re.fullmatch(r"[0-9]{1,18}", suffix):
        raise UserError(f"{address}: after '@' comes a step, 'best' or 'latest', not {suffix!r}; {there}")
    if int(suffix) not in steps:
        raise UserError(f"{address}: step {int(suffix)} has no checkpoint; {there}")
    return folder, int(suffix)


def truncate_jsonl(path: Path, last_step: int) -> int:
    """Drops the lines of steps after ``last_step``, which are run again, and a last line that a kill cut short.

    Lines that stay keep every byte. The file is replaced as a whole or not at all.

    Returns:
        How many lines went.

    Raises:
        UserError: A line in the middle is not a JSON object with a ``step``.
    """
    if not path.exists():
        return 0
    staged, dropped = path.with_name(f".tmp-{path.name}-{uuid4().hex}"), 0
    try:
        with path.open("rb") as lines, staged.open("wb") as kept:
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n") and _step(line, f"{path}:{number}") <= last_step:
                    kept.write(line)
                else:
                    dropped += 1
        sync(staged)
        os.replace(staged, path)
        sync(path.parent)
    finally:
        staged.unlink(missing_ok=True)
    return dropped


def _folder(text: str, output: Path) -> Path | None:
    """A run's folder. A recipe alone does not make one: a project has that too."""
    for folder in (Path(text), output / text):
        if (folder / BESIDE).exists() or Run(folder).checkpoints.is_dir():
            return folder
    return None


def _step(line: bytes, place: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: not a JSON object with a 'step'; repair or remove the line") from error
