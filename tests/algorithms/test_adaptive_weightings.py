"""Weightings that follow gradients, thresholds, ensembles and progress: golden numbers, identities, states."""

import json
import math
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignment.algorithms.advantages import DrGrpo, Grpo
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import component_advantages, credit
from alignment.algorithms.ensembles import Ensemble, combined
from alignment.algorithms.gradient_weights import Gradient, exponentiated, influence
from alignment.algorithms.hypervolume import Hypervolume
from alignment.algorithms.lagrangian import Lagrangian, base_weight, multiplier, slope
from alignment.algorithms.normalised_sum import NormaliseThenSum
from alignment.algorithms.recap import Recap, balance, signal
from alignment.algorithms.streams import component_means
from alignment.errors import UserError
from alignment.score import Score
from alignment.types import Group, Prompt, Rollout, SamplingParams

NAN = math.nan


def gram(*gradients: tuple[float, ...]) -> torch.Tensor:
    g_KN = torch.tensor(gradients, dtype=torch.float64)
    return g_KN @ g_KN.T


def rollout(source: Any = "policy", **values: float | None) -> Rollout:
    scores = {name: Score(value, "ok" if value is not None else "skipped") for name, value in values.items()}
    params = SamplingParams(max_tokens=1)
    return Rollout(
        "r", "p", (1,), (2,), (True,), (0.0,), "", "stop", 0, "s", params, ((0, 0),), source=source, scores=scores
    )


def told(*means: dict[str, float], **more: Any) -> Any:
    """Signals of a batch whose rollouts have these values."""
    group = Group(0, Prompt("p", {"prompt": ""}), tuple(rollout(**m) for m in means))
    fields = {"groups": [group], "gram_KK": None, "batch": SimpleNamespace(objectives=tuple(means[0]) if means else ())}
    return SimpleNamespace(**(fields | more))


def through_json(state: Any) -> Any:
    again = json.loads(json.dumps(state))
    assert again == state
    return again


# Gradients


def test_golden_influence():
    assert influence(gram((1, 0), (0, 1))) == [1, 1]
    assert influence(gram((2, 0), (1, 0))) == [6, 3]
    assert influence(gram((1, 0), (-1, 0))) == [0, 0]


def test_gradients_are_clipped_before_they_are_compared():
    assert influence(gram((2, 0), (0.5, 0)), 1.0) == pytest.approx(influence(gram((1, 0), (0.5, 0))))
    assert influence(gram((0, 0), (0.5, 0)), 1.0) == [0, 0.25]
    one, other = influence(gram((2, 1), (-1, 3)), 1.0)
    assert one == pytest.approx(other), "two that are both clipped count alike, whatever the angle"


def test_golden_weights():
    assert exponentiated([0.5, 0.5], [0.1, 0.0], 1.0) == pytest.approx([0.524979, 0.475021], abs=5e-7)
    third = [1 / 3] * 3
    assert exponentiated(third, [0.2, 0.1, 0.0], 1.0) == pytest.approx([0.367165, 0.332225, 0.300610], abs=5e-7)
    assert exponentiated([0.2, 0.8], [3.0, 3.0], 0.7) == pytest.approx([0.2, 0.8])
    assert exponentiated(third, [1000.2, 1000.1, 1000.0], 1.0) == pytest.approx(exponentiated(third, [0.2, 0.1, 0], 1))
    assert math.fsum(exponentiated([0.1, 0.9], [50.0, -50.0], 3.0)) == pytest.approx(1.0)


def test_weights_begin_with_the_recipes_and_follow_the_gradients(make_batch):
    batch = make_batch([[1.0, 0.0], [0.0, 1.0], [NAN, 1.0], [NAN, NAN]], weights=[1.0, 3.0], objectives=("a", "b"))
    weighting = Gradient(rate=1.0, max_norm=None)
    state = weighting.init()
    assert weighting.scalarise(state, batch)[:3].tolist() == [0.25, 0.75, 0.75]
    assert weighting.scalarise(state, batch)[3].isnan()
    assert weighting.observe(state, told(batch=batch)) == state, "the policy rested"
    signals = told(batch=batch, gram_KK=gram((2, 0), (1, 0)))
    state = through_json(weighting.observe(state, signals))
    expected = exponentiated([0.25, 0.75], [6.0, 3.0], 1.0)
    assert list(state["weights"].values()) == pytest.approx(expected)
    assert weighting.scalarise(state, batch)[:2].tolist() == pytest.approx(expected)
    assert weighting.metrics(state) == {"weight/a": expected[0], "weight/b": expected[1], "skipped": 0}
    spoiled = weighting.observe(state, told(batch=batch, gram_KK=gram((NAN, 0), (1, 0))))
    assert spoiled == {**state, "skipped": 1}
    with pytest.raises(UserError, match="make them positive"):
        weighting.scalarise(weighting.init(), replace(batch, weights_K=torch.tensor([1.0, 0.0])))


