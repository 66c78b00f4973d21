"""vLLM beside the embedded learner: what is published is what samples, for several architectures and ways to update."""

from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from alignment.engines.checksum import checksum
from alignment.engines.memory_transport import MemoryTransport
from alignment.engines.outgoing import buckets, outgoing
from alignment.engines.torch_learner import TorchLearner
from alignment.engines.transport_config import MemoryTransportConfig
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.engines.vllm_engine import VllmEngine
from alignment.engines.vllm_sampler import VllmSampler
from alignment.errors import UserError
from alignment.recipe import Lora
from alignment.types import Batch, Completion, Request
from tests.engines.helpers import Reinforce, learner_of, make_batch
from tests.engines.vllm_helpers import drain, publish, requests, sampler_of, site_of, small, worst


def pair(module: nn.Module, **options: Any) -> tuple[TorchLearner, VllmSampler, MemoryTransport]:
    learner = learner_of(module)
    config = VllmSamplerConfig(**({"max_num_seqs": 8} | options))
    lora = Lora(rank=8, alpha=16) if isinstance(module, PeftModel) else None
    origin: Any = SimpleNamespace(config=SimpleNamespace(lora=lora))
    sampler = VllmSampler(site_of(module, origin=origin), config)
    transport = MemoryTransport(learner, sampler, MemoryTransportConfig(bucket_mb=0.01, form=config.lora))
    return learner, sampler, transport


def sampled(sampler: VllmSampler, asked: list[Request]) -> dict[str, Completion]:
    sampler.add(asked)
    return drain(sampler)


def batch_of(asked: list[Request], completions: dict[str, Completion]) -> Batch:
    """What the learner annotates: the rollouts, with the sampler's log-probabilities."""
    rows = [(r.prompt_ids, completions[r.id]) for r in asked]
    width = max(len(p) + len(c.token_ids) for p, c in rows)
    batch = make_batch(rows=len(rows), width=width)
    ids_BT, logp_BT = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for i, (prompt, c) in enumerate(rows):
        end = len(prompt) + len(c.token_ids)
        ids_BT[i, :end] = torch.tensor([*prompt, *c.token_ids])
        logp_BT[i, len(prompt) : end] = torch.tensor(c.logp)
    return replace(
        batch,
        ids_BT=ids_BT,
        loss_mask_BT=logp_BT != 0,
        length_B=torch.tensor([len(p) + len(c.token_ids) for p, c in rows]),
        behaviour_logp_BT=logp_BT,
        temperature_B=torch.tensor([r.params.temperature for r in asked]),
        scored_B=torch.ones(len(rows), dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("Qwen3", {"tie_word_embeddings": True}), ("Qwen2", {}), ("Llama", {"attention_bias": True})],
    ids=["Qwen3 tied", "Qwen2", "Llama"],
)
def test_published_weights_are_those_that_sample(architecture, options):
    module = small(architecture, **options)
    learner, sampler, transport = pair(module)
    asked = requests(4, 12, temperature=1.0) + requests(4, 12, first=50, temperature=0.7)
    with closing(sampler):
        for version in range(3):
            metrics = transport.publish(version)
            batch = batch_of(asked, sampled(sampler, asked))
            annotated = learner.annotate(batch, ["old_logp"])
            assert annotated.old_logp_BT is not None
            off = (annotated.old_logp_BT - batch.behaviour_logp_BT)[batch.loss_mask_BT].abs().max()
            assert off < 1e-4 and metrics["publish_changed"] == 1.0
            learner.update(make_batch(seed=version), Reinforce())
        assert worst(module, asked, sampled(sampler, asked)) > 1e-3  # the last update was not published
    names = {name for name, _ in module.named_parameters()}
    assert metrics["publish_tensors"] == len(names) and ("lm_head.weight" in names) != bool(
        options.get("tie_word_embeddings")
    )
    assert metrics["publish_bytes"] == sum(p.nbytes for p in module.parameters()) and metrics["publish_buckets"] > 3


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_an_adapter_that_is_published_samples(form):
    """Added to the weights on their way, or alone, over a base that the engine has had from the beginning."""
    module = adapted(small("Llama"))
    learner, sampler, transport = pair(module, lora=form)
    asked = requests(6, 12)
    with closing(sampler):
        for version in range(2):
            metrics = transport.publish(version)
            assert worst(module, asked, sampled(sampler, asked)) < 1e-4
            learner.update(make_batch(seed=version), Reinforce())
        assert worst(module, asked, sampled(sampler, asked)) > 1e-3  # the last update was not published
    base = sum(1 for name, _ in module.named_parameters() if "lora_" not in name)
    assert metrics["publish_tensors"] == (base if form == "merged" else len(learner.trained))


def adapted(module: nn.Module) -> nn.Module:
    """With a random adapter, of the smallest rank that vLLM has, on every linear layer."""
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(module, config)  # pyright: ignore[reportArgumentType]


