"""Hypervolumes, and the weighting that is led by them."""

import itertools
import json
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignment.algorithms.advantages import DrGrpo, Gae, Grpo, ReinforcePp, ReinforcePpBaseline
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.hypervolume import Hypervolume, hypervolume, meta_reward
from alignment.algorithms.objective import Objective
from alignment.errors import UserError

SQUARES = [(1, 3), (2, 2), (3, 1)]


def test_golden_volumes():
    assert hypervolume(SQUARES, (0, 0)) == 6
    assert hypervolume([*SQUARES, (1, 1)], (0, 0)) == 6
    assert hypervolume([*SQUARES, (2.5, 2.5)], (0, 0)) == 7.25
    assert hypervolume([(2, 1, 1), (1, 2, 1), (1, 1, 2)], (0, 0, 0)) == 4
    assert hypervolume([(1, 1, 1)], (0, 0, 0)) == 1
    assert hypervolume([], (0, 0)) == 0
    assert hypervolume([(2,), (3,)], (1,)) == 2


def test_a_point_below_the_reference_adds_nothing_and_takes_nothing_away():
    assert hypervolume([(2, -1)], (0, 0)) == 0, "unclipped, the recursion says -2"
    assert hypervolume([*SQUARES, (9, -1)], (0, 0)) == 6


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_against_inclusion_and_exclusion_in_any_order(objectives):
    generator = random.Random(objectives)
    points = [[generator.uniform(-0.2, 1) for _ in range(objectives)] for _ in range(6)]
    origin = [0.0] * objectives
    expected = 0.0
    for size in range(1, 7):
        for chosen in itertools.combinations(points, size):
            expected -= (-1) ** size * math.prod(max(0.0, min(p[i] for p in chosen)) for i in range(objectives))
    for order in itertools.islice(itertools.permutations(range(objectives)), 6):
        generator.shuffle(points)
        permuted = [[p[i] for i in order] for p in points]
        assert hypervolume(permuted, origin) == pytest.approx(expected, abs=1e-12)
    grown = [hypervolume(points[:n], origin) for n in range(7)]
    assert all(b > a - 1e-12 for a, b in itertools.pairwise(grown))


def test_golden_factors():
    assert [meta_reward(x) for x in (0.0, 0.5, 1.0, math.inf)] == pytest.approx([0.5, 1.19318, 1.64239, 2.0], abs=5e-6)


def signals(evaluation, before=None, objectives=("a", "b")) -> Any:
    def named(values):
        return values and dict(zip(("reward/a", "reward/b", "length"), values, strict=False))

    return SimpleNamespace(
        evaluation=named(evaluation), evaluation_before=named(before), batch=SimpleNamespace(objectives=objectives)
    )


def run(weighting, *evaluations):
    """The state after evaluations, through JSON each time; the first is that of the policy before."""
    state, before = weighting.init(), evaluations[0]
    for evaluation in evaluations[1:]:
        state = json.loads(json.dumps(weighting.observe(state, signals(evaluation, before))))
        before = evaluation
    return state


def test_the_front_grows_by_what_adds_volume():
    weighting = Hypervolume(scales={"a": 1.0, "b": 1.0})
    assert run(weighting, (0, 0), None)["meta"] == 1.0, "nothing has been evaluated since the reference"
    state = run(weighting, (0, 0), (1, 3), (2, 2), (3, 1))
    assert state["contribution"] == 1 and state["meta"] == pytest.approx(1.642391, abs=1e-6)
    assert weighting.metrics(state)["hypervolume"] == 6 and weighting.metrics(state)["front"] == 3
    dominated = run(weighting, (0, 0), (1, 3), (2, 2), (3, 1), (1, 1))
    assert dominated["front"] == state["front"] and dominated["meta"] == 0.5
    better = run(weighting, (0, 0), (1, 3), (2, 2), (3, 1), (2.5, 2.5))
    assert better["contribution"] == 1.25 and [2, 2] not in better["front"]
    assert weighting.metrics(better)["hypervolume"] == 7.25
    assert weighting.observe(better, signals(None)) == better, "until the next evaluation"