def test_scores_may_be_averaged_over_batches(make_batch):
    batch = make_batch([[1.0, 0.0]], objectives=("a", "b"))
    weighting = Gradient(rate=1.0, max_norm=None, accumulation=2)
    state = weighting.observe(weighting.init(), told(batch=batch, gram_KK=gram((2, 0), (1, 0))))
    assert list(state["weights"].values()) == [0.5, 0.5]
    state = weighting.observe(through_json(state), told(batch=batch, gram_KK=gram((0, 0), (1, 0))))
    assert list(state["weights"].values()) == pytest.approx(exponentiated([0.5, 0.5], [3.0, 2.0], 1.0))
    assert state["batches"] == 0 and state["scores"] == {}


def test_component_advantages_are_those_of_each_component_alone(make_batch):
    rewards = [[1.0, 2.0], [0.0, NAN], [0.0, 4.0], [9.0, 9.0]]
    sources, bases = ["policy"] * 3 + ["demonstration"], ["old"] * 3 + ["self"]
    batch = make_batch(rewards, [2, 1, 1, 1], sources=sources, bases=bases)
    algorithm = Algorithm(advantage=DrGrpo())
    adv_KBT = component_advantages(credit(batch, algorithm, {}), algorithm)
    torch.testing.assert_close(adv_KBT[0, :, 1], torch.tensor([2 / 3, -1 / 3, -1 / 3, 0.0]))
    torch.testing.assert_close(adv_KBT[1, :, 1], torch.tensor([-1.0, 0.0, 1.0, 0.0]))


# Thresholds


def test_golden_first_steps_of_multipliers():
    """From u = 0, 0.4 below the threshold, at a rate of 0.1."""
    for kind, expected in (("mu", 0.01), ("xi", 0.04)):
        weighting = Lagrangian(thresholds={"b": 0.5}, kind=kind)
        state = weighting.observe(weighting.init(), told({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.2}))
        assert through_json(state)["u"]["b"] == pytest.approx(expected)
        assert weighting.metrics(state)["above/b"] == pytest.approx(-0.4)


def mixed(make_batch, weighting: Lagrangian, multipliers: dict[str, float]) -> list[float]:
    batch = make_batch([[0.0] * 3], objectives=("a", "b", "c"))
    inverse = math.atanh if weighting.kind == "xi" else lambda m: math.log(m / (1 - m))
    state = {**weighting.init(), "u": {name: inverse(m) for name, m in multipliers.items()}}
    return weighting.weights(state, batch)


def test_golden_weights_of_streams(make_batch):
    thresholds = {"b": 0.5, "c": 0.5}
    assert mixed(make_batch, Lagrangian(thresholds=thresholds, kind="mu"), {"b": 0.5, "c": 0.5}) == [1, 0.5, 0.5]
    exact = Lagrangian(thresholds=thresholds, kind="xi")
    assert mixed(make_batch, exact, {"b": -0.2, "c": 0.3}) == pytest.approx([1.9, -0.2, 0.3])
    other = Lagrangian(thresholds={"a": 0.5}, objective="c")
    assert mixed(make_batch, other, {"a": 0.25}) == pytest.approx([0.25, 1.0, 0.75]), "b counts by the recipe's weight"


@pytest.mark.parametrize(
    ("kind", "theta", "x", "m"),
    [
        ("mu", 0.3, 0.3, 0.230769),
        ("mu", 1.0, 1.0, 0.5),
        ("mu", 2.0, 2.0, 0.666667),
        ("xi", -0.3, -0.3, -0.428571),
        ("xi", 0.3, 0.3, 0.230769),
        ("mu", -0.3, 0.0, 0.0),
    ],
)
def test_golden_saddle_points_of_a_scalar_policy(kind, theta, x, m):
    """The objective is -x^2 / 2 and J(x) = x: where ascent in x and descent in u end."""
    weighting = Lagrangian(thresholds={"b": theta}, kind=kind, momentum=0.0, max_grad_norm=None)
    state, now = weighting.init(), 0.0
    for _ in range(6000):
        held = multiplier(kind, state["u"]["b"])
        moved = now + 0.05 * (-base_weight([held]) * now + held)
        state, now = weighting.observe(state, told({"b": now})), moved
    tolerance = 2e-2 if (kind, theta) == ("mu", -0.3) else 1e-4  # the slack multiplier fades like 1 / t
    assert (now, multiplier(kind, state["u"]["b"])) == pytest.approx((x, m), abs=tolerance)


