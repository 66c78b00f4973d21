"""The one test that rules them all: split, order and padding change neither the loss nor its gradients.

Every aggregation with every policy loss, correction, KL penalty and entropy bonus; every policy loss with every entropy
control, alone and all together.
"""

from dataclasses import fields, replace
from itertools import product

import pytest
import torch

from alignment.algorithms.aggregations import aggregations
from alignment.algorithms.corrections import GeometricMask, corrections
from alignment.algorithms.covariance import ClipCov, KlCov
from alignment.algorithms.entropy_controls import AdaptiveBonus, Bonus, HighEntropy, entropy_controls
from alignment.algorithms.grpo_guard import GrpoGuard
from alignment.algorithms.kl_penalties import kl_penalties
from alignment.algorithms.objective import Objective, combine
from alignment.algorithms.policy_losses import policy_losses
from alignment.algorithms.shuffled import Shuffled
from alignment.algorithms.steer import Steer
from alignment.types import Batch

ROWS, WIDTH = 8, 9
AGGREGATIONS = [entry.cls(7) if entry.name == "constant" else entry.cls() for entry in aggregations]
CORRECTIONS = [None, *(GeometricMask(0.9, 1.1) if e.name == "geometric_mask" else e.cls() for e in corrections)]
KLS = [None, *(entry.cls(coefficient=0.1, apply_to="loss") for entry in kl_penalties)]
BONUSES = [(), ((Bonus(coefficient=0.02), None),)]
CONTROLS = [
    (Bonus(coefficient=0.02), None),
    (AdaptiveBonus(target=9.0), {"coefficient": 0.03}),
    *(
        (Steer(omega=omega, shape=shape), None)
        for omega in ("repo", "own", "exact")
        for shape in ("exponential", "linear")
    ),  # fmt: skip
    (ClipCov(share=0.2, low=0.01, high=9.0), None),
    (ClipCov(share=0.2, low=-9.0, high=9.0, clip_low=0.2, clip_high=0.2), None),
    (KlCov(share=0.2), None),
    (Shuffled(of=Steer(lambda_min=0.5)), None),
    (Shuffled(of=KlCov(share=0.2)), None),
    *((HighEntropy(share=0.4, denominator=over), None) for over in ("kept", "all")),
]
LOSSES = [
    *(entry.cls() for entry in policy_losses),
    *(GrpoGuard(bins=3, bin_by=by, use_in_surrogate=by == "position") for by in ("entropy", "position")),
]


def random_batch(make_batch) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """All kinds of rows, ratios on both sides of every clip, with log-probabilities and entropies of the policy."""
    generator = torch.Generator().manual_seed(3)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(ROWS, WIDTH, generator=generator)

    logp_BT = -1 - noise(0.5).abs()
    old_BT = logp_BT + noise(0.3)
    batch = make_batch(
        [[0.0]] * ROWS,
        [8, 3, 5, 1, 6, 2, 4, 7],
        [0, 0, 0, 0, 1, 1, 1, 1],
        sources=["policy"] * 5 + ["demonstration"] * 2 + ["replay"],
        bases=["old"] * 5 + ["self", "one", "old"],
        old_logp_BT=old_BT,
        behaviour_logp_BT=old_BT + noise(0.3),
        ref_logp_BT=logp_BT + noise(0.5),
        adv_BT=noise(1.0),
        weight_BT=noise(1.0).exp(),
        logp_BT=logp_BT,
        entropy_BT=1 + noise(0.3).abs(),
        entropy_drift_BT=0.1 * noise(1.0),
        key_B=torch.tensor([40, 13, 77, 5, 61, 22, 9, 38]),
    )
    mask_BT = batch.loss_mask_BT.clone()
    mask_BT[0, 3:5] = False  # an observation
    mask_BT[2] = False  # an unscored row
    assert batch.entropy_BT is not None
    return replace(batch, loss_mask_BT=mask_BT), logp_BT, batch.entropy_BT


def padded(batch: Batch, extra: int) -> Batch:
    """``batch`` with ``extra`` columns of padding that hold NaN."""
    changes = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if f.name.endswith("_BT") and value is not None:
            junk = float("nan") if value.is_floating_point() else 0
            changes[f.name] = torch.cat([value, torch.full((len(batch), extra), junk, dtype=value.dtype)], 1)
    return replace(batch, **changes)


def evaluate(objective: Objective, batch: Batch, parts: list[list[int]], inputs: tuple[torch.Tensor, torch.Tensor]):
    """Loss, gradients for log-probabilities and entropies, and metrics, of ``batch`` taken in ``parts``."""
    prepared = objective.prepare(batch)
    gradients = torch.zeros(2, len(batch), WIDTH, dtype=inputs[0].dtype)
    total, sums = 0.0, {}
    for part in parts:
        micro = prepared.rows(part)
        leaves = [x[part, : micro.ids_BT.shape[1]].clone().requires_grad_() for x in inputs]
        loss, more = objective.loss(leaves[0], leaves[1], micro)
        got = torch.autograd.grad(loss, leaves, allow_unused=True)
        for k in range(2):
            if got[k] is not None:
                gradients[k, part, : micro.ids_BT.shape[1]] = got[k]
        total, sums = total + loss.detach(), combine(sums, more)
    return total, gradients, objective.finish(sums)


