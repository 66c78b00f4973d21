"""Value-augmented sampling inside vLLM, against full forward passes.

The newer runner needs a GPU (``tests/gpu``); here its processor meets what vLLM would hand it."""

import importlib
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alignment.algorithms.decodings import Emulated, ValueAugmented
from alignment.engines.steering import SteeringPlan
from alignment.engines.value_model import load_value_model
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.engines.vllm_environment import prepare_vllm
from alignment.engines.vllm_sampler import VllmSampler
from alignment.errors import UserError
from tests.engines.guided import exact_logp, site, tokenizer, value_folder, worst
from tests.engines.vllm_helpers import drain, longer, publish, requests, sampler_of, small

prepare_vllm()
from alignment.engines.vllm_guidance import CONFIG, SlotProcessor, processor_for  # noqa: E402

POLICY = small(seed=0)
ROW = 96


@pytest.fixture(scope="module")
def decoding(tmp_path_factory):
    place = tmp_path_factory.mktemp("values")
    body = small("Llama", 3, hidden_size=64)
    first = value_folder(place / "first", body=body)
    second = value_folder(place / "second", 6, body=small(seed=4), kind="vocabulary")
    return ValueAugmented((str(first), str(second)), (2.0, 0.5), top_k=6)


UNSTEERED = ((0.0, 0.0), ())


@pytest.fixture(scope="module")
def plain():
    """Completions of an engine without decoding, which ends before there is another."""
    made = sampler_of(POLICY, ROW, max_num_seqs=4)
    made.add([replace(r, params=replace(r.params, tilt=())) for r in of(6, UNSTEERED)])
    found = drain(made)
    made.close()
    return found


@pytest.fixture(scope="module")
def shared(plain, decoding):
    made = VllmSampler(site(POLICY, decoding, ROW), VllmSamplerConfig(max_num_seqs=4))
    publish(made, POLICY, 0)
    yield made
    made.close()


@pytest.fixture
def sampler(shared):
    shared.abort(list(shared.engine.requests))
    return shared


def of(count, tilts, **options):
    asked = requests(count, 14, **options)
    return [
        replace(longer(r, 4 + 5 * i % 17), params=replace(longer(r, 4 + 5 * i % 17).params, tilt=tilts[i % len(tilts)]))
        for i, r in enumerate(asked)
    ]


def test_logp_is_that_of_the_tilted_distribution_as_requests_come_and_go(sampler, decoding):
    asked = of(10, (decoding.tilt, (), (0.0, -1.0), (-3.0, 0.0)), temperature=0.9)
    sampler.add(asked)
    found = drain(sampler)
    assert worst(POLICY, decoding, asked, found) < 3e-5
    for request in asked[::3]:
        sampler.add([request])
        alone = drain(sampler)[request.id]
        assert alone.token_ids == found[request.id].token_ids
        torch.testing.assert_close(torch.tensor(alone.logp), torch.tensor(found[request.id].logp))


def test_requests_that_are_aborted_leave_no_trace(sampler, decoding):
    asked = of(8, (decoding.tilt,))
    sampler.add(asked)
    for _ in range(5):
        sampler.poll(0)
    sampler.abort([r.id for r in asked[::2]])
    left = [r for r in asked[1::2] if r.id in sampler.engine.requests]
    found = drain(sampler)
    assert left and worst(POLICY, decoding, left, found) < 3e-5


def test_without_tilt_every_bit_is_that_of_an_engine_without_decoding(sampler, plain):
    sampler.add(of(6, UNSTEERED))
    assert drain(sampler) == plain


def test_greedy_takes_the_best_of_the_steered_logits(sampler, decoding):
    asked = of(4, ((3.0, 1.0),), temperature=0.0)
    sampler.add(asked)
    found = drain(sampler)
    models = [load_value_model(Path(folder)) for folder in decoding.addresses]
    for request in asked:
        tokens = found[request.id].token_ids
        warm = replace(request, params=replace(request.params, temperature=1.0))
        assert exact_logp(POLICY, models, decoding, warm, tokens).argmax(1).tolist() == list(tokens)
        assert set(found[request.id].logp) == {0.0}


def test_weights_change_in_the_middle(sampler, decoding):
    other = small(seed=9)
    asked = of(3, (decoding.tilt,))
    sampler.add(asked)
    for _ in range(3):
        sampler.poll(0)
    publish(sampler, other, 1)
    late = [replace(r, id=f"late {r.id}") for r in asked]
    drain(sampler)
    sampler.add(late)
    assert worst(other, decoding, late, drain(sampler)) < 3e-5
    publish(sampler, POLICY, 2)


