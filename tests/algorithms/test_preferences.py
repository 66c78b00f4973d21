"""Preference losses: the specification's golden numbers, identities, and that nothing depends on how rows are split."""

import math
from dataclasses import replace

import pytest
import torch

from alignment.algorithms.binary_preferences import Bco, Kto
from alignment.algorithms.preference_objective import PreferenceObjective
from alignment.algorithms.preferences import (
    Dpo,
    Hinge,
    Ipo,
    LengthNormalizedDpo,
    MmDpo,
    Nll,
    Orpo,
    Pairs,
    RobustDpo,
    Rows,
    Simpo,
    check_losses,
)
from alignment.engines.gradients import accumulate
from alignment.errors import UserError
from alignment.partition import Share
from alignment.types import Batch, Context, Signals

D = torch.float64


def rows(logp, ref=None, length=1.0, wanted=True, shift=0.0) -> Rows:
    one = torch.tensor([float(logp)], dtype=D, requires_grad=True)
    refs = None if ref is None else torch.tensor([float(ref)], dtype=D)
    return Rows(
        one, refs, torch.tensor([float(length)], dtype=D), torch.tensor([wanted]), torch.tensor([shift], dtype=D)
    )


def pair(w=-10.0, lose=-12.0, ref_w=-11.0, ref_l=-11.0, n_w=10, n_l=12, gap=math.nan) -> Pairs:
    return Pairs(rows(w, ref_w, n_w), rows(lose, ref_l, n_l, wanted=False), torch.tensor([gap], dtype=D))


@pytest.mark.parametrize(
    ("loss", "pairs", "expected"),
    [
        (Dpo(), pair(), 0.5981389),
        (Dpo(label_smoothing=0.1), pair(), 0.6181389),
        (Dpo(label_smoothing=0.2), pair(), 0.6381389),
        (RobustDpo(label_smoothing=0.1), pair(), 0.5731389),
        (RobustDpo(label_smoothing=0.2), pair(), 0.5314722),
        (Ipo(tau=0.1, length_normalize=False), pair(), 9.0),
        (Ipo(tau=0.1), pair(), 23.2002778),
        (Hinge(), pair(), 0.8),
        (LengthNormalizedDpo(beta=0.1), pair(), 0.6840225),
        (LengthNormalizedDpo(beta=2.0), pair(), 0.5265261),
        (LengthNormalizedDpo(), pair(2, -1, 0, 0, 10, 5), 0.126928),
        (Dpo(), pair(2, -1, 0, 0, 10, 5), 0.554355),
        (Simpo(beta=2.0, gamma=1.0), pair(-10, -12), 1.3132617),
        (MmDpo(beta=0.1), pair(gap=2.0), 0.5701763),
        (MmDpo(w=0.0), pair(gap=2.0), 0.5981389),
        (Dpo(), pair(-11, -11), math.log(2)),
        (LengthNormalizedDpo(), pair(-11, -11), math.log(2)),
    ],
)  # fmt: skip
def test_golden_losses(loss, pairs, expected):
    assert loss.pair_loss(None, pairs).item() == pytest.approx(expected, abs=1e-6)


def test_orpo_is_the_likelihood_and_the_odds_ratio():
    pairs = pair(-5.0, -12.0, n_w=10, n_l=12)  # -0.5 and -1 per token
    assert float(Orpo(lam=1.0).pair_loss(None, pairs)) == pytest.approx(0.5 + 0.3202998, abs=1e-6)
    assert float(Orpo(lam=1.0).pair_loss(None, pair(-10, -12))) == pytest.approx(1.0 + math.log(2), abs=1e-6)


def test_kto_of_wanted_and_unwanted_completions():
    wanted, unwanted = rows(-10.0, -11.0, shift=0.5), rows(-12.0, -11.0, wanted=False, shift=0.5)
    assert float(Kto().row_loss(None, wanted)) == pytest.approx(0.4875026, abs=1e-6)
    assert float(Kto().row_loss(None, unwanted)) == pytest.approx(0.4625702, abs=1e-6)
    assert float(Kto(desirable=2.0).row_loss(None, wanted)) == pytest.approx(2 * 0.4875026, abs=1e-6)