def same(one, other, order=None) -> None:
    """Loss to 1e-6, gradients to 1e-5 of their largest, metrics to 1e-5."""
    loss, gradients, metrics = other
    if order is not None:
        gradients = gradients[:, torch.argsort(torch.tensor(order))]
    torch.testing.assert_close(loss, one[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients, one[1], atol=1e-5 * float(one[1].abs().max()), rtol=0)
    assert metrics == pytest.approx(one[2], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("policy_loss", [entry.cls() for entry in policy_losses], ids=policy_losses.names())
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=aggregations.names())
def test_split_order_and_padding_change_nothing(make_batch, aggregation, policy_loss):
    batch, *inputs = random_batch(make_batch)
    order = [6, 2, 7, 0, 3, 5, 1, 4]
    permuted = batch.rows(order)
    everything = list(range(ROWS))
    for correction, kl, controls in product(CORRECTIONS, KLS, BONUSES):
        objective = Objective(policy_loss, aggregation, kl, 0.1 if kl else 0.0, controls, correction)
        whole = evaluate(objective, batch, [everything], inputs)
        assert whole[1][0].abs().max() > 0
        same(whole, evaluate(objective, batch, [[5, 0, 3, 6], [7, 1, 2, 4]], inputs))
        same(whole, evaluate(objective, batch, [[3, 4], [0, 6], [2], [1, 5, 7]], inputs))
        in_order = tuple(x[order] for x in inputs)
        same(whole, evaluate(objective, permuted, [everything[:5], everything[5:]], in_order), order)
        same(whole, evaluate_padded(objective, batch, inputs))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_entropy_controls_are_of_the_whole_mini_batch(make_batch, loss):
    """Each alone, and all of them together, whose weights multiply."""
    batch, *inputs = random_batch(make_batch)
    order = [6, 2, 7, 0, 3, 5, 1, 4]
    in_order = tuple(x[order] for x in inputs)
    for controls in [*((control,) for control in CONTROLS), tuple(CONTROLS)]:
        objective = Objective(loss, AGGREGATIONS[-1], entropy_controls=controls, correction=CORRECTIONS[-1])
        whole = evaluate(objective, batch, [list(range(ROWS))], inputs)
        assert whole[1][0].abs().max() > 0 and ("control_weight" in whole[2]) == any(
            control.prepare(state, objective.prepare(batch)) is not None for control, state in controls
        )
        same(whole, evaluate(objective, batch, [[3, 4], [0, 6], [2], [1, 5, 7]], inputs))
        same(whole, evaluate(objective, batch.rows(order), [[0, 1, 2, 3, 4], [5, 6, 7]], in_order), order)
        same(whole, evaluate_padded(objective, batch, inputs))


def test_every_entropy_control_is_in_that_test():
    known = {entry.cls for entry in entropy_controls if entry.cls.__module__.startswith("alignment.")}
    assert known == {type(control) for control, _ in CONTROLS}


def evaluate_padded(objective: Objective, batch: Batch, inputs: list[torch.Tensor]):
    """Like :func:`evaluate` of the whole, with padding that holds NaN everywhere."""
    leaves = [torch.cat([x, torch.full((ROWS, 4), float("nan"))], 1).requires_grad_() for x in inputs]
    loss, sums = objective.loss(leaves[0], leaves[1], objective.prepare(padded(batch, 4)))
    got = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = torch.stack([torch.zeros_like(leaves[0]) if g is None else g for g in got])
    assert (gradients[..., WIDTH:] == 0).all()
    return loss.detach(), gradients[..., :WIDTH], objective.finish(sums)


def test_a_part_prepared_by_itself_would_be_wrong(make_batch):
    """What the tests above guard against: counts of a micro-batch instead of the mini-batch."""
    batch, *inputs = random_batch(make_batch)
    for aggregation in AGGREGATIONS:
        objective = Objective(policy_losses.build("clip"), aggregation)
        whole = evaluate(objective, batch, [list(range(ROWS))], inputs)
        halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
        wrong = sum(
            evaluate(objective, batch.rows(half), [[0, 1, 2, 3]], tuple(x[half] for x in inputs))[0] for half in halves
        )
        assert abs(float(wrong) - float(whole[0])) > 1e-3


def test_shared_parameters_collect_the_same_gradient_in_float64(make_batch):
    """Through a softmax policy of one weight matrix, as a learner accumulates it."""
    batch, *_ = random_batch(make_batch)
    generator = torch.Generator().manual_seed(4)
    features_BTD = torch.randn(ROWS, WIDTH, 3, generator=generator, dtype=torch.float64)
    weight_DV = torch.randn(3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    objective = Objective(policy_losses.build("gspo"), AGGREGATIONS[0], KLS[2], 0.1, BONUSES[1], CORRECTIONS[1])
    prepared = objective.prepare(batch)
    gradients = []
    for parts in ([list(range(ROWS))], [[0, 7], [1, 4, 2], [3, 6, 5]]):
        gradient_DV = torch.zeros_like(weight_DV)
        for part in parts:
            micro = prepared.rows(part)
            logp_BTV = (features_BTD[part, : micro.ids_BT.shape[1]] @ weight_DV).log_softmax(-1)
            loss, _ = objective.loss(logp_BTV[..., 2], -(logp_BTV.exp() * logp_BTV).sum(-1), micro)
            gradient_DV += torch.autograd.grad(loss, weight_DV)[0]
        gradients.append(gradient_DV)
    torch.testing.assert_close(gradients[1], gradients[0], atol=0, rtol=1e-10)
