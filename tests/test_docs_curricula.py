"""docs/curricula.md: its stages load and what they need is there; the component of one's own trains."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import alignment
from alignment.curricula import curricula
from alignment.recipe import OnlineStage, load
from tests.recipes_for_tests import BASE
from tests.test_train import lines
from tests.tiny import write

PAGE = (Path(__file__).parents[1] / "docs/curricula.md").read_text(encoding="utf-8")
STAGES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
((MODULE, CODE),) = re.findall(r"^```python file=(\w+).py\n(.*?)^```$", PAGE, re.M | re.S)
LISTED = [
    ["uniform", "difficulty_filter"],
    ["uniform", "difficulty_filter"],
    ["uniform", "prompt_curriculum"],
    ["self_evolving"],
    ["level_schedule"],
    ["uniform", "instance_filter", "thompson"],
    ["uniform", "difficulty_filter", "sample_buffer"],
]


def test_the_page_has_what_this_test_follows():
    assert len(STAGES) == len(LISTED) and len(re.findall(r"^```(yaml|console|python|bash)", PAGE, re.M)) == 8
    rows = re.findall(r"^\| `(\w+)` \|", PAGE[: PAGE.index("## Filling")], re.M)
    assert sorted(rows) == [e.name for e in curricula if e.cls.__module__.startswith("alignment.")]


@pytest.mark.parametrize("number", range(len(LISTED)))
def test_the_stages_load_without_a_warning(number, tmp_path):
    values: Any = YAML(typ="safe").load(BASE)
    (keys,) = YAML(typ="safe").load(STAGES[number])["stages"]
    values["stages"] = [{**values["stages"][1], **keys}]
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML().dump(values, file)
    recipe = load([tmp_path / "recipe.yaml"])
    (stage,) = recipe.stages
    assert isinstance(stage, OnlineStage) and recipe.warnings == []
    assert [curricula.name_of(c) for c in stage.curricula] == LISTED[number]


def test_the_component_of_ones_own_trains(tmp_path):
    assert sum(bool(line) for line in CODE.splitlines()) <= 30 and CODE.count("\n    def ") == 5
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    path = write(tmp_path, {"plugins": [MODULE], "stages": {1: {"curricula": ["short_first"], "steps": 2}}})
    try:
        run = alignment.train(path)
        assert [line["step"] for line in lines(run["folder"]) if line["kind"] == "train"] == [1, 2, 3, 4, 5]
    finally:
        curricula._entries.pop("short_first", None)
        sys.modules.pop(MODULE, None)
