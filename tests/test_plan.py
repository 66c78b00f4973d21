"""The plan of a recipe: its numbers against hand-made ones and against a model that is really built."""

import io
import json

import pytest
from rich.console import Console

from alignment.model_size import Shape
from alignment.plan import make_plan
from alignment.plan_view import show_plan
from alignment.recipe import load
from alignment.recipe_tree import RecipeError
from tests.recipes_for_tests import BASE, write


def plan_of(tmp_path, *overrides):
    return make_plan(load([write(tmp_path)], overrides))


def test_the_numbers_of_a_step(tmp_path):
    plan = plan_of(tmp_path, "stages.1.algorithm.minibatches=2", "stages.1.learner.micro_batch_tokens=60")
    warmup, rl = plan.stages
    assert (rl.prompts, rl.group_size, rl.rollouts) == (8, 4, 32)
    assert (rl.row_tokens, rl.step_tokens) == (8 + 4, 32 * 12)
    assert (rl.minibatches, rl.minibatch_rows, rl.updates) == (2, 16, 2)
    assert rl.micro_batches == 4  # 60 tokens hold 5 rows of 12, 16 rows take 4
    assert (warmup.rollouts, warmup.minibatches, warmup.updates, warmup.micro_batches) == (8, 1, 1, 1)
    assert warmup.row_tokens == len("9+9=") + len("18") + 1
    assert plan.data["eval"]["used"] > 0
    json.dumps(plan.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ([], ("sample", "update")),
        (["stages.1.algorithm.epochs=2"], ("sample", "old log-probabilities", "update (2 optimizer steps)")),
        (["stages.1.algorithm.kl=k3"], ("sample", "reference log-probabilities", "update")),
        (
            ["stages.1.algorithm.kl={name: k1, apply_to: reward}"],
            ("sample", "old log-probabilities", "reference log-probabilities", "update"),
        ),
    ],
)
def test_passes_that_nobody_needs_are_not_run(tmp_path, overrides, passes):
    assert plan_of(tmp_path, *overrides).stages[1].passes == passes


def test_components_are_shown_with_what_is_not_default(tmp_path):
    shown = plan_of(tmp_path, "stages.1.algorithm.kl=k3", "stages.1.algorithm.correction=null").stages[1].components
    assert shown["policy_loss"] == "clip {clip_high: 0.28}"
    assert shown["curricula.1"] == "difficulty_filter"
    assert shown["learner"] == "torch {lr: 0.001}"
    assert shown["kl"] == "k3" and "correction" not in shown


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("lora", [None, "{rank: 2, targets: all-linear}"])
def test_parameters_are_those_of_the_model_that_is_built(tmp_path, architecture, lora):
    from alignment.model_saving import save_model
    from alignment.models import load_model

    overrides = [f"model.build.architecture={architecture}", "model.build.kv_heads=1", f"model.lora={lora or 'null'}"]
    recipe = load([write(tmp_path)], overrides)
    plan, model = make_plan(recipe), load_model(recipe.model, seed=0)
    parameters = list(model.module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    assert plan.trainable == trained
    assert plan.parameters == sum(p.numel() for p in parameters) - (trained if lora else 0)
    if lora is None:
        save_model(model, tmp_path / "saved")
        by_path = recipe.model.model_copy(update={"build": None, "path": str(tmp_path / "saved")})
        shape = Shape.of(by_path)
        assert shape is not None and shape.parameters == plan.parameters


def test_memory_follows_what_the_step_keeps(tmp_path):
    plain = plan_of(tmp_path).stages[1].memory_bytes
    n = plan_of(tmp_path).parameters
    assert plain["parameters"] == plain["gradients"] == 4 * n and plain["optimizer"] == 8 * n
    assert plain["reference"] == 0 and plain["total"] == sum(v for k, v in plain.items() if k != "total")
    assert plain["cache"] == 4 * 32 * 12 * 2 * 2 * 2 * 16  # float32, rows, tokens, layers, keys and values, heads, size
    assert plan_of(tmp_path, "stages.1.algorithm.kl=k3").stages[1].memory_bytes["reference"] == 4 * n
    lora = plan_of(tmp_path, "stages.1.algorithm.kl=k3", "model.lora={rank: 2}").stages[1].memory_bytes
    assert lora["reference"] == 0 and lora["optimizer"] < plain["optimizer"]
    smaller = plan_of(tmp_path, "stages.1.learner.gradient_checkpointing=true").stages[1].memory_bytes
    assert smaller["activations"] < plain["activations"]
    assert plan_of(tmp_path, "model.build=null", "model.path=some/model").stages[1].memory_bytes is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train={name: dataset, path: none.jsonl}"], "data.train: cannot read"),
        (["data.eval.size=9999"], "base.yaml:7: data.eval: arithmetic has"),
        (["data.train.task.operators=['*']"], "model.build.alphabet lacks: '*'; add them there"),
        (["data.max_prompt_tokens=3"], "prompts have more than data.max_prompt_tokens (3) tokens; the shortest has 4"),
    ],
)
def test_data_that_does_not_suit_is_told_at_its_line(tmp_path, overrides, message):
    with pytest.raises(RecipeError) as error:
        plan_of(tmp_path, *overrides)
    assert message in str(error.value).replace(f"{tmp_path}/", "")


