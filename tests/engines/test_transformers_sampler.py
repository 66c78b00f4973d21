"""The embedded sampler: what it samples, what it records, and that what is batched together does not matter."""

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TopKLogitsWarper, TopPLogitsWarper

from alignment.engines.config import LocalCluster, Site, TransformersSamplerConfig, clusters, samplers
from alignment.engines.transformers_sampler import TransformersSampler, draw, truncate
from alignment.models import Model
from alignment.sampling import Sampler, submit
from alignment.types import Completion, Request, SamplingParams
from tests.engines.helpers import tiny

VOCABULARY = 19
PROMPTS = [(3, 4, 5), (7,), (3, 4, 5), (1, 2, 3, 4, 5, 6, 7, 8), (9, 9), (3, 4, 6)]
PARAMS = [
    SamplingParams(12),
    SamplingParams(40, temperature=0.7),
    SamplingParams(9, temperature=1.6, top_k=5),
    SamplingParams(5, top_p=0.8),
    SamplingParams(20, temperature=1.3, top_k=9, top_p=0.6, stop_ids=(0, 11)),
    SamplingParams(15, temperature=2.0, stop_ids=(4,)),
]


def mixed_requests(count: int = 60) -> list[Request]:
    """Shared and single prompts of several lengths, with all kinds of parameters."""
    chosen = random.Random(0)
    return [Request(f"r{i}", chosen.choice(PROMPTS), chosen.choice(PARAMS), 1000 + i) for i in range(count)]


def run(module: nn.Module, requests: list[Request], **options: Any) -> dict[str, Completion]:
    found = list(submit(TransformersSampler(module, TransformersSamplerConfig(**options)), requests))
    assert len(found) == len(requests)
    return {c.id: c for c in found}


