"""What a person sees: at 80 and 120 columns, in a terminal, in a log, after Ctrl-C."""

import io
import logging
import re
import warnings
from typing import Literal

import pytest
from rich.console import Console

from alignment.console import LiveSink, PlainSink, console_sink, final_table, panel
from alignment.metrics import Record, StageResult, build_result

RUN = {
    "name": "quickstart",
    "folder": "runs/quickstart",
    "recipe": {},
    "stages": [{"name": "warmup", "stage": "sft", "steps": 4}, {"name": "rl", "stage": "online", "steps": 10}],
    "resumed_from": None,
}
METRICS = {"loss": 0.1, "reward": 0.7, "accuracy": 0.71, "entropy": 0.312, "kl": 0.0002, "length": 3.14}
EVALUATION = {"accuracy": 0.84, "accuracy_low": 0.81, "accuracy_high": 0.87}
CURSOR_HIDDEN, CURSOR_SHOWN = "\x1b[?25l", "\x1b[?25h"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def terminal(width=80, **options):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, **options)


def log_file(width=80):
    return Console(file=io.StringIO(), width=width)


def text_of(console):
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def online(step, **metrics):
    return Record(4 + step, "rl", step, 10, METRICS | {"tokens_per_s": 4123.4} | metrics)


def result(status: Literal["complete", "interrupted"] = "complete"):
    def found(accuracy):
        return {"accuracy": accuracy, "interval": [accuracy - 0.04, accuracy + 0.04], "n": 300}

    return build_result(
        status=status,
        stages=[
            StageResult("warmup", "sft", 400, 24.2, {"demonstrations": 400}, None, found(0.62)),
            StageResult("rl", "online", 150, 3724.0, {"rewards": 153600}, found(0.62), found(0.94)),
        ],
        before=found(0.62),
        after=found(0.94),
        best=None,
        folder="runs/quickstart",  # pyright: ignore[reportArgumentType]
        files={"metrics.jsonl": "one line per step", "checkpoints": "the last two and the best"},
    )


def test_the_kind_of_output_decides():
    assert isinstance(console_sink(terminal()), LiveSink)
    assert isinstance(console_sink(log_file()), PlainSink)


def test_a_log_has_a_line_every_two_seconds_no_colours_and_no_lost_evaluation():
    console, clock = log_file(), Clock()
    sink = PlainSink(console, every_s=2.0, clock=clock)
    sink.start(RUN)
    for step in range(1, 11):
        clock.now += 0.5
        sink.log(online(step))
        if step == 6:
            sink.log(Record(10, "rl", 6, 10, EVALUATION, "eval"))
    sink.close()
    lines = text_of(console).splitlines()
    assert "\x1b" not in text_of(console)
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert "quickstart: warmup (sft, 4 steps), rl (online, 10 steps) in runs/quickstart" in lines[0]
    assert [line.split()[2] for line in lines[1:]] == ["1/10", "5/10", "6/10", "9/10", "10/10"]
    first = "rl 1/10  reward 0.700  accuracy 71.0 %  entropy 0.312  KL 2.0e-04  length 3.1  4,123 tokens/s"
    assert lines[1][9:].startswith(first)
    assert lines[2].endswith("  0:02 left")
    assert lines[3][9:] == "rl 6/10  held-out accuracy 84.0 % [81, 87]"


def test_slow_steps_are_all_logged_and_long_lines_are_not_broken():
    console, clock = log_file(width=40), Clock()
    sink = PlainSink(console, clock=clock)
    sink.start(RUN)
    for step in (1, 2, 3):
        clock.now += 30
        sink.log(online(step))
    sink.close()
    assert len(text_of(console).splitlines()) == 4


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_shows_stages_metrics_course_and_evaluation(width):
    console, clock = terminal(width, color_system=None), Clock()
    sink = LiveSink(console, clock)
    sink.start(RUN)
    for step in range(1, 5):
        clock.now += 1
        sink.log(Record(step, "warmup", step, 4, {"loss": 1 / step, "tokens_per_s": 51234.0}))
    sink.log(Record(4, "warmup", 4, 4, EVALUATION, "eval"))
    for step in range(1, 7):
        clock.now += 2
        sink.log(online(step, accuracy=0.1 * step))
    sink.close()
    assert sink.progress is not None
    show = Console(file=io.StringIO(), width=width)
    show.print(panel(sink.progress))
    lines = text_of(show).splitlines()
    assert {len(line) for line in lines} == {width}
    assert "quickstart" in lines[0]
    assert re.search(r"✓ warmup sft +4/4 .* 0:04", lines[1])
    assert re.search(r"● rl +online 6/10 ━+.* 0:08 left", lines[2])
    shown = "\n".join(lines)
    assert re.search(r"reward +accuracy +entropy +KL +length +tokens/s", shown)
    assert re.search(r"0\.700 +60\.0 % +0\.312 +2\.0e-04 +3\.1 +4,123", shown)
    assert "▁▂▃▄▅" in shown.replace("▁▁", "▁").replace("▃▃", "▃") or "10.0 % to 60.0 %" in shown
    assert "10.0 % to 60.0 %" in shown
    assert "held out  84.0 % [81, 87]  at step 4 of warmup" in shown


