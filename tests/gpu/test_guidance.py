"""Value-augmented sampling in vLLM on a GPU, with whichever model runner it takes and with the older one."""

from contextlib import closing

import pytest
import torch

from alignment.algorithms.decodings import ValueAugmented
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.engines.vllm_sampler import VllmSampler
from tests.engines.guided import site, value_folder, worst
from tests.engines.vllm_helpers import drain, publish, requests, small


@pytest.mark.parametrize("runner", [None, "0"], ids=["its own choice", "the older runner"])
@pytest.mark.parametrize("sleep", [False, True])
def test_logp_is_that_of_the_tilted_distribution(tmp_path, monkeypatch, runner, sleep):
    if runner is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    policy = small(seed=0)
    folder = value_folder(tmp_path / "values", body=small("Llama", 3, hidden_size=64))
    decoding = ValueAugmented(str(folder), 2.0, top_k=6)
    config = VllmSamplerConfig(
        max_num_seqs=8, dtype="float32", kv_cache_gb=2, gpu_memory_utilization=0.4, enforce_eager=True, sleep=sleep
    )
    with closing(VllmSampler(site(policy, decoding, 96), config)) as sampler:
        publish(sampler, small(seed=0).cuda(), 0)
        for version in range(2):
            asked = requests(12, 20, first=100 * version, tilt=decoding.tilt)
            sampler.add(asked)
            assert worst(policy, decoding, asked, drain(sampler)) < 2e-2
            if sleep:
                sampler.sleep()
                sampler.wake("weights")
                publish(sampler, small(seed=0).cuda(), version + 1)
                sampler.wake("cache")
        beside = requests(6, 20, first=500)
        sampler.add(beside)
        assert worst(policy, decoding, beside, drain(sampler)) < 2e-2
    torch.cuda.empty_cache()
