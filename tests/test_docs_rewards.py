"""Follows docs/rewards.md: its modules are imported, its recipes loaded and scored with, its verdicts compared."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from alignment.recipe import load
from alignment.reward_registry import reward_functions
from alignment.scoring import Scorer
from alignment.types import Group
from rewards import Math
from tests.rewards.test_judge import served
from tests.test_scoring import group

PAGE = (Path(__file__).parents[1] / "docs/rewards.md").read_text()
FILES = dict(re.findall(r"^```python file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S))
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
VERDICTS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (ok|wrong) \| (.+?) \|$", PAGE, re.M)
BASE = """
model: {build: {alphabet: "0123456789+=", hidden_size: 32, layers: 1, heads: 2, kv_heads: 2, intermediate_size: 64}}
data: {train: {name: dataset, path: train.jsonl}}
stages: [{stage: online, steps: 1, prompts_per_step: 1}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    tmp_path = tmp_path_factory.mktemp("page")
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "my_lab/__init__.py").touch()
    (tmp_path / "train.jsonl").write_text('{"prompt": "2+2=", "answer": "4"}\n')
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[module]
    reward_functions._entries.pop("one_of", None)


def scored(
    folder: Path, number: int, texts: list[str], prompt: Any = "2+2=", **row: Any
) -> tuple[Group, list[str | None]]:
    """A group scored by one of the page's recipes, and what is wrong with its row."""
    path = folder / f"recipe{number}.yaml"
    path.write_text(json.dumps({**YAML(typ="safe").load(BASE), **YAML(typ="safe").load(RECIPES[number])}))
    with Scorer.from_recipe(load([path])) as scorer:
        asked = group(texts, prompt=prompt, **row)
        return scorer.score([asked])[0], scorer.faults([asked.prompt])


def columns(found: Group) -> list[dict[str, float | None]]:
    return [{name: score.value for name, score in rollout.scores.items()} for rollout in found.rollouts]


def test_the_page_has_what_this_test_follows() -> None:
    assert len(RECIPES) == 6 and len(FILES) == 5 and len(VERDICTS) == 16
    assert len(re.findall("^```(yaml|python|console)", PAGE, re.M)) == len(FILES) + len(RECIPES)


def test_every_reward_is_named() -> None:
    table = PAGE[PAGE.index("## What there is") : PAGE.index("## Mathematics")]
    shipped = [entry.name for entry in reward_functions if entry.cls.__module__.startswith("rewards.")]
    assert len(shipped) > 8 and [name for name in shipped if f"`{name}`" not in table] == []


@pytest.mark.parametrize(("gold", "answer", "verdict", "why"), VERDICTS)
def test_verdicts(gold: str, answer: str, verdict: str, why: str) -> None:
    prompt = "Expand $(x+1)^2$." if "a copy" in why else "How many?"
    assert Math()([prompt], [f"\\boxed{{{answer}}}"], answer=[gold])[0].status == verdict


def test_the_first_list(folder: Path) -> None:
    found, _ = scored(folder, 0, [r"Please: \boxed{4.0}", r"\boxed{5}"], answer="4")
    assert columns(found) == [
        {"math": 1.0, "brevity": 0.0, "polite": 1.0},
        {"math": 0.0, "brevity": 0.0, "polite": 0.0},
    ]
    assert [r.reward for r in found.rollouts] == [1.2, 0.0] and [r.correct for r in found.rollouts] == [True, False]
    space: dict[str, Any] = {}
    exec(FILES["tiers.py"], space)
    assert space["tiers"]([found]) == {"number": 1, "wrong": 1}


def test_the_component(folder: Path) -> None:
    found, faults = scored(folder, 1, ["it is four", "five", ""], accepted=["four", "4"])
    assert columns(found) == [{"one_of": 1.0}, {"one_of": 0.0}, {"one_of": 0.0}] and faults == [None]
    assert [r.scores["one_of"].answer for r in found.rollouts] == ["four", "five", None]
    assert scored(folder, 1, ["x"], accepted=[])[1] == ["reward 'one_of': column 'accepted' is empty"]


def test_from_trl(folder: Path) -> None:
    chat = [{"role": "user", "content": "2+2="}]
    found, _ = scored(folder, 2, [r"\boxed{4}", r"\boxed{5}"], chat, solution="$4$")
    assert [c["accuracy_reward"] for c in columns(found)] == [1.0, 0.0]
    assert [c["get_soft_overlong_punishment"] for c in columns(found)] == [0.0, 0.0]


@pytest.mark.parametrize("prompt", ["2+2=", [{"role": "user", "content": "2+2="}]], ids=["text", "chat"])
def test_from_openrlhf_and_verl(folder: Path, prompt: Any) -> None:
    found, _ = scored(folder, 3, ["4", "5", " 4"], prompt, answer="4")
    assert columns(found) == [{"right": 1.0}, {"right": 0.0}, {"right": 1.0}]
    found, _ = scored(folder, 4, ["4", "5", " 4"], prompt, answer="4", data_source="sums", extra_info={"index": 3})
    assert columns(found) == [{"score": 1.0}, {"score": 0.0}, {"score": 0.0}]
    assert columns(scored(folder, 4, ["4"], prompt, answer="4")[0]) == [{"score": 1.0}], "without data_source"


def test_a_judge(folder: Path) -> None:
    with served(lambda *_: json.dumps({"evidence": "", "first": 9, "second": 3})) as (url, _):
        path = folder / "judged.yaml"
        page = YAML(typ="safe").load(RECIPES[5])
        places = {"cache": str(folder / "judge_cache"), "account": str(folder / "judge_usage.jsonl")}
        page["rewards"][1] |= {"base_url": url, **places}
        path.write_text(json.dumps({**YAML(typ="safe").load(BASE), **page}))
        with Scorer.from_recipe(load([path])) as scorer:
            found = scorer.score([group(["four"], prompt="2+2=", answer="4")])[0]
    assert columns(found) == [{"numeric_match": 0.0, "judge": 0.5}]
