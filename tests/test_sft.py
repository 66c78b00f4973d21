"""Supervised fine-tuning: TRL's trainer as the oracle, and runs of every option from end to end."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alignment
from alignment.algorithms.imitations import imitations
from alignment.batching import collate
from alignment.data.load import LoadedData, load_data
from alignment.engines.torch_learner import TorchLearner
from alignment.errors import UserError
from alignment.models import Model
from alignment.origin import Origin
from alignment.plan import make_plan
from alignment.recipe import Recipe, RecipeError, SftStage, load
from alignment.scoring import Scorer
from alignment.supervision import Lesson, lesson
from alignment.types import Group, Prompt
from tests.evaluation.evaluated import bpe_model
from tests.test_train import Recorder, contents, lines

MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SINGLE = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i} " + "ok " * i} for i in range(1, 5)]
DIALOGUES = [
    {
        "messages": [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": f"{i}." * i},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": f"Yes, {i}."},
        ]
    }
    for i in range(1, 5)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return bpe_model(tmp_path_factory.mktemp("model"), [json.dumps(DIALOGUES + SINGLE)], MARKED)


def recipe_of(
    folder: Path,
    model: Path,
    rows: Sequence[Mapping[str, Any]],
    stage: Mapping[str, Any],
    name: str = "sft",
    **of_model: Any,
) -> Recipe:
    """A recipe of one supervised stage on ``rows``."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"stage": "sft", "steps": 4, "batch_size": 3, "learner": {"name": "torch", "lr": 1e-2}}
    values = {
        "run": {"name": name, "output": str(folder / "runs"), "save_every": 0, "sinks": ["jsonl"]},
        "model": {"path": str(model), **of_model},
        "data": {"demonstrations": {"name": "dataset", "path": "rows.jsonl"}, "max_prompt_tokens": 64},
        "stages": [own | dict(stage)],
    }
    (folder / "recipe.yaml").write_text(json.dumps(values))
    return load([folder / "recipe.yaml"])


def loaded(recipe: Recipe) -> tuple[Model, LoadedData]:
    """The model, and the data."""
    made = Origin(recipe.located_model(), 0).make()
    with Scorer.from_recipe(recipe) as scorer:
        return made, load_data(recipe, made, scorer)


def taught_by(recipe: Recipe, data: LoadedData, control: tuple[int, ...] = ()) -> Lesson:
    (stage,) = recipe.stages
    assert isinstance(stage, SftStage)
    return lesson(stage, data, "stages.0", control, 0)


