"""Log-probabilities and entropies against the model's own logits on the whole batch."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from alignment.engines.logprobs import LogProbs
from alignment.types import Batch
from tests.engines.helpers import assert_close, chunk_mb, make_batch, tiny, widen

PLAIN = ["Qwen2", "Qwen3", "Llama", "GPT2"]
PROCESSED = {
    "Gemma2": ({"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}, "changes logits after"),
    "Granite": ({"logits_scaling": 4.0}, "changes logits after"),
    "Cohere": ({"logit_scale": 0.25}, "changes logits after"),
}


def expected(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """By definition, one row at a time, without padding."""
    logp_BT, entropy_BT = torch.zeros(batch.ids_BT.shape), torch.zeros(batch.ids_BT.shape)
    for b in range(len(batch)):
        n = int(batch.length_B[b])
        logits = module(input_ids=batch.ids_BT[b : b + 1, :n]).logits[0].float() / batch.temperature_B[b]
        log_p = logits.log_softmax(-1)
        for t in range(1, n):
            if batch.loss_mask_BT[b, t]:
                logp_BT[b, t] = log_p[t - 1, batch.ids_BT[b, t]]
                entropy_BT[b, t] = torch.distributions.Categorical(logits=logits[t - 1]).entropy()
    return logp_BT, entropy_BT


@pytest.mark.parametrize("architecture", PLAIN)
@pytest.mark.parametrize("chunk_tokens", [3, 1000])
def test_equals_the_models_own_logits_at_the_rows_temperature(architecture: str, chunk_tokens: int) -> None:
    module, batch = tiny(architecture), make_batch()
    logprobs = LogProbs(module, chunk_mb(chunk_tokens))
    assert logprobs.slow_reason is None
    with torch.no_grad():
        logp_BT, entropy_BT = logprobs(widen(batch, 4), "value")
        want_logp, want_entropy = expected(module, batch)
    assert entropy_BT is not None
    assert logp_BT.dtype == torch.float32 and logp_BT.shape == (8, 15)
    torch.testing.assert_close(logp_BT[:, :11], want_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_BT[:, :11], want_entropy, rtol=1e-5, atol=1e-5)
    assert not logp_BT[:, 11:].any() and not logp_BT[1].any()


@pytest.mark.parametrize("architecture", PROCESSED)
def test_a_model_that_changes_its_logits_is_noticed_and_computed_right(
    architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    options, reason = PROCESSED[architecture]
    module, batch = tiny(architecture, **options), make_batch()
    with caplog.at_level(logging.WARNING):
        logprobs = LogProbs(module, chunk_mb(3))
    assert logprobs.slow_reason is not None and reason in logprobs.slow_reason
    assert architecture in caplog.text and reason in caplog.text
    logp_BT, entropy_BT = logprobs(batch, "value")
    want_logp, want_entropy = expected(module, batch)
    torch.testing.assert_close(logp_BT, want_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_BT, want_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}])
def test_what_moves_the_entropy_comes_beside_it(options: dict) -> None:
    """``sum_v p^2 (log p + H)`` over the vocabulary, in chunks and from the model's own logits."""
    module, batch = tiny("Gemma2" if options else "Qwen3", **options), make_batch()
    logprobs = LogProbs(module, chunk_mb(3))
    assert (logprobs.slow_reason is None) == (not options)
    with torch.no_grad():
        logp_BT, both = logprobs(batch, "drift")
        plain_logp_BT, entropy_BT = logprobs(batch, "value")
        logits = module(input_ids=batch.ids_BT).logits.float() / batch.temperature_B[:, None, None]
    assert both is not None and entropy_BT is not None and torch.equal(logp_BT, plain_logp_BT)
    assert torch.equal(both[..., 0], entropy_BT)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    drift = (log_p.exp() ** 2 * (log_p + entropy)).sum(-1)
    want_BT = torch.where(batch.loss_mask_BT, torch.cat([drift[:, :1] * 0, drift[:, :-1]], 1), 0.0)
    torch.testing.assert_close(both[..., 1], want_BT, rtol=1e-4, atol=1e-5)


def test_a_cap_is_noticed_even_where_it_does_nothing_yet() -> None:
    module = tiny("Gemma2", final_logit_softcapping=30.0, query_pre_attn_scalar=8)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.01)
    assert LogProbs(module, chunk_mb(3)).slow_reason is not None


