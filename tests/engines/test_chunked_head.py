"""The output layer by chunks against its definition, written with autograd."""

import math

import pytest
import torch
from torch import Tensor

from alignment.engines import chunked_head
from alignment.engines.chunked_head import ChunkedHead

N, V, H = 11, 7, 5


def problem(dtype: torch.dtype = torch.float64, seed: int = 0, size: tuple[int, int, int] = (N, V, H)):
    n, v, h = size
    drawn = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(n, h, generator=drawn, dtype=torch.float64).to(dtype)
    weight_VH = torch.randn(v, h, generator=drawn, dtype=torch.float64).to(dtype)
    token_N = torch.randint(0, v, (n,), generator=drawn)
    temperature_N = 0.5 + torch.rand(n, generator=drawn)
    return hidden_NH, weight_VH, token_N, temperature_N


def by_definition(
    hidden_NH: Tensor, weight_VH: Tensor, token_N: Tensor, temperature_N: Tensor
) -> tuple[Tensor, Tensor]:
    log_p_NV = (hidden_NH @ weight_VH.t() / temperature_N[:, None]).log_softmax(-1)
    return log_p_NV.gather(-1, token_N[:, None])[:, 0], -(log_p_NV.exp() * log_p_NV).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, N, 100])
@pytest.mark.parametrize("block_bytes", [1, 2 * 4 * V, 1 << 20])
def test_values_and_gradients_are_those_of_the_definition(chunk, block_bytes, monkeypatch):
    monkeypatch.setattr(chunked_head, "CACHE_BYTES", block_bytes)
    hidden_NH, weight_VH, token_N, temperature_N = problem()
    leaves = hidden_NH.requires_grad_(), weight_VH.requires_grad_()

    def compute(hidden_NH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        return ChunkedHead.apply(hidden_NH, weight_VH, token_N, temperature_N, chunk, torch.float64, "gradient")  # pyright: ignore[reportReturnType]

    torch.testing.assert_close(compute(*leaves), by_definition(*leaves, token_N, temperature_N), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(compute, leaves)


def test_golden():
    # Two tokens at logits (0, ln 3) and temperature 1: p = (1/4, 3/4).
    hidden, weight = torch.ones(1, 1).requires_grad_(), torch.tensor([[0.0], [math.log(3)]]).requires_grad_()
    logp, entropy = ChunkedHead.apply(hidden, weight, torch.tensor([0]), torch.ones(1), 8, torch.float32, "value")  # pyright: ignore[reportGeneralTypeIssues]
    assert logp.item() == pytest.approx(math.log(1 / 4))
    assert entropy.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    logp.backward()
    assert weight.grad is not None and weight.grad[:, 0].tolist() == pytest.approx([0.75, -0.75])
    assert hidden.grad is not None and hidden.grad.item() == pytest.approx(-0.75 * math.log(3))


@pytest.mark.parametrize("entropy", ["none", "value", "gradient"])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_changes_none(entropy, trained):
    hidden_NH, weight_VH, token_N, temperature_N = problem()
    hidden_NH.requires_grad_(trained != "weight")
    weight_VH.requires_grad_(trained != "hidden")
    leaves = [x for x in (hidden_NH, weight_VH) if x.requires_grad]
    weights_N = torch.linspace(-1, 1, N, dtype=torch.float64)

    def gradients(logp_N: Tensor, entropy_N: Tensor | None) -> tuple[Tensor, ...]:
        loss = (weights_N * logp_N).sum()
        if entropy == "gradient":
            assert entropy_N is not None
            loss = loss + (weights_N**2 * entropy_N).sum()
        return torch.autograd.grad(loss, leaves)

    found = ChunkedHead.apply(hidden_NH, weight_VH, token_N, temperature_N, 4, torch.float64, entropy)
    logp_N, entropy_N = found  # pyright: ignore[reportGeneralTypeIssues]
    assert (entropy_N is None) == (entropy == "none")
    assert entropy_N is None or entropy_N.requires_grad == (entropy == "gradient")
    want = gradients(*by_definition(hidden_NH, weight_VH, token_N, temperature_N))
    torch.testing.assert_close(gradients(logp_N, entropy_N), want, rtol=1e-12, atol=1e-12)


def test_a_gradient_of_the_entropy_alone():
    hidden_NH, weight_VH, token_N, temperature_N = problem()
    hidden_NH.requires_grad_()
    args = (hidden_NH, weight_VH, token_N, temperature_N)
    _, entropy_N = ChunkedHead.apply(*args, 4, torch.float64, "gradient")  # pyright: ignore[reportGeneralTypeIssues]
    want = torch.autograd.grad(by_definition(*args)[1].sum(), hidden_NH)
    torch.testing.assert_close(torch.autograd.grad(entropy_N.sum(), hidden_NH), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits_do_not_overflow(shift):
    hidden_NH, weight_VH, token_N, temperature_N = problem(torch.float32)
    weight_VH[:, 0] = shift
    leaves = hidden_NH.requires_grad_(), weight_VH.requires_grad_()
    logp_N, entropy_N = ChunkedHead.apply(*leaves, token_N, temperature_N, 4, torch.float32, "gradient")  # pyright: ignore[reportGeneralTypeIssues]
    gradients = torch.autograd.grad(logp_N.sum() + entropy_N.sum(), leaves)
    assert all(x.isfinite().all() for x in (logp_N, entropy_N, *gradients))


def test_bfloat16_products_sum_the_weights_gradient_in_float32(monkeypatch):
    monkeypatch.setattr(chunked_head, "VOCABULARY_SLICE", 10)
    hidden_NH, weight_VH, token_N, temperature_N = problem(torch.float32, size=(400, 33, 8))
    exact, rough = [], []
    for dtype, found in ((torch.float64, exact), (torch.bfloat16, rough)):
        leaves = [x.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in (hidden_NH, weight_VH)]
        logp_N, entropy_N = ChunkedHead.apply(*leaves, token_N, temperature_N, 16, dtype, "value")  # pyright: ignore[reportGeneralTypeIssues]
        found += [logp_N.detach(), entropy_N, *torch.autograd.grad(logp_N.mean(), leaves)]
    assert [x.dtype for x in rough] == [torch.float32] * 4
    for a, b in zip(rough, exact, strict=True):
        assert 0 < (a - b).abs().max() < 2e-2 * b.abs().max()


def test_weights_in_bfloat16_get_their_gradient_in_bfloat16():
    hidden_NH, weight_VH, token_N, temperature_N = problem(torch.bfloat16, size=(64, 33, 8))
    leaves = hidden_NH.requires_grad_(), weight_VH.requires_grad_()
    logp_N, _ = ChunkedHead.apply(*leaves, token_N, temperature_N, 16, torch.bfloat16, "none")  # pyright: ignore[reportGeneralTypeIssues]
    assert logp_N.dtype == torch.float32
    got = torch.autograd.grad(logp_N.sum(), leaves)
    assert [g.dtype for g in got] == [torch.bfloat16] * 2
    wide = hidden_NH.detach().double().requires_grad_(), weight_VH.detach().double().requires_grad_()
    want = torch.autograd.grad(by_definition(*wide, token_N, temperature_N)[0].sum(), wide)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 2e-2 * b.abs().max()


def test_it_may_be_differentiated_once_more_from_the_same_forward_pass():
    hidden_NH, weight_VH, token_N, temperature_N = problem()
    leaves = hidden_NH.requires_grad_(), weight_VH.requires_grad_()
    logp_N, _ = ChunkedHead.apply(*leaves, token_N, temperature_N, 100, torch.float64, "none")  # pyright: ignore[reportGeneralTypeIssues]
    first = torch.autograd.grad(logp_N.sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(logp_N.sum(), leaves), strict=True))


def test_no_tokens_give_nothing_and_zero_gradients():
    hidden_NH, weight_VH, token_N, temperature_N = problem(size=(0, V, H))
    leaves = hidden_NH.requires_grad_(), weight_VH.requires_grad_()
    logp_N, entropy_N = ChunkedHead.apply(*leaves, token_N, temperature_N, 4, torch.float64, "value")  # pyright: ignore[reportGeneralTypeIssues]
    assert logp_N.shape == entropy_N.shape == (0,)
    gradients = torch.autograd.grad(logp_N.sum(), leaves)
    assert gradients[0].shape == (0, H) and not gradients[1].any()