def test_the_gradient_of_dpo():
    pairs = pair()
    Dpo().pair_loss(None, pairs).sum().backward()
    assert float(pairs.chosen.logp_R.grad) == pytest.approx(-0.0450166, abs=1e-6)
    assert float(pairs.rejected.logp_R.grad) == pytest.approx(0.0450166, abs=1e-6)


def test_swapping_the_sides_changes_dpo_by_beta_h():
    there, back = pair(), pair(-12.0, -10.0)
    difference = float(Dpo().pair_loss(None, there) - Dpo().pair_loss(None, back))
    assert difference == pytest.approx(-0.1 * float(there.h_P), abs=1e-9)


def test_length_normalised_dpo_of_equal_lengths_is_dpo():
    pairs = pair(n_w=8, n_l=8)
    ours, plain = LengthNormalizedDpo(beta=0.8), Dpo(beta=0.1)
    assert float(ours.pair_loss(None, pairs)) == pytest.approx(float(plain.pair_loss(None, pairs)), abs=1e-9)


def test_dynamic_reward_scaling_stays_within_its_bounds():
    gaps = torch.tensor([0.0, 1.0, 2.0, 10.0, -1.0, 1e9], dtype=D)
    found = MmDpo(beta=0.1, w=0.5, k=0.5).scaled(gaps)
    assert found.tolist() == pytest.approx([0.1, 0.1196735, 0.1316060, 0.1496631, 0.1, 0.15], abs=1e-6)


def test_mpo_is_the_weighted_sum():
    total = 0.8 * float(Dpo().pair_loss(None, pair(-11, -11))) + 0.2 * float(Bco().row_loss(None, rows(-11, -11)))
    assert total == pytest.approx(0.831777, abs=1e-6)


def test_a_bco_that_remembers_pulls_both_sides_by_themselves():
    bco, state = Bco(beta=0.5), {"mean": 0.0, "rows": 0.0}
    context = Context(0, 0)
    for chosen, rejected, pairs in ((4.0, 0.0, 1.0), (8.0, 0.0, 3.0)):
        metrics = {"ratio/chosen": chosen, "ratio/rejected": rejected, "rows": 2 * pairs, "wanted": pairs}
        state = bco.observe(state, Signals((), batch(), metrics, None, context))
    assert state == {"mean": pytest.approx((1.0 * 1 + 2.0 * 3) / 4), "rows": 8.0}
    assert bco.observe(state, Signals((), batch(), {"pairs": 0.0}, None, context)) == state
    one_sided = bco.observe(
        state, Signals((), batch(), {"ratio/chosen": 6.0, "rows": 2.0, "wanted": 2.0}, None, context)
    )
    assert one_sided == {"mean": pytest.approx((1.75 * 8 + 3.0 * 2) / 10), "rows": 10.0}
    sides = rows(-11.0, -11.0), rows(-11.0, -11.0, wanted=False)
    losses = [bco.row_loss(state, side) for side in sides]
    for loss in losses:
        loss.sum().backward()
    assert sides[0].logp_R.grad < 0 < sides[1].logp_R.grad
    # a mean over the two rows is -log sigmoid(-d) - log sigmoid(d)
    assert float(sum(losses)) / 2 == pytest.approx(math.log1p(math.exp(1.75)) + math.log1p(math.exp(-1.75)), abs=1e-6)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ((), "losses is empty"),
        ((Nll(),), "nothing that learns from a preference"),
        ((Dpo(), Dpo(beta=0.5)), "same one twice"),
    ],
)
def test_lists_that_cannot_be_summed_are_refused(losses, message):
    with pytest.raises(UserError, match=message):
        check_losses(losses)
    check_losses((Dpo(), Bco(), Nll(), Nll(of="ground_truth")))


