"""Real vLLM engines as actors, and what becomes of their work when they die, hang, or are left with no one."""

import os
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from alignment.engines.object_store import ObjectStoreTransport
from alignment.engines.ray_config import RayClusterConfig
from alignment.engines.ray_sampler import RaySampler
from alignment.engines.transport_config import ObjectStoreTransportConfig
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.errors import EngineFailed, UserError
from tests.engines.helpers import learner_of
from tests.engines.vllm_helpers import longer, requests, site_of, small, worst

HEARTBEAT_S = 10.0


@contextmanager
def engines(count, learner, **options):
    """A sampler of ``count`` engines and its transport, the learner's weights published as version 0."""
    config = VllmSamplerConfig(**{"engines": count, "max_num_seqs": 4, "heartbeat_s": HEARTBEAT_S, **options})
    stage = SimpleNamespace(learner=SimpleNamespace(), sampler=config)
    site = site_of(learner.module)
    with RayClusterConfig(start_timeout_s=120.0).open(stage, site) as cluster:
        sampler = RaySampler(replace(site, cluster=cluster), config)
        transport = ObjectStoreTransport(learner, sampler, ObjectStoreTransportConfig(bucket_mb=0.01))
        transport.publish(0)
        yield sampler, transport
        sampler.close()


def drain(sampler, count, meanwhile=lambda found: None):
    """``count`` completions, by id; fails if one comes twice."""
    found, deadline = {}, time.monotonic() + 300
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} came"
        for completion in sampler.poll(0.5):
            assert completion.id not in found, "it came twice"
            found[completion.id] = completion
        meanwhile(found)
    assert sampler.poll(0.0) == [] and sampler.router.pending == 0
    return found


def pid_of(sampler, index):
    engine = sampler.engines[index]
    return sampler.cluster.places[engine.actor._actor_id.hex()].pid


@pytest.fixture(scope="module")
def two(live_ray):
    learner = learner_of(small())
    with engines(2, learner, max_restarts=9) as (sampler, transport):
        yield sampler, transport, learner


def test_two_engines_share_the_work_and_say_what_the_learner_would(two):
    sampler, _, learner = two
    asked = requests(12, temperature=0.7)
    sampler.add(asked)
    assert {len(load.running) >= 4 for load in sampler.router.loads.values()} == {True}, "both are full, the rest waits"
    found = drain(sampler, 12)
    assert found.keys() == {r.id for r in asked}
    assert worst(learner.module, asked, found) < 1e-4
    assert {c.versions for c in found.values()} == {((0, 0),)}


def test_a_bad_request_is_refused_before_any_is_taken(two):
    sampler, _, _ = two
    good, bad = requests(2)
    with pytest.raises(UserError, match="exceed the model's"):
        sampler.add([good, longer(bad, 1000)])
    assert sampler.router.pending == 0


def test_new_weights_come_between_two_tokens_and_aborted_requests_never(two):
    sampler, transport, learner = two
    asked = requests(8, max_tokens=40)
    sampler.add(asked)
    sampler.abort([asked[0].id, asked[7].id])
    for parameter in learner.trained.values():
        parameter.data.add_(0.01)
    metrics = transport.publish(1)
    assert metrics["publish_changed"] == 1 and metrics["publish_buckets"] > 1
    found = drain(sampler, 6)
    assert found.keys() == {r.id for r in asked[1:7]}
    assert {c.versions[-1][0] for c in found.values()} == {1}
    sampler.add(requests(2, first=50))
    assert {c.versions for c in drain(sampler, 2).values()} == {((1, 0),)}


def wait_for(condition, sampler):
    """Looks after the engines until ``condition()`` holds; nothing may be pending."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert sampler.poll(0.0) == [], "a completion that nobody waits for"
        time.sleep(0.1)


def fail(engine):
    def step():
        raise RuntimeError("the GPU is on fire")

    engine.step = step


LOSSES = {
    "killed": lambda sampler, pid: os.kill(pid, signal.SIGKILL),
    "stopped": lambda sampler, pid: os.kill(pid, signal.SIGSTOP),
    "failed": lambda sampler, pid: sampler.engines[0].peer.call(fail).result(60),
}


@pytest.mark.parametrize("how", LOSSES)
def test_what_a_lost_engine_had_is_sampled_by_others_and_its_heir_has_the_newest_weights(two, how, caplog):
    """The stopped one is lost in an update, which is made anew with the others."""
    sampler, transport, learner = two
    first, ended = 100 + 100 * list(LOSSES).index(how), len(sampler.endings)
    asked = requests(16, max_tokens=40, first=first)
    sampler.add(asked)
    lost = pid_of(sampler, 0)
    LOSSES[how](sampler, lost)
    if how == "stopped":
        transport.publish(sampler.version + 1)
    found = drain(sampler, 16)
    assert found.keys() == {r.id for r in asked}
    assert len(sampler.endings) == ended + 1 and "engine 0 (process" in sampler.endings[-1]
    told = {
        "stopped": "did not answer for 10 s",
        "killed": "died",
        "failed": "failed: RuntimeError: the GPU is on fire",
    }
    assert told[how] in sampler.endings[-1]
    assert "another one takes its place" in caplog.text
    wait_for(lambda: 0 in sampler.router.loads, sampler)
    assert pid_of(sampler, 0) != lost
    again = requests(8, first=first + 50)
    sampler.add(again)
    on_heir = [id_ for id_, engine in sampler.router.where.items() if engine == 0]
    found = drain(sampler, 8)
    assert on_heir and {found[id_].versions for id_ in on_heir} == {((sampler.version, 0),)}
    assert worst(learner.module, again, found) < 1e-4


def test_an_engine_that_is_lost_while_all_sleep_is_replaced_when_they_wake(two):
    """Its heir gets no buckets: whoever waits for completions brings it the weights again."""
    sampler, transport, learner = two
    sampler.add(requests(4, first=500))
    drain(sampler, 4)
    sampler.sleep()
    lost = pid_of(sampler, 0)
    os.kill(lost, signal.SIGKILL)
    losses = sampler.losses
    wait_for(lambda: sampler.losses > losses, sampler)
    assert 0 not in sampler.engines, "the memory is the learner's"
    sampler.wake("weights")
    transport.publish(sampler.version + 1)
    sampler.wake("cache")
    published = []
    sampler.updated(sampler.version, again=lambda version: published.append(transport.publish(version)))
    assert 0 not in sampler.router.loads
    while 0 not in sampler.router.loads:
        asked = requests(2, first=510 + 2 * len(published), max_tokens=40)
        sampler.add(asked)
        assert worst(learner.module, asked, drain(sampler, 2)) < 1e-4
    assert pid_of(sampler, 0) != lost and len(published) == 1


def test_when_none_is_left_and_none_may_be_started_their_ends_are_told(live_ray):
    with engines(1, learner_of(small()), max_restarts=0) as (sampler, _):
        sampler.add(requests(4, max_tokens=40))
        os.kill(pid_of(sampler, 0), signal.SIGKILL)
        with pytest.raises(
            EngineFailed, match=r"no rollout engine is left \(max_restarts: 0\): engine 0 \(process .*died"
        ):
            drain(sampler, 4)
