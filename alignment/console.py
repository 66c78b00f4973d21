"""What the user sees while a run goes on: a live display in a terminal, a plain log elsewhere, and the final table."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from alignment.metrics import Record, Sink
from alignment.types import Group as RolloutGroup

SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "accuracy": "accuracy",
    "entropy": "entropy",
    "kl": "KL",
    "length": "length",
    "tokens_per_s": "tokens/s",
}
"""Metrics of a step that are shown, and their headings."""
_BLOCKS = "▁▂▃▄▅▆▇█"


def console_sink(console: Console | None = None) -> Sink:
    """The sink for ``console`` (default: standard output): live where it is a terminal, a plain log elsewhere."""
    console = console or Console()
    return LiveSink(console) if console.is_interactive else PlainSink(console)


class _Progress:
    """Where the run is: stages, the newest metrics of each, and time left."""

    def __init__(self, run: Mapping[str, Any], clock: Callable[[], float]) -> None:
        self.run, self.clock = run, clock
        self.stages: Sequence[Mapping[str, Any]] = run["stages"]
        self.at = 0
        self.done = 0
        self.metrics: Mapping[str, float] = {}
        self.evaluation: Record | None = None
        self.accuracies: list[float] = []
        self.seconds: dict[int, float] = {}
        self._fresh, self._last, self._since, self._since_step = True, clock(), clock(), 0

    def add(self, record: Record) -> None:
        """Takes a record in."""
        before, self._last = self._last, self.clock()
        if record.kind == "eval":
            self.evaluation = record
            return
        at = next(i for i, stage in enumerate(self.stages) if stage["name"] == record.stage)
        if self._fresh or at != self.at:  # a resumed stage does not begin at step 0
            self._fresh, self.at, self.accuracies = False, at, []
            self._since, self._since_step = before, record.stage_step - 1
        self.done, self.metrics = record.stage_step, record.metrics
        if not math.isnan(record.metrics.get("accuracy", math.nan)):
            self.accuracies.append(record.metrics["accuracy"])
        if self.done >= self.stages[at]["steps"]:
            self.seconds[at] = self.clock() - self._since

    def left_s(self) -> float | None:
        """Seconds that the stage will still take at its mean speed so far; None before that is known."""
        steps = self.done - self._since_step
        if steps < 1:
            return None
        return (self.stages[self.at]["steps"] - self.done) * (self.clock() - self._since) / steps


class PlainSink:
    """One line per step, but at most one every ``every_s`` seconds, and one per evaluation. No colours."""

    def __init__(self, console: Console, every_s: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.every_s, self.clock = console, every_s, clock
        self._stack = ExitStack()
        self._next = 0.0

    def start(self, run: Mapping[str, Any]) -> None:
        self.progress = _Progress(run, self.clock)
        self._next = self.clock()
        show_warnings(self.console, self._stack)
        self._say(f"{run['name']}: {_stage_list(run)} in {run['folder']}{_resumed(run)}")

    def log(self, record: Record) -> None:
        self.progress.add(record)
        place = f"{record.stage} {record.stage_step}/{record.stage_steps}"
        if record.kind == "eval":
            self._say(f"{place}  held-out accuracy {_accuracy(_evaluation(record))}")
            return
        last = record.stage_step >= record.stage_steps
        if self.clock() < self._next and not last and record.stage_step != 1:
            return
        self._next = self.clock() + self.every_s
        shown = "  ".join(
            f"{value} {heading}" if "/s" in heading else f"{heading} {value}"
            for heading, value in _values(record.metrics)
        )
        left = self.progress.left_s()
        self._say(f"{place}  {shown}" + ("" if last or left is None else f"  {_duration(left)} left"))

    def rollouts(self, step: int, stage: str, groups: Sequence[RolloutGroup]) -> None:
        """Rollouts are not shown."""

    def finish(self, result: Mapping[str, Any]) -> None:
        self.console.print(final_table(result))

    def close(self) -> None:
        self._stack.close()

    def _say(self, text: str) -> None:
        line = f"{datetime.now().astimezone():%H:%M:%S} {text}"
        self.console.print(Text(line), soft_wrap=True)


class LiveSink:
    """A panel that is redrawn in place: stages with bars, the newest metrics, the accuracy so far."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._stack = ExitStack()
        self.progress: _Progress | None = None

    def start(self, run: Mapping[str, Any]) -> None:
        self.progress = _Progress(run, self.clock)
        live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
        self._stack.enter_context(live)  # leaving it shows the cursor again and gives the streams back
        show_warnings(self.console, self._stack)

    def log(self, record: Record) -> None:
        assert self.progress is not None, "log before start"
        self.progress.add(record)

    def rollouts(self, step: int, stage: str, groups: Sequence[RolloutGroup]) -> None:
        """Rollouts are not shown."""

    def finish(self, result: Mapping[str, Any]) -> None:
        self.close()
        self.console.print(final_table(result))

    def close(self) -> None:
        self._stack.close()

    def _render(self) -> RenderableType:
        assert self.progress is not None
        return panel(self.progress, plain=self.console.options.ascii_only)


