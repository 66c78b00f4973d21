"""docs/clusters.md: its commands run, its stages load, and its worked example is what the code computes."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from alignment.cluster_plan import Hardware, StageOnCluster
from alignment.model_size import GIB
from alignment.plan import make_plan
from alignment.recipe import OnlineStage, load
from tests.evaluation.evaluated import align
from tests.recipes_for_tests import BASE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/clusters.md").read_text()
COMMANDS = [
    (line, int(code or 0))
    for code, block in re.findall(r"^```console(?: exit=(\d))?\n(.*?)^```$", PAGE, re.M | re.S)
    for line in block.splitlines()
]
STAGES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_page_has_what_this_test_follows():
    assert len(COMMANDS) == 6 and len(STAGES) == 4
    assert len(re.findall(r"^```(yaml|console|python|bash)", PAGE, re.M)) == 6


@pytest.mark.parametrize(("line", "code"), COMMANDS)
def test_every_command_ends_as_the_page_says(line, code, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = align(*line.removeprefix("align ").split())
    assert done.exit_code == code, done.output
    assert ("does not fit" in done.stdout) == bool(code) and (" fits: " in done.stdout) != bool(code)


@pytest.mark.parametrize("keys", STAGES)
def test_every_stage_loads(keys, tmp_path):
    values: Any = YAML(typ="safe").load(BASE)
    values["stages"] = [{**values["stages"][1], "learner": None, **YAML(typ="safe").load(keys)}]
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML().dump(values, file)
    (stage,) = load([tmp_path / "recipe.yaml"]).stages
    assert isinstance(stage, OnlineStage)


@pytest.fixture(scope="module")
def example() -> StageOnCluster:
    (stage,) = make_plan(load([ROOT / "recipes/simplerl_zoo_7b.yaml"]), Hardware(2, 8, 80)).cluster
    return stage


def test_the_worked_example(example):
    (holding,) = example.holdings
    update, sampling = holding.phases["update"], holding.phases["sampling"]
    engine = sum(amount for name, amount in sampling.items() if name.startswith("engine"))
    computed = {
        **update,
        "context, engine asleep": update["context"] + update["engine asleep"],
        "update": sum(update.values()),
        "learner at rest": sampling["learner at rest"],
        "engine": engine,
        "context": sampling["context"],
        "sampling": sum(sampling.values()),
    }
    told = dict(re.findall(r"^\| \**([a-z, ]+?)\**(?::[^|]*)? \|[^|]*\| \**(\d+\.\d\d)\** \|$", PAGE, re.M))
    assert len(told) == 13
    assert told == {name: f"{computed[name] / GIB:.2f}" for name in told}


def test_the_formulas_of_the_worked_example(example):
    """What stands in its middle column, evaluated."""
    (holding,) = example.holdings
    parts = dict(re.findall(r"^\| ([a-z]+) \| ([^|]*\d[^|]*) \| \d+\.\d\d \|$", PAGE, re.M))
    assert set(parts) >= {"parameters", "gradients", "optimizer", "buckets", "activations", "logits"}
    for name, formula in parts.items():
        if name == "engine":
            continue
        written = formula.replace(" x ", " * ").replace("1,000 M", "10**9").replace("MiB", "* 2**20")
        written = re.sub(r"(\d+) P", rf"\1 * {7_615_616_512}", written)
        assert eval(written) == pytest.approx(holding.phases["update"][name], rel=1e-6), name


def test_the_cache_of_the_worked_example(example):
    text = " ".join(PAGE.split())
    assert f"so {example.cache.tokens:,} tokens fit, or {example.cache.sequences} rows of 1024 + 8192" in text
    assert "4 x 28 x (4 / 2) x 128 = 28,672 bytes" in text and 4 * 28 * 2 * 128 == 28_672
    assert f"the other {example.holdings[0].phases['sampling']['engine cache'] / GIB:.2f} are cache" in text


def test_what_does_not_fit_is_shown_as_it_is(monkeypatch):
    monkeypatch.chdir(ROOT)
    (line,) = [line for line, code in COMMANDS if code]
    (shown,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.M | re.S)
    assert shown in align(*line.removeprefix("align ").split()).stdout
