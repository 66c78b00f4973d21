"""On a CPU: attention in float32 under autocast, and one thread for small products."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from alignment.engines.config import TransformersSamplerConfig
from alignment.engines.cpu import fitting_threads, float32_attention
from alignment.engines.transformers_sampler import TransformersSampler
from alignment.sampling import submit
from alignment.types import Request, SamplingParams
from tests.engines.helpers import Reinforce, learner_of, make_batch, tiny

CPU = torch.device("cpu")


def test_attention_is_computed_in_float32_where_autocast_would_take_bfloat16():
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    want = scaled_dot_product_attention(query, key, value, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        rough = scaled_dot_product_attention(query, key, value, is_causal=True)
        with float32_attention(CPU, autocast=True):
            exact = scaled_dot_product_attention(query, key, value, is_causal=True)
            mixed = scaled_dot_product_attention(query, key, value.bfloat16(), is_causal=True)
            product = query @ key.transpose(-1, -2)
        with float32_attention(CPU, autocast=False):
            untouched = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert rough.dtype == product.dtype == untouched.dtype == torch.bfloat16
    assert exact.dtype == mixed.dtype == torch.float32 and torch.equal(exact, want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_learner_uses_it_forward_and_backward(checkpointing):
    learner = learner_of(tiny("Llama"), autocast="bfloat16", gradient_checkpointing=checkpointing)
    kinds: list[torch.dtype] = []
    after_attention = learner.module.get_submodule("model.layers.0.self_attn.o_proj")
    after_attention.register_forward_pre_hook(lambda _, inputs: kinds.append(inputs[0].dtype))
    assert learner.update(make_batch(), Reinforce())["optimizer_steps"] == 1
    assert kinds == [torch.float32] * (2 if checkpointing else 1)
    learner.annotate(make_batch(), {"old_logp"})
    assert set(kinds) == {torch.float32}


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_products_take_one_thread_and_the_others_come_back(three_threads, monkeypatch):
    def inside(flop: float, autocast: bool = False, device: torch.device = CPU) -> int:
        with fitting_threads(device, flop, autocast):
            return torch.get_num_threads()

    assert [inside(1e6), inside(30e6), inside(30e6, True), inside(200e6, True)] == [1, 3, 1, 3]
    assert inside(1e6, device=torch.device("cuda")) == 3
    with pytest.raises(KeyError), fitting_threads(CPU, 1e6, False):
        raise KeyError
    assert torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # waiting threads are awake
    assert inside(1e6) == 3


def test_decoding_takes_one_thread_only_while_the_model_runs(three_threads):
    module, seen = tiny("Llama"), []
    module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    request = Request("a", (3, 4, 5), SamplingParams(4), 0)
    for _ in submit(TransformersSampler(module, TransformersSamplerConfig()), [request]):
        assert torch.get_num_threads() == 3
    assert seen == [1] * 4
