"""A study of seconds: two arms of the tiny recipe and a control."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.tiny import merged, write

CLAIM: dict[str, Any] = {
    "claim": "An entropy bonus raises accuracy.",
    "recipe": "tiny.yaml",
    "warm_up": {"stages": 1},
    "arms": {
        "plain": {"papers": [{"says": "it is stable", "source": "A paper (arXiv 0000.00000)"}]},
        "bonus": {"set": {"stages.1.algorithm.entropy_controls": [{"name": "bonus", "coefficient": 0.1}]}},
        "zero": {"set": {"stages.1.algorithm.entropy_controls": [{"name": "bonus", "coefficient": 0.0}]}},
    },
    "tune": {"seeds": [101], "grid": {"stages.1.learner.lr": [1e-3, 1e-2]}},
    "report_seeds": [1, 2],
    "measure": {"metric": "area"},
    "primary": {"arm": "bonus", "against": "plain", "minimum_effect": 0.02},
    "gate": [{"arm": "plain", "metric": "eval/accuracy", "when": "last", "at_most": 1.0}],
    "budget": {"steps": 2},
    "controls": [{"arm": "zero", "equals": "plain"}],
}


def write_claim(folder: Path, change: Mapping[str, Any] | None = None) -> Path:
    """The claim, with ``change`` merged in, beside its recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)
    path = folder / "small.yaml"
    with path.open("w") as file:
        YAML().dump(merged(CLAIM, change or {}), file)
    return path