def panel(progress: _Progress, *, plain: bool = False) -> RenderableType:
    """The live display. ``plain`` avoids characters beyond ASCII."""
    bars = Table.grid(padding=(0, 1), expand=True)
    for ratio in (None, None, None, None, 1, None):
        bars.add_column(ratio=ratio, no_wrap=True)
    for i, stage in enumerate(progress.stages):
        bars.add_row(*_stage_row(progress, i, stage, plain))
    parts: list[RenderableType] = [bars]
    values = _values(progress.metrics)
    if values:
        numbers = Table.grid(padding=(0, 3, 0, 0))
        for _ in values:
            numbers.add_column(justify="right", no_wrap=True)
        numbers.add_row(*(Text(heading, "dim") for heading, _ in values))
        numbers.add_row(*(Text(value, "bold") for _, value in values))
        parts += [Text(), numbers]
    if len(progress.accuracies) > 1:
        parts += [Text(), _curve(progress.accuracies, plain)]
    if progress.evaluation:
        record = progress.evaluation
        where = f"  at step {record.stage_step} of {record.stage}"
        accuracy = _accuracy(_evaluation(record))
        parts.append(Text.assemble(("held out  ", "dim"), (accuracy, "bold green"), (where, "dim")))
    title = Text.assemble((progress.run["name"], "bold"), (_resumed(progress.run), "dim"))
    return Panel(Group(*parts), title=title, title_align="left", padding=(0, 1), border_style="dim")


def _stage_row(progress: _Progress, i: int, stage: Mapping[str, Any], plain: bool) -> list[RenderableType]:
    steps, done = stage["steps"], progress.done if i == progress.at else stage["steps"] if i < progress.at else 0
    current = i == progress.at and done < steps
    mark = ("*" if plain else "●", "cyan") if current else ("+" if plain else "✓", "green") if done else (" ", "")
    style = "bold" if current else "dim"
    left = progress.left_s()
    end = f"{_duration(left)} left" if current and left is not None else ""
    if not current and i in progress.seconds:
        end = _duration(progress.seconds[i])
    count = Text(f"{done}/{steps}", style)
    bar = ProgressBar(total=max(steps, 1), completed=done) if current else Text()
    return [Text(*mark), Text(stage["name"], style), Text(stage["stage"], "dim"), count, bar, Text(end, "dim")]


def _curve(values: Sequence[float], plain: bool, width: int = 40) -> Text:
    """The course of a share between 0 and 1 as a line of blocks, averaged to at most ``width`` of them."""
    bins = min(width, len(values))
    cut = [values[i * len(values) // bins : (i + 1) * len(values) // bins] for i in range(bins)]
    means = [sum(part) / len(part) for part in cut]
    blocks = "" if plain else "".join(_BLOCKS[min(7, int(m * 8))] if not math.isnan(m) else " " for m in means)
    ends = f"{_percent(means[0])} to {_percent(means[-1])}"
    return Text.assemble(("accuracy  ", "dim"), (blocks, "cyan"), f"  {ends}")


def final_table(result: Mapping[str, Any]) -> RenderableType:
    """What the run did: accuracy before and after each stage, labels used, and where everything was written."""
    title = "Accuracy on held-out problems, with 95 % intervals"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("stage", "steps", "time", "labels used", "before", "after"):
        right = name in ("steps", "time")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "labels used")
    for stage in result["stages"]:
        labels = ", ".join(f"{count:,} {label}" for label, count in stage["labels"].items()) or "none"
        cells = [stage["name"], f"{stage['steps']:,}", _duration(stage["seconds"]), labels]
        cells += [_accuracy(stage["eval"][when]) for when in ("before", "after")]
        table.add_row(*(Text(cell) for cell in cells))
    parts: list[RenderableType] = [Text(), table]
    before, after = result["eval"]["before"], result["eval"]["after"]
    if before and after:
        points = 100 * (after["accuracy"] - before["accuracy"])
        change = f"{_percent(before['accuracy'])} before, {_percent(after['accuracy'])} after: {points:+.1f} points"
        parts.append(Text(change, "bold green" if points > 0 else "bold"))
    if result["status"] == "interrupted":
        parts.append(Text("The run was interrupted; the same command continues it.", "yellow"))
    parts += [Text(), Text.assemble("Written to ", (result["folder"], "bold"))]
    files = Table.grid(padding=(0, 2))
    for path, what in result["files"].items():
        files.add_row(Text(f"  {path}"), Text(what, "dim"))
    return Group(*parts, files)


def _values(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Heading and formatted value of each metric that is shown; the loss only where there is no reward."""
    hidden = "loss" if "reward" in metrics else None
    return [(SHOWN[n], _number(n, metrics[n])) for n in SHOWN if n in metrics and n != hidden]


def _number(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    if name == "accuracy":
        return _percent(value)
    if name == "tokens_per_s":
        return f"{value:,.0f}"
    return f"{value:.1f}" if name == "length" else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def _evaluation(record: Record) -> dict[str, Any]:
    m = record.metrics
    interval = [m["accuracy_low"], m["accuracy_high"]] if "accuracy_low" in m else None
    return {"accuracy": m.get("accuracy"), "interval": interval}


def _accuracy(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None or evaluation["accuracy"] is None:
        return "-"
    text = _percent(evaluation["accuracy"])
    if not evaluation.get("interval"):
        return text
    low, high = evaluation["interval"]
    return f"{text} [{100 * low:.0f}, {100 * high:.0f}]"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _stage_list(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{s['name']} ({s['stage']}, {s['steps']} steps)" for s in run["stages"])


def _resumed(run: Mapping[str, Any]) -> str:
    return "" if run.get("resumed_from") is None else f", resumed from step {run['resumed_from']}"


class _WarningHandler(logging.Handler):
    """Prints warnings and errors of any logger through the console: above a live display, in line with a plain log."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno < logging.ERROR else "bold red"
        text = Text.assemble((f"{record.levelname.lower()}: ", style), record.getMessage().rstrip())
        self.console.print(text, soft_wrap=True)


def show_warnings(console: Console, stack: ExitStack) -> None:
    """Until ``stack`` is closed, logged warnings and those of the ``warnings`` module go to ``console``."""
    handler = _WarningHandler(console)
    logging.getLogger().addHandler(handler)
    stack.callback(logging.getLogger().removeHandler, handler)
    logging.captureWarnings(True)
    stack.callback(logging.captureWarnings, False)
