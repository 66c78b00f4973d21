"""The adaptive bonus, the mask of high entropies, Clip-Cov and KL-Cov; random numbers by key."""

import json
import math
from dataclasses import replace

import pytest
import torch

from alignment.algorithms.aggregations import TokenMean
from alignment.algorithms.covariance import ClipCov, KlCov, covariances
from alignment.algorithms.entropy_controls import AdaptiveBonus, Bonus, HighEntropy, PenaltyView
from alignment.algorithms.objective import Objective
from alignment.algorithms.policy_losses import Reinforce
from alignment.algorithms.shuffled import Shuffled
from alignment.algorithms.steer import Steer
from alignment.algorithms.tokens import in_order, keyed_numbers, share_down, share_up
from alignment.errors import UserError
from alignment.types import SOURCES, Context, Signals


def column(values):
    """One token in each row, behind a prompt token that is not trained on."""
    return torch.tensor([[math.nan, value] for value in values], dtype=torch.float64)


def batch_of(make_batch, adv, logp, **more):
    tensors = {"adv_BT": column(adv), "logp_BT": column(logp), "old_logp_BT": column(logp)}
    batch = make_batch([0.0] * len(adv), **(tensors | more))
    return Objective(Reinforce(), TokenMean()).prepare(batch)


# Adaptive bonus


def signals_of(batch):
    return Signals([], batch, {}, None, Context(0, 0))


def test_the_coefficient_follows_the_entropy_and_acts_one_batch_later(make_batch):
    """Entropies .1, .1, .3, .1 at a target of .2: c becomes .005, .01, .005, .01 and 0, .005, 0, .005 are applied."""
    control = AdaptiveBonus(target=0.2, delta=0.005)
    state, applied, after = control.init(), [], []
    for entropy in (0.1, 0.1, 0.3, 0.1):
        batch = batch_of(make_batch, [1.0, 1.0], [-1.0, -1.0], entropy_BT=column([entropy - 0.05, entropy + 0.05]))
        mark_BT = control.mark(state, batch)
        view = PenaltyView(mark_BT, mark_BT, torch.full_like(mark_BT, 2.0), mark_BT)
        applied.append(float(mark_BT[0, 1]))
        assert control.penalty(state, view)[0, 1] == pytest.approx(-2 * applied[-1]) and mark_BT[0, 0] == 0
        state = json.loads(json.dumps(control.observe(state, signals_of(batch))))
        after.append(state["coefficient"])
    assert after == pytest.approx([0.005, 0.010, 0.005, 0.010])
    assert applied == pytest.approx([0.0, 0.005, 0.0, 0.005])


def test_the_coefficient_stays_within_its_bounds_and_without_tokens_it_stays(make_batch):
    control = AdaptiveBonus(target=0.2, delta=0.3, coefficient=0.1, minimum=0.05, maximum=0.2)
    low, high = (batch_of(make_batch, [1.0], [-1.0], entropy_BT=column([h])) for h in (0.1, 0.9))
    assert control.observe({"coefficient": 0.1}, signals_of(low)) == {"coefficient": 0.2}
    assert control.observe({"coefficient": 0.1}, signals_of(high)) == {"coefficient": 0.05}
    empty = replace(low, loss_mask_BT=torch.zeros_like(low.loss_mask_BT))
    assert control.observe({"coefficient": 0.1}, signals_of(empty)) == {"coefficient": 0.1}
    with pytest.raises(ValueError, match=r"starts at 2, which is not between minimum 0 and maximum 1"):
        AdaptiveBonus(coefficient=2.0)


# Mask of high entropies


