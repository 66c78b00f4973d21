"""docs/scaling.md: its commands run, its stage loads, and what it names is there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from alignment.recipe import OnlineStage, load
from tests.recipes_for_tests import BASE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/scaling.md").read_text()
COMMANDS = [line for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
STAGES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_page_has_what_this_test_follows():
    assert "@@" not in PAGE and len(COMMANDS) == 2 and len(STAGES) == 1
    assert len(re.findall(r"^```(yaml|console|python|bash)", PAGE, re.M)) == 3


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_runs(line, tmp_path):
    python, script, *options = line.split()
    assert python == "python" and "--quick" in options
    done = subprocess.run(
        [sys.executable, ROOT / script, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.stat().st_size > 0 for path in tmp_path.iterdir())
    assert ("--plot" in options) == any(tmp_path.glob("*.png"))


def test_the_stage_loads(tmp_path):
    values: Any = YAML(typ="safe").load(BASE)
    (keys,) = YAML(typ="safe").load(STAGES[0])["stages"]
    values["stages"] = [{**values["stages"][1], "learner": {"name": "deepspeed", "ranks": 2}, "cluster": "ray", **keys}]
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML().dump(values, file)
    (stage,) = load([tmp_path / "recipe.yaml"]).stages
    assert isinstance(stage, OnlineStage) and stage.max_staleness == 1
