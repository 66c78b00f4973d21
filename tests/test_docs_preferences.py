"""docs/preferences.md: its command, its recipes and its code run; its tables name what there is."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

import alignment
from alignment.algorithms.preferences import preference_losses
from alignment.cli import app
from alignment.pairings import pairings
from alignment.recipe import PreferenceStage, load
from alignment.references import references
from tests.test_preference import FORMAT, PAIRS, TRAIN, given, lines, recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/preferences.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_page_has_what_this_test_follows():
    assert (len(COMMANDS), len(RECIPES), len(CODE)) == (1, 4, 1)
    assert len(re.findall(r"^```\w", PAGE, re.M)) == 6
    assert CODE[0].count("\n") <= 30


def test_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    fewer = {"stages.0.steps": 20, "stages.1.steps": 2, "stages.2.steps": 2, "stages.2.critic.pretraining_steps": 1}
    fewer |= {"stages.1.prompts_per_step": 8, "stages.2.prompts_per_step": 8, "data.eval.size": 8}
    fewer |= {"data.eval_preferences.size": 8}
    options = [f"--set={key}={value}" for key, value in fewer.items()]
    done = CliRunner().invoke(app, [*shlex.split(COMMANDS[0])[1:], *options, "--set=run.sinks=[jsonl]"])
    assert done.exit_code == 0, done.output
    stages = json.loads((tmp_path / "runs" / "tulu3-mini" / "result.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["sft", "preference", "online"]


def laid_over(text: str, folder: Path) -> Path:
    """A recipe of the page laid over the tiny one, with fewer steps."""
    given_: Any = YAML(typ="safe").load(text)
    given_ = given_ if isinstance(given_, dict) else {"losses": given_}
    stage: dict[str, Any] = {"stage": "preference", **(given_["stages"][0] if "stages" in given_ else given_)}
    stage |= {"steps": 2, "learner": {"name": "torch", "lr": 1e-3}}
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    if "sampling" in stage:
        stage |= {"prompts_per_step": 4, "sampling": {"max_tokens": 3}}
    shown = {"demonstrations": TRAIN["train"]} if "merge" in str(stage) else {}
    model = {key: value for key, value in given_.get("model", {}).items() if key != "path"}
    path = recipe(folder, stage, data={**TRAIN, **shown, **given_.get("data", {})}, model=model)
    whole = YAML(typ="safe").load(path.read_text())
    with path.open("w") as file:
        YAML().dump({**whole, "rewards": FORMAT}, file)
    return path


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_the_recipes_train(number, tmp_path):
    path = laid_over(RECIPES[number], tmp_path)
    (stage,) = load([path]).stages
    assert isinstance(stage, PreferenceStage)
    assert alignment.train(path)["status"] == "complete"


def test_a_loss_of_ones_own_trains(tmp_path):
    (tmp_path / "squared_loss.py").write_text(CODE[0])
    path = recipe(tmp_path, given(losses=["squared"], steps=8))
    whole = YAML(typ="safe").load(path.read_text())
    with path.open("w") as file:
        YAML().dump({**whole, "plugins": ["squared_loss"]}, file)
    records = lines(alignment.train(path)["folder"])
    assert records[0]["loss"] == pytest.approx(0.5 * 2.0**2, abs=1e-4)
    assert records[-1]["loss"] < records[0]["loss"] and records[-1]["margin"] > 0


def test_the_tables_name_what_there_is():
    def ours(registry: Any) -> set[str]:
        return {entry.name for entry in registry if entry.cls.__module__.startswith("alignment.")}

    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert rows == ours(preference_losses) | ours(pairings) | ours(references) | {"pairs", "reference"}
