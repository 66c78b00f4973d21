"""One scoring process as its parent sees it, and the calls that are sent to it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.scoring_worker import Sample

SEND_TIMEOUT_S = 10.0
"""An idle worker that does not take a message by then has been stopped."""
# The project's own packages are found first, so that a user's rewards.py cannot stand in for them.
BOOTSTRAP = (
    "import json, sys; root, path = json.loads(sys.argv[1]); sys.path.insert(0, root); import rewards; "
    "from alignment.scoring_worker import main; sys.path[:] = path; main(int(sys.argv[2]), int(sys.argv[3]))"
)
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT  # look whether a process has ended, and leave it to be reaped


@dataclass(eq=False, slots=True)
class Call:
    """A call of one reward, and where its answer belongs."""

    reward: int
    sample: Sample
    group: int
    rows: tuple[int, ...]
    whole: bool
    """It may not be split: the reward compares completions."""
    split_from: int = 1
    """Completions of the call that it was split from."""
    check: bool = False
    """It asks what is wrong with rows of the data set: they stand in the place of completions."""

    def split(self) -> list["Call"]:
        """One call per completion."""
        n = len(self.rows)
        return [replace(self, sample=self.sample.only(i), rows=(row,), split_from=n) for i, row in enumerate(self.rows)]


class Worker:
    """One process and the calls that were sent to it and are not answered yet; it works on the first of them."""

    def __init__(self, setup: Mapping[str, Any], sys_path: Sequence[str]) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = [*sys.path, *(p for p in sys_path if p not in sys.path)]
        self.channel, theirs = socket.socketpair()
        self.lifeline: int | None
        held, self.lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, json.dumps([root, path]), str(theirs.fileno()), str(held)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what a reward prints can neither block it nor spoil the display
                pass_fds=(theirs.fileno(), held),
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(held)
        self.channel.settimeout(SEND_TIMEOUT_S)
        self.calls: deque[Call] = deque()
        self.alone = False
        """It tries a single completion, beside the regular workers."""
        self.needs: list[list[str]] | None = None
        """Columns that each reward needs; None until the worker is ready."""
        self.loading = "the scoring worker"
        self.since = time.monotonic()
        """When it was started, or began the call it is on."""
        self._unread = b""
        self._write(setup)

    def send(self, calls: Sequence[Call]) -> None:
        """Gives it work; it is idle, so it reads at once."""
        self.calls.extend(calls)
        samples = {id(call.sample): call.sample for call in calls}
        place = {key: i for i, key in enumerate(samples)}
        self._write(
            {"samples": [*samples.values()], "calls": [(c.reward, place[id(c.sample)], c.check) for c in calls]}
        )
        self.since = time.monotonic()

    def _write(self, message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            self.channel.sendall(data)
        except OSError:  # dead or stuck: the end of its answers, or the deadline, will tell
            with contextlib.suppress(OSError):
                self.channel.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[Any] | None:
        """The messages that have arrived; None at the end, when the process has closed its side."""
        try:
            data = self.channel.recv(1 << 18)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # something else wrote into the channel: it cannot be trusted any more
            return None

    def kill(self) -> None:
        """Ends the process and whatever it started; reaps it last, while the group's number is surely its own."""
        self.end()
        self.process.wait()
        self.channel.close()
        if self.lifeline is not None:
            os.close(self.lifeline)
            self.lifeline = None

    def end(self) -> None:
        """Ends the process and whatever it started, without waiting; may be called from any thread."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ending(self) -> str:
        """How the process came to its end, once its side of the channel is closed; kills what is left of it."""
        until = time.monotonic() + 1.0
        while time.monotonic() < until and not os.waitid(os.P_PID, self.process.pid, _ENDED):
            time.sleep(0.005)
        closed = not os.waitid(os.P_PID, self.process.pid, _ENDED)
        self.kill()
        code = self.process.returncode
        if closed:
            return "closed its channel"
        if code >= 0:
            return f"ended with exit code {code}"
        hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"
