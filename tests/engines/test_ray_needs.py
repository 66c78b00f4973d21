"""What a stage needs of a cluster, and what is said where that is not there."""

from types import SimpleNamespace

import pytest

from alignment.engines.ray_needs import Needs, Node, nodes_of


def stage(ranks=0, engines=0, tensor_parallel=1):
    learner = SimpleNamespace(ranks=ranks) if ranks else SimpleNamespace()
    sampler = SimpleNamespace(engines=engines, tensor_parallel=tensor_parallel) if engines else SimpleNamespace()
    return SimpleNamespace(learner=learner, sampler=sampler)


def gpus(*each):
    return [Node(count, 16.0 * count + 16) for count in each]


def test_separate_engines_add_up():
    needs = Needs.of(stage(ranks=8, engines=2, tensor_parallel=2), False, "gpu", 1.0)
    assert (needs.devices, needs.processes, needs.cpus) == (12, 12, 12.0)
    assert needs.engine_bundles() == [[{"GPU": 1.0, "CPU": 1.0}] * 2] * 2
    assert needs.learner_bundles() == [{"GPU": 1.0, "CPU": 1.0}] * 8
    assert needs.share() == {"GPU": 1.0, "CPU": 1.0}
    assert needs.shortfall(gpus(8, 4)) is None
    assert needs.shortfall(gpus(8)) == (
        "the run needs 8 learner GPUs + 4 engine GPUs; the cluster has 8 GPUs on 1 node. Set cluster.placement to "
        "colocated, lower learner.ranks, lower sampler.engines, lower sampler.tensor_parallel, or use a larger cluster"
    )


def test_sharing_is_advised_with_all_that_it_takes():
    stale = SimpleNamespace(**vars(stage(ranks=2, engines=1)), max_staleness=1)
    lacking = Needs.of(stale, False, "gpu", 1.0).shortfall(gpus(2))
    assert lacking is not None and "Set cluster.placement to colocated and max_staleness to 0, lower" in lacking


def test_colocated_engines_share():
    needs = Needs.of(stage(ranks=8, engines=2, tensor_parallel=2), True, "gpu", 1.0)
    assert needs.devices == 8 and needs.share() == {"GPU": 0.5, "CPU": 1.0}
    assert len(needs.learner_bundles()) == 4, "four ranks share with engines, four are alone"
    assert needs.engine_bundles()[0][0] == {"GPU": 1.0, "CPU": 2.0}, "each of the two processes has its core"
    assert needs.shortfall(gpus(8)) is None
    assert needs.shortfall(gpus(4)) == (
        "the run needs 8 learner GPUs + 4 engine GPUs, shared, so 8 GPUs; the cluster has 4 GPUs on 1 node. Lower "
        "learner.ranks, lower sampler.engines, lower sampler.tensor_parallel, or use a larger cluster"
    )


def test_an_engine_stays_on_one_node():
    needs = Needs.of(stage(engines=2, tensor_parallel=4), False, "gpu", 1.0)
    assert needs.shortfall(gpus(8)) is None
    lacking = needs.shortfall(gpus(4, 2, 2))
    assert lacking == (
        "each of 2 engines needs 4 GPUs on one node (tensor_parallel 4); the cluster has 8 GPUs on 3 nodes, at most 4 "
        "GPUs on one. Lower sampler.tensor_parallel or sampler.engines, or use larger nodes"
    )


def test_cores_count_too():
    needs = Needs.of(stage(ranks=2, engines=1), False, "gpu", 8.0)
    assert needs.shortfall([Node(4, 24)]) is None
    assert needs.shortfall([Node(4, 23)]) == (
        "the run asks Ray for 24 CPUs (3 devices with 8 each); the cluster has 23 CPUs. Lower cluster.cpus_per_process"
    )


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_one_process_needs_nothing(device):
    needs = Needs.of(stage(), True, device, 1.0)
    assert needs.devices == 0 and not needs.colocated
    assert needs.shortfall([Node(0, 0)]) is None


def test_without_gpus_the_cpu_is_named():
    needs = Needs.of(stage(ranks=1, engines=1), False, "gpu", 1.0)
    assert needs.shortfall([Node(0, 2)]) == (
        "the run needs 1 learner GPU + 1 engine GPU; the cluster has 0 GPUs on 1 node. Set cluster.device to cpu, or "
        "use a larger cluster"
    )
    cpu = Needs.of(stage(ranks=1, engines=1), False, "cpu", 2.0)
    assert cpu.shortfall([Node(0, 3)]) == (
        "the run needs 2 learner CPUs + 2 engine CPUs; the cluster has 3 CPUs on 1 node. Lower "
        "cluster.cpus_per_process, or use a larger cluster"
    )


def test_nodes_that_left_do_not_count():
    listing = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
    assert nodes_of(listing) == [Node(0.0, 4.0)]