def test_refusals(sampler, decoding, tmp_path):
    with pytest.raises(UserError, match="tilt has 1 numbers, and the sampler's decoding steers with 2 models"):
        sampler.add(of(1, ((1.0,),)))
    small(seed=1).save_pretrained(tmp_path / "lm")
    tokenizer().save_pretrained(tmp_path / "lm")
    emulated = Emulated(str(tmp_path / "lm"), str(tmp_path / "lm"))
    spec = sampler.engine.spec
    assert pickle.loads(pickle.dumps(spec)) == spec and spec.steering.folders == decoding.addresses
    with pytest.raises(UserError, match="sampler vllm: it has no decoding emulated; use sampler: transformers"):
        VllmSampler(site(POLICY, emulated, ROW), VllmSamplerConfig())


class Slots:
    """What vLLM's newer runner shares with processors: tokens and lengths by slot."""

    def __init__(self, slots=4):
        self.device = torch.device("cpu")
        self.prefill_len = SimpleNamespace(np=np.zeros(slots, dtype=np.int32))
        self.all_token_ids = SimpleNamespace(gpu=torch.zeros(slots, 96, dtype=torch.int32))
        self.lengths = [0] * slots

    def put(self, slot, ids, prompt):
        self.prefill_len.np[slot] = prompt
        self.all_token_ids.gpu[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        self.lengths[slot] = len(ids)


def test_the_processor_of_the_newer_runner(decoding):
    states, config = Slots(), SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True))
    config.additional_config = {CONFIG: SteeringPlan.of(site(POLICY, decoding, ROW)).to_json()}
    processor = SlotProcessor(config, states)
    models = [load_value_model(Path(folder)) for folder in decoding.addresses]
    g = torch.Generator().manual_seed(0)
    added = {1: (2.0, 0.5), 3: (), 0: (0.0, -1.0)}
    for slot, tilt in added.items():
        states.put(slot, torch.randint(0, 19, (5 + slot,), generator=g).tolist(), 5 + slot)
        params = SimpleNamespace(extra_args={"tilt": list(tilt)} if tilt else None)
        assert processor.add_request(slot, params) is bool(tilt)
    for step in range(8):
        order = [3, 0, 1] if step % 2 else [1, 3, 0]
        if step == 4:  # another request in the same slot, of which the first two tokens were computed
            states.put(1, [4, 5, 6], 3)
            processor.add_request(1, SimpleNamespace(extra_args={"tilt": [-1.0, 0.0]}))
        lengths = [2 if step == 4 and slot == 1 else states.lengths[slot] for slot in order]
        ids = [states.all_token_ids.gpu[slot, :length].tolist() for slot, length in zip(order, lengths, strict=True)]
        context = SimpleNamespace(
            idx_mapping_np=np.array(order),
            seq_lens_upper_bound_np=np.array([*lengths, 0]),
            input_ids=torch.tensor([own[-1] for own in ids], dtype=torch.int32),
        )
        logits = torch.randn(3, 19, generator=g)
        found = processor.apply(logits.clone(), context)
        for slot, own, before, after in zip(order, ids, logits, found, strict=True):
            tilt = {1: (-1.0, 0.0) if step > 4 else () if step == 4 else added[1], 3: (), 0: added[0]}[slot]
            top, wanted = before.topk(6).indices, before.clone()
            for model, beta in zip(models, tilt, strict=False):
                with torch.no_grad():
                    values = model.values(torch.tensor([[*own, a] for a in top.tolist()]))[:, -1]
                wanted[top] += beta * (values - values.mean())
            torch.testing.assert_close(after, wanted, atol=2e-5, rtol=1e-5)
        for slot in order:
            more = int(torch.randint(0, 19, (), generator=g))
            if not (step == 4 and slot == 1):
                states.put(
                    slot,
                    [*states.all_token_ids.gpu[slot, : states.lengths[slot]].tolist(), more],
                    states.prefill_len.np[slot],
                )


@pytest.mark.parametrize(("v2", "name"), [(True, "SlotProcessor"), (False, "BatchProcessor")])
def test_each_runner_gets_the_class_that_it_takes(v2, name):
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

    module, _, found = processor_for(SimpleNamespace(use_v2_model_runner=v2)).partition(":")
    assert found == name
    assert issubclass(getattr(importlib.import_module(module), found), LogitsProcessorV2 if v2 else LogitsProcessor)
