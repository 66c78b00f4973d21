"""Weightings in a recipe: what a check says of them, and whole runs.

That each goes on exactly is said in ``test_exact_resume.py``.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import alignment
from alignment.metrics import Record
from alignment.recipe import load
from tests.recipes_for_tests import BASE, only, write
from tests.test_train import Recorder
from tests.tiny import tiny

HERE = "stages.1.algorithm.weighting"
EVALUATED = "evaluation.every=2"


def said(path: Path, *overrides: str) -> list[str]:
    """What loading the recipe warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load([path], list(overrides))
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("override", ["evaluation.every=0", "data.eval=null"])
def test_a_weighting_that_learns_from_evaluations_needs_them(tmp_path, override):
    assert "learns from evaluations during the stage" in only(
        write(tmp_path), overrides=(f"{HERE}=hypervolume", EVALUATED, override)
    )


def test_names_of_rewards_are_looked_up(tmp_path):
    chosen = f"{HERE}={{name: hypervolume, objectives: [exact_match, length, brevity]}}"
    found = only(write(tmp_path), overrides=(chosen, EVALUATED))
    assert "names brevity, which is no reward of this recipe; there are exact_match" in found


@pytest.mark.parametrize("option", ["minimise: [length]", "scales: {length: 100}"])
def test_a_measure_that_is_no_objective_is_refused(tmp_path, option):
    """With no ``objectives`` these are the rewards, and a length would be minimised nowhere."""
    chosen = f"{HERE}={{name: hypervolume, {option}}}"
    found = only(write(tmp_path), overrides=(chosen, EVALUATED))
    assert f"{HERE}: 'minimise' and 'scales' name length, and without 'objectives'" in found
    assert found.endswith("objectives: [exact_match, length]")
    listed = chosen.replace(option, f"objectives: [exact_match, length], {option}")
    called_so = "rewards=[{name: format, pattern: x, as: length}]"
    for overrides in ([listed], [chosen, called_so]):
        load([write(tmp_path)], [EVALUATED, *overrides])


def test_a_factor_that_does_nothing_is_warned_of(tmp_path):
    path = write(tmp_path, BASE)

    def apply_to(where: str, advantage: str = "grpo") -> list[str]:
        chosen = f"{HERE}={{name: hypervolume, apply_to: {where}}}"
        return said(path, chosen, EVALUATED, f"stages.1.algorithm.advantage={advantage}")

    assert apply_to("lr") == []
    assert "apply_to 'reward' has no effect here" in apply_to("reward")[0]
    assert "AdamW divides by the size of the gradient" in apply_to("reward", "dr_grpo")[0]
    assert "AdamW divides by the size of the gradient" in apply_to("advantage")[0]


def trained(folder: Path, weighting: Any, steps: int = 4, **change: Any) -> tuple[list[Record], str]:
    """The records of the online stage of a run with two rewards, and its folder."""
    rewards = [{"name": "format", "pattern": "[0-4].*"}, {"name": "exact_match", "weight": 0.5}]
    online = {"steps": steps, "learner": {"lr": 2e-2}, "algorithm": {"weighting": weighting, **change}}
    evaluation = {"every": 1, "samples": 4, "sampling": {"temperature": 1.0}}
    recipe = tiny(folder, {"rewards": rewards, "evaluation": evaluation, "stages": {0: {"steps": 1}, 1: online}})
    sink = Recorder()
    run = alignment.train(recipe, sinks=[sink])["folder"]
    return [r for r in sink.records if r.kind == "train" and r.stage == "rl"], run


def test_hypervolume_multiplies_the_learning_rate(tmp_path):
    weighting = {"name": "hypervolume", "objectives": ["format"]}
    whole, _ = trained(tmp_path, weighting)
    rates, factors = [r.metrics["lr"] for r in whole], [r.metrics["weighting/meta"] for r in whole]
    assert rates == pytest.approx([2e-2 * f for f in [1.0, *factors[:-1]]]), "the next update has the factor"
    assert {0.5} < set(factors) and all(r.metrics["update_norm"] > 0 for r in whole)
    assert {"weighting/front", "weighting/hypervolume", "weighting/objective/format"} <= whole[-1].metrics.keys()


def test_gradients_of_components_make_the_weights_of_the_next_batch(tmp_path):
    steps, run = trained(tmp_path, {"name": "gradient", "layers": "lm_head|layers.1"}, steps=2)
    weights = [[r.metrics[f"weighting/weight/{name}"] for name in ("format", "exact_match")] for r in steps]
    assert all(sum(pair) == pytest.approx(1.0) for pair in weights)
    assert weights[0][0] > 2 / 3, "the one that is sometimes earned gains on the other, from 1 to 0.5"
    newest = sorted((Path(run) / "checkpoints").glob("step_*"))[-1]
    state = json.loads((newest / "state.json").read_text())["components"]["weighting"]
    assert list(state["weights"].values()) == weights[-1] and state["skipped"] == 0


def test_gradients_of_components_need_advantages_without_a_critic(tmp_path):
    chosen = ("stages.1.algorithm.advantage=gae", "stages.1.critic=model", f"{HERE}=gradient")
    assert "a critic predicts their sum" in only(write(tmp_path), overrides=chosen)


def test_multipliers_move_towards_their_thresholds(tmp_path):
    weighting = {"name": "lagrangian", "thresholds": {"exact_match": 0.9}, "max_grad_norm": None}
    steps, _ = trained(tmp_path, weighting, steps=2)
    assert all(r.metrics["weighting/above/exact_match"] < 0 for r in steps)
    first, second = (r.metrics["weighting/multiplier/exact_match"] for r in steps)
    assert 0 < first < second and steps[0].metrics["weighting/objective_weight"] == pytest.approx(1 - first)
    assert steps[0].metrics["weighting/above/exact_match"] == pytest.approx(
        steps[0].metrics["reward/exact_match"] - 0.9
    )


def test_a_sum_of_advantages_that_nobody_normalised_is_warned_of(tmp_path):
    sums = (f"{HERE}=normalise_then_sum", "stages.1.algorithm.advantage=dr_grpo")
    assert "the component with the largest spread decides" in said(write(tmp_path), *sums)[0]
    assert said(write(tmp_path), *sums[:1]) == []
