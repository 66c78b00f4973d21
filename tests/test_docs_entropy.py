"""docs/entropy.md: its recipes load, its example trains, its tables name what there is and what is logged."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import alignment
from alignment.algorithms.aggregations import TokenMean
from alignment.algorithms.entropy_controls import entropy_controls
from alignment.algorithms.objective import Objective
from alignment.algorithms.policy_losses import Reinforce, policy_losses
from alignment.metrics import Record
from alignment.recipe import OnlineStage, load
from alignment.registry import REGISTRIES
from tests.engines.helpers import make_batch
from tests.recipes_for_tests import BASE
from tests.tiny import tiny

PAGE = (Path(__file__).parents[1] / "docs/entropy.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> set[str]:
    cells = re.findall(r"^\| (`.*?`) \|", text, re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def ours(registry: Any) -> set[str]:
    return {entry.name for entry in registry if entry.cls.__module__.startswith("alignment.")}


class Last:
    """A sink that keeps what was logged."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def log(self, record: Record) -> None:
        self.records.append(record)

    def start(self, run: Any) -> None: ...

    def rollouts(self, step: int, stage: str, groups: Any) -> None: ...

    def finish(self, result: Any) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_the_recipes_load(number: int, tmp_path: Path) -> None:
    values: Any = YAML(typ="safe").load(BASE)
    values["stages"][1]["algorithm"] = YAML(typ="safe").load(RECIPES[number])["algorithm"]
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML().dump(values, file)
    recipe = load([tmp_path / "recipe.yaml"])
    assert isinstance(recipe.stages[1], OnlineStage) and recipe.warnings == []


def test_the_tables_name_what_there_is() -> None:
    assert len(RECIPES) == 4
    assert rows(PAGE.partition("\n## ")[0]) == ours(entropy_controls)
    assert rows(section("What each costs")) == ours(entropy_controls) | {"grpo_guard"}
    assert "grpo_guard" in ours(policy_losses)


def test_what_is_logged_is_logged_and_the_example_trains(tmp_path: Path) -> None:
    """One run with the example, a control that penalises the entropy, and regulated clipping."""
    known = set(entropy_controls.names())
    namespace: dict[str, Any] = {"__name__": "the_page"}
    exec(EXAMPLE, namespace)  # noqa: S102 - it is ours
    try:
        assert set(entropy_controls.names()) - known == {"doubt"}
        algorithm = {
            "entropy_controls": ["doubt", "bonus"],
            "policy_loss": "grpo_guard",
            "epochs": 2,
            "minibatches": 2,
        }
        rewards = [{"name": "format", "pattern": "[0-4].*"}]
        sink = Last()
        stages = {0: {"steps": 1}, 1: {"steps": 2, "algorithm": algorithm}}
        alignment.train(tiny(tmp_path, {"rewards": rewards, "stages": stages}), sinks=[sink])
        logged = next(record for record in reversed(sink.records) if record.kind == "train").metrics
        named = rows(section("What is logged"))
        assert len(named) == 12 and named <= logged.keys()
        assert 0 < logged["control_weight"] < 1

        control = entropy_controls.build("doubt")
        logp_BT = torch.full((8, 11), -0.05)
        batch = replace(make_batch(), old_logp_BT=logp_BT, entropy_BT=-logp_BT)
        prepared = Objective(Reinforce(), TokenMean(), entropy_controls=((control, None),)).prepare(batch)
        assert batch.adv_BT is not None and prepared.marks_BTC is not None
        assert torch.equal(prepared.marks_BTC[..., 0] > 0, batch.loss_mask_BT & (batch.adv_BT > 0))
    finally:
        REGISTRIES["entropy_controls"]._entries.pop("doubt", None)