def test_time_left_of_a_resumed_stage_counts_only_its_own_steps():
    console, clock = terminal(), Clock()
    sink = LiveSink(console, clock)
    sink.start(RUN | {"resumed_from": 9})
    sink.close()
    clock.now += 5
    sink.log(online(6))
    assert sink.progress is not None
    assert sink.progress.left_s() == pytest.approx(4 * 5.0)
    show = log_file()
    show.print(panel(sink.progress))
    assert "quickstart, resumed from step 9" in text_of(show)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_the_terminal_is_given_back_whatever_happens(error):
    console = terminal()
    handlers = list(logging.getLogger().handlers)
    sink = LiveSink(console)
    with pytest.raises(error):
        try:
            sink.start(RUN)
            sink.log(online(1))
            raise error
        finally:
            sink.close()
    out = text_of(console)
    assert out.count(CURSOR_HIDDEN) == out.count(CURSOR_SHOWN) == 1
    assert out.rindex(CURSOR_SHOWN) > out.rindex(CURSOR_HIDDEN)
    assert logging.getLogger().handlers == handlers
    sink.close()


@pytest.mark.parametrize("make", [terminal, log_file])
def test_warnings_go_through_the_console(make):
    console = make()
    sink = console_sink(console)
    sink.start(RUN)
    logging.getLogger("alignment.scoring").warning("3 of %d rewards [red] timed out", 64)
    logging.getLogger("alignment.scoring").info("not shown")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # pytest replaced the hook that the sink installed
        warnings.warn("the disk is nearly full", stacklevel=1)
    sink.close()
    logging.getLogger("alignment.scoring").warning("after the end")
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text_of(console))
    assert "warning: 3 of 64 rewards [red] timed out" in out
    assert "the disk is nearly full" in out
    assert "not shown" not in out
    assert "after the end" not in out


@pytest.mark.parametrize("width", [80, 120])
def test_the_final_table(width):
    console = log_file(width)
    console.print(final_table(result()))
    out = text_of(console)
    assert max(len(line.rstrip()) for line in out.splitlines()) <= width
    assert "Accuracy on held-out problems, with 95 % intervals" in out
    assert re.search(r"warmup +400 +0:24 +400 demonstrations +- +62\.0 % \[58, 66\]", out)
    assert re.search(r"rl +150 +1:02:04 +153,600 rewards +62\.0 % \[58, 66\] +94\.0 % \[90, 98\]", out)
    assert "62.0 % before, 94.0 % after: +32.0 points" in out
    assert re.search(r"Written to runs/quickstart\n +metrics\.jsonl +one line per step", out)
    assert "interrupted" not in out


def test_an_interrupted_run_says_how_to_go_on():
    console = log_file()
    console.print(final_table(result("interrupted")))
    assert "The run was interrupted; the same command continues it." in text_of(console)


def test_the_live_display_ends_in_the_final_table():
    console = terminal(color_system=None)
    sink = LiveSink(console)
    sink.start(RUN)
    sink.log(online(10))
    sink.finish(result())
    sink.close()
    out = text_of(console)
    assert out.index(CURSOR_SHOWN) < out.index("Accuracy on held-out problems")
    assert out.count("Accuracy on held-out problems") == 1


def test_a_terminal_without_unicode_gets_ascii():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=True, width=80, color_system=None)
    sink = LiveSink(console)
    sink.start(RUN)
    for step in (1, 2):
        sink.log(online(step))
    sink.finish(result())
    console.file.flush()
    assert b"accuracy  " in raw.getvalue()
