"""What the objective adds up, reports and asks for."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from alignment.algorithms.aggregations import Constant, SequenceMean, SequenceSum, TokenMean
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.corrections import IcePop, Tis
from alignment.algorithms.credit import credit
from alignment.algorithms.entropy_controls import Bonus
from alignment.algorithms.kl_penalties import K1, K2
from alignment.algorithms.objective import Objective, combine
from alignment.algorithms.policy_losses import Clip, Reinforce

NAN, INF = math.nan, math.inf


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean(), SequenceSum(), Constant(length=4)])
def test_supervised_is_exactly_the_negative_log_likelihood(make_batch, aggregation):
    """Whatever the rows claim to be, with or without a stale old log-probability."""
    generator = torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    batch = make_batch([[NAN]] * 3, [2, 5, 3], scored=[False] * 3, old_logp_BT=torch.full((3, 6), -30.0))
    logp_BT = logits_BTV.log_softmax(-1)[..., 4]
    scale_BT = aggregation.scale(batch.loss_mask_BT)
    nll = (
        scale_BT
        * torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), torch.full((3, 6), 4), reduction="none")
    ).sum()
    objective = Objective.supervised(aggregation)
    loss, sums = objective.loss(logp_BT, None, objective.prepare(batch))
    assert float(loss.detach()) == pytest.approx(float(nll.detach()), abs=1e-12)
    gradients = [torch.autograd.grad(x, logits_BTV, retain_graph=True)[0] for x in (loss, nll)]
    close(gradients[0], gradients[1], 1e-12)
    assert objective.finish(sums) == pytest.approx(
        {"loss": float(nll.detach()), "tokens": 10, "sampled_tokens": 0, "ratio": 1.0}
    )


def mixed_batch(make_batch):
    """A policy row, a demonstration, an unscored row and a replayed one; junk wherever nothing is trained."""
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 2:4] = mask[1, 1:4] = mask[3, 1:3] = True
    junk_BT = torch.tensor([[NAN, INF, -INF, NAN, INF]]).expand(4, 5)

    def tensor(value):
        return torch.where(mask, torch.as_tensor(value, dtype=torch.float32), junk_BT)

    return make_batch(
        [[1.0], [NAN], [NAN], [0.0]],
        [4, 3, 4, 2],
        sources=["policy", "demonstration", "policy", "replay"],
        bases=["old", "self", "old", "old"],
        scored=[True, True, False, True],
        mask=mask.tolist(),
        behaviour_logp_BT=tensor([[-1.0], [-9.0], [0.0], [-3.0]]),
        old_logp_BT=tensor([[-1.0], [-2.0], [0.0], [-2.0]]),
        ref_logp_BT=tensor([[-1.5], [-7.0], [0.0], [-2.0]]),
        adv_BT=tensor([[0.5], [1.0], [0.0], [-0.5]]),
        weight_BT=tensor([[1.0], [0.25], [1.0], [2.0]]),
    )


def leaves(batch, logp=-1.0, entropy=2.0):
    junk_BT = torch.where(batch.loss_mask_BT, 0.0, NAN)
    return (junk_BT + logp).requires_grad_(), (junk_BT + entropy).requires_grad_()


def test_every_part_of_the_loss_by_hand(make_batch):
    """Ratio 1, e^1 and base self; correction min(e^1, 2) on the replayed row alone; KL on sampled rows alone.

    The four tokens of the rollouts have a mean of their own, and so have the three of the demonstration.
    """
    batch = mixed_batch(make_batch)
    objective = Objective(
        policy_loss=Reinforce(),
        aggregation=TokenMean(),
        kl=K2(),
        kl_coefficient=0.1,
        entropy_controls=((Bonus(coefficient=0.01), None),),
        correction=Tis(cap=2.0),
    )
    logp_BT, entropy_BT = leaves(batch)
    loss, sums = objective.loss(logp_BT, entropy_BT, objective.prepare(batch))
    policy = (2 * 0.5 * 1.0 + 2 * 2.0 * 2.0 * math.e * -0.5) / 4 + 3 * 0.25 * 1.0 / 3
    kl = 0.1 * (2 * 0.5**2 / 2 + 2 * 1.0**2 / 2) / 4
    bonus = -0.01 * 2.0 * 2
    assert float(loss.detach()) == pytest.approx(policy + kl + bonus, rel=1e-6)

    gradient_BT, entropy_gradient_BT = torch.autograd.grad(loss, (logp_BT, entropy_BT))
    row_0 = -0.5 + 0.1 * 0.5
    row_3 = 2.0 * 2.0 * math.e * 0.5 + 0.1 * 1.0
    expected = [[0, 0, row_0, row_0, 0], [0, -0.25, -0.25, -0.25, 0], [0] * 5, [0, row_3, row_3, 0, 0]]
    count_B1 = torch.tensor([4, 3, 4, 4])[:, None]
    close(gradient_BT, torch.tensor(expected) / count_B1)
    close(entropy_gradient_BT, batch.loss_mask_BT * (-0.01 / count_B1))

    def k3(d):
        return math.exp(-d) - 1 + d

    metrics = objective.finish(sums)
    assert metrics == pytest.approx(
        {
            "loss": float(loss.detach()),
            "tokens": 7,
            "sampled_tokens": 4,
            "ratio": (2 + 3 + 2 * math.e) / 7,
            "entropy": 2.0,
            # -w p (1 - p)(log p + H) times the pull, of 2 tokens at 0.5, 3 at 0.25 and 2 at 2 * 2 * e * -0.5
            "entropy_predicted": -math.exp(-1) * (1 - math.exp(-1)) * (2 * 0.5 + 3 * 0.25 - 4 * math.e) / 7,
            "entropy_penalty": -0.01 * 2.0,
            "entropy_positive": 2.0,
            "entropy_negative": 2.0,
            "kl": (2 * k3(0.5) + 2 * k3(1.0)) / 4,
            "mismatch_kl": 2 * k3(-1.0) / 4,
            "mismatch_abs_max": 1.0,
            "correction_weight": (2 * 1.0 + 2 * 2.0) / 4,
            "correction_capped": 0.5,
        },
        rel=1e-6,
    )


def test_junk_outside_the_mask_contributes_exactly_nothing(make_batch):
    batch = mixed_batch(make_batch)
    clean = {
        name: torch.where(batch.loss_mask_BT, getattr(batch, name), 0.0)
        for name in ("behaviour_logp_BT", "old_logp_BT", "ref_logp_BT", "adv_BT", "weight_BT")
    }
    objective = Objective.of(Algorithm(kl=K2(), entropy_controls=(Bonus(),)), {})
    results = []
    for candidate in (batch, replace(batch, **clean)):
        logp_BT, entropy_BT = leaves(candidate)
        loss, sums = objective.loss(logp_BT, entropy_BT, objective.prepare(candidate))
        results.append((loss.detach(), torch.autograd.grad(loss, logp_BT)[0], objective.finish(sums)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][1][~batch.loss_mask_BT] == 0).all()
    assert results[0][2] == results[1][2]


def test_unscored_rows_contribute_nothing(make_batch):
    """The same loss, gradients and metrics as if they had not been in the batch at all."""
    batch = make_batch([[1.0], [0.0], [1.0]], [2, 3, 1], scored=[True, True, True])
    unscored = make_batch([[1.0], [0.0], [1.0], [NAN]], [2, 3, 1, 3], scored=[True, True, True, False])
    mask_BT = unscored.loss_mask_BT & unscored.scored_B[:, None]
    unscored = replace(unscored, loss_mask_BT=mask_BT)
    for aggregation in (TokenMean(), SequenceMean(), SequenceSum(), Constant(length=4)):
        algorithm = Algorithm(aggregation=aggregation, entropy_controls=(Bonus(),))
        objective = Objective.of(algorithm, {})
        results = []
        for candidate in (batch, unscored):
            logp_BT, entropy_BT = leaves(candidate)
            loss, sums = objective.loss(logp_BT, entropy_BT, objective.prepare(credit(candidate, algorithm, {})))
            (gradient_BT,) = torch.autograd.grad(loss, logp_BT)
            results.append((float(loss.detach()), gradient_BT[:3], objective.finish(sums)))
        assert results[0][0] == pytest.approx(results[1][0], abs=1e-7)
        close(results[0][1], results[1][1], 1e-8)
        assert results[0][2] == pytest.approx(results[1][2], abs=1e-7)


@pytest.mark.parametrize("scored", [True, False])
def test_an_all_demonstration_batch_has_no_rl_term_and_no_nan(make_batch, scored):
    """And one with nothing to train on has loss 0, with a graph to go back through."""
    batch = make_batch(
        [[NAN], [NAN]], [2, 3], sources=["demonstration"] * 2, bases=["self"] * 2, ref_logp_BT=torch.full((2, 4), -9.0)
    )
    if not scored:
        batch = replace(batch, loss_mask_BT=torch.zeros(2, 4, dtype=torch.bool))
    algorithm = Algorithm(policy_loss=Reinforce(), kl=K2(coefficient=5.0))
    objective = Objective.of(algorithm, {})
    logp_BT, _ = leaves(batch)
    loss, sums = objective.loss(logp_BT, None, objective.prepare(credit(batch, algorithm, {})))
    (gradient_BT,) = torch.autograd.grad(loss, logp_BT)
    assert float(loss.detach()) == pytest.approx(1.0 if scored else 0.0)
    close(gradient_BT, batch.loss_mask_BT * -0.2)
    metrics = objective.finish(sums)
    assert set(metrics) == {"loss", "tokens", "sampled_tokens"} | ({"ratio"} if scored else set())
    assert all(math.isfinite(value) for value in metrics.values())


def test_without_old_log_probabilities_the_correction_uses_the_current_ones(make_batch):
    """First and only update of a batch: annotating it beforehand or not gives the same step."""
    objective = Objective(policy_loss=Clip(), aggregation=TokenMean(), correction=IcePop())
    batch = make_batch([[1.0], [0.0]], [2, 2], adv_BT=torch.tensor([[0.3], [-0.3]]).expand(2, 3))
    behaviour_BT = torch.tensor([[0.0, -1.1, -4.0], [0.0, -0.8, -1.0]])
    results = []
    for old_BT in (None, torch.full((2, 3), -1.0)):
        candidate = replace(batch, behaviour_logp_BT=behaviour_BT, old_logp_BT=old_BT)
        logp_BT = torch.full((2, 3), -1.0, requires_grad=True)
        loss, sums = objective.loss(logp_BT, None, objective.prepare(candidate))
        results.append((loss.detach(), torch.autograd.grad(loss, logp_BT)[0], objective.finish(sums)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    assert results[0][1][0, 2] == 0 and results[0][1][0, 1] != 0  # e^3 > 5: dropped
    assert results[0][2]["mismatch_abs_max"] == pytest.approx(3.0)


@dataclass(frozen=True)
class LargestAdvantage:
    """A control that weighs tokens by |A| over the largest of the mini-batch, and asks for entropies to be there."""

    needs: ClassVar[tuple[str, ...]] = ("entropy",)

    def prepare(self, state, minibatch):
        return state["w"] * minibatch.adv_BT.abs() / minibatch.adv_BT.abs().max()

    def penalty(self, state, view):
        return None


def test_weights_of_controls_multiply_and_see_the_whole_mini_batch(make_batch):
    control: Any = LargestAdvantage()
    batch = make_batch([[0.0]] * 2, [1, 1], adv_BT=torch.tensor([[NAN, 2.0], [INF, -1.0]]))
    batch = replace(batch, weight_BT=torch.full((2, 2), 3.0))
    objective = Objective(Reinforce(), TokenMean(), entropy_controls=((control, {"w": 0.5}), (control, {"w": 2.0})))
    prepared = objective.prepare(batch)
    assert prepared.control_weight_BT is not None and prepared.weight_BT is not None
    close(prepared.weight_BT[:, 1], [3.0, 3.0])
    close(prepared.control_weight_BT, [[0.0, 1.0], [0.0, 0.25]])
    logp_BT = torch.full((2, 2), -1.0, requires_grad=True)
    loss, sums = objective.loss(logp_BT, None, prepared)
    (gradient_BT,) = torch.autograd.grad(loss, logp_BT)
    close(gradient_BT[:, 1], [-2.0 * 3.0 / 2, 1.0 * 0.75 / 2])
    assert objective.finish(sums)["control_weight"] == pytest.approx(0.625)
    assert objective.finish(sums)["control_dropped"] == 0
    assert objective.entropies == "value"


def test_needs_are_what_is_used():
    def needs(staleness=0, **options):
        return Objective.of(Algorithm(**options), {"kl": {}}).needs(staleness=staleness)

    assert needs() == frozenset()
    assert needs(staleness=1) == {"old_logp"}
    assert needs(epochs=2) == {"old_logp"}
    assert needs(minibatches=2) == {"old_logp"}
    assert needs(kl=K2()) == {"reference"}
    assert needs(kl=K1()) == {"reference", "old_logp"}
    assert needs(entropy_controls=(LargestAdvantage(),)) == {"entropy"}
    assert Objective.supervised().needs() == frozenset()


def test_entropies_are_wanted_with_a_gradient_only_where_they_are_used_and_not_at_all_of_imitation():
    assert Objective.of(Algorithm(), {}).entropies == "value"
    assert Objective.of(Algorithm(entropy_controls=(Bonus(),)), {}).entropies == "gradient"
    assert Objective.of(Algorithm(entropy_controls=(Bonus(coefficient=0.0),)), {}).entropies == "value"
    assert Objective.supervised().entropies == "none"


def test_a_penalty_is_shown_entropies_only_if_it_says_that_it_differentiates_them(make_batch):
    """Otherwise it might use numbers without a gradient and never know."""
    seen = []

    class Undeclared(LargestAdvantage):
        def penalty(self, state, view):
            seen.append(view.entropy_BT)
            return None

    class Declared(Undeclared):
        entropy_gradient = True

    batch = make_batch([[0.0]], [1], adv_BT=torch.ones(1, 2))
    for control in (Undeclared(), Declared()):
        controls: Any = ((control, {"w": 1.0}),)
        objective = Objective(Reinforce(), TokenMean(), entropy_controls=controls)
        objective.loss(torch.zeros(1, 2), torch.ones(1, 2), objective.prepare(batch))
    assert seen[0] is None and seen[1].tolist() == [[0.0, 1.0]]


def test_of_takes_coefficients_and_states_from_the_components_state():
    algorithm = Algorithm(kl=K2(target=0.1), entropy_controls=(LargestAdvantage(),), epochs=2, minibatches=3)
    objective = Objective.of(algorithm, {"kl": {"coefficient": 0.7}, "entropy_controls.0": {"w": 4.0}})
    assert objective.kl_coefficient == 0.7
    assert objective.entropy_controls == ((LargestAdvantage(), {"w": 4.0}),)
    assert (objective.epochs, objective.minibatches) == (2, 3)
    assert Objective.of(Algorithm(kl=K1(coefficient=0.5)), {"kl": {}}).kl_coefficient == 0.0  # it is in the reward


def test_combine_adds_sums_and_takes_the_larger_maximum():
    one = {"tokens": torch.tensor(3), "x": torch.tensor(1.5), "y_max": torch.tensor(2.0)}
    two = {"tokens": torch.tensor(4), "x": torch.tensor(-1.0), "y_max": torch.tensor(-1.0)}
    joined = combine(combine({}, one), two)
    assert {name: float(value) for name, value in joined.items()} == {"tokens": 7.0, "x": 0.5, "y_max": 2.0}


@dataclass(frozen=True)
class ZeroOutside:
    """A correction that knows the mask only."""

    def weights(self, old_logp_BT, behaviour_logp_BT, mask_BT):
        return 3.0 * mask_BT, {}


def test_corrections_leave_demonstrations_alone(make_batch):
    batch = make_batch(
        [[1.0], [1.0]], sources=["policy", "demonstration"], bases=["old", "self"], adv_BT=torch.ones(2, 2)
    )
    objective = Objective(Reinforce(), TokenMean(), correction=ZeroOutside())
    logp_BT = torch.full((2, 2), -1.0, requires_grad=True)
    (gradient_BT,) = torch.autograd.grad(objective.loss(logp_BT, None, objective.prepare(batch))[0], logp_BT)
    close(gradient_BT[:, 1], [-3.0, -1.0])  # each kind has a mean of its own


def test_correct_rollouts_add_their_negative_log_likelihood_by_its_own_mean(make_batch):
    """VAPO: 0.1 times the mean over the tokens of correct rollouts; demonstrations and wrong ones add nothing."""
    batch = make_batch(
        [[1.0], [0.0], [1.0], [1.0]], [1, 3, 2, 2], sources=["policy"] * 3 + ["demonstration"], adv_BT=torch.zeros(4, 4)
    )
    objective = Objective.of(Algorithm(positive_nll=0.1, correction=None), {})
    prepared = objective.prepare(batch)
    logp_BT = (-torch.arange(16.0).reshape(4, 4)).requires_grad_()
    loss, _ = objective.loss(logp_BT, None, prepared)
    assert loss.item() == pytest.approx(0.1 * (1 + 9 + 10) / 3)
    (gradient,) = torch.autograd.grad(loss, logp_BT)
    assert gradient[0, 1].item() == pytest.approx(-0.1 / 3) and not gradient[[1, 3]].any()
    parts = [objective.loss(logp_BT[rows, :w], None, prepared.rows(rows))[0] for rows, w in (([1, 2], 4), ([0, 3], 3))]
    assert sum(part.item() for part in parts) == pytest.approx(loss.item())
