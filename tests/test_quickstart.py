"""The quickstart does what the README promises. How long it takes is no test's business."""

from pathlib import Path

import pytest

import alignment

RECIPE = Path(__file__).parents[1] / "recipes/quickstart.yaml"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_right_or_wrong_teaches_what_more_demonstrations_steps_do_not(tmp_path, seed):
    result = alignment.train(RECIPE, overrides=[f"run.output={tmp_path}", f"run.seed={seed}"])
    before, after = result["eval"]["before"], result["eval"]["after"]
    assert after["accuracy"] >= 0.8
    assert after["accuracy"] - before["accuracy"] >= 0.25
    assert after["interval"][0] > before["interval"][1], "the intervals do not overlap"
    assert [stage["name"] for stage in result["stages"]] == ["warmup", "rl"]


@pytest.mark.full  # the test of Slurm runs the same recipe on the same engines
def test_the_real_engines_learn_it_too(tmp_path):
    """vLLM, two DeepSpeed ranks and Ray, in a cluster of its own, one batch in flight."""
    result = alignment.train(RECIPE.with_name("quickstart_cluster.yaml"), overrides=[f"run.output={tmp_path}"])
    before, after = result["eval"]["before"], result["eval"]["after"]
    assert result["status"] == "complete"
    assert after["accuracy"] - before["accuracy"] >= 0.15
