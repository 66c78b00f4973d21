"""What ``align eval`` shows: progress while it runs, and tables of scores."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text


class Progress:
    """One bar per benchmark, in completions: how many of how many, how many per second, time left.

    Where ``console`` is no terminal, one line per benchmark that begins or is done.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._samples: dict[str, int] = {}
        self._problems: dict[str, int] = {}
        self._now = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def add(self, name: str, problems: int, samples: int, done: int) -> None:
        """A benchmark, of which ``done`` problems are finished already."""
        self._samples[name], self._problems[name] = samples, problems
        total = problems * samples
        self._tasks[name] = self._bars.add_task(name, total=total, completed=done * samples, start=False, rate="")
        if done and not self.console.is_terminal:
            self._say(f"{name}: {done} of {problems} problems are done already")

    def begin(self, name: str) -> None:
        """The benchmark is next."""
        self._now = name
        self._bars.start_task(self._tasks[name])
        if not self.console.is_terminal:
            self._say(f"{name}: {self._problems[name]} problems, {self._samples[name]} completions each")

    def sampled(self) -> None:
        """One more completion."""
        task = self._bars.tasks[self._tasks[self._now]]
        speed = task.speed
        rate = "" if speed is None else f"{speed:,.1f}/s" if speed < 100 else f"{speed:,.0f}/s"
        self._bars.update(task.id, advance=1, rate=rate)

    def finished(self, problems: int) -> None:
        """So many problems are sampled, scored and on the disk."""
        self._bars.update(self._tasks[self._now], completed=problems * self._samples[self._now])

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def results_table(results: Mapping[str, Any]) -> Table:
    """The scores of ``results.json``, narrow enough for 80 columns."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=0, show_edge=False)
    table.add_column("task")
    table.add_column("problems", justify="right")
    table.add_column("score")
    for heading in ("% [95 % interval]", "floor", "cut off", "no answer", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, task in results["tasks"].items():
        n, scores = task["samples"], task["scores"]
        shown = [f"avg@{n}"] + [key for key in (f"pass@{n}", f"maj@{n}") if n > 1 and key in scores]
        rates = [percent(share) for share in (task["data"]["floor"], task["truncated"], task["unparseable"])]
        length = "-" if task["length"] is None else f"{task['length']:.0f}"
        problems = str(task["problems"]) if n == 1 else f"{task['problems']} x {n}"
        table.add_row(name, problems, shown[0], with_interval(scores[shown[0]]), *rates, length)
        for key in shown[1:]:
            table.add_row("", "", key, with_interval(scores[key]))
    return table


def notes(results: Mapping[str, Any]) -> list[str]:
    """What must not be overlooked beside the scores."""
    found = []
    for name, task in results["tasks"].items():
        left_out = task["data"]["left_out"]
        for why, reason in (("bad_rows", "cannot be judged"), ("over_long", "are too long")):
            if left_out[why]:
                found.append(f"{name}: {left_out[why]} problems are left out, which {reason}")
        if task["unscored"]:
            found.append(f"{name}: {task['unscored']} completions could not be scored; they are in no score")
    return found


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """What :func:`alignment.evaluation.compare.compare_folders` found."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=0, show_edge=False)
    for heading in ("task", "problems", "A, %", "B, %", "B - A [95 %]", "p", "wins", "ties", "losses"):
        table.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=heading != "task")
    for name, found in comparison["tasks"].items():
        low, high = found["interval"]
        table.add_row(
            name,
            str(found["problems"]),
            f"{100 * found['a']:.1f}",
            f"{100 * found['b']:.1f}",
            f"{100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
            f"{found['p']:.3f}" if found["p"] >= 0.001 else "<.001",
            *(str(found[key]) for key in ("wins", "ties", "losses")),
        )
    return table


def with_interval(score: Mapping[str, Any]) -> str:
    """``52.1 [48.0, 56.2]``, in per cent."""
    if score["value"] is None:
        return "-"
    low, high = score["interval"]
    return f"{100 * score['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def percent(share: float | None) -> str:
    """``52.1 %``; a dash where there is none."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def show(table: Table, remarks: Sequence[str], console: Console) -> None:
    """Prints a table and what goes with it."""
    console.print(table)
    console.print()
    for remark in remarks:
        console.print(Text(f"note: {remark}"), soft_wrap=True)
