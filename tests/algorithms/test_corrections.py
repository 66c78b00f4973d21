"""Golden numbers and invariances of the rollout-mismatch corrections."""

import math

import pytest
import torch

from alignment.algorithms.corrections import GeometricMask, IcePop, SequenceMask, SequenceTis, Tis, corrections

ALL = [entry.cls() for entry in corrections]


def weights(correction, ratios, mask=None):
    """Weights of rows whose learner / sampler ratios are these."""
    rho_BT = torch.tensor(ratios, dtype=torch.float64)
    mask_BT = torch.ones_like(rho_BT, dtype=torch.bool) if mask is None else torch.tensor(mask)
    behaviour_BT = torch.full_like(rho_BT, -2.0)
    weight_BT, metrics = correction.weights(behaviour_BT + rho_BT.log(), behaviour_BT, mask_BT)
    assert weight_BT.shape == rho_BT.shape
    return weight_BT, metrics


@pytest.mark.parametrize(
    ("correction", "ratios", "expected"),
    [
        (Tis(cap=2.0), [3.0, 2.0, 0.1], [2.0, 2.0, 0.1]),
        (Tis(cap=5.0, floor=0.5), [9.0, 1.5, 0.1], [5.0, 1.5, 0.5]),
        (IcePop(low=0.5, high=5.0), [0.4, 3.0, 6.0], [0.0, 3.0, 0.0]),
        (SequenceTis(cap=2.0), [3.0, 1.5, 0.5], [2.0, 2.0, 2.0]),
        (SequenceTis(cap=3.0), [3.0, 1.5, 0.5], [2.25, 2.25, 2.25]),
        (SequenceMask(cap=2.0), [3.0, 1.5, 0.5], [0.0, 0.0, 0.0]),
        (SequenceMask(cap=3.0), [3.0, 1.5, 0.5], [2.25, 2.25, 2.25]),
        (GeometricMask(low=0.9, high=1.1), [2.0, 0.5, 1.1], [1.0, 1.0, 1.0]),
        (GeometricMask(low=0.9, high=1.1), [2.0, 0.5, 1.5], [0.0, 0.0, 0.0]),
        (GeometricMask(low=0.9, high=1.1), [0.5, 0.9, 0.9], [0.0, 0.0, 0.0]),
    ],
)
def test_one_row(correction, ratios, expected):
    assert weights(correction, [ratios])[0][0].tolist() == pytest.approx(expected, abs=1e-9)


def test_metrics_say_what_was_capped_or_dropped():
    assert weights(Tis(cap=2.0), [[3.0, 1.0]])[1]["capped"].tolist() == [[1.0, 0.0]]
    assert weights(IcePop(), [[0.4, 3.0]])[1]["dropped"].tolist() == [[1.0, 0.0]]
    assert weights(SequenceTis(), [[3.0, 1.0]])[1]["capped"].tolist() == [[1.0, 1.0]]
    assert weights(SequenceMask(), [[3.0, 1.0]])[1]["dropped"].tolist() == [[1.0, 1.0]]
    assert weights(GeometricMask(), [[1.0, 1.0]])[1]["dropped"].tolist() == [[0.0, 0.0]]


def test_only_the_geometric_mask_is_length_invariant():
    row = [1.2, 0.9, 1.1, 1.0]
    mask = GeometricMask(low=0.9, high=1.05)
    for repeats in (1, 3, 10):
        assert weights(mask, [row * repeats])[0].eq(1).all()
    assert weights(SequenceMask(cap=2.0), [row])[0].ne(0).all()
    assert weights(SequenceMask(cap=2.0), [row * 10])[0].eq(0).all()


@pytest.mark.parametrize("correction", ALL, ids=corrections.names())
def test_agreement_changes_nothing(correction):
    assert weights(correction, [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])[0].eq(1).all()


@pytest.mark.parametrize("correction", ALL, ids=corrections.names())
def test_masked_positions_influence_nothing(correction):
    mask = [[False, True, True, False], [False, True, True, True]]
    clean = weights(correction, [[1, 1.3, 0.7, 1], [1, 0.9, 1.1, 2.0]], mask)[0]
    junk = weights(correction, [[math.nan, 1.3, 0.7, math.inf], [0.0, 0.9, 1.1, 2.0]], mask)[0]
    assert torch.equal(clean[torch.tensor(mask)], junk[torch.tensor(mask)])


@pytest.mark.parametrize("correction", ALL, ids=corrections.names())
def test_rows_do_not_see_each_other_and_extremes_stay_finite(correction):
    rows = [[1.3, 0.7], [1e-30, 1e-30], [1e30, 1e30], [math.inf, 0.0]]
    together = weights(correction, rows)[0]
    assert together.isfinite().all()
    for row, expected in zip(rows, together, strict=True):
        assert torch.equal(weights(correction, [row])[0][0], expected)


@pytest.mark.parametrize("make", [lambda: Tis(cap=1, floor=2), lambda: IcePop(3, 2), lambda: GeometricMask(2, 1)])
def test_bounds_in_the_wrong_order_are_refused(make):
    with pytest.raises(ValueError, match="must be at most"):
        make()
