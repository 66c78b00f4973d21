"""Claims, costs, measures, intervals and verdicts of studies."""

import json
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML
from torch import nn

from alignment.architectures import Shape
from alignment.ledger import Verdicts
from alignment.models import load_model
from alignment.recipe import load
from alignment.recipe_tree import RecipeError
from alignment.score import Tally
from alignment.studies.claim import Gate, Measure, read_claim
from alignment.studies.cost import Sizes, costs, flops, linear_weights, sizes_of
from alignment.studies.curve import crossing, gate_value, measured, peak, weights
from alignment.studies.design import Study, Task
from alignment.studies.judge import paired
from alignment.studies.statistics import bootstrap_interval, seed_interval, student, word
from tests.studies.small import write_claim
from tests.tiny import SUMS, write

EVALUATION = {"kind": "eval", "step": 0, "stage": "rl", "prompt_tokens": 4, "completion_tokens": 6}


@pytest.mark.parametrize(
    ("mean", "interval", "minimum", "reached", "said"),
    [
        (0.05, (0.01, 0.09), 0.02, True, "holds"),
        (0.05, (0.0, 0.1), 0.02, True, "inconclusive"),  # 0 is not excluded
        (0.015, (0.01, 0.02), 0.02, True, "inconclusive"),  # an effect, but perhaps a smaller one
        (0.01, (0.005, 0.015), 0.02, True, "does not hold"),  # an effect, and surely a smaller one
        (-0.05, (-0.09, -0.01), 0.02, True, "does not hold"),
        (-0.01, (-0.015, 0.005), -0.02, True, "holds"),  # a margin: not worse by more
        (0.05, (0.01, 0.09), 0.02, False, "regime not reached"),
        (0.05, (-np.inf, np.inf), 0.02, True, "inconclusive"),
    ],
)
def test_verdicts(mean, interval, minimum, reached, said):
    assert word(mean, interval, minimum, reached) == said


def test_flops_of_a_step_worked_by_hand():
    record = {
        "kind": "train", "prompt_tokens": 10, "completion_tokens": 20,  # 2 * 100 * 30 = 6000
        "read_tokens/policy": 25, "read_tokens/reference": 25,  # 2 * 100 * 50 = 10000
        "read_tokens/values": 25, "critic/fitted_tokens": 50,  # 2 * 7 * 25 + 6 * 7 * 50 = 2450
        "prompt_value/read_tokens": 9, "prompt_value/fitted_tokens": 3,  # 2 * 3 * 9 + 6 * 3 * 3 = 108
        "fitted_tokens": 50, "sft/fitted_tokens": 5,  # 6 * 100 * 55 = 33000
    }  # fmt: skip
    assert flops(record, Sizes(policy=100, critic=7, prompt_value=3)) == 6000 + 10000 + 2450 + 108 + 33000
    assert flops(record, Sizes(100, 7, 3, trained=4)) == 6000 + 10000 + 2450 + 108 + 22000
    assert flops({"kind": "eval", "prompt_tokens": 10, "completion_tokens": 20}, Sizes(100)) == 6000


def test_validation_and_dropped_rollouts_count():
    lines = [
        {"step": 0, "stage": "rl", "kind": "eval", "prompt_tokens": 4, "completion_tokens": 6},
        {"step": 1, "stage": "rl", "kind": "train", "prompt_tokens": 4, "completion_tokens": 16, "fitted_tokens": 10},
        {"step": 2, "stage": "rl", "kind": "eval", "prompt_tokens": 4, "completion_tokens": 6},
        {"step": 2, "stage": "rl", "kind": "train", "prompt_tokens": 4, "completion_tokens": 16, "fitted_tokens": 20},
    ]
    at = costs(lines, {"rl": Sizes(1)})
    assert [(at[s].flops, at[s].tokens, at[s].steps) for s in (0, 1, 2)] == [(20, 0, 0), (120, 16, 1), (300, 32, 2)]


