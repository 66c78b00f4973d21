"""What describes a reward column, and what of it reaches another process."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

from alignment.reward_registry import RewardSpec, reward_functions, texts
from rewards import ExactMatch, Overlong, RelativeLength


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"column": "f", "function": "lab"}, "'f': 'lab' is not the dotted path"),
        ({"column": "f", "function": "lab.my-f"}, "not the dotted path"),
        ({"column": "f", "function": "lab..f"}, "not the dotted path"),
        ({"column": "f", "weight": math.inf}, "not a finite number"),
        ({"column": ""}, "needs a name"),
    ],
)
def test_mistakes(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RewardSpec(**fields)


def test_group_level_is_the_component_s_or_the_recipe_s() -> None:
    assert RewardSpec("x", function=RelativeLength()).whole_group
    assert RewardSpec("x", function="a.b", group_level=True).whole_group
    assert not RewardSpec("x", function=ExactMatch()).whole_group


def test_options_only_with_a_path() -> None:
    with pytest.raises(ValueError, match="options go with"):
        RewardSpec("x", function=ExactMatch(), options={"a": 1})


def test_wire_is_names_and_options() -> None:
    wire = RewardSpec("long", function=Overlong(8, 2)).wire()
    assert wire is not None and json.loads(json.dumps(wire)) == wire
    assert wire["column"] == "long" and wire["module"] == "rewards.length"
    assert reward_functions.build(wire["component"]) == Overlong(8, 2)
    assert RewardSpec("x", function="a.b", options={"k": 1}).wire() == {
        "column": "x",
        "path": "a.b",
        "options": {"k": 1},
    }
    assert RewardSpec("tool").wire() is None


def test_options_are_plain_values() -> None:
    with pytest.raises(ValueError, match="plain YAML values.*type set"):
        RewardSpec("x", function="a.b", options={"k": {1}}).wire()


def test_a_component_of_a_script_cannot_travel() -> None:
    @dataclass(frozen=True)
    class Mine:
        def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
            return [0.0] * len(completions)

    Mine.__module__ = "__main__"
    with pytest.raises(ValueError, match="move Mine from the script into a module"):
        RewardSpec("x", function=Mine()).wire()


def test_texts() -> None:
    chat = [
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b"},
    ]
    assert texts(["plain", chat]) == ["plain", "b"]
