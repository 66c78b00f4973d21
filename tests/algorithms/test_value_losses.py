"""Value losses: golden numbers of two-hot and HL-Gauss targets, what their readout loses, and the mean over states."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alignment.algorithms.value_losses import HlGauss, Scalar, TwoHot, ValueObjective, value_losses
from alignment.errors import UserError

HISTOGRAMS = [HlGauss(bins=51), TwoHot(bins=10), HlGauss(low=-1.0, high=3.0, bins=7, sigma_ratio=2.0)]


def read(loss: HlGauss | TwoHot, target: Tensor) -> Tensor:
    """The value of the distribution that stands for ``target``, in float64."""
    return (loss.target(target) * loss.centres_M).sum(-1)


@pytest.mark.parametrize("loss", HISTOGRAMS, ids=repr)
def test_targets_are_distributions_that_read_out_as_the_return(loss):
    y = torch.linspace(loss.low, loss.high, 201, dtype=torch.float64)
    p = loss.target(y)
    assert p.shape == (201, loss.outputs) and (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(201, dtype=torch.float64))
    assert (read(loss, y) - y).abs().max() < 1e-3 * loss.width
    outside = loss.target(torch.tensor([loss.low - 5, loss.high + 5]))
    torch.testing.assert_close(outside, loss.target(torch.tensor([loss.low, loss.high])))
    assert loss.outside(torch.tensor([loss.low - 5, loss.low, loss.high + 0.1])).tolist() == [True, False, True]


def test_how_much_the_readout_of_hl_gauss_loses():
    for low, high, bins, most in ((0.0, 1.0, 51, 3e-6), (-10.0, 10.0, 101, 2.2e-5)):
        bare = HlGauss(low=low, high=high, bins=bins, pad_sigmas=0)
        y = torch.linspace(low + 4 * bare.sigma, high - 4 * bare.sigma, 501, dtype=torch.float64)
        assert (read(bare, y) - y).abs().max() < most
    padded = HlGauss(low=-0.1, high=1.1, bins=61, pad_sigmas=0)
    assert (read(padded, torch.tensor([0.0, 1.0])) - torch.tensor([0.0, 1.0])).abs().max() < 1e-7
    assert padded.outputs == 61


@pytest.mark.parametrize(("ratio", "inward"), [(0.75, 0.69), (2.0, 1.63)])
def test_without_padding_the_ends_are_pulled_inward(ratio, inward):
    bare = HlGauss(bins=51, sigma_ratio=ratio, pad_sigmas=0)
    assert float(read(bare, torch.tensor(0.0)) / bare.width) == pytest.approx(inward, abs=0.01)
    kept = HlGauss(bins=51, sigma_ratio=ratio)
    assert abs(float(read(kept, torch.tensor(0.0)))) < 1e-3 * kept.width


def test_two_hot_targets():
    p = TwoHot(bins=10).target(torch.tensor([0.37, 0.0, 1.0], dtype=torch.float64))
    assert p[0].tolist() == pytest.approx([0, 0, 0, 0.3, 0.7, 0, 0, 0, 0, 0, 0])
    assert p[1].tolist() == [1.0, *[0.0] * 10] and p[2].tolist() == [*[0.0] * 10, 1.0]


def test_a_return_in_the_middle_has_a_symmetric_target():
    p = HlGauss(bins=51).target(torch.tensor(0.5))
    torch.testing.assert_close(p, p.flip(0))


@pytest.mark.parametrize("loss", HISTOGRAMS, ids=repr)
def test_the_cross_entropy_is_least_at_the_target_and_its_gradient_is_the_difference(loss):
    target = torch.tensor(0.62)
    p = loss.target(target).float()
    output = torch.randn(loss.outputs, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(output, target), output)
    torch.testing.assert_close(gradient, output.detach().softmax(-1) - p)
    entropy = -torch.special.xlogy(p, p).sum()
    best = loss(p.clamp(min=1e-30).log(), target)
    assert float(best) == pytest.approx(float(entropy), abs=1e-5) and loss(output, target) > best


def test_the_mean_of_targets_is_the_target_of_a_mixture():
    """So a Bernoulli return has its probability as the optimal value."""
    loss = HlGauss(bins=51)
    optimum = 0.3 * loss.target(torch.tensor(1.0)) + 0.7 * loss.target(torch.tensor(0.0))
    assert float(loss.readout(optimum.log())) == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize("loss", [Scalar(), *HISTOGRAMS], ids=repr)
def test_a_head_that_begins_at_zero_begins_in_the_middle(loss):
    value = loss.readout(torch.zeros(3, loss.outputs))
    middle = 0.0 if isinstance(loss, Scalar) else (loss.low + loss.high) / 2
    torch.testing.assert_close(value, torch.full((3,), middle), atol=1e-6, rtol=0)


def test_the_clipped_scalar_loss_takes_the_worse_of_two():
    loss, old = Scalar(clip=0.2), torch.tensor([0.0, 0.0, 0.0])
    output, target = torch.tensor([[0.5], [0.5], [0.1]]), torch.tensor([1.0, 0.0, 1.0])
    assert loss(output, target, old).tolist() == pytest.approx([0.32, 0.125, 0.405])
    assert loss(output, target).tolist() == pytest.approx([0.125, 0.125, 0.405])
    value = torch.tensor([[0.5]]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(value, torch.ones(1), torch.zeros(1)).sum(), value)
    assert gradient.item() == 0, "beyond the clip, and better: it is not pulled further"


def test_options_that_cannot_be():
    with pytest.raises(UserError, match=r"low \(1.0\) must be below high \(0.0\)"):
        HlGauss(low=1.0, high=0.0)


@pytest.mark.parametrize("streams", [0, 2])
def test_the_objective_is_the_mean_over_states_with_a_target_however_split(make_batch, streams):
    returns_BT = torch.tensor([[0.5, 0.25, 1.0, 1.0], [0.0, float("nan"), 0.0, 0.0], [float("nan")] * 4])
    returns = torch.stack([returns_BT] * streams, -1) if streams else returns_BT
    batch = replace(
        make_batch([1.0, 0.0, 0.5], [3, 1, 2], returns_BT=returns), values_BT=torch.zeros_like(returns).nan_to_num()
    )
    objective = ValueObjective(Scalar())
    prepared = objective.prepare(batch)
    output = torch.full((*returns.shape, 1), 0.5)
    output[1, 1] = torch.inf  # where there is no target anything may stand
    loss, sums = objective.loss(output, prepared)
    expected = 0.5 * (0.0 + 0.0625 + 0.25 + 0.25 + 0.25) / 5 * max(1, streams)
    assert float(loss) == pytest.approx(expected)
    assert objective.finish(sums) == {"states": 5.0, "value_loss": pytest.approx(expected), "outside_support": 0.0}
    parts = [objective.loss(output[rows, :width], prepared.rows(rows)) for rows, width in (([0], 4), ([1, 2], 3))]
    assert float(sum(part for part, _ in parts)) == pytest.approx(expected)


def test_every_value_loss_has_a_gradient(make_batch):
    for entry in value_losses:
        loss = entry.cls()
        output = torch.zeros(2, loss.outputs, requires_grad=True)
        loss(output, torch.tensor([0.2, 0.9])).sum().backward()
        assert output.grad is not None and output.grad.isfinite().all() and output.grad.abs().sum() > 0
