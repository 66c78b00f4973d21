"""What a recipe's list of rewards may say, and what of it reaches another process."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic_core import PydanticCustomError

from alignment.reward_registry import RewardSpec, parse_reward, reward_functions, texts
from rewards import ExactMatch, Overlong


def test_entries() -> None:
    assert parse_reward("exact_match") == RewardSpec("exact_match", 1.0, ExactMatch())
    entry = {"name": "exact_match", "weight": 2, "as": "right", "column": "gold"}
    assert parse_reward(entry) == RewardSpec("right", 2.0, ExactMatch("gold"))
    assert entry["weight"] == 2, "the recipe's own mapping is left alone"
    assert parse_reward({"function": "lab.mod.f"}) == RewardSpec("f", 1.0, "lab.mod.f")
    full = {"function": "lab.f", "name": "n", "weight": 0.5, "options": {"a": 1}, "group_level": True}
    assert parse_reward(full) == RewardSpec("n", 0.5, "lab.f", {"a": 1}, True)
    assert parse_reward({"environment": "tool", "weight": -1}) == RewardSpec("tool", -1.0)
    spec = RewardSpec("x", function="a.b")
    assert parse_reward(spec) is spec


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (3, "a name or a mapping"),
        ({"function": "lab.f", "wieght": 1}, "unknown key 'wieght'.*weight"),
        ({"environment": "tool", "name": "x"}, "unknown key 'name'"),
        ({"function": "lab"}, "not the dotted path"),
        ({"function": "lab.my-f"}, "not the dotted path"),
        ({"function": 3}, "dotted path"),
        ({"name": "exact_match", "weight": "much"}, "'much' is not a number"),
        ({"name": "exact_match", "weight": True}, "not a number"),
        ({"name": "exact_match", "weight": math.inf}, "not a finite number"),
        ({"environment": ""}, "needs a name"),
    ],
)
def test_mistakes(entry: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_reward(entry)
    with pytest.raises(PydanticCustomError):
        parse_reward({"name": "exact_mach"})


def test_options_only_with_a_path() -> None:
    with pytest.raises(ValueError, match="options go with"):
        RewardSpec("x", function=ExactMatch(), options={"a": 1})


def test_wire_is_names_and_options() -> None:
    wire = parse_reward({"name": "overlong", "max_tokens": 8, "cache_tokens": 2, "as": "long"}).wire()
    assert wire is not None and json.loads(json.dumps(wire)) == wire
    assert wire["module"] == "rewards.length"
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
