"""Golden numbers and properties of the aggregations."""

import pytest
import torch

from alignment.algorithms.aggregations import Constant, SequenceMean, SequenceSum, TokenMean

EXAMPLE = [(TokenMean(), 1 / 3), (SequenceMean(), 0.5), (SequenceSum(), 1.0), (Constant(length=8), 0.125)]


@pytest.mark.parametrize(("aggregation", "expected"), EXAMPLE)
def test_two_rows_of_two_and_four_tokens(make_batch, aggregation, expected):
    """Loss 1 on the tokens of the short row, 0 on those of the long one."""
    batch = make_batch([0, 0], [2, 4])
    loss_BT = torch.tensor([[1.0], [0.0]]).expand(2, 5)
    assert float((aggregation.scale(batch.loss_mask_BT) * loss_BT).sum()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("aggregation", [a for a, _ in EXAMPLE])
def test_rows_without_trained_tokens_count_nowhere(make_batch, aggregation):
    mask_BT = make_batch([0, 0], [2, 4]).loss_mask_BT
    padded_BT = torch.cat([mask_BT, torch.zeros(3, 5, dtype=torch.bool)])
    scale_BT = aggregation.scale(padded_BT)
    torch.testing.assert_close(scale_BT[:2], aggregation.scale(mask_BT), atol=0, rtol=0)
    assert (scale_BT[~padded_BT] == 0).all()


@pytest.mark.parametrize("aggregation", [a for a, _ in EXAMPLE])
def test_nothing_to_train_on_gives_zero(aggregation):
    assert (aggregation.scale(torch.zeros(2, 3, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean()])
def test_means_have_weights_that_add_up_to_one(make_batch, aggregation):
    scale_BT = aggregation.scale(make_batch([0] * 4, [1, 5, 2, 7]).loss_mask_BT)
    assert float(scale_BT.sum()) == pytest.approx(1.0, abs=1e-6)
