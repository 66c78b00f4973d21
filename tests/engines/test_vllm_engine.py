"""The vLLM engine: streaming, weights between steps, records, and what it refuses. One engine for all of it."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alignment.engines.vllm_sampler import VllmSampler
from alignment.errors import UserError
from alignment.types import Request, SamplingParams
from tests.engines.vllm_helpers import PROMPTS, drain, longer, polled, publish, requests, sampler_of, small, worst

OLD, NEW = small(seed=0), small(seed=1)


@pytest.fixture(scope="module")
def shared() -> Iterator[VllmSampler]:
    sampler = sampler_of(OLD)
    yield sampler
    sampler.close()


@pytest.fixture
def sampler(shared: VllmSampler) -> VllmSampler:
    """With the weights of ``OLD`` and nothing pending."""
    shared.abort(list(shared.engine.requests))
    publish(shared, OLD, 0)
    return shared


def test_completions_stream_and_each_comes_once(sampler):
    asked = [longer(r, 4 + 3 * i) for i, r in enumerate(requests(6))]
    sampler.add(asked)
    order = []
    while found := sampler.poll():
        order.append([c.id for c in found])
    assert sum(order, []) == [r.id for r in asked] and len(order) == 6
    assert sampler.poll() == [] and sampler.poll(0) == []


def test_poll_gives_up_in_time_and_goes_on_later(sampler):
    sampler.add(requests(1, 30))
    assert sampler.poll(0) == []  # one step
    assert sampler.engine.pending == 1
    [done] = sampler.poll()
    assert len(done.token_ids) == 30


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_is_the_models(sampler, temperature):
    asked = requests(8, 20, temperature=temperature)
    sampler.add(asked)
    completions = drain(sampler)
    assert worst(OLD, asked, completions) < 1e-5
    assert all(c.versions == ((0, 0),) for c in completions.values())


def test_weights_change_between_two_steps(sampler):
    asked = requests(4, 20, temperature=1.0)
    late = requests(2, 20, first=100)
    sampler.add(asked)
    for _ in range(5):
        assert sampler.poll(0) == []
    received = publish(sampler, NEW, 1)
    assert received.version == 1 and received.tensors == len(list(NEW.parameters()))
    sampler.add(late)
    completions = drain(sampler)
    assert all(completions[r.id].versions == ((0, 0), (1, 5)) for r in asked)
    assert all(completions[r.id].versions == ((1, 0),) for r in late)
    before = {r.id: completions[r.id] for r in asked}
    cut = {i: type(c)(i, c.token_ids[:5], c.logp[:5], c.finish_reason, c.versions) for i, c in before.items()}
    assert worst(OLD, asked, cut) < 1e-5
    # The same prompts as those in flight, whose blocks of the cache were computed with the old weights.
    assert worst(NEW, late, completions) < 1e-5
    assert worst(NEW, asked, completions, first=5) > 1e-3  # their cache is of the old weights still


def test_what_waits_at_an_update_starts_with_the_new_weights(sampler):
    rows = sampler.engine.spec.options.max_num_seqs
    asked = requests(rows + 4, 6)
    sampler.add(asked)
    assert sampler.poll(0) == []
    publish(sampler, NEW, 3)
    completions = drain(sampler)
    runs = Counter(c.versions for c in completions.values())
    assert runs == {((0, 0), (3, 1)): rows, ((3, 0),): 4}
    waited = [r for r in asked if completions[r.id].versions == ((3, 0),)]
    assert worst(NEW, waited, completions) < 1e-5


def test_equal_prompts_are_computed_once_and_not_across_weights(sampler):
    cached = []
    original = sampler.engine._engine.step

    def step():
        outputs = original()
        cached.extend(o.num_cached_tokens for o in outputs if o.finished)
        return outputs

    sampler.engine._engine.step = step
    try:
        for version in (0, 0, 1):
            if version:
                publish(sampler, NEW, version)
            sampler.add(requests(2, 3))
            list(polled(sampler))
    finally:
        sampler.engine._engine.step = original
    assert cached == [0, 32, 32, 32, 0, 32]


def test_seed_gives_the_tokens_whatever_is_beside_it(sampler):
    asked = requests(8, 16)
    sampler.add(asked)
    together = drain(sampler)
    sampler.add(asked[3:4])
    assert drain(sampler)[asked[3].id].token_ids == together[asked[3].id].token_ids
    sampler.add([Request(r.id, r.prompt_ids, r.params, r.seed + 77) for r in asked])
    others = drain(sampler)
    assert sum(others[i].token_ids != c.token_ids for i, c in together.items()) >= 7
    largest = Request("big", PROMPTS[0], SamplingParams(3), (1 << 63) - 1)
    sampler.add([largest])
    assert len(drain(sampler)["big"].token_ids) == 3


def test_greedy_takes_the_most_likely_token_with_logp_0(sampler):
    greedy = requests(2, 12, temperature=0.0)
    beside = requests(2, 12, first=50)
    sampler.add(greedy + beside)
    completions = drain(sampler)
    for request in greedy:
        done = completions[request.id]
        ids = torch.tensor([[*request.prompt_ids, *done.token_ids]])
        best = OLD(ids).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1)
        assert best.tolist() == list(done.token_ids) and set(done.logp) == {0.0}
    assert all(sum(completions[r.id].logp) < 0 for r in beside)


def test_top_k_and_top_p_renormalise(sampler):
    for options, most in (({"top_k": 3}, 3), ({"top_p": 0.5}, None)):
        asked = requests(8, 12, temperature=1.3, **options)
        sampler.add(asked)
        completions = drain(sampler)
        for request in asked:
            done = completions[request.id]
            ids = torch.tensor([[*request.prompt_ids, *done.token_ids]])
            logits = OLD(ids).logits[0, len(request.prompt_ids) - 1 : -1].float() / 1.3
            for row, token, logp in zip(logits, done.token_ids, done.logp, strict=True):
                prob, order = row.detach().softmax(-1).sort(descending=True)
                kept = most or int((prob.cumsum(0) - prob < 0.5).sum())
                place = order.tolist().index(token)
                assert place < kept
                assert math.isclose(logp, float((prob[place] / prob[:kept].sum()).log()), abs_tol=1e-4)


def test_banned_tokens_never_come_and_the_rest_is_renormalised(sampler):
    module, banned = small(), tuple(range(4, 19))
    publish(sampler, module, 1)
    cases: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.0}, {"top_k": 3})
    for options in cases:
        asked = requests(8, 6, **options, banned_ids=banned)
        free = requests(4, 6, first=50)
        sampler.add([*asked, *free])
        done = drain(sampler)
        assert all(max(done[r.id].token_ids) < 4 for r in asked)
        assert any(max(done[r.id].token_ids) >= 4 for r in free), "others are sampled as before"
        for request in asked if not options else ():
            ids = torch.tensor([[*request.prompt_ids, *done[request.id].token_ids]])
            with torch.no_grad():
                logp = module(ids).logits[0, len(request.prompt_ids) - 1 : -1, :4].log_softmax(-1)
            expected = logp.gather(-1, ids[0, len(request.prompt_ids) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(done[request.id].logp), expected, rtol=0, atol=1e-4)


def test_a_stop_token_is_the_last_one(sampler):
    asked = requests(8, 40, stop_ids=(3, 5))
    sampler.add(asked)
    completions = drain(sampler)
    reasons = {c.finish_reason for c in completions.values()}
    assert reasons == {"stop", "length"} or reasons == {"stop"}
    for c in completions.values():
        ends = [t in (3, 5) for t in c.token_ids]
        assert not any(ends[:-1]) and ends[-1] == (c.finish_reason == "stop")
        assert len(c.logp) == len(c.token_ids) <= 40


def test_aborted_requests_never_come(sampler):
    asked = requests(6, 10)
    sampler.add(asked)
    sampler.poll(0)
    sampler.abort([asked[0].id, asked[3].id, "unknown"])
    assert drain(sampler).keys() == {r.id for r in asked} - {asked[0].id, asked[3].id}
    sampler.add(asked[:1])  # the id is free again
    assert drain(sampler).keys() == {asked[0].id}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": ()}, "its prompt has no tokens"),
        ({"params": SamplingParams(0)}, "max_tokens is 0"),
        ({"params": SamplingParams(60)}, "40 prompt tokens . max_tokens 60 exceed the model's 96 positions"),
        ({"params": SamplingParams(5, top_p=0.0)}, "top_p is 0.0"),
        ({"params": SamplingParams(5, temperature=0.001)}, "temperature is 0.001; with vLLM it must be 0"),
    ],
)
def test_a_bad_request_is_refused_before_any_is_taken(sampler, changes, message):
    bad = {"id": "bad", "prompt_ids": PROMPTS[0], "params": SamplingParams(5), "seed": 1} | changes
    with pytest.raises(UserError, match=f"request 'bad': {message}"):
        sampler.add([*requests(2), Request(**bad)])
    assert sampler.engine.pending == 0


def test_weights_that_are_not_the_models(sampler):
    named = dict(OLD.named_parameters())
    keys = "model.layers.1.self_attn.k_proj.weight"
    cases = (
        (
            {**named, "model.layers.7.mlp.up_proj.weight": named[keys]},
            r"has no place of this shape for model\.layers\.7\.mlp\.up_proj\.weight",
        ),
        ({n: p for n, p in named.items() if n != "model.norm.weight"}, r"got no weights for model\.norm\.weight"),
        ({n: p for n, p in named.items() if n != keys}, r"got a part only of model\.layers\.1\.self_attn\.qkv_proj"),
        (
            {**named, "lm_head.weight": named["lm_head.weight"][:-1]},
            r"no place of this shape for lm_head\.weight \[18, 32\]; got no weights for lm_head",
        ),
    )
    for weights, message in cases:
        sampler.begin_update(9)
        with pytest.raises(ValueError, match=message):
            sampler.load(weights)
            sampler.end_update()
        assert sampler.version is None
        with pytest.raises(AssertionError, match="no weights"):
            sampler.engine.step()
    publish(sampler, OLD, 10)
    sampler.add(requests(2))
    assert worst(OLD, requests(2), drain(sampler)) < 1e-5


def test_random_numbers_and_threads_of_the_process_are_left_alone(shared):
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"
    torch.manual_seed(3)
    first = torch.randn(4)
    torch.manual_seed(3)
    shared.add(requests(2))
    drain(shared)
    assert torch.equal(torch.randn(4), first)
