"""Two programs that do the same work, a step at a time in turns: so what else a machine does falls on both alike.

Each is a process of its own. It takes a step whenever its standard input says so, by a line, and answers with a line of
JSON that begins with `@`: first what it starts from, with `checksum` and `memory_mb`, then for each step its `seconds`,
the CPU time of the process (`cpu`), the most memory that the process has had so far (`peak_mb`), and whatever the side
measured. What a side does between two steps is in its seconds.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Side:
    """A side's process: ``python SCRIPT NAME FOLDER``. A context manager that ends it.

    Args:
        script: Beside this file.
        name: Of the side.
        folder: What it reads and writes; its standard error goes to ``NAME.log``.
        threads: Of its computations.
        sleep: Whether idle threads sleep, whatever the side has as its default.
    """

    def __init__(self, script: str, name: str, folder: Path, threads: int, sleep: bool) -> None:
        self.name = name
        command = [sys.executable, str(Path(__file__).with_name(script)), name, str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"OMP_WAIT_POLICY": "PASSIVE"} if sleep else {}
        self._log = (folder / f"{name}.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._log.close()

    def go(self) -> None:
        """Lets it take a step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says next."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        self._log.seek(0)
        raise SystemExit(f"{self.name} ended early:\n{self._log.read()[-4000:]}")


def in_turns(sides: Sequence[Side], count: int) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """What each side starts from, which has to be the same weights, and its ``count`` steps, by its name.

    While one takes a step the others wait; who goes first changes with every step.
    """
    starts = {side.name: side.answer() for side in sides}
    sums = {name: start["checksum"] for name, start in starts.items()}
    assert len(set(sums.values())) == 1, f"the sides start from other weights: {sums}"
    steps: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for number in range(count):
        for side in sides if number % 2 == 0 else reversed(sides):
            side.go()
            steps[side.name].append(side.answer())
    return starts, steps


@dataclass
class Stepper:
    """Waits for the parent's word before each step and reports the step before."""

    start: float = 0.0
    cpu: float = 0.0
    memory_mb: float = 0.0

    def say(self, message: Mapping[str, Any]) -> None:
        """Sends a line to the parent."""
        sys.stdout.write(f"@{json.dumps(message)}\n")
        sys.stdout.flush()

    def begin(self, **found: Any) -> None:
        """Says what the weights are and waits for the first step; memory is counted from here."""
        self.memory_mb = _memory_mb()
        self.say({"memory_mb": self.memory_mb, **found})
        self.wait()

    def wait(self) -> None:
        """Returns when the next step may begin."""
        sys.stdin.readline()
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def done(self, **found: Any) -> None:
        """Reports a step and waits for the next."""
        seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        self.say({"seconds": seconds, "cpu": cpu, "peak_mb": _peak_mb(), **found})
        self.wait()


def _memory_mb() -> float:
    """What the process has now; Linux alone says so, elsewhere it is what it has had at most."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return _peak_mb()
    return int(pages.read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 2**20


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