def test_weights_of_linear_layers_are_those_of_the_model(tmp_path):
    recipe = load([write(tmp_path)])
    shape = Shape.of(recipe.model)
    module = load_model(recipe.model, 0).module
    assert shape is not None
    assert linear_weights(shape) == sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    assert sizes_of(recipe, recipe.stages[1]) == Sizes(linear_weights(shape))


@pytest.mark.parametrize(("critic", "expected"), [("model", 1), ("head", 1)])
def test_sizes_of_a_critic_are_the_policys_unless_it_has_a_model(tmp_path, critic, expected):
    change = {"stages": {1: {"critic": critic, "algorithm": {"advantage": "gae"}}}}
    recipe = load([write(tmp_path, change)])
    found = sizes_of(recipe, recipe.stages[1])
    assert found.critic == expected * found.policy


def test_weights_of_evaluations():
    x = [1.0, 2.0, 4.0]
    area = weights(x, 4.0, Measure(metric="area"))
    # Flat from 0 to 1, straight lines to 2 and to 4: (1 + 0.5, 0.5 + 1, 1) / 4.
    assert area.tolist() == pytest.approx([0.375, 0.375, 0.25])
    assert weights(x, 3.0, Measure(metric="final")).tolist() == pytest.approx([0, 0.5, 0.5])
    assert weights(x, 3.0, Measure(metric="area")).sum() == pytest.approx(1)


def test_student_and_its_interval():
    assert student(0.95, 7) == pytest.approx(2.3646, abs=1e-3)
    low, high = seed_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)


def test_bootstrap_covers_about_as_often_as_it_says():
    """Differences with an effect of the seed and of the problem, which all seeds share."""
    random, hits = np.random.default_rng(0), {True: 0, False: 0}
    for trial in range(60):
        problem_P, seed_S = random.normal(0, 1, 40), random.normal(0, 0.1, 8)
        values = problem_P + seed_S[:, None] + random.normal(0, 0.3, (8, 40))
        for crossed in hits:
            low, high = bootstrap_interval(values.tolist(), crossed, seed=trial)
            hits[crossed] += low <= 0 <= high
    assert hits[True] >= 54  # of 60; 57 are expected
    assert hits[False] < hits[True]  # problems drawn anew for each seed average out, and are none the less the same


def test_bootstrap_without_problems_to_draw_is_of_seeds():
    values = [[0.1] * 5, [0.2] * 5, [0.3] * 5, [0.4] * 5]
    found = [bootstrap_interval(values, crossed) for crossed in (True, False)]
    assert found[0] == pytest.approx(found[1], abs=0.02) and 0.05 < found[0][0] < 0.2 < found[0][1] <= 0.4 + 1e-9
    assert bootstrap_interval(values, True) == found[0]
    assert bootstrap_interval([[0.1, 0.2]], True) == (-np.inf, np.inf)


def test_pairs_are_by_seed_and_problem():
    own = {("a", 1): {"problems": {"p": 0.5, "q": 1.0}}, ("b", 1): {"problems": {"q": 0.25, "p": 0.5}},
           ("a", 2): {"problems": {"p": 0.0, "q": 1.0}}, ("b", 2): {"problems": {"p": 0.5, "q": 0.0}}}  # fmt: skip
    assert paired(own, "a", "b") == ([[0.0, 0.75], [-0.5, 1.0]], True)
    other = {key: {"problems": {f"{key[1]}/{p}": v for p, v in r["problems"].items()}} for key, r in own.items()}
    assert paired(other, "a", "b") == ([[0.0, 0.75], [-0.5, 1.0]], False)