LENGTHS = (5, 9, 7, 4, 12, 6, 8, 8, 10, 3)
PROMPT = 2
SIDES = (1, -1) * 4 + (0, 2)


def batch(seed: int = 0) -> Batch:
    """Four pairs, a mismatched row and a demonstration."""
    generator = torch.Generator().manual_seed(seed)
    count, width = len(LENGTHS), max(LENGTHS)
    at = torch.arange(width)
    length_B = torch.tensor(LENGTHS)
    mask_BT = (at >= PROMPT) & (at < length_B[:, None])

    def numbers() -> torch.Tensor:
        return torch.where(mask_BT, -torch.rand(count, width, generator=generator) * 2, 0.0)

    return Batch(
        ids_BT=torch.zeros(count, width, dtype=torch.int64),
        loss_mask_BT=mask_BT,
        length_B=length_B,
        group_B=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 5]),
        source_B=torch.ones(count, dtype=torch.int8),
        ratio_base_B=torch.ones(count, dtype=torch.int8),
        temperature_B=torch.ones(count),
        behaviour_logp_BT=torch.zeros(count, width),
        rewards_BK=torch.zeros(count, 0),
        weights_K=torch.zeros(0),
        scored_B=torch.zeros(count, dtype=torch.bool),
        truncated_B=torch.zeros(count, dtype=torch.bool),
        key_B=torch.arange(count),
        side_B=torch.tensor(SIDES, dtype=torch.int8),
        old_logp_BT=numbers(),
        ref_logp_BT=numbers(),
        reward_B=torch.rand(count, generator=generator),
    )


EVERY = [
    [Dpo()], [Dpo(label_smoothing=0.2)], [RobustDpo()], [Ipo()], [Ipo(length_normalize=False)], [Hinge()],
    [LengthNormalizedDpo()], [Simpo()], [Orpo()], [MmDpo()], [Kto()], [Bco()],
    [Dpo(weight=0.8), Bco(weight=0.2), Nll()], [Dpo(), Nll(mean="token", weight=0.3)],
    [Dpo(), Nll(), Nll(of="ground_truth", weight=0.1)],
]  # fmt: skip


class Fake:
    """A backend whose log-probabilities are a parameter: one number for each row's key and token."""

    def __init__(self, whole: Batch) -> None:
        assert whole.old_logp_BT is not None
        self.logp = whole.old_logp_BT.double().clone().requires_grad_()
        self.share, self.device = Share(), torch.device("cpu")

    def computing(self):
        return torch.enable_grad()

    def backward(self, loss, last):
        loss.backward()


def computed(losses, given: Batch, budget: int) -> tuple[float, torch.Tensor, dict[str, float]]:
    """The loss, its gradient by each row's key and token, and the metrics."""
    backend, objective = Fake(batch()), PreferenceObjective([(loss, None) for loss in losses])
    prepared = objective.prepare(given)

    def loss_of(micro: Batch):
        logp_BT = backend.logp[micro.key_B][:, : micro.ids_BT.shape[1]]
        return objective.loss(logp_BT, None, micro)

    loss, sums = accumulate(backend, loss_of, prepared, budget)
    return float(loss), backend.logp.grad, objective.finish(sums)


@pytest.mark.parametrize("losses", EVERY, ids=lambda losses: "+".join(type(loss).__name__ for loss in losses))
def test_loss_gradient_and_metrics_do_not_depend_on_micro_batches_or_order(losses):
    whole = batch()
    loss, grad, metrics = computed(losses, whole, 1000)
    assert grad.abs().sum() > 0 and metrics["pairs"] == 4
    shuffled = whole.rows([7, 3, 9, 0, 5, 8, 2, 6, 1, 4])
    for given, budget in ((whole, 24), (shuffled, 24), (shuffled, 48)):
        again, grad_again, metrics_again = computed(losses, given, budget)
        assert again == pytest.approx(loss, rel=1e-6)
        assert metrics_again == pytest.approx(metrics, rel=1e-6)
        assert torch.allclose(grad_again, grad, rtol=1e-6)


