"""Opens a Ray cluster for a stage: what it needs is compared with what there is before anything is created."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import ray

from alignment.engines.config import Site
from alignment.engines.ray_cluster import RayCluster, own_cores
from alignment.engines.ray_config import RayClusterConfig
from alignment.engines.ray_needs import Needs, Node, nodes_of
from alignment.engines.ray_session import connected
from alignment.errors import UserError


@contextlib.contextmanager
def open_cluster(config: RayClusterConfig, stage: Any, site: Site) -> Iterator[RayCluster]:
    """Room for the actors of ``stage``. A private cluster begins and ends here.

    Raises:
        UserError: The cluster cannot be reached, or is too small.
    """
    gpus = _visible_gpus() if config.address is None and config.device != "cpu" else 0
    if config.address is None:
        needs = _needs(config, stage, gpus)
        _refuse(needs, [Node(gpus, max(needs.cpus, own_cores()))])
    cores = max(_needs(config, stage, gpus).cpus, own_cores())
    with connected(config.address, cores, gpus, config.object_store_mb) as session:
        nodes = nodes_of(ray.nodes())
        needs = _needs(config, stage, sum(node.gpus for node in nodes))
        _refuse(needs, nodes)
        cluster = RayCluster(config, needs, site, session)
        try:
            cluster.place()
            yield cluster
        finally:
            cluster.close()


def _needs(config: RayClusterConfig, stage: Any, gpus: float) -> Needs:
    """What the stage needs, on GPUs if there are any and the recipe does not say otherwise."""
    device: Literal["gpu", "cpu"] = "gpu" if config.device == "gpu" or (config.device == "auto" and gpus) else "cpu"
    return Needs.of(stage, config.placement == "colocated", device, config.cpus_per_process)


def _refuse(needs: Needs, nodes: Sequence[Node]) -> None:
    if (lacking := needs.shortfall(nodes)) is not None:
        raise UserError(f"cluster: {lacking}")


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()