def test_gates_read_metrics():
    lines = [{"kind": "train", "zero_variance": v} for v in (0.2, None, 0.6)] + [{"kind": "eval", "accuracy": 0.9}]
    gates = {when: Gate(arm="a", metric="zero_variance", when=when, at_least=0) for when in ("first", "last", "mean")}
    assert [gate_value(lines, gates[when]) for when in gates] == [0.2, 0.6, pytest.approx(0.4)]
    assert gate_value(lines, Gate(arm="a", metric="eval/accuracy", at_most=1)) == 0.9
    with pytest.raises(ValueError, match=r"no metric|has a metric 'zero'.*zero_variance"):
        gate_value(lines, Gate(arm="a", metric="zero", at_most=1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"armz": 1}, r"small.yaml:\d+: armz: there is no key 'armz'; did you mean 'arms'\?"),
        (
            {"primary": {"arm": "bonis"}},
            r"small.yaml:\d+: primary.arm: there is no arm 'bonis'; did you mean 'bonus'\?",
        ),
        ({"primary": {"against": "bonus"}}, "cannot be compared with itself"),
        ({"primary": {"arm": "zero"}}, "'zero' is a control"),
        (
            {"controls": [{"arm": "zero", "equals": "plain"}, {"arm": "zero", "no_better_than": "plain"}]},
            "'zero' is in two of them",
        ),
        ({"controls": [{"arm": "zero"}]}, "exactly one of equals and no_better_than"),
        ({"controls": [{"arm": "zero", "equals": "plain", "no_better_than": "plain"}]}, "exactly one of equals"),
        ({"controls": [{"arm": "plain", "no_better_than": "plain"}]}, "cannot be compared with itself"),
        ({"controls": [{"arm": "zero", "no_better_than": "plane"}]}, "there is no arm 'plane'"),
        ({"tune": {"seeds": [1, 101]}}, r"seeds \[1\] are report seeds as well"),
        ({"report_seeds": [1, 1]}, "a seed is given twice"),
        ({"budget": {"steps": 2, "tokens": 3}}, "exactly one of flops, tokens and steps"),
        ({"gate": [{"arm": "plain", "metric": "accuracy"}]}, "needs at_least, at_most or both"),
        (
            {"gate": [{"arm": "plain", "metric": "accuracy", "at_least": 1.0, "at_most": 0.5}]},
            "at_least: is above at_most",
        ),
        ({"arms": {"bonus": {"set": {"stages.1.learner.lr": 1}}}}, "is in tune.grid"),
        ({"budget": {"steps": "two"}}, r"budget.steps: expected a number"),
        ({"measure": {"of": "reward", "pass_at": 2}}, r"measure.pass_at: counts correct samples"),
        ({"measure": {"metric": "after_peak"}}, r"tune: would choose what loses least"),
    ],
)
def test_mistakes_in_a_claim_are_told_with_their_line(tmp_path, change, told):
    with pytest.raises(RecipeError, match=told):
        read_claim(write_claim(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"arms": {"bonus": {"set": {"stages.1.algoritm": {}}}}},
            r"small.yaml:\d+: stages.1.algoritm: there is no key",
        ),
        ({"arms": {"bonus": {"set": {"evaluation.samples": 2}}}}, r"arms.bonus.set: changes evaluation"),
        ({"arms": {"bonus": {"set": {"stages.0.steps": 2}}}}, r"arms.bonus.set: changes stages.0"),
        (
            {"tune": {"grid": {"stages.1.learner.lr": [-1.0]}}},
            r"small.yaml:\d+: stages.1.learner.lr: expected a number",
        ),
        ({"arms": {"bonus": {"set": {"data.train.size": 5}}}}, r"arms.bonus.set: changes data.train, which all"),
        ({"tune": {"grid": {"data.train.size": [5, 6]}}}, r"tune.grid: changes data.train, which all"),
        ({"measure": {"pass_at": 16}}, r"small.yaml:\d+: measure.pass_at: pass@16 .* evaluation.samples is 1"),
        ({"measure": {"problems": "zzz*"}}, r"small.yaml:\d+: measure.problems: no problem of data.eval matches 'zzz"),
        ({"budget": {"steps": 9}}, r"small.yaml:\d+: budget.steps: is more than the 4 steps that arm 'plain' trains"),
        ({"warm_up": {"stages": 2}}, "leaves nothing to study"),
        ({"recipe": "none.yaml"}, "none.yaml: no such file"),
    ],
)
def test_mistakes_in_the_recipes_of_a_claim_are_told_with_its_line(tmp_path, change, told):
    study = Study(read_claim(write_claim(tmp_path, change)), tmp_path / "out")
    with pytest.raises(RecipeError, match=told):
        study.check()


