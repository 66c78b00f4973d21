"""Every weighting, entropy control and mixer in a run that is stopped and goes on: it is the uninterrupted one, bit for
bit. Mixers' runs are in ``test_mixing.py``; here is said that none is missing."""

import json
from pathlib import Path
from typing import Any

import pytest

import alignment
from alignment.algorithms.entropy_controls import entropy_controls
from alignment.algorithms.mixers import mixers
from alignment.algorithms.state import fresh
from alignment.algorithms.weightings import weightings
from alignment.checkpoint import Checkpoints
from alignment.recipe import OnlineStage
from tests.test_mixing import JUDGING, MIXERS
from tests.test_train import Recorder, contents, lines
from tests.tiny import RECIPE, merged, tiny

REWARDS = [{"name": "format", "pattern": "[0-4].*"}, {"name": "exact_match", "weight": 0.5}]
"""The first is one that an untrained model sometimes earns, so that groups differ."""
STOP, END = 3, 5
"""Steps."""
THRESHOLD = {"name": "lagrangian", "thresholds": {"exact_match": 0.5}}
MEMBERS = {"name": "ensemble", "members": ["format", "exact_match"]}
OFTEN = {"evaluation": {"every": 1, "samples": 4, "sampling": {"temperature": 1.0}}}

WEIGHTINGS: dict[str, dict[str, Any]] = {
    "fixed": {"name": "fixed", "truncated": -1.0},
    "normalised": {"name": "normalised"},
    "normalise_then_sum": {"name": "normalise_then_sum"},
    "lagrangian mu": {**THRESHOLD, "kind": "mu"},
    "lagrangian xi": {**THRESHOLD, "kind": "xi"},
    "recap": {"name": "recap", "window": 2, "temperature": 0.5},
    "gradient": {"name": "gradient", "max_norm": None, "accumulation": 2},
    **{f"ensemble {how}": {**MEMBERS, "combine": how} for how in ("mean", "worst", "uncertainty")},
    **{f"hypervolume of {what}": {"name": "hypervolume", "apply_to": what} for what in ("reward", "advantage", "lr")},
}
CONTROLS: dict[str, dict[str, Any]] = {
    "bonus": {"name": "bonus", "coefficient": 0.1},
    "adaptive_bonus": {"name": "adaptive_bonus", "target": 3.0, "delta": 0.01},
    "high_entropy": {"name": "high_entropy"},
    "steer": {"name": "steer"},
    "steer exact": {"name": "steer", "omega": "exact", "shape": "linear"},
    "clip_cov": {"name": "clip_cov", "share": 0.2, "low": 0.1},
    "kl_cov": {"name": "kl_cov", "share": 0.2},
    "shuffled": {"name": "shuffled", "of": {"name": "steer"}},
}


def states(run: str, step: int) -> dict[str, Any]:
    """Those of components in the checkpoint of a step."""
    folder = Checkpoints(Path(run) / "checkpoints").folder_of(step)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))["components"]


def assert_goes_on_exactly(folder: Path, stage: dict[str, Any], change: dict[str, Any] | None = None) -> None:
    """Two runs of one recipe, of which one is stopped among its steps, end alike; every state that components
    keep had moved before the stop, and moved on after it."""
    stages = [merged(RECIPE["stages"][1], {"steps": END, "learner": {"lr": 2e-2}, **stage})]
    change = {"rewards": REWARDS, "evaluation": {"every": 0}, "stages": stages, **(change or {})}
    whole = alignment.train(tiny(folder, {**change, "run": {"name": "whole"}}))["folder"]
    recipe = tiny(folder, {**change, "run": {"name": "parts"}})
    assert alignment.train(recipe, sinks=[Recorder(STOP)])["status"] == "interrupted"
    parts = alignment.train(recipe)
    assert parts["status"] == "complete"
    assert contents(parts["folder"]) == contents(whole) and lines(parts["folder"]) == lines(whole)
    (online,) = recipe.stages
    assert isinstance(online, OnlineStage)
    first, stopped, ended = fresh(online.components()), states(parts["folder"], STOP), states(whole, END)
    assert first.keys() == stopped.keys() == ended.keys()
    assert [place for place in first if not first[place] != stopped[place] != ended[place]] == []


@pytest.mark.filterwarnings("ignore:.*apply_to")
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting(tmp_path, weighting):
    change = OFTEN if weighting.startswith("hypervolume") else None
    assert_goes_on_exactly(tmp_path, {"algorithm": {"weighting": WEIGHTINGS[weighting]}}, change)


def test_a_critic_with_values_of_every_component(tmp_path):
    algorithm = {"weighting": THRESHOLD, "advantage": "gae"}
    assert_goes_on_exactly(tmp_path, {"algorithm": algorithm, "critic": "model"})


@pytest.mark.parametrize("control", CONTROLS)
def test_an_entropy_control(tmp_path, control):
    algorithm = {"entropy_controls": [CONTROLS[control]], "policy_loss": "reinforce", "minibatches": 2}
    assert_goes_on_exactly(tmp_path, {"algorithm": algorithm})


def test_none_is_missing():
    tested = {
        weightings: WEIGHTINGS,
        entropy_controls: CONTROLS,
        mixers: {**MIXERS, **JUDGING, "none": {"name": "none"}},
    }
    for registry, cases in tested.items():
        ours = {entry.name for entry in registry if entry.cls.__module__.startswith("alignment.")}
        assert {case["name"] for case in cases.values()} == ours