def test_the_largest_fifth_of_ten(make_batch):
    entropies = [3.0, 9.0, 1.0, 4.0, 10.0, 2.0, 5.0, 6.0, 7.0, 8.0]
    batch = batch_of(make_batch, [1.0] * 10, [-1.0] * 10, entropy_BT=column(entropies))
    for over, weight in (("kept", 5.0), ("all", 1.0)):
        found = HighEntropy(share=0.2, denominator=over).prepare(None, batch)
        assert found is not None
        assert found[:, 1].tolist() == [weight if h >= 9 else 0.0 for h in entropies]
    logp_BT = torch.full((10, 2), -1.0, requires_grad=True)
    objective = Objective(Reinforce(), TokenMean(), entropy_controls=((HighEntropy(share=0.2), None),))
    loss, sums = objective.loss(logp_BT, None, objective.prepare(batch))
    gradient = torch.autograd.grad(loss, logp_BT)[0][:, 1]
    assert gradient.tolist() == pytest.approx([-0.5 if h >= 9 else 0.0 for h in entropies]), "the mean over two tokens"
    assert objective.finish(sums)["control_dropped"] == pytest.approx(0.8)


def test_among_equal_entropies_the_first_by_key_and_demonstrations_are_left_alone(make_batch):
    key_B = torch.tensor([30, 10, 40, 20])
    batch = batch_of(make_batch, [1.0] * 4, [-1.0] * 4, entropy_BT=column([2.0] * 4), key_B=key_B)
    found = HighEntropy(share=0.5, denominator="all").prepare(None, batch)
    assert found is not None and found[:, 1].tolist() == [0.0, 1.0, 0.0, 1.0]
    shown = replace(batch, source_B=torch.tensor([0, 1, 0, 0], dtype=torch.int8))
    found = HighEntropy(share=0.3, denominator="all").prepare(None, shown)
    assert found is not None and found[:, 1].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_shares_are_not_moved_by_rounding():
    assert (share_up(0.1, 30), share_up(0.1, 31), share_up(0.2, 10)) == (3, 4, 2)
    assert (share_down(0.29, 100), share_down(0.29, 101), share_down(2e-4, 100)) == (29, 29, 0)


# Covariances


def test_centred_products_add_up_to_the_covariance(make_batch):
    generator = torch.Generator().manual_seed(0)
    adv, logp = torch.randn(2, 9, generator=generator).double()
    _, cov_N = covariances(batch_of(make_batch, adv.tolist(), logp.tolist()))
    assert float(cov_N.sum()) == pytest.approx(
        9 * float(torch.cov(torch.stack([adv, logp]), correction=0)[0, 1]), abs=1e-6
    )


ADV, LOGP = [2.0, -2.0, 1.0, -1.0], [-0.5, -4.5, -3.0, -2.0]
"""Means 0 and -2.5: Cov is 4, 4, -0.5, -0.5."""


def test_kl_cov_takes_known_tokens_and_charges_for_the_distance(make_batch):
    batch = batch_of(make_batch, [2.0, -2.0, 1.0, -1.0], [-0.4, -4.5, -3.1, -2.0])  # Cov 4.2, 4.0, -0.6, -0.5
    assert KlCov(share=0.3).mark(None, batch)[:, 1].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert KlCov(share=0.5).mark(None, batch)[:, 1].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert KlCov(share=1e-9).mark(None, batch).sum() == 1, "at least one"
    moved_BT = torch.full((4, 2), -2.0, requires_grad=True)
    objective = Objective(Reinforce(), TokenMean(), entropy_controls=((KlCov(share=0.5, coefficient=3.0), None),))
    plain = Objective(Reinforce(), TokenMean())
    loss, other = (o.loss(moved_BT, None, o.prepare(batch))[0] for o in (objective, plain))
    (gradient_BT,) = torch.autograd.grad(loss - other, moved_BT)
    # |-2 + .4| and |-2 + 4.5|, each over 4 tokens
    assert float((loss - other).detach()) == pytest.approx(3.0 * (1.6 + 2.5) / 4, rel=1e-6)
    assert gradient_BT[:, 1].tolist() == pytest.approx([-0.75, 0.75, 0.0, 0.0], abs=1e-6)
    assert objective.entropies == "value" and objective.wants_logp