def test_gates_read_ratios_falls_and_the_measure():
    lines = [{"kind": "train", "entropy": value} for value in (0.5, 0.8, 0.1)]
    found = [
        gate_value(lines, Gate(arm="a", metric="entropy", when=w, at_most=1)) for w in ("ratio", "fall", "highest")
    ]
    assert found == pytest.approx([0.2, 0.7, 0.8])
    assert gate_value([], Gate(arm="a", metric="measure", when="fall", at_least=0), [0.2, 0.9, 0.6]) == pytest.approx(
        0.3
    )
    with pytest.raises(ValueError, match="begins at 0"):
        gate_value([], Gate(arm="a", metric="measure", when="ratio", at_least=0), [0.0, 0.9])


def test_matched_weighs_the_two_evaluations_around_the_first_crossing():
    assert crossing([0.2, 0.4, 0.8, 0.1, 0.9], 0.5) == pytest.approx([0, 0.75, 0.25, 0, 0])
    assert crossing([0.6, 0.4], 0.5) == pytest.approx([1, 0]) and crossing([0.2, 0.5], 0.5) == pytest.approx([0, 1])
    assert crossing([0.1, 0.2], 0.5) == pytest.approx([0, 0])


def test_after_peak_is_what_is_left_of_the_best_evaluation(tmp_path):
    assert peak([0, 1, 2, 3], [0.2, 0.6, 0.6, 0.9], 2).tolist() == [0, 1, 0, 0]  # the last is beyond the budget
    scores = {0: (0.2, 0.4), 1: (0.9, 0.5), 2: (0.3, 0.7)}  # in the mean 0.3, 0.7, 0.5
    verdicts = Verdicts(tmp_path / "evaluations.jsonl")
    for step, values in scores.items():
        verdicts.append(step, {f"p{i}": Tally(0, 4, 4 * value) for i, value in enumerate(values)})
    lines = [{"kind": "train", "step": step, "stage": "rl", "completion_tokens": 5} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [EVALUATION, *lines]))
    row = measured(tmp_path, None, "steps", 2, Measure(metric="after_peak", of="reward"))
    assert row["problems"] == {"p0": pytest.approx(-0.6), "p1": pytest.approx(0.2)}
    assert [at[3] for at in row["curve"]] == pytest.approx([0.3, 0.7, 0.5])
    never = measured(tmp_path, None, "steps", 1, Measure(metric="after_peak", of="reward"))
    assert never["problems"] == {"p0": 0, "p1": 0}


def test_arms_find_the_reward_models_of_their_warm_up(tmp_path):
    models = [{"name": "reward_model", "stage": "rm", "as": "one"}, {"name": "reward_model", "path": "x", "as": "two"}]
    change = {"rewards": ["exact_match", *models], "data": {"preferences": SUMS | {"split": "train", "pairs": True}}}
    recipe = write(tmp_path, change)
    data = YAML().load(recipe)
    data["stages"][0] = {"stage": "reward_model", "name": "rm", "steps": 1}
    YAML().dump(data, recipe)

    def study(change: dict[str, Any]) -> Study:
        return Study(read_claim(write_claim(tmp_path / "claim", {"recipe": str(recipe), **change})), tmp_path)

    warm_up, arm = (study({}).recipe(Task(kind, "plain", 0, 7)) for kind in ("warm-up", "report"))
    assert [spec.column for spec in warm_up.reward_specs] == ["exact_match", "two"]
    found = {spec.column: getattr(spec.function, "path", None) for spec in arm.reward_specs[1:]}
    assert found == {"one": str(tmp_path / "runs" / "warm-up.7"), "two": "x"}
    with pytest.raises(RecipeError, match=r"changes data.preferences, which all arms share"):
        study({"arms": {"bonus": {"set": {"data.preferences.size": 2}}}}).check()
