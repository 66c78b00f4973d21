"""Runs that mix demonstrations with rollouts: they learn from both, and go on exactly where they were stopped."""

from typing import Any

import pytest

import alignment
from alignment.recipe import RecipeError, load
from tests.test_train import Recorder, contents, lines
from tests.tiny import RECIPE, SUMS, tiny, write

MIXERS: dict[str, Any] = {
    "hpt": {"name": "hpt"},
    "soft": {"name": "hpt", "soft": [[1, 0.5, 0.5], [3, 1.0, 0.0]]},
    "blend": {"name": "blend", "rows": 4, "start": 1.0, "end": 0.1, "over_steps": 4},
    "relift": {"name": "relift", "batch_size": 3},
}
SAME = {"data": {"demonstrations": SUMS | {"split": "train"}}, "evaluation": {"every": 0}}


def change(mixer: str, name: str) -> dict[str, Any]:
    stage = {"algorithm": {"mixer": MIXERS[mixer], "minibatches": 2}, "steps": 6, "prompts_per_step": 6}
    return SAME | {"run": {"name": name}, "stages": {1: stage}}


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixed_run_goes_on_exactly(tmp_path, mixer):
    whole = alignment.train(tiny(tmp_path, change(mixer, "whole")))
    parts = tiny(tmp_path, change(mixer, "parts"))
    assert alignment.train(parts, sinks=[Recorder(6)])["exit_code"] == 130
    second = alignment.train(parts)
    assert contents(second["folder"]) == contents(whole["folder"])
    steps = [line for line in lines(whole["folder"]) if line["kind"] == "train" and line["stage"] == "rl"]
    assert steps == [s for s in lines(second["folder"]) if s["kind"] == "train" and s["stage"] == "rl"]
    if mixer == "relift":
        taught = [step for step in steps if "sft/loss" in step]
        assert taught and all(step["sft/optimizer_steps"] == 1 for step in taught)
        assert any(name.startswith("learner/slot-sft") for name in contents(whole["folder"]))
    else:
        assert any(step.get("demonstrations", 0) > 0 for step in steps)


def test_a_mixer_without_demonstrations_is_refused_at_its_line(tmp_path):
    rl = {**RECIPE["stages"][1], "algorithm": {"mixer": "hpt"}}
    path = write(tmp_path, {"data": {"demonstrations": None}, "stages": [rl]})
    with pytest.raises(RecipeError, match=r"tiny\.yaml:\d+: stages\.0\.algorithm\.mixer: needs data\.demonstrations"):
        load([path])