@pytest.mark.parametrize("loss", [Kto(), Bco(), Kto(desirable=2.0)], ids=["kto", "bco", "weighted"])
def test_completions_that_were_judged_by_themselves(loss):
    """Of no pair, three wanted and five not: means over them, whatever the micro-batches, and those of the pairs."""
    paired_loss, paired_grad, paired = computed([loss], batch(), 1000)
    apart = replace(batch(), group_B=torch.arange(len(LENGTHS)))
    found, grad, metrics = computed([loss], apart, 1000)
    assert metrics["pairs"] == 0 and metrics["rows"] == 8 and metrics["wanted"] == 4 and "margin" not in metrics
    assert found == pytest.approx(paired_loss, rel=1e-6) and torch.allclose(grad, paired_grad, rtol=1e-6)
    for name in ("ratio/chosen", "ratio/rejected", "logp/chosen", "length/rejected"):
        assert metrics[name] == pytest.approx(paired[name], rel=1e-6)
    uneven = replace(apart, side_B=torch.tensor([1, -1, 1, -1, -1, -1, 1, -1, 0, 2], dtype=torch.int8))
    found, grad, metrics = computed([loss], uneven, 1000)
    assert metrics["wanted"] == 3
    for given, budget in ((uneven, 12), (uneven.rows([7, 3, 9, 0, 5, 8, 2, 6, 1, 4]), 24)):
        again, grad_again, metrics_again = computed([loss], given, budget)
        assert again == pytest.approx(found, rel=1e-6) and torch.allclose(grad_again, grad, rtol=1e-6)
        assert metrics_again == pytest.approx(metrics, rel=1e-6)
    ones = uneven.rows([0, 2, 6])
    assert "ratio/rejected" not in computed([loss], ones, 1000)[2], "there is none"


def test_sides_of_a_pair_share_a_micro_batch_and_every_row_is_there_once():
    whole = batch()
    for ranks in (1, 2, 3):
        seen = []
        for rank in range(ranks):
            for index, micro in Share(rank, ranks).micro_batches(whole, 24):
                seen += index.tolist()
                groups = whole.group_B[index].tolist()
                pairs = [g for g in groups if g < 4]
                assert all(pairs.count(g) == 2 for g in pairs), "a pair was torn apart"
                assert len(index) * max(micro.length_B.tolist()) <= 24 or len(index) == 0
        assert sorted(seen) == list(range(len(whole)))


def test_rows_of_other_prompts_completions_shift_kto_and_are_not_trained_on():
    whole, objective = batch(), PreferenceObjective([(Kto(), None)])
    assert whole.old_logp_BT is not None and whole.ref_logp_BT is not None
    high = whole.old_logp_BT.clone()
    high[8] = torch.where(whole.loss_mask_BT[8], whole.ref_logp_BT[8] + 0.5, 0.0)
    prepared = objective.prepare(replace(whole, old_logp_BT=high))
    expected = 0.5 * float(whole.loss_mask_BT[8].sum())
    assert prepared.shift_B is not None and torch.allclose(prepared.shift_B, torch.tensor(expected))
    assert not prepared.loss_mask_BT[8:].any() and prepared.loss_mask_BT[:8].any(1).all()
    low = torch.where(whole.loss_mask_BT, whole.ref_logp_BT - 1.0, 0.0)
    assert not objective.prepare(replace(whole, old_logp_BT=low)).shift_B.any()  # at least 0


def test_a_demonstration_of_the_prompt_is_trained_on_where_a_loss_is_of_it():
    whole = batch()
    _, grad, _ = computed([Dpo(), Nll(of="ground_truth")], whole, 1000)
    tokens = whole.loss_mask_BT[9].sum()
    assert torch.allclose(grad[9], -whole.loss_mask_BT[9].double() / tokens)
    assert not computed([Dpo()], whole, 1000)[1][8:].any()