def test_kl_cov_with_coefficient_0_is_the_unclipped_policy_gradient(make_batch):
    batch, found = batch_of(make_batch, ADV, LOGP), []
    for controls in ((), ((KlCov(coefficient=0.0), None),)):
        logp_BT = torch.full((4, 2), -1.0, requires_grad=True)
        objective = Objective(Reinforce(), TokenMean(), entropy_controls=controls)
        loss, _ = objective.loss(logp_BT, None, objective.prepare(batch))
        found.append((loss.detach(), torch.autograd.grad(loss, logp_BT)[0]))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_in_the_first_update_of_a_batch_kl_cov_has_no_gradient_and_clip_cov_leaves_out(make_batch):
    """``recipe_advice`` warns of the one and not of the other."""
    batch, plain = batch_of(make_batch, ADV, LOGP), Objective(Reinforce(), TokenMean())
    found = []
    for controls in ((), ((KlCov(share=1.0), None),), ((ClipCov(share=1.0), None),)):
        objective = replace(plain, entropy_controls=controls)
        logp_BT = column(LOGP).requires_grad_()
        found.append(torch.autograd.grad(objective.loss(logp_BT, None, objective.prepare(batch))[0], logp_BT)[0][:, 1])
    assert found[0].abs().min() > 0 and torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[0] * torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_clip_cov_drops_one_of_the_eligible_tokens_and_none_where_there_is_none(make_batch):
    batch = batch_of(make_batch, ADV, LOGP)
    weight_BT = ClipCov(share=1e-6).prepare(None, batch)
    assert sorted(weight_BT[:, 1].tolist()) == [0.0, 1.0, 1.0, 1.0] and weight_BT[2:, 1].min() == 1
    assert ClipCov(share=1.0).prepare(None, batch)[:, 1].tolist() == [0.0, 0.0, 1.0, 1.0], "all, if they are fewer"
    assert ClipCov(share=1.0, low=5.0, high=9.0).prepare(None, batch).min() == 1
    assert ClipCov(share=1.0, low=1.0, high=4.0).prepare(None, batch).min() == 1, "the bounds are not eligible"
    with pytest.raises(ValueError, match="low 5 must be below high 5"):
        ClipCov(low=5.0)


def test_clip_cov_leaves_out_what_the_loss_clips_already(make_batch):
    old_BT = column([-0.5 - 0.3, -4.5 + 0.3, -3.0, -2.0])  # ratios e^.3 and e^-.3
    batch = batch_of(make_batch, ADV, LOGP, old_logp_BT=old_BT)
    assert ClipCov(share=1.0, clip_low=0.2, clip_high=0.2).prepare(None, batch).min() == 1
    higher = ClipCov(share=1.0, clip_low=0.2, clip_high=0.4).prepare(None, batch)
    assert higher[:, 1].tolist() == [0.0, 1.0, 1.0, 1.0]