def test_a_relative_path_starts_at_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    path = write(
        tmp_path,
        BASE.replace(
            "{name: procedural, task: {name: arithmetic, sizes: [9]}, split: train}",
            "{name: dataset, path: rows.jsonl}",
        ),
    )
    monkeypatch.chdir("/")
    assert make_plan(load([path])).data["train"]["used"] == 1


def test_every_source_that_does_not_suit_is_told(tmp_path):
    sources = ["data.train={name: dataset, path: none.jsonl}", "data.eval={name: dataset, path: rows.jsonl}"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1"}\n{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(RecipeError) as error:
        plan_of(tmp_path, *sources, "data.demonstrations.size=9999", "model={build: null, path: ./none}")
    places = [problem.place for problem in error.value.problems]
    assert places == [("data", "train"), ("data", "demonstrations"), ("model", "path")]
    with pytest.raises(RecipeError) as error:
        plan_of(tmp_path, *sources)
    assert [problem.place[-1] for problem in error.value.problems] == ["train", "eval"]
    assert "2 of 3 rows cannot be used" in str(error.value)
    assert [f"rows.jsonl:{n}" in str(error.value) for n in (1, 2, 3)] == [False, True, True]


def test_sections_are_shown_with_what_is_left_out(tmp_path):
    lines = ['{"prompt": "1+1=", "answer": "2"}'] * 150 + ["[1]", '{"prompt": "11+11+11=", "answer": "33"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    recipe = load([write(tmp_path)], ["data.train={name: dataset, path: rows.jsonl}", "data.on_bad_row=skip"])
    console = Console(file=io.StringIO(), width=300)
    show_plan(recipe, make_plan(recipe), console)
    (line,) = [line for line in console.file.getvalue().splitlines() if "data.train" in line]  # pyright: ignore
    numbers = "152 rows, 150 used, 1 distinct, 1 bad skipped, 1 over-long left out, always the same answer scores"
    assert f"{numbers} 100.0%; from {tmp_path}/rows.jsonl" in line


def test_where_the_model_comes_from_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert plan_of(tmp_path).model == "built by the recipe"
    assert plan_of(tmp_path, "model={build: null, path: lab/tiny}").model.startswith(
        "lab/tiny from the hub (there is no such"
    )
    (tmp_path / "lab/tiny").mkdir(parents=True)
    assert plan_of(tmp_path, "model={build: null, path: lab/tiny}").model == f"folder {tmp_path}/lab/tiny"
