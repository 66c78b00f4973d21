"""What a stage's options name is looked for before the first stage: columns of prompts, and weights of the model."""

import pytest

import alignment
from alignment.models import load_model
from alignment.plan import make_plan
from alignment.recipe import RecipeError, load
from alignment.stage_checks import unknown_layers
from tests.recipes_for_tests import only, write
from tests.tiny import tiny

WEIGHTING = "stages.1.algorithm.weighting"


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ({"name": "self_evolving", "by": ["nosuch"]}, "has no column 'nosuch'; its columns are: prompt, answer"),
        ({"name": "level_schedule", "by": "nosuch"}, "has no column 'nosuch'"),
        (
            {"name": "level_schedule", "by": "prompt"},
            "orders prompts by the numbers in their column 'prompt', and could",
        ),
    ],
)
def test_columns_that_prompts_lack_are_told_before_the_first_stage(tmp_path, curriculum, message):
    recipe = tiny(tmp_path, {"stages": {1: {"curricula": [curriculum]}}})
    for whole in (make_plan, alignment.train):
        with pytest.raises(RecipeError, match="stages.1.curricula: ") as caught:
            whole(recipe)
        assert message in str(caught.value)
    assert not list((tmp_path / "runs").rglob("metrics.jsonl")), "no step was made"


def test_the_line_of_a_curriculum_is_told(tmp_path):
    with pytest.raises(RecipeError, match="--set stages.1.curricula=.*: stages.1.curricula: .* has no column 'kind'"):
        make_plan(load([write(tmp_path)], ["stages.1.curricula=[{name: self_evolving, by: [level, kind]}]"]))


def test_layers_are_a_regular_expression(tmp_path):
    found = only(write(tmp_path), overrides=(f"{WEIGHTING}={{name: gradient, layers: '(['}}",))
    assert found.startswith(f"--set {WEIGHTING}=") and "'([' is no regular expression (unterminated" in found


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_layers_that_no_trained_weight_has_are_told_before_the_first_stage(tmp_path, lora):
    weighting = {"name": "gradient", "layers": "nosuch"}
    recipe = tiny(tmp_path, {"model": {"lora": lora}, "stages": {1: {"algorithm": {"weighting": weighting}}}})
    with pytest.raises(
        RecipeError, match="weighting.layers: no trained weight has a name with 'nosuch' in it"
    ) as caught:
        alignment.train(recipe)
    assert ("lora_A" in str(caught.value)) == (lora is not None)
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_of_adapters_that_other_processes_train_nothing_is_said(tmp_path):
    chosen = (f"{WEIGHTING}={{name: gradient, layers: lora_A}}", "model.lora={rank: 2}")
    recipe = load([write(tmp_path)], chosen)
    for weights in (True, False):
        assert unknown_layers(recipe, load_model(recipe.located_model(), 0, weights).module) == []


def test_a_reward_without_a_threshold_is_left_to_maximise(tmp_path):
    held = f"{WEIGHTING}={{name: lagrangian, thresholds: {{exact_match: 0.5}}}}"
    found = only(write(tmp_path), overrides=(held,))
    assert f"{WEIGHTING}.thresholds: every reward has a threshold (exact_match), and one must be left" in found
    rewards = "rewards=[exact_match, {name: format, pattern: x}]"
    assert load([write(tmp_path)], [held, rewards])