class Halving(Qwen3ForCausalLM):
    """A model that scales hidden states between its body and its output embeddings."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> CausalLMOutputWithPast:  # pyright: ignore[reportIncompatibleMethodOverride]
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, **inputs).last_hidden_state / 2))


def test_hidden_states_changed_before_the_head_are_noticed() -> None:
    plain, batch = tiny("Qwen3"), make_batch()
    module = Halving(plain.config).eval()
    module.load_state_dict(plain.state_dict())
    logprobs = LogProbs(module, chunk_mb(3))
    assert logprobs.slow_reason is not None and "changes hidden states" in logprobs.slow_reason
    torch.testing.assert_close(logprobs(batch)[0], expected(module, batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"sliding_window": 3}, {"sliding_window": 3, "attn_implementation": "eager"}])
def test_padding_is_not_seen_through_a_sliding_window_either(options: dict[str, Any]) -> None:
    module, batch = tiny("Mistral", **options), make_batch()
    logp_BT, _ = LogProbs(module, chunk_mb(5))(widen(batch, 4))
    torch.testing.assert_close(logp_BT[:, :11], expected(module, batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("entropy", ["none", "value", "gradient"])
def test_gradients_equal_those_of_the_full_logits(entropy: str, tied: bool) -> None:
    module, batch = tiny(tie_word_embeddings=tied), make_batch()
    assert (module.get_submodule("lm_head").weight is module.get_submodule("model.embed_tokens").weight) == tied
    adv_BT = batch.adv_BT
    assert adv_BT is not None

    def gradients(logp_BT: Tensor, entropy_BT: Tensor) -> list[Tensor]:
        loss = (logp_BT * adv_BT).sum() + (entropy_BT**2).sum() * (entropy == "gradient")
        return list(torch.autograd.grad(loss, list(module.parameters())))

    want = gradients(*expected(module, batch))
    for chunk_tokens in (3, 1000):
        logp_BT, entropy_BT = LogProbs(module, chunk_mb(chunk_tokens))(batch, entropy)  # pyright: ignore[reportArgumentType]
        assert (entropy_BT is None) == (entropy == "none")
        if entropy_BT is not None:
            assert entropy_BT.requires_grad == (entropy == "gradient")
        got = gradients(logp_BT, torch.zeros(()) if entropy_BT is None else entropy_BT)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Widest(TorchDispatchMode):
    """Notes the largest tensor over a vocabulary of 500 that any operation gives, other than the weights' own size."""

    tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.ndim and 500 in tensor.shape and tensor.numel() != 500 * 16:
                self.tokens = max(self.tokens, tensor.numel() // 500)
        return out


@pytest.mark.parametrize("plain", [True, False])
def test_no_tensor_holds_the_vocabulary_for_more_tokens_than_a_chunk(plain: bool) -> None:
    module, batch = tiny(vocab_size=500), make_batch()
    if not plain:  # what is hooked is called, so it is no plain linear layer
        module.get_submodule("lm_head").register_forward_hook(lambda *_: None)
    logprobs = LogProbs(module, chunk_mb(4, 500))
    saved: list[int] = []
    noting = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with noting, Widest() as seen:
        logp_BT, _ = logprobs(batch, "value")
    assert batch.loss_mask_BT.sum() > 20
    assert seen.tokens in ((4, 8) if plain else (4,))  # on the way, two more blocks of the size of a chunk
    weights = {p.numel() for p in module.parameters()}
    assert not [n for n in saved if n % 500 == 0 and n not in weights]
    with Widest() as seen:
        logp_BT.sum().backward()
    assert seen.tokens in (4, 8)


def test_a_head_with_an_adapter_has_the_gradients_of_the_full_logits() -> None:
    batch, grown = make_batch(), []
    for chunk in (None, 3):
        module = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.2)
        logp_BT, entropy_BT = (
            expected(module, batch) if chunk is None else LogProbs(module, chunk_mb(chunk))(batch, "gradient")
        )
        assert entropy_BT is not None
        (logp_BT.sum() + (entropy_BT**2).sum()).backward()
        grown.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert "base_model.model.lm_head.lora_A.default.weight" in grown[0] and all(g.any() for g in grown[0].values())
    assert_close(grown[1], grown[0], rtol=1e-4)


def test_works_through_peft() -> None:
    module, batch = tiny(), make_batch()
    with torch.no_grad():
        plain, _ = LogProbs(module, chunk_mb(5))(batch)
    wrapped = get_peft_model(module, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_()
    logprobs = LogProbs(wrapped, chunk_mb(5))
    assert logprobs.slow_reason is None
    with torch.no_grad():
        adapted, _ = logprobs(batch)
        with wrapped.disable_adapter():
            off, _ = logprobs(batch)
        want, _ = expected(wrapped, batch)
    torch.testing.assert_close(adapted, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(off, plain)
    assert (adapted - plain).abs().max() > 0.1


def test_bfloat16_autocast_is_close_to_float32() -> None:
    module, batch = tiny(), make_batch()
    with torch.no_grad():
        exact, exact_entropy = LogProbs(module, chunk_mb(5))(batch, "value")
        rough, rough_entropy = LogProbs(module, chunk_mb(5), autocast=True)(batch, "value")
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1
    assert exact_entropy is not None and rough_entropy is not None
    assert (rough_entropy - exact_entropy).abs().max() < 0.1


def test_nothing_to_train_on_gives_zeros() -> None:
    batch = make_batch()
    batch = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    logp_BT, entropy_BT = LogProbs(tiny(), chunk_mb(5))(batch, "value")
    assert entropy_BT is not None
    assert not logp_BT.any() and not entropy_BT.any()


def test_looking_at_a_model_changes_neither_its_mode_nor_the_global_random_numbers() -> None:
    module = tiny("GPT2", resid_pdrop=0.5).train()
    module.get_submodule("transformer.h.0").eval()
    modes = [m.training for m in module.modules()]
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    LogProbs(module, chunk_mb(5))
    assert torch.equal(torch.rand(3), want)
    assert [m.training for m in module.modules()] == modes
    assert not module.get_submodule("lm_head")._forward_hooks