def exact_logp(module: nn.Module, ids: tuple[int, ...], params: SamplingParams) -> list[float]:
    """Log-probabilities of the token after ``ids``, one token at a time, written without the sampler's code."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids])).logits[0, -1].double() / params.temperature
    ranked = sorted(range(VOCABULARY), key=lambda v: -logits[v])
    kept = ranked[: params.top_k or None]
    if params.top_p < 1:
        total = logits[kept].exp().sum()
        mass, nucleus = 0.0, []
        for v in kept:
            if mass >= params.top_p:
                break
            nucleus.append(v)
            mass += float(logits[v].exp() / total)
        kept = nucleus
    norm = logits[kept].logsumexp(0)
    return [float(logits[v] - norm) if v in kept else -math.inf for v in range(VOCABULARY)]


def check_against_full_forward(module: nn.Module, requests: list[Request], tolerance: float = 1e-5) -> None:
    found = run(module, requests)
    for request in requests:
        completion, ids = found[request.id], request.prompt_ids
        assert len(completion.logp) == len(completion.token_ids)
        for token, logp in zip(completion.token_ids, completion.logp, strict=True):
            assert logp == pytest.approx(exact_logp(module, ids, request.params)[token], abs=tolerance)
            ids += (token,)


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "GPT2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_probabilities_are_those_of_a_full_forward_pass(architecture, attention):
    check_against_full_forward(tiny(architecture, attn_implementation=attention), mixed_requests(24))


def test_a_sliding_window_is_respected():
    check_against_full_forward(tiny("Mistral", sliding_window=6), mixed_requests(24))


def test_an_adapter_is_part_of_the_policy():
    base = tiny("Qwen3")
    without = run(base, mixed_requests())
    module = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    module.eval()
    check_against_full_forward(module, mixed_requests(24))
    assert run(module, mixed_requests()) != without
    with module.disable_adapter():
        assert {i: c.token_ids for i, c in run(module, mixed_requests()).items()} == {
            i: c.token_ids for i, c in without.items()
        }


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(3, temperature=1.5, top_k=3, stop_ids=(2, 5, 9, 13)),
        SamplingParams(3, temperature=3.0, top_k=6, top_p=0.7, stop_ids=(2, 5, 9, 13)),
        SamplingParams(1, temperature=2.0),
    ],
)
def test_sequences_come_with_their_exact_probabilities(params):
    """Chi-square of 6000 sequences against all possible ones, by a full forward pass for each prefix."""
    module, prompt, count = tiny("Llama", seed=1), (3, 4, 5), 6000
    exact: dict[tuple[int, ...], float] = {}
    prefixes = {(): 0.0}
    while prefixes:
        following = {}
        for prefix, logp in prefixes.items():
            for token, more in enumerate(exact_logp(module, prompt + prefix, params)):
                if more > -math.inf:
                    ends = token in params.stop_ids or len(prefix) + 1 == params.max_tokens
                    (exact if ends else following)[(*prefix, token)] = logp + more
        prefixes = following
    assert sum(map(math.exp, exact.values())) == pytest.approx(1.0, abs=1e-6)

    requests = [Request(str(i), prompt, params, i) for i in range(count)]
    seen = Counter(c.token_ids for c in run(module, requests, batch_rows=2000).values())
    assert seen.keys() <= exact.keys()
    expected = {ids: count * math.exp(logp) for ids, logp in exact.items()}
    common = [ids for ids in expected if expected[ids] >= 5]
    pairs = [(seen[ids], expected[ids]) for ids in common]
    pairs.append((count - sum(s for s, _ in pairs), count - sum(e for _, e in pairs)))
    chi_square = sum((s - e) ** 2 / e for s, e in pairs if e > 1)
    assert len(common) >= 6
    degrees = len(common)
    # Wilson-Hilferty: the cube root of chi-square / degrees is nearly normal; 3 standard deviations.
    spread = math.sqrt(2 / (9 * degrees))
    assert (chi_square / degrees) ** (1 / 3) < 1 - 2 / (9 * degrees) + 3 * spread


def test_what_is_batched_together_changes_nothing():
    module, requests = tiny("Qwen3"), mixed_requests()
    whole = run(module, requests, batch_rows=256)
    assert {c.finish_reason for c in whole.values()} == {"stop", "length"}
    shuffled = random.Random(1).sample(requests, len(requests))
    for rows, given in ((1, requests), (7, requests), (256, shuffled)):
        again = run(module, given, batch_rows=rows)
        for i, completion in whole.items():
            assert again[i].token_ids == completion.token_ids
            assert again[i].finish_reason == completion.finish_reason
            assert again[i].logp == pytest.approx(completion.logp, abs=1e-5)


def test_the_same_run_twice_is_the_same_to_the_bit_and_leaves_global_random_state_alone():
    module = tiny("Qwen3")
    torch.manual_seed(1)
    first, state = run(module, mixed_requests()), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert run(module, mixed_requests()) == first


def test_the_seed_decides():
    module = tiny("Qwen3")
    same = [Request(str(i), PROMPTS[0], SamplingParams(30), 5) for i in range(3)]
    found = run(module, same)
    assert found["0"].token_ids == found["1"].token_ids == found["2"].token_ids
    assert run(module, [replace(same[0], seed=6)])["0"].token_ids != found["0"].token_ids
    # One number per token: a longer limit continues the same completion.
    longer = [replace(same[0], params=SamplingParams(50))]
    assert run(module, longer)["0"].token_ids[:30] == found["0"].token_ids


def test_it_stops_exactly_at_a_stop_token_or_at_the_limit():
    found = run(tiny("Qwen3"), requests := mixed_requests())
    for request in requests:
        completion, params = found[request.id], request.params
        *before, last = completion.token_ids
        assert not set(before) & set(params.stop_ids)
        assert completion.finish_reason == ("stop" if last in params.stop_ids else "length")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == params.max_tokens
        assert len(completion.token_ids) <= params.max_tokens


def test_temperature_0_is_greedy_also_among_sampled_rows():
    module: Any = tiny("Qwen3")
    greedy = SamplingParams(10, temperature=0.0)
    requests = [Request(str(i), ids, greedy, i) for i, ids in enumerate(PROMPTS)]
    found = run(module, requests + mixed_requests())
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        expected = module.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, eos_token_id=None
        )
        assert found[request.id].token_ids == tuple(expected[0, ids.shape[1] :].tolist())
        assert found[request.id].logp == (0.0,) * 10


def test_each_prompt_is_computed_once_and_finished_rows_leave_the_batch():
    module = tiny("Qwen3")
    shapes: list[tuple[int, ...]] = []

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))
        assert not torch.is_grad_enabled()

    module.register_forward_pre_hook(note, with_kwargs=True)
    requests = [Request(f"{i}", (3, 4, 5), SamplingParams(1 + i), i) for i in range(8)]
    requests += [Request(f"other{i}", (7,), SamplingParams(8), i) for i in range(2)]
    run(module, requests)
    assert shapes == [(2, 3), *[(rows, 1) for rows in range(9, 2, -1)]]


def test_completions_come_as_they_finish_and_the_consumer_may_train_in_between_and_stop():
    module = tiny("Qwen3", attention_dropout=0.5)
    requests = [Request(str(n), (3, 4, 5), SamplingParams(n, stop_ids=()), n) for n in (6, 2, 4)]
    expected = run(module, requests)
    module.train()
    module.get_submodule("model.layers.0").eval()
    modes = [m.training for m in module.modules()]
    sampler = TransformersSampler(module, TransformersSamplerConfig())
    stream = submit(sampler, requests)
    order = []
    for completion in stream:
        order.append(completion.id)
        assert completion.token_ids == expected[completion.id].token_ids  # without dropout, though in training mode
        assert [m.training for m in module.modules()] == modes
        assert torch.is_grad_enabled()
        module(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
        if len(order) == 2:
            break
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert order == ["2", "4"]
    assert [m.training for m in module.modules()] == modes
    assert run(module, requests) == expected


def test_versions_say_which_weights_sampled_which_tokens():
    module = tiny("Qwen3")
    sampler = TransformersSampler(module, TransformersSamplerConfig())
    sampler.version = 7
    stream = iter(submit(sampler, [Request(str(n), (3,), SamplingParams(n), n) for n in (2, 5)]))
    assert next(stream).versions == ((7, 0),)
    sampler.version = 8
    assert next(stream).versions == ((7, 0), (8, 2))
    assert [c.versions for c in submit(sampler, mixed_requests(3))] == [((8, 0),)] * 3


def test_autocast_computes_in_bfloat16_and_still_records_what_it_sampled_from():
    module, requests = tiny("Qwen3"), mixed_requests()
    kinds: set[torch.dtype] = set()
    module.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
    found = run(module, requests, autocast="bfloat16")
    assert kinds == {torch.bfloat16}
    params = requests[0].params
    ids = requests[0].prompt_ids
    for token, logp in zip(found["r0"].token_ids, found["r0"].logp, strict=True):
        assert logp == pytest.approx(exact_logp(module, ids, params)[token], abs=0.25)
        ids += (token,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": ()}, "no tokens"),
        ({"params": SamplingParams(0)}, "max_tokens is 0"),
        ({"params": SamplingParams(3, temperature=-1.0)}, "temperature is -1.0"),
        ({"params": SamplingParams(3, temperature=float("nan"))}, "temperature is nan"),
        ({"params": SamplingParams(3, top_p=0.0)}, "top_p is 0.0"),
        ({"params": SamplingParams(3, top_k=-2)}, "top_k is -2"),
        ({"params": SamplingParams(62)}, "3 prompt tokens .* exceed the model's 64 positions"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_computed(change, message):
    sampler = TransformersSampler(tiny("Qwen3"), TransformersSamplerConfig())
    good = Request("a", (1, 2, 3), SamplingParams(61), 0)
    submit(sampler, [good])
    with pytest.raises(ValueError, match=f"request 'b': .*{message}"):
        submit(sampler, [good, replace(good, **{"id": "b", **change})])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_not_a_token(temperature):
    module = tiny("Qwen3")
    next(module.parameters()).data.fill_(math.nan)
    sampler = TransformersSampler(module, TransformersSamplerConfig())
    with pytest.raises(FloatingPointError, match="diverged"):
        list(submit(sampler, [Request("a", (1,), SamplingParams(2, temperature=temperature), 0)]))


def test_no_requests_no_completions():
    assert run(tiny("Qwen3"), []) == {}


def test_draw_inverts_the_distribution():
    logits = torch.tensor([0.5, 0.25, 0.0, 0.25, 0.0]).log()
    cases = {0.0: 0, 0.4999: 0, 0.5001: 1, 0.7499: 1, 0.7501: 3, 1 - 2**-53: 3}
    uniform = torch.tensor(list(cases), dtype=torch.float64)
    token, logp = draw(logits.expand(len(cases), -1), torch.ones(len(cases)), uniform)
    assert token.tolist() == list(cases.values())
    assert logp.exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])
    # A token of probability 0 is not chosen at the lower end either.
    first, _ = draw(logits.flip(0)[None], torch.ones(1), torch.zeros(1, dtype=torch.float64))
    assert first.tolist() == [1]
    # Temperature 0.5 squares the odds: 4 : 1 : 1.
    _, half = draw(logits[None], torch.tensor([0.5]), torch.zeros(1, dtype=torch.float64))
    assert half.exp().item() == pytest.approx(4 / 6)


def kept(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[int]:
    out = truncate(logits[None], torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p]))
    assert torch.equal(out[out > -math.inf], logits[out[0] > -math.inf])
    return (out[0] > -math.inf).nonzero()[:, 0].tolist()


def test_truncation_by_hand():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_k=9) == [0, 1, 2, 3]
    assert kept(logits, top_p=0.01) == [1]
    assert kept(logits, top_p=0.49) == [1]
    assert kept(logits, top_p=0.51) == [1, 3]
    assert kept(logits, top_p=0.81) == [0, 1, 3]
    # Of the two largest alone, the first has 5/8: top-p works on what top-k left.
    assert kept(logits, top_k=2, top_p=0.6) == [1]
    assert kept(logits, top_k=2, top_p=0.63) == [1, 3]
    # At temperature 0.5 the first has 0.25 / 0.365 = 0.68.
    assert kept(logits, temperature=0.5, top_p=0.6) == [1]
    assert kept(torch.zeros(3000), top_k=2) == [0, 1]  # ties


def test_truncation_is_that_of_transformers():
    torch.manual_seed(0)
    logits: Any = 3 * torch.randn(200, 50)
    ids: Any = None
    by_theirs = TopPLogitsWarper(0.7)(ids, TopKLogitsWarper(8)(ids, logits))
    ours = truncate(logits, torch.ones(200), torch.full((200,), 8), torch.full((200,), 0.7))
    assert torch.equal(ours, by_theirs)


def test_rows_that_do_not_truncate_are_left_alone_beside_rows_that_do():
    logits = torch.tensor([0.0, *[-40.0] * 30])  # the tail is lost when mass is summed
    both = truncate(logits.expand(2, -1), torch.ones(2), torch.tensor([0, 3]), torch.tensor([1.0, 1.0]))
    assert torch.equal(both[0], logits)
    assert (both[1] > -math.inf).sum() == 3


def test_recipes_build_it():
    config = samplers.build({"name": "transformers", "batch_rows": 3, "autocast": "bfloat16"})
    assert config == TransformersSamplerConfig(3, "bfloat16")
    sampler = config.build(Site(Model(tiny("Qwen3"), None, "tiny")), None)  # pyright: ignore[reportArgumentType]
    assert isinstance(sampler, Sampler) and isinstance(sampler, TransformersSampler)
    assert (sampler.name, sampler.config) == ("transformers", config)
    assert clusters.build("local") == LocalCluster()
