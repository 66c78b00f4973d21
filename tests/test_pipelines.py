"""Recipes of several stages: for clusters, their check and a step of each stage; the small one, whole."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import alignment
from alignment.cluster_plan import Hardware
from alignment.plan import make_plan
from alignment.recipe import Recipe, load
from tests.test_cluster_recipes import HEADER, LEARNER
from tests.test_preference import PAIRS
from tests.test_train import Recorder

ROOT = Path(__file__).parents[1]
PIPELINES = {"tulu3_8b": ["sft", "preference", "online"], "skywork_r1v2_text": ["preference", "online"]}
HARDWARE = Hardware(1, 8, 80)
each = pytest.mark.parametrize("name", PIPELINES)
SUMS = {"name": "procedural", "task": {"name": "arithmetic", "sizes": [9]}}


def path(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


@each
def test_it_fits_its_hardware_and_its_header_says_how_that_was_found(name):
    recipe = load([path(name)])
    plan = make_plan(recipe, HARDWARE)
    assert plan.fits and [stage.stage for stage in recipe.stages] == PIPELINES[name] and recipe.run.name == name
    assert all(section["rows"] is None for section in plan.data.values()), "nothing was fetched"
    header = "".join(x for x in path(name).read_text().splitlines(keepends=True) if x.startswith("#"))
    assert HEADER.search(header) and "Where the numbers come from" in header and "arXiv" in header
    assert f"`align check recipes/{name}.yaml --gpus 8 --gpu-memory 80`" in header.replace("\n# ", " ")


def shrunk(name: str, folder: Path) -> Recipe:
    """The recipe with a small model, small data and few rows on the embedded engines; what its stages do as it is."""
    recipe = load([path(name)])
    whole, stages = recipe.resolved(), []
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    for stage, written in zip(recipe.stages, whole["stages"], strict=True):
        few = {key: value for key, value in written.items() if key not in ("sampler", "cluster", "transport")}
        few |= {"steps": 1}
        few["learner"] = {"name": "torch", **{o: getattr(stage.learner, o) for o in LEARNER}, "warmup_steps": 0}
        if stage.stage == "sft":
            few["batch_size"] = 4
        elif stage.stage == "preference":
            few["pairs"] = {**written["pairs"], "batch_size": 4}
        else:
            few |= {"prompts_per_step": 4, "group_size": 4, "sampling": {**written["sampling"], "max_tokens": 6}}
            few |= {"critic": written["critic"] | {"pretraining_steps": 0}} if written["critic"] else {}
        stages.append(few)
    data: dict[str, Any] = {"train": {**SUMS, "split": "train"}, "eval": {**SUMS, "split": "eval", "size": 4}}
    if recipe.data.demonstrations is not None:
        data["demonstrations"] = {**SUMS, "split": "demonstrations"}
    values = {
        "run": {"name": name, "output": str(folder / "runs"), "sinks": ["jsonl"]},
        "model": {"build": {"alphabet": "0123456789+=", "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1}},
        "data": {**data, "preferences": {"name": "dataset", "path": "pairs.jsonl"}, "max_prompt_tokens": 8},
        # one that is earned sometimes decides what is correct, or a filter would drop every group
        "rewards": [{"name": "format", "pattern": "[0-4].*", "as": "digits"}, *whole["rewards"]],
        "evaluation": {"every": 0, "sampling": {"max_tokens": 6}},
        "stages": stages,
    }
    file = folder / f"{name}.yaml"
    with file.open("w") as out:
        YAML().dump(json.loads(json.dumps(values)), out)
    return load([file])


@each
def test_each_stage_takes_a_step(name, tmp_path):
    sink = Recorder()
    result = alignment.train(shrunk(name, tmp_path), sinks=[sink])
    assert result["status"] == "complete" and [s["stage"] for s in result["stages"]] == PIPELINES[name]
    steps = [record for record in sink.records if record.kind == "train"]
    assert [record.stage_step for record in steps] == [1] * len(PIPELINES[name])
    assert all(record.metrics["grad_norm"] > 0 for record in steps)


@pytest.mark.full
def test_every_stage_of_the_small_one_improves_what_it_is_measured_on(tmp_path):
    result = alignment.train(path("tulu3_mini"), overrides=[f"run.output={tmp_path}", "run.sinks=[jsonl]"])
    sft, dpo, rlvr = result["stages"]
    accuracy = [stage["eval"]["after"]["accuracy"] for stage in (sft, dpo, rlvr)]
    assert 0.3 < accuracy[0] < accuracy[1] < accuracy[2] and accuracy[2] > 0.85
    assert sum(stage["seconds"] for stage in result["stages"]) < 600
    lines = [json.loads(line) for line in (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines()]
    rankings = [line for line in lines if line["stage"] == "dpo" and line["kind"] == "train"]
    assert rankings[-1]["held_out/ranking"] > rankings[0]["held_out/ranking_before"]


def test_a_pipeline_that_was_stopped_in_its_second_stage_goes_on_there(tmp_path):
    recipe = shrunk("tulu3_8b", tmp_path)
    two = [stage.model_copy(update={"steps": 2}) for stage in recipe.stages]
    recipe = recipe.model_copy(update={"stages": tuple(two)})
    assert alignment.train(recipe, sinks=[Recorder(stop_after=3)])["status"] == "interrupted"
    sink = Recorder()
    result = alignment.train(recipe, sinks=[sink])
    assert result["status"] == "complete" and sink.run["resumed_from"] == 3
    assert [(r.stage, r.stage_step) for r in sink.records if r.kind == "train"] == [
        ("dpo", 2),
        ("rlvr", 1),
        ("rlvr", 2),
    ]
    assert re.search(r"tulu3_8b", result["folder"])
