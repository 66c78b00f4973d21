"""Value-augmented sampling in vLLM engines that Ray placed: the plan travels, the value model is read there."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from alignment.algorithms.decodings import ValueAugmented
from alignment.engines.object_store import ObjectStoreTransport
from alignment.engines.ray_config import RayClusterConfig
from alignment.engines.ray_sampler import RaySampler
from alignment.engines.transport_config import ObjectStoreTransportConfig
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.sampling import submit
from tests.engines.guided import site, value_folder, worst
from tests.engines.helpers import learner_of
from tests.engines.vllm_helpers import requests, small


@pytest.mark.full
def test_an_engine_of_ray_is_steered(live_ray, tmp_path):
    learner = learner_of(small())
    decoding = ValueAugmented(str(value_folder(tmp_path / "values", body=small(seed=3))), 2.0, top_k=6)
    config = VllmSamplerConfig(max_num_seqs=4)
    here = site(learner.module, decoding, 96)
    stage = SimpleNamespace(learner=SimpleNamespace(), sampler=config)
    with RayClusterConfig(start_timeout_s=120.0).open(stage, here) as cluster:
        sampler = RaySampler(replace(here, cluster=cluster), config)
        ObjectStoreTransport(learner, sampler, ObjectStoreTransportConfig(bucket_mb=0.01)).publish(0)
        asked = [*requests(6, 9, tilt=decoding.tilt), *requests(3, 9, first=50)]
        found = {c.id: c for c in submit(sampler, asked)}
        sampler.close()
    assert worst(learner.module, decoding, asked, found) < 1e-4