def test_multipliers_have_momentum_and_a_clipped_gradient():
    plain: dict[str, Any] = {"thresholds": {"b": 0.5, "c": 0.5}}
    weighting = Lagrangian(**plain, momentum=0.5, max_grad_norm=None)
    below = told({"a": 0.0, "b": 0.1, "c": 0.5})
    first = weighting.observe(weighting.init(), below)
    second = weighting.observe(first, below)
    expected = 0.5 * -0.4 + slope("xi", first["u"]["b"]) * -0.4
    assert second["velocity"]["b"] == pytest.approx(expected) and second["u"]["c"] == 0
    far = Lagrangian(**plain).observe(weighting.init(), told({"a": 0.0, "b": -2.5, "c": 4.5}))
    assert math.hypot(*far["velocity"].values()) == pytest.approx(0.5)
    assert far["velocity"]["b"] == pytest.approx(0.5 * -3 / 5)
    unseen = weighting.observe(first, told({"a": 0.0, "c": 0.5}))
    assert unseen["u"]["b"] == first["u"]["b"], "nothing was measured, so nothing is changed"


def test_multipliers_look_at_the_policys_own_scored_rollouts():
    own, steered = rollout(a=1.0), rollout(a=9.0, source="steered")
    shown = rollout(a=9.0, source="demonstration")
    failed = replace(rollout(a=9.0), scores={"a": Score(9.0, "ok"), "b": Score(None, "error")})
    group = Group(0, Prompt("p", {"prompt": ""}), (own, steered, shown, failed, rollout(a=0.0, b=None)))
    assert component_means([group]) == {"a": 0.5}


def test_each_stream_is_normalised_over_the_tokens_it_applies_to(make_batch):
    rewards = [[1.0, 40.0], [0.0, 0.0], [0.0, NAN], [1.0, 20.0]]
    batch = make_batch(rewards, [2, 1, 3, 1], [0, 0, 1, 1], objectives=("a", "b"))
    weighting = Lagrangian(thresholds={"b": 0.5}, kind="mu")
    states = {"weighting": weighting.init()}

    def adv(weighting: Lagrangian, batch: Any) -> torch.Tensor:
        found = credit(batch, Algorithm(advantage=DrGrpo(), weighting=weighting), states).adv_BT
        assert found is not None
        return found

    scaled = replace(batch, rewards_BK=batch.rewards_BK * torch.tensor([1.0, 7.0]))
    torch.testing.assert_close(adv(weighting, scaled), adv(weighting, batch))
    raw_KBT = component_advantages(batch, Algorithm(advantage=DrGrpo()))
    b_N = raw_KBT[1][batch.loss_mask_BT & ~batch.rewards_BK[:, 1, None].isnan()]
    a_N = raw_KBT[0][batch.loss_mask_BT]
    expected = 0.5 * (raw_KBT[0, 0, 1] - a_N.mean()) / a_N.std() + 0.5 * (raw_KBT[1, 0, 1] - b_N.mean()) / b_N.std()
    assert float(adv(weighting, batch)[0, 1]) == pytest.approx(float(expected), rel=1e-4)
    plain = adv(Lagrangian(thresholds={"b": 0.5}, kind="mu", normalise=False), batch)
    assert float(plain[0, 1]) == pytest.approx(0.5 * 0.5 + 0.5 * 20.0)


def test_thresholds_that_leave_no_objective_are_refused(make_batch):
    batch = make_batch([[0.0]], objectives=("a",))
    with pytest.raises(UserError, match="one reward must be the objective"):
        Lagrangian(thresholds={"a": 1.0}).weights(Lagrangian(thresholds={"a": 1.0}).init(), batch)
    with pytest.raises(UserError, match="is the objective and has a threshold"):
        Lagrangian(thresholds={"a": 1.0}, objective="a")
    with pytest.raises(UserError, match="needs a threshold"):
        Lagrangian(thresholds={})


# Ensembles


