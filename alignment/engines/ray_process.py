"""What every process that a cluster places does before anything else, and who it is."""

import ctypes
import importlib
import os
import random
import re
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import UserError

_PR_SET_PDEATHSIG = 1
LAST_LINES = 12
"""Of what a dead process printed that an error repeats."""


@dataclass(frozen=True)
class Place:
    """Where an actor lives."""

    pid: int
    node_id: str
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Preparation:
    """Makes a process ready for what was pickled behind it: a pickle is read from its beginning.

    So the actor's own arguments may be of classes that only the recipe's folder or its plugins know.
    """

    def __init__(self, folders: Sequence[str], plugins: Sequence[str]) -> None:
        self.folders, self.plugins = tuple(folders), tuple(plugins)

    def __reduce__(self) -> tuple[Any, ...]:
        return prepare, (self.folders, self.plugins)


def prepare(folders: Sequence[str], plugins: Sequence[str]) -> None:
    """Joins ``folders`` to the end of ``sys.path``, imports ``plugins`` and ends with the node's own Ray process.

    Raises:
        UserError: A plugin cannot be imported here.
    """
    if sys.platform == "linux":
        # A stopped or stuck process would outlive the cluster: only the kernel can end it for certain.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.path += [folder for folder in folders if folder not in sys.path]
    for name in plugins:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"plugins: {name} cannot be imported on {socket.gethostname()}: {error}. Every machine of the cluster"
                " has to see the recipe's folder, or have the plugin installed"
            ) from error


def hosted(cls: type) -> type:
    """The class of actors that hold one ``cls``: a subclass whose only argument is ``(Preparation, arguments)``."""

    class Hosted(cls):
        """A ``cls`` in a process of its own."""

        def __init__(self, packed: tuple[None, Sequence[Any]]) -> None:
            self.align_refusal: UserError | None = None
            try:
                super().__init__(*packed[1])
            except UserError as error:  # Ray would hand on the text of a traceback instead of the error
                self.align_refusal = error

        def align_place(self) -> Place:
            """Where it is, once it is ready; raises what the constructor refused."""
            import ray

            if self.align_refusal is not None:
                raise self.align_refusal
            node = ray.get_runtime_context().get_node_id()
            return Place(os.getpid(), node, ray.util.get_node_ip_address())

    Hosted.__name__ = Hosted.__qualname__ = cls.__name__
    return Hosted


def free_port() -> int:
    """A TCP port that nothing on this machine uses now.

    It is below the range that systems take the ports of outgoing connections from: one of those might have it by the
    time that whoever asked listens on it.
    """
    ports = random.SystemRandom().sample(range(20_000, 32_000), 100)
    for port in ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(f"none of 100 TCP ports between {min(ports)} and {max(ports)} is free on this machine")


def kill_process(pid: int) -> None:
    """Ends an actor's process on this machine, stopped or not; does nothing where it is gone."""
    try:
        if sys.platform != "linux" or Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        return


def ending(error: Exception, session_folder: Path) -> str:
    """How an actor ended, by what Ray says of it and what it printed last, where that was on this machine."""
    text = str(error)
    detail = re.search(r"Worker exit detail: (.*?)(?:\.\s|\.?$)", text, re.DOTALL)
    said = " ".join((detail.group(1) if detail else text).split())[:2000]
    pid = re.search(r"pid: (\d+)", text)
    lines: list[str] = []
    for path in (session_folder / "logs").glob(f"worker-*-{pid.group(1)}.err" if pid else ""):
        lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
    last = [line for line in lines if line.strip() and not line.startswith(":")][-LAST_LINES:]
    return said + ("\nIt last printed:\n" + "\n".join(f"  {line[:300]}" for line in last) if last else "")
