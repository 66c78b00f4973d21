"""The recipes for real clusters: each passes its check on its hardware offline, and its algorithm takes a step."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import alignment
from alignment.cluster_plan import Hardware
from alignment.plan import make_plan
from alignment.recipe import OnlineStage, Recipe, load
from tests.test_train import Recorder

ROOT = Path(__file__).parents[1]
HARDWARE = {
    "gsm8k_one_gpu": Hardware(1, 1, 80),
    "gsm8k_8gpu": Hardware(1, 8, 80),
    "simplerl_zoo_7b": Hardware(2, 8, 80),
    "dapo_32b": Hardware(4, 8, 80),
    "tina_1.5b_lora": Hardware(1, 1, 48),
    "tulu3_rlvr_8b": Hardware(1, 8, 80),
    "hpt_math_7b": Hardware(1, 8, 80),
}
HEADER = re.compile(r"^# (trained|one step run|checked): .*\b20\d\d-\d\d-\d\d\b", re.M)
each_recipe = pytest.mark.parametrize("name", HARDWARE)
LEARNER = ("lr", "betas", "eps", "weight_decay", "max_grad_norm", "schedule", "warmup_steps", "min_lr_ratio")


def path(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


def online(recipe: Recipe) -> OnlineStage:
    (stage,) = recipe.stages
    assert isinstance(stage, OnlineStage)
    return stage


def command(hardware: Hardware) -> list[str]:
    nodes = [] if hardware.nodes == 1 else ["--nodes", str(hardware.nodes)]
    return [*nodes, "--gpus", str(hardware.gpus), "--gpu-memory", f"{hardware.memory_gib:g}"]


@each_recipe
def test_the_header_says_what_was_done_and_how_to_repeat_it(name):
    text = path(name).read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert HEADER.search(header) and "Where the numbers come from" in header and "arXiv" in header
    nodes = "" if name != "gsm8k_8gpu" else "--nodes 1 "
    assert f"`align check recipes/{name}.yaml {nodes}{' '.join(command(HARDWARE[name]))}`" in header.replace(
        "\n# ", " "
    )


@each_recipe
def test_it_fits_its_hardware(name):
    recipe = load([path(name)])
    plan = make_plan(recipe, HARDWARE[name])
    (stage,) = plan.cluster
    assert plan.fits, stage.problems
    assert stage.idle == 0 and stage.cache is not None and stage.cache.sequences >= 16
    assert all(section["rows"] is None for section in plan.data.values()), "nothing was fetched"
    assert plan.parameters and plan.stages[0].row_tokens is not None
    assert recipe.run.name == name


@each_recipe
def test_a_healthy_update_is_not_taken_for_a_hung_one(name):
    """At most 6 FLOPs for each parameter and token, a third more for checkpointing, at 300 TFLOP/s of each GPU."""
    stage, hardware = online(load([path(name)])), HARDWARE[name]
    plan = make_plan(load([path(name)]), hardware)
    tokens = plan.stages[0].rollouts * (plan.stages[0].row_tokens or 0)
    ranks = getattr(stage.learner, "ranks", 1)
    longest_s = 8 * (plan.parameters or 0) * tokens / ranks / 300e12
    assert getattr(stage.learner, "timeout_s", longest_s * 2) >= 1.5 * longest_s, longest_s


def test_the_check_needs_no_network_and_is_quick_to_import(tmp_path):
    """In a process that could not open a connection: every attempt ends the program."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): sys.exit('a connection was opened')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from alignment.plan import make_plan; from alignment.recipe import load\n"
        "from alignment.cluster_plan import Hardware\n"
        f"[make_plan(load([p]), Hardware(4, 8)) for p in {[str(path(name)) for name in HARDWARE]!r}]\n"
        "heavy = {'transformers', 'trl', 'peft', 'datasets', 'vllm', 'deepspeed', 'ray'}\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & heavy))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.strip() == "[]", done.stderr


