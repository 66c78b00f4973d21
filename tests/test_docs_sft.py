"""docs/sft.md: its recipes are run, on a small model, and its tables name what there is."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import alignment
from alignment.algorithms.imitations import imitations
from alignment.recipe import SftStage, load
from tests.evaluation.evaluated import bpe_model
from tests.test_train import Recorder
from tests.tiny import merged

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/sft.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
((NAME, ROWS),) = re.findall(r"^```jsonl file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return bpe_model(tmp_path_factory.mktemp("model"), [ROWS])


def test_the_page_has_what_this_test_follows():
    assert len(RECIPES) == 5 and len(re.findall(r"^```\w", PAGE, re.M)) == 6


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_the_recipes_run(number, model, tmp_path):
    (tmp_path / NAME).write_text(ROWS)
    values: Any = merged(YAML(typ="safe").load(RECIPES[0]), YAML(typ="safe").load(RECIPES[number]))
    values["run"] = {"name": "page", "output": str(tmp_path / "runs"), "sinks": ["jsonl"]}
    values["model"]["path"] = str(model)
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML().dump(values, file)
    sink = Recorder()
    recipe = load([tmp_path / "recipe.yaml"], ["stages.0.steps=2", "stages.0.batch_size=3"])
    assert alignment.train(recipe, sinks=[sink])["status"] == "complete"
    assert all(record.metrics["optimizer_steps"] == 1 for record in sink.records) and len(sink.records) == 2


def test_the_tables_name_what_there_is():
    rows = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.M)
    stage = set(SftStage.model_fields) - {"stage", "name", "steps", "batch_size", "sampler", "learner", "cluster"}
    ours = {entry.name for entry in imitations if entry.cls.__module__.startswith("alignment.")}
    assert set(rows) == (stage - {"transport"}) | {"learner.packing", "objective"} | ours
