"""docs/mixing.md: its recipes load, its code runs, and its tables name what there is."""

import re
from pathlib import Path

import pytest

import alignment
from alignment.algorithms.mixers import mixers
from alignment.recipe import OnlineStage, load
from tests.test_train import Recorder
from tests.tiny import SUMS, laid_over

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/mixing.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
FILES = re.findall(r"^```python file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S)
NAMES = ["hpt", "hpt", "relift", "blend", "luffy", "srft", "lottery"]


def written(text: str, folder: Path) -> Path:
    """A recipe of the page laid over the tiny one."""
    return laid_over(text, folder, {"data": {"demonstrations": SUMS | {"split": "train"}}}, FILES)


def test_the_page_has_what_this_test_follows():
    assert len(RECIPES) == len(NAMES) and len(FILES) == 1
    assert len(re.findall(r"^```\w", PAGE, re.M)) == 8
    assert FILES[0][1].count("\n") <= 35


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_the_recipes_load(number, tmp_path):
    (stage,) = load([written(RECIPES[number], tmp_path)]).stages
    assert isinstance(stage, OnlineStage)
    assert mixers.name_of(stage.algorithm.mixer) == NAMES[number]


def test_a_mixer_of_ones_own_trains(tmp_path):
    sink = Recorder()
    alignment.train(load([written(RECIPES[-1], tmp_path)], ["stages.0.prompts_per_step=8"]), sinks=[sink])
    steps = [r.metrics for r in sink.records if r.kind == "train"]
    assert 0 < sum(step["demonstrations"] for step in steps) < 16
    assert all(step["imitated"] == step["demonstrations"] / 8 for step in steps)


def test_the_tables_name_what_there_is():
    ours = {entry.name for entry in mixers if entry.cls.__module__.startswith("alignment.")}
    rows = set(re.findall(r"^\| `([\w/.]+)` \|", PAGE, re.M))
    metrics = {"demonstrations", "imitated", "without_demonstration", "demonstrations_unscored", "mixer/...", "sft/..."}
    assert rows == ours | {"mixer"} | metrics