def shrunk(name: str, folder: Path) -> Recipe:
    """The recipe with a small model, small data and few rows on the embedded engines; its algorithm as it is, and with
    it the curricula, KL, rewards, schedule and LoRA."""
    recipe = load([path(name)])
    stage, whole = online(recipe), recipe.resolved()
    sums = {"name": "procedural", "task": {"name": "arithmetic", "sizes": [9]}}
    rewards: list[Any] = [entry for entry in whole["rewards"] if entry["name"] != "overlong"]
    rewards += [{"name": "overlong", "max_tokens": 6, "cache_tokens": 5}]  # else all rewards of a group would be 0
    learner = {option: getattr(stage.learner, option) for option in LEARNER}
    filtered = any(hasattr(c, "keep") for c in stage.curricula)  # then some rollout of a group must be right
    values = {
        "run": {"name": name, "output": str(folder / "runs"), "sinks": ["jsonl"]},
        "model": {
            "build": {"alphabet": "0123456789+=", "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1},
            "lora": {**whole["model"]["lora"], "rank": 2} if whole["model"]["lora"] else None,
        },
        "data": {
            "train": {**sums, "split": "train"},
            "eval": {**sums, "split": "eval", "size": 4},
            **({"demonstrations": {**sums, "split": "train"}} if recipe.data.demonstrations else {}),
            "max_prompt_tokens": 8,
        },
        "rewards": rewards,
        "evaluation": {"every": 0},
        "stages": [
            {
                **{
                    key: value
                    for key, value in whole["stages"][0].items()
                    if key not in ("sampler", "cluster", "transport")
                },
                "steps": 1,
                "prompts_per_step": stage.algorithm.minibatches,
                "group_size": 16 if filtered else 4,
                **({"critic": whole["stages"][0]["critic"] | {"pretraining_steps": 0}} if stage.critic else {}),
                "max_staleness": 0,
                "sampling": {**whole["stages"][0]["sampling"], "max_tokens": 6},
                "learner": {"name": "torch", **learner, "warmup_steps": 0},
            }
        ],
    }
    file = folder / f"{name}.yaml"
    with file.open("w") as out:
        YAML().dump(json.loads(json.dumps(values)), out)
    return load([file])


@each_recipe
def test_its_algorithm_takes_a_step(name, tmp_path):
    recipe, sink = shrunk(name, tmp_path), Recorder()
    given = online(load([path(name)]))
    assert online(recipe).algorithm == given.algorithm and online(recipe).curricula == given.curricula
    result = alignment.train(recipe, sinks=[sink])
    assert result["status"] == "complete"
    (step,) = [record.metrics for record in sink.records if record.kind == "train"]
    assert (
        step["grad_norm"] > 0 and step["rollouts"] >= 4 * given.algorithm.minibatches
    )  # more where groups are dropped
    assert ("kl" in step) == (given.algorithm.kl is not None)
    assert sink.groups and all(group.rollouts[0].scores for group in sink.groups)


def test_tinas_format_is_the_end_of_the_reasoning_once():
    spec = next(spec for spec in load([path("tina_1.5b_lora")]).reward_specs if spec.column == "format")
    texts = ["a\n</think>\nb", "a</think>b", "a\n</think>\nb\n</think>\nc", "\n</think>\n"]
    scores = spec.function([""] * 4, texts)  # pyright: ignore
    assert [score.value for score in scores] == [1.0, 0.0, 0.0, 1.0]


def test_the_penalty_of_dapo_begins_where_the_paper_says():
    spec = next(spec for spec in load([path("dapo_32b")]).reward_specs if spec.column == "overlong")
    ids = [[0] * length for length in (16384, 18432, 20480)]
    assert spec.function([""] * 3, [""] * 3, completion_ids=ids, length_tokens=[len(i) for i in ids]) == [0, -0.5, -1]
