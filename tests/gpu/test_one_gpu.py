"""One GPU in turns, without a cluster: vLLM and the torch learner in one process, with sleep and wake."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import alignment
from alignment.engines.colocated import Colocated
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.memory_transport import MemoryTransport
from alignment.engines.torch_learner import TorchLearner
from alignment.engines.transport_config import MemoryTransportConfig
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.engines.vllm_sampler import VllmSampler
from alignment.types import Completion, Request
from tests.engines.vllm_helpers import drain, logp_of, requests, site_of, small

ROOT = Path(__file__).parents[2]
CACHE_GIB = 4
MEBI = 1 << 20


def difference(module: nn.Module, asked: list[Request], found: dict[str, Completion]) -> float:
    """Mean, over sampled tokens, of how far the recorded log-probabilities are from ``module``'s in float32."""
    reference = small(seed=0)
    reference.load_state_dict({name: t.float().cpu() for name, t in module.state_dict().items()})
    off = [(logp_of(reference, r, found[r.id].token_ids) - torch.tensor(found[r.id].logp)).abs() for r in asked]
    return float(torch.cat(off).mean())


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[TorchLearner, VllmSampler, Colocated]]:
    """One for the module: vLLM's sleeping allocator serves one engine of a process."""
    learner = TorchLearner(small(seed=0), TorchLearnerConfig(device="cuda"), 10, 0)
    options: dict[str, Any] = {
        "max_num_seqs": 16,
        "kv_cache_gb": CACHE_GIB,
        "sleep": True,
        "gpu_memory_utilization": 0.5,
    }
    with closing(VllmSampler(site_of(small(seed=0)), VllmSamplerConfig(**options))) as sampler:
        transport = MemoryTransport(learner, sampler, MemoryTransportConfig(bucket_mb=0.01))
        yield learner, sampler, Colocated(transport, sampler)


def free() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_sleeping_gives_the_memory_and_waking_takes_it_again(pair):
    _, sampler, both = pair
    both.publish(0)
    awake = free()
    both.rest()
    asleep = free()
    assert asleep - awake > 0.9 * CACHE_GIB * 1024 * MEBI
    sampler.wake("weights")
    with_weights = free()
    assert with_weights <= asleep and with_weights - awake > 0.9 * CACHE_GIB * 1024 * MEBI  # the cache comes last
    both.transport.publish(1)
    sampler.wake("cache")
    both.asleep = False
    assert abs(free() - awake) < 64 * MEBI


def test_log_probabilities_are_right_after_every_turn(pair):
    learner, sampler, both = pair
    both.publish(10)
    asked = requests(8, 12, temperature=1.0)
    for turn in range(3):
        both.rest()
        with torch.no_grad():
            for i, p in enumerate(learner.module.parameters()):
                generator = torch.Generator(p.device).manual_seed(100 * turn + i)
                p.add_(0.1 * torch.randn(p.shape, generator=generator, device=p.device))
        before = difference(small(seed=0), asked, _sampled_with(sampler, both, asked, 11 + turn))
        found = drain_of(sampler, asked)
        assert difference(learner.module, asked, found) < 0.1 < before
        assert {c.versions for c in found.values()} == {((11 + turn, 0),)}


def drain_of(sampler: VllmSampler, asked: list[Request]) -> dict[str, Completion]:
    sampler.add(asked)
    return drain(sampler)


def _sampled_with(sampler: VllmSampler, both: Colocated, asked: list[Request], version: int) -> dict[str, Completion]:
    both.publish(version)
    return drain_of(sampler, asked)


def test_requests_in_flight_go_on_after_a_turn(pair):
    _, sampler, both = pair
    both.publish(20)
    asked = requests(4, 30, temperature=1.0)
    sampler.add(asked)
    for _ in range(4):
        assert sampler.poll(0) == []
    both.rest()
    both.publish(21)
    found = drain(sampler)
    assert set(found) == {r.id for r in asked} and all(len(c.token_ids) == 30 for c in found.values())


def test_a_few_steps_of_the_quickstart_on_vllm(tmp_path, monkeypatch):
    """The same recipe with another sampler, which sleeps while the learner works; in a process of its own, for vLLM."""
    import json
    import subprocess
    import sys

    settings = {
        "stages.0.steps": 60,
        "stages.1.steps": 4,
        "stages.1.sampler": "{name: vllm, sleep: true, kv_cache_gb: 1, gpu_memory_utilization: 0.4, max_num_seqs: 512}",
        "run.name": "one-gpu",
        "run.output": str(tmp_path),
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "alignment", "train", str(ROOT / "recipes/quickstart.yaml"), *sets]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    [metrics] = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train" and line["stage"] == "rl"]
    assert len(steps) == 4 and all(step["publish_bytes"] > 0 for step in steps)
    assert all(abs(step["mismatch_kl"]) < 1e-2 for step in steps)  # bfloat16 against float32
    assert alignment.__version__