def score(values: list[float], *args: Any) -> float:
    return float(combined(torch.tensor([values]), *args)[0])


def test_golden_ensembles():
    values = [1.0, 2.0, 3.0]
    assert score(values, "mean") == 2 and score(values, "worst") == 1
    assert score(values, "uncertainty", 0.5, 0) == pytest.approx(1.666667, abs=1e-6)
    assert score(values, "uncertainty", 0.5, 1) == 1.5
    assert score(values, "uncertainty", 0.0, 1) == score(values, "mean")
    assert score([0.0, 10.0], "uncertainty", 1.0, 0) == -20, "below the worst case"
    assert {score([4.0] * 3, c) for c in ("mean", "worst", "uncertainty")} == {4.0}


def test_how_ensembles_scale_and_shift():
    for values in ([0.3, -1.0, 2.5], [5.0, 5.5, 4.0, 9.0]):
        mean = score(values, "mean")
        for combine in ("mean", "worst", "uncertainty"):
            assert score([v + 3 for v in values], combine) == pytest.approx(score(values, combine) + 3)
            assert score(values, combine) <= mean + 1e-12
        tripled = [3 * v for v in values]
        assert score(tripled, "worst") == pytest.approx(3 * score(values, "worst"))
        penalty = mean - score(values, "uncertainty")
        assert 3 * mean - score(tripled, "uncertainty") == pytest.approx(9 * penalty)


def test_members_are_combined_and_others_added(make_batch):
    rewards = [[1.0, 0.2, 3.0], [2.0, NAN, NAN], [NAN, 0.2, NAN], [NAN, NAN, NAN]]
    batch = make_batch(rewards, weights=[9.0, 2.0, 9.0], objectives=("a", "brief", "b"))
    weighting = Ensemble(members=("a", "b"), combine="uncertainty", weight=10.0)
    reward_B = weighting.scalarise(weighting.init(), batch)
    assert reward_B[:3].tolist() == pytest.approx([10 * (2 - 0.5 * 2) + 0.4, 20.0, 0.4]) and reward_B[3].isnan()
    state = through_json(weighting.observe(weighting.init(), told(batch=batch)))
    assert weighting.metrics(state) == {"std": pytest.approx(math.sqrt(2))}
    with pytest.raises(UserError, match="two or more members"):
        Ensemble(members=("a", "a"))


# RECAP


def test_golden_signals_of_losses():
    assert signal([4, 4, 2, 2]) == (2, 0)
    assert signal([1, 1, 0.5, 1.5]) == (1, 0.25)
    assert signal([1, 1, 1, 1]) == (1, 0)
    assert signal([4, 4, 2, 2], "recent_over_previous") == (0.5, 0)
    assert signal([9, 9, 1, 1])[0] == 5
    assert signal([0.3 * x for x in (4, 3, 2, 1)]) == pytest.approx(signal([4, 3, 2, 1]))


def test_golden_balance():
    assert balance([2.0, 1.0, 1.25], 5.0) == pytest.approx([1.119637, 0.916682, 0.963681], abs=5e-7)
    for temperature in (0.1, 5.0, 1e9):
        assert math.fsum(balance([2.0, 1.0, 1.25], temperature)) == pytest.approx(3.0)
    assert balance([2.0, 1.0, 1.25], 1e9) == pytest.approx([1.0] * 3)
    assert balance([2.0, 1.0, 1.25], 1e-3) == pytest.approx([3.0, 0.0, 0.0])


def test_a_component_that_still_improves_gains_weight(make_batch):
    weighting = Recap(window=2, best={"b": 2.0})
    state = weighting.init()
    for a, b in ((0.0, 1.0), (0.0, 1.0), (0.5, 1.0)):
        state = through_json(weighting.observe(state, told({"a": a, "b": b})))
        assert weighting.balanced(state, ("a", "b")) == [1.0, 1.0]
    state = weighting.observe(weighting.observe(state, told({"a": 0.5, "b": 1.0})), told({"a": 0.5, "b": 1.0}))
    assert {name: len(losses) for name, losses in state["losses"].items()} == {"a": 4, "b": 4}
    a, b = weighting.balanced(state, ("a", "b"))
    expected = balance([sum(signal([1.001, 0.501, 0.501, 0.501])), sum(signal([1.001] * 4))], 5.0)
    assert [a, b] == pytest.approx(expected) and a > 1 > b
    batch = make_batch([[1.0, 0.0]], weights=[1.0, 3.0], objectives=("a", "b"))
    adv_KBT = torch.tensor([1.0, 10.0]).view(2, 1, 1).expand(2, 1, 2)
    assert float(weighting.mix(state, adv_KBT, batch)[0, 1]) == pytest.approx(a / 4 + 10 * b * 3 / 4)
    assert weighting.metrics(state) == {"lambda/a": a, "lambda/b": b}
    with pytest.raises(UserError, match="make it positive"):
        weighting.mix(state, adv_KBT, replace(batch, weights_K=torch.tensor([1.0, -1.0])))


