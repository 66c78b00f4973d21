"""Prompts and completions that do not fit a model's positions are found before the first step, and by the check."""

import pytest

import alignment
from alignment.model_saving import save_model
from alignment.models import load_model
from alignment.plan import make_plan
from alignment.recipe import load
from alignment.recipe_sections import ModelConfig
from alignment.recipe_tree import RecipeError
from alignment.runs import Run
from tests.tiny import RECIPE, tiny


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model of 12 positions in a folder. The prompts of the tiny recipe have 4 characters, each one token."""
    folder = tmp_path_factory.mktemp("models") / "short"
    build = {**RECIPE["model"]["build"], "max_positions": 12}
    save_model(load_model(ModelConfig.model_validate({"build": build}), 0), folder)
    return folder


def recipe(tmp_path, model, stage, evaluation):
    change = {
        "model": {"build": None, "path": str(model)},
        "stages": {1: {"sampling": {"max_tokens": stage}}},
        "evaluation": {"sampling": {"max_tokens": evaluation}},
    }
    return tiny(tmp_path, change)


@pytest.mark.parametrize("find", [make_plan, alignment.train])
def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, short, find):
    found = recipe(tmp_path, short, 9, 13)
    with pytest.raises(RecipeError) as refused:
        find(found)
    stage, evaluation = map(str, refused.value.problems)
    assert (
        "tiny.yaml:" in stage
        and (
            "stages.1.sampling.max_tokens: 9 and the longest prompt of data.train (4 tokens) together exceed the "
            "model's 12 positions; at most 8 would fit, or data.max_prompt_tokens: 3 would leave longer prompts out"
        )
        in stage
    )
    assert evaluation.endswith(
        "evaluation.sampling.max_tokens: 13 and the longest prompt of data.eval (4 tokens) together exceed the model's "
        "12 positions; at most 8 would fit"
    )
    assert not Run(found.run.folder).checkpoints.joinpath("LATEST").exists()


def test_what_just_fits_is_checked_and_trained(tmp_path, short):
    found = recipe(tmp_path, short, 8, 8)
    assert found.data.max_prompt_tokens + 8 > 12, "prompts could be longer than they are"
    make_plan(found)
    assert alignment.train(found)["status"] == "complete"


def test_a_check_needs_the_tokenizer_only_in_doubt(tmp_path, short):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((short / "config.json").read_bytes())
    make_plan(recipe(tmp_path, bare, 4, 4))
    with pytest.raises(RecipeError, match="model.path: .*has no tokenizer"):
        make_plan(recipe(tmp_path, bare, 5, 4))


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "mk.py").write_text("")
    found = load([tiny_file(tmp_path)], [f"run.output={tmp_path / 'mk.py'}"])
    with pytest.raises(alignment.errors.UserError, match="cannot make the folder .*mk.py/tiny: .*another run.output"):
        alignment.train(found)


def tiny_file(folder):
    tiny(folder)
    return folder / "tiny.yaml"