def test_an_objective_may_be_minimised_and_scaled():
    up = run(Hypervolume(scales={"a": 1.0, "b": 1.0}), (0, 0), (1, 3), (2, 2))
    down = Hypervolume(objectives=("a", "length"), minimise=("length",), scales={"a": 1.0, "length": 100.0})
    state = run(down, (0, 0, 500), (1, 0, 200), (2, 0, 300))
    assert state["contribution"] == pytest.approx(up["contribution"]) and state["meta"] == pytest.approx(up["meta"])
    assert down.metrics(state)["objective/length"] == 300 and down.metrics(state)["objective/a"] == 2


def test_without_scales_the_range_seen_so_far_counts_as_one():
    """So that neither the unit of an objective nor its zero matters."""
    evaluations = [(0.1, 0.2), (0.2, 0.2), (0.3, 0.3), (0.2, 0.5), (0.0, 0.4), (0.5, 0.6)]
    plain = run(Hypervolume(), *evaluations)
    other = run(Hypervolume(), *[(1000 * a, b - 7) for a, b in evaluations])
    assert plain["contribution"] == pytest.approx(other["contribution"]) and plain["contribution"] > 0
    assert Hypervolume().metrics(plain)["hypervolume"] == pytest.approx((0.4 / 0.5) * 1.0)


def test_what_the_evaluation_does_not_say_is_an_error_with_a_remedy():
    with pytest.raises(UserError, match=r"no value of c; name in weighting.objectives"):
        Hypervolume().observe(Hypervolume().init(), signals((1, 2), objectives=("a", "c")))
    with pytest.raises(UserError, match="add them"):
        Hypervolume(objectives=("a",), minimise=("length",))
    with pytest.raises(UserError, match="above 0"):
        Hypervolume(scales={"a": 0.0})
    assert Hypervolume(objectives=("a", "length")).names == ("a",)


def credited(make_batch, weighting, advantage, meta=2.0):
    batch = make_batch(
        [[1.0, 0.0], [0.0, 0.5], [0.5, 0.5], [5.0, 5.0]],
        [2] * 4,
        sources=["policy"] * 3 + ["demonstration"],
        bases=["old"] * 3 + ["self"],
    )
    algorithm = Algorithm(advantage=advantage, weighting=weighting)
    states = {"weighting": {**weighting.init(), "meta": meta}}
    found = credit(batch, algorithm, states).adv_BT
    assert found is not None
    return found, Objective.of(algorithm, states)


@pytest.mark.parametrize("apply_to", ["reward", "advantage", "lr"])
def test_where_the_factor_goes(make_batch, apply_to):
    weighting = Hypervolume(apply_to=apply_to)
    plain_BT, _ = credited(make_batch, weighting, DrGrpo(), meta=1.0)
    adv_BT, objective = credited(make_batch, weighting, DrGrpo())
    factor = 1.0 if apply_to == "lr" else 2.0
    torch.testing.assert_close(adv_BT[:3], factor * plain_BT[:3])
    assert (adv_BT[3, 1:] == 1).all(), "what is imitated is left alone"
    assert objective.lr_factor == (2.0 if apply_to == "lr" else 1.0) and objective.update_norm


@pytest.mark.parametrize("advantage", [Grpo(), ReinforcePp(), ReinforcePpBaseline()])
def test_a_factor_on_rewards_cancels_in_normalised_advantages(make_batch, advantage):
    """Golden: twice the rewards change GRPO's advantages by no more than 2e-6, which is eps."""
    assert advantage.scale_free
    one_BT, _ = credited(make_batch, Hypervolume(apply_to="reward"), advantage, meta=1.0)
    two_BT, _ = credited(make_batch, Hypervolume(apply_to="reward"), advantage, meta=2.0)
    torch.testing.assert_close(two_BT, one_BT, atol=2e-6, rtol=0)
    assert not Grpo(normalise="none").scale_free and not hasattr(Gae, "scale_free")
