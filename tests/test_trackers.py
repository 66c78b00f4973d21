"""TensorBoard and W&B receive everything, go on after a resume, and no secret."""

import builtins
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import UserError
from alignment.metrics import Record, Sink
from alignment.recipe import load
from alignment.trackers import TensorBoardSink, WandbSink, make_sinks, redact

RECIPE = """
run: {name: small, sinks: [jsonl, console, tensorboard, {name: wandb, project: lab, mode: offline}]}
model: {build: {alphabet: "0123456789"}}
data: {demonstrations: {name: procedural, task: arithmetic, split: demonstrations}}
stages: [{stage: sft, steps: 3}]
"""


def run_of(folder: Path, resumed_from=None):
    recipe = {"model": {"path": "m"}, "api_key": "hunter2", "data": ["https://me:hunter2@host/x"], "max_tokens": 7}
    return {"name": "small", "folder": folder, "recipe": recipe, "stages": [], "resumed_from": resumed_from}


def test_secrets_are_left_out():
    hidden = redact(run_of(Path())["recipe"])
    assert "hunter2" not in str(hidden)
    assert (hidden["max_tokens"], hidden["model"]) == (7, {"path": "m"})
    assert redact({"options": [{"note": "sk-" + "a" * 24}]}) == {"options": [{"note": "***"}]}


def test_a_recipe_names_its_sinks(tmp_path):
    (tmp_path / "small.yaml").write_text(RECIPE)
    made = make_sinks(load([tmp_path / "small.yaml"]))
    assert [type(sink).__name__ for sink in made] == ["JsonlSink", "PlainSink", "TensorBoardSink", "WandbSink"]
    assert all(isinstance(sink, Sink) for sink in made)
    wandb = made[-1]
    assert isinstance(wandb, WandbSink)
    assert (wandb.project, wandb.entity, wandb.mode) == ("lab", None, "offline")


def test_tensorboard_can_be_read_back_and_goes_on_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoardSink()
    first.start(run_of(tmp_path))
    for step in range(1, 6):
        first.log(Record(step, "rl", step, 9, {"reward": step / 10, "kl": math.nan}))
    first.close()
    second = TensorBoardSink()
    second.start(run_of(tmp_path, resumed_from=3))
    for step in range(4, 7):
        second.log(Record(step, "rl", step, 9, {"reward": step / 10 + 100}))
    second.log(Record(6, "rl", 6, 9, {"accuracy": 0.5}, "eval"))
    second.close()
    second.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("train/reward")}
    assert points == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3, 4: 100.4, 5: 100.5, 6: 100.6})
    assert len(events.Scalars("train/reward")) == 6, "the points after the checkpoint are purged"
    assert [event.value for event in events.Scalars("eval/accuracy")] == [0.5]
    assert math.isnan(events.Scalars("train/kl")[0].value)
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"max_tokens": 7' in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("sink", "package", "extra"),
    [(TensorBoardSink, "torch.utils.tensorboard", "tensorboard"), (WandbSink, "wandb", "wandb")],
)
def test_a_package_that_is_missing_names_its_extra(tmp_path, monkeypatch, sink, package, extra):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(package):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"pip install 'alignment-rl\[{extra}\]'"):
        sink().start(run_of(tmp_path))


class FakeWandb:
    """Stands in for the package: remembers what it was told."""

    def __init__(self):
        self.inits, self.logged, self.summary, self.finished = [], [], {}, 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def Settings(self, **options):  # noqa: N802 - its name there
        return options

    def define_metric(self, name, step_metric=None):
        self.logged.append((name, step_metric))

    def log(self, metrics):
        self.logged.append(metrics)

    def finish(self):
        self.finished += 1


def test_wandb_keeps_its_id_over_a_resume_and_takes_a_new_one_afresh(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed_from in (None, 5, None):
        sink = WandbSink("lab")
        sink.start(run_of(tmp_path, resumed_from))
        sink.log(Record(6, "rl", 1, 9, {"reward": 0.5}))
        sink.finish({"status": "complete", "eval": {"after": None}})
        sink.close()
        sink.close()
    first, resumed, fresh = fake.inits
    assert first["id"] == resumed["id"] != fresh["id"]
    assert all(options["resume"] == "allow" for options in fake.inits)
    assert "hunter2" not in str(fake.inits)
    assert first["config"]["max_tokens"] == 7
    assert fake.logged[:3] == [("step", None), ("*", "step"), {"step": 6, "train/reward": 0.5}]
    assert fake.summary == {"status": "complete", "eval": {"after": None}}
    assert fake.finished == 3


def test_wandb_itself_accepts_all_of_this_offline(tmp_path):
    wandb = pytest.importorskip("wandb")
    sink = WandbSink("lab", mode="offline")
    sink.start(run_of(tmp_path))
    sink.log(Record(1, "rl", 1, 9, {"reward": 0.5, "kl": math.nan}))
    sink.log(Record(1, "rl", 1, 9, {"accuracy": 0.25}, "eval"))
    sink.finish({"status": "complete", "eval": {"after": {"accuracy": 0.25}}})
    sink.close()
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    wandb.teardown()  # its own process writes the file; this waits for it
    content = written.read_bytes()
    assert b"train/reward" in content
    assert (tmp_path / "wandb_id").read_text() in written.name
    assert b"hunter2" not in content


def test_wandb_without_a_login_says_how_to_log_in(tmp_path, monkeypatch):
    fake: Any = FakeWandb()
    fake.UsageError = type("UsageError", (Exception,), {})

    def init(**_):
        raise fake.UsageError("api_key not configured (no-tty)")

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match="api_key not configured.*`wandb login`.*WANDB_MODE=offline"):
        WandbSink("lab").start(run_of(tmp_path))
