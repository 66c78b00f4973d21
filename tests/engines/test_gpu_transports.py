"""NCCL and CUDA IPC without a GPU: real engines, vLLM's own sending and receiving, over a wire that is a queue.

What only a GPU can show (that NCCL and IPC handles work, streams, memory) is in ``tests/gpu``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alignment.engines.ipc_transport import IpcTransport
from alignment.engines.nccl_transport import NcclTransport
from alignment.engines.transport_config import IpcTransportConfig, NcclTransportConfig
from alignment.engines.vllm_sampler import VllmSampler
from alignment.engines.vllm_transfer import by_alignment, watched
from alignment.errors import EngineFailed, UserError
from tests.engines.gpu_fakes import Fleet, Machine, Ranks
from tests.engines.helpers import learner_of
from tests.engines.vllm_helpers import drain, requests, sampler_of, small, worst

OLD, NEW = small(seed=0), small(seed=1)
NAMES = [name for name, _ in OLD.named_parameters()]


@pytest.fixture(scope="module")
def sampler() -> Iterator[VllmSampler]:
    sampler = sampler_of(OLD)
    yield sampler
    sampler.close()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def transport(kind: str, ranks: Ranks, fleet: Fleet) -> Any:
    """With buckets of few tensors."""
    if kind == "nccl":
        return NcclTransport(ranks, fleet, NcclTransportConfig(0.01, 120.0))
    return IpcTransport(ranks, fleet, IpcTransportConfig(0.01, 120.0))


def samples(sampler: VllmSampler, module: torch.nn.Module) -> float:
    """How far the engine's log-probabilities are from the module's."""
    sampler.abort(list(sampler.engine.requests))
    asked = requests(4, 6)
    sampler.add(asked)
    return worst(module, asked, drain(sampler))


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_what_is_published_samples(machine: Machine, sampler: VllmSampler, kind: str):
    machine.same = kind == "ipc"
    fleet = Fleet(sampler.engine)
    for version, module in ((1, NEW), (2, OLD)):
        both = transport(kind, Ranks(learner_of(module)), fleet)
        metrics = both.publish(version)
        assert sampler.version == version and samples(sampler, module) < 1e-5
        assert metrics["publish_tensors"] == len(NAMES) and metrics["publish_buckets"] > 2
        assert metrics["publish_bytes"] == sum(p.nbytes for p in module.parameters())
        assert both.publish(version + 10)["publish_changed"] == 0.0
    assert machine.collected == (4 if kind == "ipc" else 0)


def test_the_group_is_made_once_and_anew_for_a_new_engine(machine: Machine, sampler: VllmSampler):
    fleet = Fleet(sampler.engine)
    both = transport("nccl", Ranks(learner_of(NEW)), fleet)
    both.publish(1)
    both.publish(2)
    assert [who for who, _ in machine.joins] == ["worker", "learner"]
    info = dict(machine.joins)
    assert info["worker"] == {"rank": 1, "world_size": 2} and info["learner"]["world_size"] == 2
    assert info["learner"]["master_address"] == "127.0.0.1" and info["learner"]["master_port"] > 0
    fleet.restart()
    both.publish(3)
    assert len(machine.joins) == 4 and sampler.version == 3


def test_ranks_of_several_engines_follow_one_another():
    from alignment.engines.nccl_transport import Rendezvous

    meeting = Rendezvous("10.0.0.1", 1234, (2, 1, 4))
    assert [meeting.init_info(i, 1.0)["rank_offset"] for i in range(3)] == [1, 3, 4]
    assert {meeting.init_info(i, 1.0)["world_size"] for i in range(3)} == {8}
    assert meeting.learner_info == {"master_address": "10.0.0.1", "master_port": 1234, "world_size": 8}


def test_a_byte_that_changed_on_the_way_is_found(machine: Machine, sampler: VllmSampler):
    both = transport("nccl", Ranks(learner_of(NEW)), Fleet(sampler.engine))
    both.publish(1)
    machine.wire.spoil = True
    with pytest.raises(EngineFailed, match="policy version 2: what vllm engine 0 received is not .* checksum"):
        both.publish(2)
    both.publish(3)  # by a new group
    assert len(machine.joins) == 4 and samples(sampler, NEW) < 1e-5


def test_nobody_waits_for_ever_for_a_learner_that_does_not_send(machine: Machine, sampler: VllmSampler):
    fleet = Fleet(sampler.engine)
    both = transport("nccl", Ranks(learner_of(NEW)), fleet)
    both.publish(1)
    machine.wire.cut, patient, both.config = True, both.config, NcclTransportConfig(0.01, 1.0)
    with pytest.raises(EngineFailed, match="vllm engine 0"):
        both.publish(2)
    [engine] = fleet.peers()
    # Its thread is free again: the engine let go of the wire by itself. It refuses to work with half an update.
    assert engine.call(lambda e: e.version).result(timeout=60) is None
    both.config = patient
    both.publish(3)
    assert samples(sampler, NEW) < 1e-5


def test_two_members_on_one_gpu_are_refused(machine: Machine, sampler: VllmSampler):
    machine.same = True
    with pytest.raises(UserError, match="vllm engine 0 and learner rank 0 have the same GPU.*use transport: ipc"):
        transport("nccl", Ranks(learner_of(NEW)), Fleet(sampler.engine)).publish(1)


def test_memory_is_lent_on_the_same_gpu_only(machine: Machine, sampler: VllmSampler):
    with pytest.raises(UserError, match="vllm engine 0 works on GPU-1, and no rank of the learner does"):
        transport("ipc", Ranks(learner_of(NEW)), Fleet(sampler.engine)).publish(1)


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_an_engine_in_this_process_is_refused(sampler: VllmSampler, kind: str):
    with pytest.raises(UserError, match=f"transport {kind} .*use transport: memory"):
        transport(kind, Ranks(learner_of(NEW)), sampler)  # pyright: ignore[reportArgumentType]


def test_all_ranks_gather_and_their_handles_are_merged(machine: Machine, sampler: VllmSampler):
    machine.same = True
    asked: list[dict[str, Any]] = []

    class Counting:
        """A learner that notes how often its weights are asked for."""

        def __init__(self, index: int) -> None:
            self.learner, self.index = learner_of(NEW), index

        def weights(self, bucket_bytes: int, form: Any):
            for bucket in self.learner.weights(bucket_bytes, form):
                asked.append({"rank": self.index, "names": list(bucket)})
                yield bucket

    transport("ipc", Ranks(Counting(0), Counting(1)), Fleet(sampler.engine)).publish(4)
    by_rank = [[a["names"] for a in asked if a["rank"] == rank] for rank in (0, 1)]
    assert by_rank[0] == by_rank[1] and sum(by_rank[0], []) == NAMES
    assert samples(sampler, NEW) < 1e-5


def test_an_odd_number_of_short_elements_does_not_shift_longer_ones():
    bucket = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(2), "c": torch.zeros(1, dtype=torch.uint8)}
    assert list(by_alignment(bucket)) == ["b", "a", "c"]


class TestWatched:
    def test_releases_what_hangs(self):
        import threading

        stuck = threading.Event()
        with pytest.raises(TimeoutError, match="receiving took longer than 0.05 s"):
            with watched(stuck.set, 0.05, "receiving"):
                assert stuck.wait(60)

    def test_leaves_other_errors_and_successes_alone(self):
        released: list[int] = []
        with pytest.raises(KeyError), watched(lambda: released.append(1), 60, "receiving"):
            raise KeyError
        with watched(lambda: released.append(1), 60, "receiving"):
            pass
        assert not released
