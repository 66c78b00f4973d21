"""What a launch writes and runs, as values: a dry run shows them, a real one carries them out."""

import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from alignment.errors import UserError

PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that a command gets in place of us."""


@dataclass(frozen=True)
class Job:
    """What is to run, and where its files go."""

    name: str
    command: tuple[str, ...]
    """Such as ``align train``. The interpreter that runs it comes with the cluster."""
    workdir: Path
    folder: Path
    """Of this launch; made for it. All nodes must see it."""
    uses_ray: bool
    """Whether the command joins a Ray cluster."""
    wait: bool = False
    """Whether the launch lasts as long as the job."""


@dataclass(frozen=True)
class File:
    """A file to write."""

    path: Path
    content: str
    mode: int = 0o700


@dataclass(frozen=True)
class Command:
    """A command to run, with changes to the environment."""

    argv: tuple[str, ...]
    workdir: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError if the program is not there."""
        if shutil.which(self.argv[0]) is None:
            raise UserError(f"there is no program {self.argv[0]} here; launch where there is, or see --dry-run")

    def __str__(self) -> str:
        setting = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*setting, shlex.join(self.argv)])


@dataclass(frozen=True)
class Launch:
    """A folder to make, files to write into it, and the command that starts the job."""

    folder: Path
    files: tuple[File, ...]
    command: Command
    next_steps: str = ""
    """What the user may do once the command has returned."""

    def shown(self) -> str:
        """All of it as text."""
        parts = [f"# make the folder {self.folder} (mode 0700)\n"]
        parts += [f"# write {file.path} (mode {file.mode:04o})\n{file.content}" for file in self.files]
        parts += [f"# in {self.command.workdir}, run\n{self.command}\n"]
        return "\n".join(parts)

    def write(self) -> None:
        """Makes the folder and the files; nothing is overwritten.

        Raises:
            UserError: The folder is there already or cannot be made.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700)
        except OSError as error:
            raise UserError(f"cannot make {self.folder} for the files of this launch: {error}") from error
        for file in self.files:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(file.path, flags, file.mode), "w", encoding="utf-8") as stream:
                os.fchmod(stream.fileno(), file.mode)  # whatever the umask says
                stream.write(file.content)

    def run(self) -> int:
        """Runs the command, which gets the signals that this process gets, and gives its exit code."""
        environment = {**os.environ, **self.command.env}
        # In a session of its own: Ctrl-C reaches it once, from us, and not from the terminal too.
        child = subprocess.Popen(self.command.argv, cwd=self.command.workdir, env=environment, start_new_session=True)
        with _signals_to(child):
            code = child.wait()
        return 128 - code if code < 0 else code


class _signals_to:
    """Passes signals on to a child for as long as the context lasts. Outside the main thread nobody gets any."""

    def __init__(self, child: subprocess.Popen) -> None:
        self.child = child
        self.before: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for name in PASSED_ON:
                number = signal.Signals[name]
                self.before[number] = signal.signal(number, self._pass_on)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.child.send_signal(number)  # does nothing once the child was waited for


def next_folder(output: Path, name: str) -> Path:
    """The folder of the next launch of a run: ``OUTPUT/NAME.launch/1``, then ``2``, ..."""
    parent = output / f"{name}.launch"
    taken = [int(path.name) for path in parent.glob("[0-9]*") if path.name.isdecimal()]
    return parent / str(max(taken, default=0) + 1)