def ours(recipe: Any, taught: Lesson, made: Model) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step, which is not taken."""
    (stage,) = recipe.stages
    found: dict[str, Tensor] = {}
    learner = TorchLearner(made.module, stage.learner, 10, 0)
    stepper: Any = learner.slots["rl"].stepper
    step = stepper.step

    def observed(loss: Tensor) -> Any:
        found.update({name: p.grad.clone() for name, p in learner.trained.items() if p.grad is not None})
        return step(loss)

    stepper.step = observed
    groups = [Group(i, Prompt(r.prompt_id, {}), (r,)) for i, r in enumerate(taught.rollouts)]
    batch = taught.weighted(collate(groups, 0, [], []), range(len(groups)))
    metrics = learner.update(batch, stage.supervision())
    return metrics["loss"], found


def trls(
    folder: Path, model: Path, rows: Sequence[Mapping[str, Any]], **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch of all rows in TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    made: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(rows),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
        **options,
    )
    trainer: Any = SFTTrainer(
        made,
        config,
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    made.train()
    loss = trainer.compute_loss(made, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


CASES: list[tuple[list[Any], dict[str, Any], dict[str, Any]]] = [
    (SINGLE, {}, {}),
    (SINGLE, {"loss_on": "all"}, {"completion_only_loss": False}),
    (DIALOGUES, {}, {"assistant_only_loss": True}),
]


@pytest.mark.parametrize(("rows", "stage", "options"), CASES, ids=["completion", "all", "dialogues"])
def test_loss_and_gradients_are_those_of_trl(tmp_path, model, rows, stage, options):
    expected, gradients = trls(tmp_path, model, rows, **options)
    for packing in (False, True):
        recipe = recipe_of(tmp_path, model, rows, {**stage, "learner": {"name": "torch", "packing": packing}})
        made, data = loaded(recipe)
        loss, found = ours(recipe, taught_by(recipe, data), made)
        assert loss == pytest.approx(expected, abs=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


JUDGED: list[dict[str, Any]] = [row | {"score": i / 10, "reward": -i / 10} for i, row in enumerate(SINGLE)]
OBJECTIVES: list[dict[str, Any]] = [
    {"name": "likelihood"},
    {"name": "unlikelihood", "score": "score", "threshold": 0.1, "alpha": 0.1},
    {"name": "reward_weighted", "reward": "reward", "beta": 0.2},
    {"name": "advantage_weighted", "reward": "reward", "beta": 0.2, "clip": 2.0, "baseline": "all"},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective["name"])
def test_the_loss_of_each_objective_by_its_definition(tmp_path, model, objective):
    recipe = recipe_of(tmp_path, model, JUDGED, {"objective": objective})
    made, data = loaded(recipe)
    taught, expected, tokens = taught_by(recipe, data), 0.0, 0
    for row, rollout in zip(JUDGED, taught.rollouts, strict=True):
        ids = torch.tensor([(*rollout.prompt_ids, *rollout.token_ids)])
        with torch.no_grad():
            logp = made.module(input_ids=ids).logits[0, :-1].log_softmax(-1)
        logp = logp.gather(-1, ids[0, 1:, None])[-len(rollout.token_ids) :, 0].double()
        unlike = -objective.get("alpha", 0.0) * (1 - logp.exp()).log().sum()
        nll, reward = -logp.sum(), row["reward"]
        expected += {
            "likelihood": nll,
            "unlikelihood": nll if row["score"] <= 0.1 else unlike,
            "reward_weighted": math.exp(reward / 0.2) * nll,
            "advantage_weighted": min(math.exp((reward + 0.15) / 0.2), 2.0) * nll,
        }[objective["name"]]
        tokens += len(logp)
    assert ours(recipe, taught, made)[0] == pytest.approx(float(expected) / tokens, abs=1e-5)


@pytest.mark.parametrize(
    ("row", "objective", "said"),
    [
        (
            {},
            OBJECTIVES[1],
            r"stages.0.objective reads the column 'score'.* 1 of 3 .*name the right column.*:3: has no",
        ),
        ({"score": "bad"}, OBJECTIVES[1], "rows.jsonl:3: 'score' is 'bad', not a finite number"),
        ({"score": True}, OBJECTIVES[1], "'score' is True, not"),
        ({"reward": None}, OBJECTIVES[2], "'reward' is None, not"),
        (
            {"reward": 1e4},
            OBJECTIVES[2],
            "weight of .*rows.jsonl:3, whose judgement is 10000, is too large.*raise beta",
        ),
    ],
)
def test_rows_that_are_not_judged_are_named_before_the_first_step(tmp_path, model, row, objective, said):
    recipe, sink = recipe_of(tmp_path, model, [*JUDGED[:2], SINGLE[2] | row], {"objective": objective}), Recorder()
    with pytest.raises(UserError, match=re.compile(said, re.S)):
        alignment.train(recipe, sinks=[sink])
    assert not sink.records


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"learner": {"name": "torch", "micro_batch_tokens": 20}}, "stages.0.learner.micro_batch_tokens (20)"),
        ({}, "the model's positions (1,024)"),
    ],
)
def test_rows_that_are_too_long_are_named_and_never_cut(tmp_path, model, stage, said):
    text = "9876543210" * (120 if "positions" in said else 3)
    rows, sink = [*SINGLE[:1], {"prompt": "Say ok.", "completion": text}], Recorder()
    with pytest.raises(UserError, match=re.escape(f"1 of 2 rows are longer than {said}") + r"(.|\n)*rows.jsonl:2: "):
        alignment.train(recipe_of(tmp_path, model, rows, stage), sinks=[sink])
    assert not sink.records


def test_the_check_names_the_line_of_the_recipe_and_the_row(tmp_path, model):
    recipe = recipe_of(tmp_path, model, [*JUDGED, SINGLE[0]], {"objective": OBJECTIVES[1]})
    with pytest.raises(RecipeError, match=r"recipe.yaml:1: stages.0.objective: reads the column 'score'(.|\n)*jsonl:5"):
        make_plan(recipe)
    conditional = {"conditional": {"score": "score", "threshold": 0.1}, "objective": OBJECTIVES[2]}
    (plan,) = make_plan(recipe_of(tmp_path, model, JUDGED, conditional, control={})).stages
    assert plan.components["conditional"] == "aligned where score <= 0.1, no control token for 1%"
    assert plan.components["objective"] == 'reward_weighted {reward: "reward", beta: 0.2}'


OPTIONS: list[tuple[list[Any], dict[str, Any]]] = [
    (SINGLE, {"loss_on": "all"}),
    (DIALOGUES, {"learner": {"name": "torch", "lr": 1e-2, "packing": True, "pack_tokens": 64}}),
    *((JUDGED, {"objective": objective}) for objective in OBJECTIVES),
]


def test_what_says_end_to_end_is_run():
    assert {e.name for e in imitations if e.evidence == "end to end"} == {o["name"] for o in OBJECTIVES}


@pytest.mark.parametrize(
    ("rows", "stage"), OPTIONS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_every_option_runs_and_a_resumed_run_is_the_whole_one(tmp_path, model, rows, stage):
    sink = Recorder()
    entire = alignment.train(recipe_of(tmp_path, model, rows, stage, "entire"), sinks=[sink])
    losses = [record.metrics["loss"] for record in sink.records]
    assert len(losses) == 4 and losses[-1] != losses[0]
    recipe = recipe_of(tmp_path, model, rows, stage, "parts")
    assert alignment.train(recipe, sinks=[Recorder(2)])["status"] == "interrupted"
    parts = alignment.train(recipe)
    assert contents(parts["folder"]) == contents(entire["folder"])
    assert lines(parts["folder"]) == lines(entire["folder"])