def test_clip_cov_picks_by_seed_step_and_rollout(make_batch):
    keys = torch.arange(64) * 7919 + 3
    batch = batch_of(make_batch, [1.0, -1.0] * 32, [0.0, -4.0] * 32, key_B=keys)
    picked = [
        ClipCov(share=0.25).prepare(None, replace(batch, step=step, seed=seed))
        for step, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert all(int((weight_BT == 0).sum()) == 16 for weight_BT in picked)
    assert not torch.equal(picked[0], picked[1]) and not torch.equal(picked[0], picked[2])
    assert torch.equal(picked[0], ClipCov(share=0.25).prepare(None, batch))
    assert 2 < int((picked[0][:32] == 0).sum()) < 14, "spread over the rows"


def test_keyed_numbers_are_uniform_and_know_nothing_of_the_batch_around_them(make_batch):
    batch = make_batch([0.0] * 100, [40] * 100)
    places = in_order(batch, batch.loss_mask_BT)
    numbers_N = keyed_numbers(batch, places, "x")
    assert len(numbers_N.unique()) == 4000
    for bit in (0, 17, 40, 63):
        assert abs(float(((numbers_N >> bit) & 1).double().mean()) - 0.5) < 0.05
    part = make_batch([0.0] * 2, [3, 5], key_B=torch.tensor([7, 9]))
    own = in_order(part, part.loss_mask_BT)
    wanted = {(7, t): numbers_N[7 * 40 + t - 1] for t in (1, 2, 3)} | {
        (9, t): numbers_N[9 * 40 + t - 1] for t in range(1, 6)
    }
    for row, position, number in zip(*own, keyed_numbers(part, own, "x"), strict=True):
        assert number == wanted[int(part.key_B[row]), int(position)]
    assert not torch.equal(numbers_N, keyed_numbers(batch, places, "y"))


# Nothing to tell


def test_shuffled_weights_are_the_same_ones_at_other_tokens_of_the_policy(make_batch):
    adv, numbers = [float(i % 5) - 2 for i in range(64)], torch.arange(64) / 64
    batch = batch_of(make_batch, adv, (-3 * numbers - 0.1).tolist(), entropy_BT=column(numbers.tolist()))
    demonstrations = torch.arange(64) < 4
    batch = replace(batch, source_B=torch.where(demonstrations, SOURCES.index("demonstration"), batch.source_B))
    for control in (Steer(lambda_min=0.5), HighEntropy(share=0.3)):
        plain = control.prepare(None, batch)
        shuffled = Shuffled(of=control).prepare(None, batch)
        assert plain is not None and shuffled is not None
        assert torch.equal(plain[demonstrations], shuffled[demonstrations])
        assert torch.equal(plain[~demonstrations, 1].sort().values, shuffled[~demonstrations, 1].sort().values)
        assert not torch.equal(plain, shuffled)
        another = Shuffled(of=control).prepare(None, replace(batch, step=batch.step + 1))
        assert another is not None and not torch.equal(another, shuffled), "another order in each step"


def test_shuffled_marks_are_as_many(make_batch):
    batch = batch_of(make_batch, [float(i) for i in range(32)], [-0.1 * i - 0.1 for i in range(32)])
    plain, shuffled = KlCov(share=0.25).mark(None, batch), Shuffled(of=KlCov(share=0.25)).mark(None, batch)
    assert shuffled.sum() == plain.sum() == 8 and not torch.equal(shuffled, plain)
    assert not Shuffled(of=Steer()).mark(None, batch).any(), "one that only weighs marks nothing"
    assert Shuffled(of=KlCov()).needs == KlCov.needs and Shuffled(of=KlCov()).several_updates


@pytest.mark.parametrize("control", [Bonus(), AdaptiveBonus()])
def test_what_picks_no_tokens_cannot_be_shuffled(control):
    with pytest.raises(UserError, match="does not pick tokens"):
        Shuffled(of=control)


# Together


def test_weights_multiply_and_covariances_know_nothing_of_weights(make_batch):
    batch = batch_of(make_batch, ADV, LOGP, entropy_BT=column([1.0, 2.0, 3.0, 4.0]))
    parts = [Steer(), HighEntropy(share=0.5), ClipCov(share=1.0)]
    objective = Objective(Reinforce(), TokenMean(), entropy_controls=tuple((part, None) for part in parts))
    found = objective.prepare(replace(batch, weight_BT=torch.full((4, 2), 9.0))).control_weight_BT
    separate = [part.prepare(None, batch) for part in parts]
    assert found is not None
    expected = torch.stack([weight_BT for weight_BT in separate if weight_BT is not None]).prod(0)[:, 1]
    torch.testing.assert_close(found[:, 1], expected)
    assert expected[:2].eq(0).all() and expected[2:].gt(0).all()