# Normalise, then sum


def test_sums_that_are_equal_for_other_reasons_are_told_apart(make_batch):
    """Rewards 0 or 1 and 0 or 10: summed first, the small one is lost; alone it pulls as much as the large one."""
    rewards = [[1.0, 0.0], [0.0, 10.0], [0.0, 0.0], [0.0, 0.0]]
    batch = make_batch(rewards, objectives=("a", "b"))

    def adv(weighting: Any) -> list[float]:
        found = credit(batch, Algorithm(advantage=Grpo(), weighting=weighting), {}).adv_BT
        assert found is not None
        return found[:, 1].tolist()

    plain = adv(NormaliseThenSum(whiten=False))
    assert plain == pytest.approx([1.0, 1.0, -1.0, -1.0], abs=1e-5)  # 1.5 and -0.5 in each component
    whitened = adv(NormaliseThenSum())
    half = math.sqrt(3) / 2
    assert whitened == pytest.approx([half, half, -half, -half], abs=1e-5)


def test_the_sum_has_the_recipes_weights_and_leaves_other_rows_out(make_batch):
    rewards = [[1.0, 0.0], [0.0, 10.0], [0.0, 0.0], [NAN, NAN]]
    batch = make_batch(rewards, weights=[1.0, 0.0], scored=[True, True, True, False], objectives=("a", "b"))
    summed = credit(batch, Algorithm(weighting=NormaliseThenSum(whiten=False)), {}).adv_BT
    alone = credit(replace(batch, rewards_BK=batch.rewards_BK[:, :1], weights_K=torch.ones(1)), Algorithm(), {}).adv_BT
    torch.testing.assert_close(summed, alone)
    whole = credit(batch, Algorithm(weighting=NormaliseThenSum()), {}).adv_BT
    assert whole is not None and whole[3].abs().max() == 0 and whole[:3, 1].std() == pytest.approx(1.0)


ALL = [
    Ensemble(members=("a", "b")),
    Gradient(),
    Hypervolume(apply_to="advantage"),
    Lagrangian(thresholds={"b": 0.5}),
    NormaliseThenSum(),
    Recap(window=2),
]


@pytest.mark.parametrize("weighting", ALL, ids=lambda w: type(w).__name__)
def test_neither_the_order_of_rows_nor_padding_matters(make_batch, weighting):
    generator = torch.Generator().manual_seed(1)
    rewards_BK = torch.rand(8, 3, generator=generator)
    rewards_BK[[1, 5, 6], [0, 1, 2]] = NAN
    batch = make_batch(
        rewards_BK.tolist(), [3, 1, 2, 4, 2, 2, 1, 3], [0, 0, 0, 1, 1, 1, 2, 2], objectives=("a", "b", "c")
    )
    state = weighting.init() if hasattr(weighting, "init") else {}
    if isinstance(weighting, Recap):
        state = {"losses": {"a": [0.9, 0.9, 0.2, 0.1], "b": [0.5] * 4, "c": [0.1, 0.9] * 2}}
    algorithm, states = Algorithm(advantage=Grpo(), weighting=weighting), {"weighting": state}
    order = torch.tensor([7, 2, 4, 0, 1, 6, 3, 5])
    expected_BT = credit(batch, algorithm, states).adv_BT
    shuffled_BT = credit(batch.rows(order), algorithm, states).adv_BT
    assert expected_BT is not None and shuffled_BT is not None and expected_BT.abs().max() > 0.1
    torch.testing.assert_close(shuffled_BT, expected_BT[order])
    wider = {
        f.name: torch.cat([value, torch.zeros(8, 2, dtype=value.dtype)], 1)
        for f in fields(batch)
        if f.name.endswith("_BT") and isinstance(value := getattr(batch, f.name), torch.Tensor)
    }
    padded_BT = credit(replace(batch, **wider), algorithm, states).adv_BT
    assert padded_BT is not None
    torch.testing.assert_close(padded_BT[:, :-2], expected_BT)
