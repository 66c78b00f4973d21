"""docs/values.md: its commands run, with fewer steps; its stages load."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from alignment.cli import app
from alignment.critics import HeadCritic, ModelCritic, critics
from alignment.recipe import OnlineStage, load
from tests.recipes_for_tests import BASE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/values.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
STAGES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
FEWER = {
    "train": [
        "--set=stages.0.steps=30", "--set=stages.1.steps=3", "--set=stages.1.prompts_per_step=8",
        "--set=data.eval.size=8", "--set=run.sinks=[jsonl]",
    ],
    "eval": ["--limit", "8"],
}  # fmt: skip


def test_the_page_has_what_this_test_follows():
    assert len(COMMANDS) == 6 and len(STAGES) == 2
    assert len(re.findall(r"^```(yaml|console|python|bash)", PAGE, re.M)) == 3


def test_every_command_runs_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for line in COMMANDS:
        _, command, *rest = shlex.split(line)
        ahead = ["--set=stages.1.critic.pretraining_steps=1"] if "_ppo.yaml" in line and command == "train" else []
        fewer = ahead + [o for o in FEWER.get(command, []) if "ppo" in line or "prompts" not in o or "values" in line]
        done = CliRunner().invoke(app, [command, *rest, *fewer], env={"COLUMNS": "200"})
        assert done.exit_code == 0, f"{line}\n{done.output}"
    assert (tmp_path / "my_values" / "value_model.json").is_file() and (
        tmp_path / "my_policy" / "config.json"
    ).is_file()


def test_the_commands_that_a_recipe_names_are_whole():
    text = (ROOT / "recipes/quickstart_values.yaml").read_text(encoding="utf-8").split("\nrun:")[0]
    lines = text.replace("#", " ").replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.strip().startswith("align ")]
    assert len(commands) == 3
    for _, command, *rest in commands:
        shown = [shlex.split(line)[2:] for line in COMMANDS if line.startswith(f"align {command} ")]
        options = {tuple(o for o in line if o.startswith("--")) for line in shown}
        assert tuple(o for o in rest if o.startswith("--")) in options, f"{command} {rest}: docs/values.md has {shown}"


@pytest.mark.parametrize("number", range(len(STAGES)))
def test_the_stages_load(number, tmp_path):
    values: Any = YAML(typ="safe").load(BASE)
    (keys,) = YAML(typ="safe").load(STAGES[number])["stages"]
    values["stages"] = [{**values["stages"][1], "curricula": ["uniform"], "prompts_per_step": 8, **keys}]
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML().dump(values, file)
    (stage,) = load([tmp_path / "recipe.yaml"]).stages
    assert isinstance(stage, OnlineStage)
    assert isinstance(stage.critic, ModelCritic) if number == 0 else stage.guidance is not None


def test_the_tables_name_what_there_is():
    assert {HeadCritic, ModelCritic} <= {entry.cls for entry in critics}
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert rows == {"model", "head", "scalar", "hl_gauss", "two_hot"}
