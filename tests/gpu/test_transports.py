"""Weights over NCCL and CUDA IPC to an engine in another process: what is published is what samples."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

from alignment.engines.ipc_transport import IpcTransport
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.nccl_transport import NcclTransport
from alignment.engines.torch_learner import TorchLearner
from alignment.engines.transport_config import IpcTransportConfig, NcclTransportConfig
from alignment.errors import EngineFailed, UserError
from alignment.types import Completion, Request
from benchmarks.gpu_engine import Apart, EnginePeer, dies, digests, sampled
from tests.engines.vllm_helpers import logp_of, requests, small

ENGINE: dict[str, Any] = {"max_num_seqs": 16, "gpu_memory_utilization": 0.3, "kv_cache_gb": 0.5, "dtype": "bfloat16"}
NEAR, FAR = 0.1, 0.5
"""Mean difference of log-probabilities: of bfloat16 from float32, and of one random model from another."""


def learner_of(seed: int) -> TorchLearner:
    """In bfloat16, so that the engine keeps what it gets bit for bit."""
    return TorchLearner(small(seed=seed).to(torch.bfloat16), TorchLearnerConfig(device="cuda"), 10, 0)


def transport(kind: str, learner: Any, sampler: Any, timeout_s: float = 300.0) -> Any:
    if kind == "nccl":
        return NcclTransport(learner, sampler, NcclTransportConfig(0.01, timeout_s))
    return IpcTransport(learner, sampler, IpcTransportConfig(0.01, timeout_s))


@pytest.fixture(params=["ipc", "nccl"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: NCCL takes one member of a group on each")
    return request.param


def engine_apart(kind: str) -> Apart:
    """On the learner's GPU under IPC, on the next one under NCCL."""
    return Apart(EnginePeer(small(), 0 if kind == "ipc" else 1, "vllm engine 0", **ENGINE))


@pytest.fixture
def sampler(kind: str) -> Iterator[Apart]:
    with closing(engine_apart(kind)) as apart:
        yield apart


def difference(module: nn.Module, asked: list[Request], found: dict[str, Completion]) -> float:
    """Mean, over sampled tokens, of how far the recorded log-probabilities are from ``module``'s in float32."""
    off = [(logp_of(module, r, found[r.id].token_ids) - torch.tensor(found[r.id].logp)).abs() for r in asked]
    return float(torch.cat(off).mean())


def test_what_is_published_samples(kind: str, sampler: Apart):
    learners, asked = [learner_of(0), learner_of(1)], requests(8, 12, temperature=1.0)
    [engine] = sampler.peers()
    seen = []
    for version, learner in enumerate(learners):
        both = transport(kind, learner, sampler)
        metrics = both.publish(version)
        assert metrics["publish_bytes"] == sum(p.nbytes for p in learner.module.parameters())
        assert metrics["publish_buckets"] > 2
        found = engine.call(sampled, asked).result(timeout=300)
        assert {c.versions for c in found.values()} == {((version, 0),)}
        own, other = (difference(small(seed=s), asked, found) for s in (version, 1 - version))
        assert own < NEAR and other > FAR
        seen.append(engine.call(digests).result(timeout=300))
        assert both.publish(version + 10)["publish_changed"] == 0.0
        assert engine.call(digests).result(timeout=300) == seen[-1]
    assert seen[0].keys() == seen[1].keys() and not set(seen[0].values()) & set(seen[1].values())


def test_an_engine_that_dies_is_named_and_another_takes_its_place(kind: str, sampler: Apart):
    both = transport(kind, learner_of(0), sampler, timeout_s=60.0)
    both.publish(0)
    [first] = sampler.peers()
    first.call(dies)
    with pytest.raises(EngineFailed, match="vllm engine 0"):
        both.publish(1)
    with closing(engine_apart(kind)) as second:
        sampler.engines = second.engines
        assert both.publish(1)["publish_tensors"] > 0
    torch.cuda.synchronize()  # the learner's own stream is not stuck behind a broadcast


def test_the_learner_can_go_on_at_once(kind: str, sampler: Apart):
    """What was sent is what the weights were, though they change right after ``publish`` returns."""
    learner = learner_of(0)
    both = transport(kind, learner, sampler)
    both.publish(0)
    with torch.no_grad():
        for p in learner.module.parameters():
            p.zero_()
    [engine] = sampler.peers()
    asked = requests(8, 12, temperature=1.0)
    assert difference(small(seed=0), asked, engine.call(sampled, asked).result(timeout=300)) < NEAR


def test_nccl_refuses_to_share_a_gpu():
    with closing(engine_apart("ipc")) as sampler, pytest.raises(UserError, match="have the same GPU"):
        transport("nccl", learner_of(0), sampler).publish(0)


def test_lent_memory_is_given_back():
    with closing(engine_apart("ipc")) as sampler:
        both = transport("ipc", learner_of(0), sampler)
        both.publish(0)
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info()
        for version in range(1, 30):
            both.publish(version)
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
        after, _ = torch.cuda.mem_get_info()
        assert before - after < 64 << 20
