"""docs/weightings.md: its recipes load, its code runs, and its table names what there is."""

import re
from pathlib import Path
from typing import Any

import pytest

import alignment
from alignment.algorithms.lagrangian import Lagrangian
from alignment.algorithms.weightings import weightings
from alignment.recipe import OnlineStage, load
from tests.test_train import Recorder
from tests.tiny import laid_over

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/weightings.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
FILES = re.findall(r"^```python file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S)
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
PLAIN = [{"name": "exact_match"}, {"name": "format", "pattern": "[0-9].*"}]


def written(text: str, folder: Path) -> Path:
    """A recipe of the page laid over the tiny one."""
    return laid_over(text, folder, {"rewards": PLAIN}, FILES)


def test_the_page_has_what_this_test_follows():
    assert len(RECIPES) == 7 and len(FILES) == 1 and len(CODE) == 1
    assert len(re.findall(r"^```\w", PAGE, re.M)) == 9
    assert FILES[0][1].count("\n") <= 45


@pytest.mark.parametrize("number", range(7))
def test_the_recipes_load(number, tmp_path):
    (stage,) = load([written(RECIPES[number], tmp_path)]).stages
    assert isinstance(stage, OnlineStage)
    names = ["hypervolume", "gradient", "lagrangian", "ensemble", "recap", "normalise_then_sum", "scarce"]
    assert weightings.name_of(stage.algorithm.weighting) == names[number]


def test_a_weighting_of_ones_own_trains(tmp_path):
    sink = Recorder()
    alignment.train(load([written(RECIPES[-1], tmp_path)]), sinks=[sink])
    last = [r for r in sink.records if r.kind == "train"][-1].metrics
    assert last["weighting/mean/format"] == pytest.approx(last["reward/format"])


def test_thresholds_are_searched(tmp_path):
    scope: dict[str, Any] = {}
    exec(CODE[0].replace("steps=50", "steps=1"), scope)  # noqa: S102 - what the page shows
    candidates = scope["thresholds"](written(RECIPES[2], tmp_path))
    (key,) = {key for candidate in candidates for key in candidate.settings}
    for candidate in candidates:
        (stage,) = load([candidate.folder / "recipe.yaml"]).stages
        assert isinstance(stage, OnlineStage) and stage.steps == 1
        assert isinstance(stage.algorithm.weighting, Lagrangian)
        assert stage.algorithm.weighting.thresholds == {"format": candidate.settings[key]}
    assert len(candidates) > 1 and candidates[0].value == max(c.value for c in candidates)


def test_the_table_names_what_there_is():
    ours = {entry.name for entry in weightings if entry.cls.__module__.startswith("alignment.")}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == ours | {"weighting"}