class TestInFlight:
    """Two ways for completions under way when weights change; that they go on is tested with the engine."""

    @pytest.fixture(scope="class")
    def modules(self) -> tuple[nn.Module, nn.Module]:
        return small(seed=0), small(seed=1)

    def test_pause_ends_what_has_begun_and_starts_nothing(self, modules):
        old, new = modules
        with closing(sampler_of(old, in_flight="pause", max_num_seqs=4)) as sampler:
            asked = requests(6, 10)
            sampler.add(asked)
            for _ in range(3):
                assert sampler.poll(0) == []
            publish(sampler, new, 1)
            first = {c.id: c for c in sampler.poll(0)}
            assert first.keys() == {r.id for r in asked[:4]} and {c.versions for c in first.values()} == {((0, 0),)}
            assert worst(old, asked[:4], first) < 1e-5
            rest = drain(sampler)
            assert {c.versions for c in rest.values()} == {((1, 0),)} and worst(new, asked[4:], rest) < 1e-5

    def test_recompute_makes_the_rest_the_new_weights_own(self, modules):
        old, new = modules
        with closing(sampler_of(old, in_flight="recompute")) as sampler:
            asked = requests(4, 20)
            sampler.add(asked)
            for _ in range(5):
                sampler.poll(0)
            publish(sampler, new, 1)
            completions = drain(sampler)
            assert {c.versions for c in completions.values()} == {((0, 0), (1, 5))}
            assert worst(new, asked, completions, first=5) < 1e-5

    def test_sleep_and_wake_keep_what_is_pending(self, modules):
        """On a CPU nothing is given up; the order of calls and the refusals are those of a GPU."""
        old, new = modules
        with closing(sampler_of(old, sleep=True)) as sampler:
            assert sampler.sleeps
            sampler.add(requests(2))
            sampler.poll(0)
            sampler.sleep()
            sampler.add(requests(2, first=20))
            for refused in (sampler.engine.step, lambda: sampler.begin_update(1), lambda: sampler.wake("cache")):
                with pytest.raises(AssertionError):
                    refused()
            sampler.wake("weights")
            publish(sampler, new, 1)
            with pytest.raises(AssertionError):
                sampler.engine.step()
            sampler.wake("cache")
            completions = drain(sampler)
            assert len(completions) == 4 and completions["20.0"].versions == ((1, 0),)


def test_steps_too_small_for_bfloat16_are_noticed():
    module = small().bfloat16().float()  # so that no weight is near the edge between two of bfloat16
    with closing(sampler_of(module, dtype="bfloat16")) as sampler:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1 + 1e-4)
        assert publish(sampler, module, 1).unchanged_in == "torch.bfloat16"
        with torch.no_grad():
            next(module.parameters()).add_(1.0)
        assert publish(sampler, module, 2).unchanged_in == ""
        assert publish(sampler, module, 3).unchanged_in == "", "nothing new was sent"


class TestSpec:
    def test_several_engines_need_a_cluster(self):
        with pytest.raises(UserError, match=r"sampler.engines is 2, .* set cluster: ray, or engines: 1"):
            VllmSamplerConfig(engines=2).build(site_of(small()), None)

    def test_rows_longer_than_the_model(self):
        with pytest.raises(UserError, match="rows of 500 tokens exceed the model's 128 positions"):
            sampler_of(small(), row_tokens=500)

    def test_heads_that_vllm_has_not(self):
        with pytest.raises(UserError, match=r"vLLM cannot run this model: on a CPU .* heads of 32, 64.* not of 16"):
            sampler_of(small(head_dim=16))

    def test_an_adapter_without_one(self):
        with pytest.raises(UserError, match=r"sampler.lora is 'adapter', but the model has no LoRA adapter"):
            sampler_of(small(), lora="adapter")

    def test_shapes_alone_are_enough(self):
        real = small()
        with torch.device("meta"):
            shapes = type(real)(real.config)  # pyright: ignore[reportCallIssue]
        chosen: dict[str, Any] = {"max_num_seqs": 8}
        with closing(VllmSampler(site_of(shapes), VllmSamplerConfig(**chosen))) as sampler:
            publish(sampler, real, 0)
            assert worst(real, requests(2), sampled(sampler, requests(2))) < 1e-5


class TestOutgoing:
    def test_buckets_hold_everything_once_within_their_size(self):
        module = small(tie_word_embeddings=True)
        named = dict(outgoing(module, "merged"))
        made = list(buckets(named.items(), 5000))
        assert [n for bucket in made for n in bucket] == list(named) == [n for n, _ in module.named_parameters()]
        sizes = [sum(t.nbytes for t in bucket.values()) for bucket in made]
        assert all(size <= 5000 or len(bucket) == 1 for size, bucket in zip(sizes, made, strict=True)) and len(made) > 5
        assert sum(checksum(bucket) for bucket in made) % (1 << 64) == checksum(dict(module.named_parameters()))

    def test_an_adapter_where_there_is_none(self):
        with pytest.raises(ValueError, match="no LoRA adapter to send"):
            dict(outgoing(small(), "adapter"))


def test_close_can_be_called_twice():
    sampler = sampler_of(small())
    assert isinstance(sampler.engine, VllmEngine)
    sampler.close()
    sampler.close()
