"""Which GPU of a cluster holds what of a stage."""

from dataclasses import dataclass
from typing import Any

from alignment.engines.ray_needs import Needs
from alignment.model_size import GIB


@dataclass(frozen=True)
class Hardware:
    """The machines that are asked about, all alike."""

    nodes: int = 1
    gpus: int = 1
    """Of one node."""
    memory_gib: float = 80.0
    """Of one GPU."""

    @property
    def memory(self) -> int:
        """Of one GPU, in bytes."""
        return int(self.memory_gib * GIB)

    def __str__(self) -> str:
        each = f"{counted(self.gpus, 'GPU')} with {self.memory_gib:g} GiB"
        return each if self.nodes == 1 else f"{self.nodes} nodes, each of {each}"


def counted(number: float, noun: str) -> str:
    """A number with its noun."""
    told = f"{int(number):,}" if number == int(number) else f"{number:g}"
    return f"{told} {noun}{'' if number == 1 else 's'}"


def needs_of(stage: Any) -> Needs:
    """GPUs of the stage's ranks and engines; what a ``local`` cluster runs shares one."""
    colocated = getattr(stage.cluster, "placement", "separate") == "colocated"
    return Needs.of(stage, colocated, "gpu", getattr(stage.cluster, "cpus_per_process", 1.0))


def is_local(stage: Any) -> bool:
    """Whether everything of the stage lives in one process."""
    return not hasattr(stage.cluster, "placement") or not (hasattr(stage.learner, "ranks") or has_engine(stage))


def layout(stage: Any, hardware: Hardware) -> list[list[str]]:
    """For each node, what each of its GPUs holds: engines first, each on one node, then ranks on what is left."""
    nodes = [[""] * hardware.gpus for _ in range(hardware.nodes)]
    if is_local(stage):
        nodes[0][0] = "learner + engine" if has_engine(stage) else "learner + sampler"
        return nodes
    needs = needs_of(stage)
    shared: list[tuple[int, int]] = []
    for engine in range(needs.engines):
        node = next((n for n, held in enumerate(nodes) if held.count("") >= needs.tensor_parallel), None)
        if node is None:
            continue
        for gpu in [g for g, held in enumerate(nodes[node]) if not held][: needs.tensor_parallel]:
            nodes[node][gpu] = f"engine {engine}"
            shared.append((node, gpu))
    free = [(n, g) for n, held in enumerate(nodes) for g, what in enumerate(held) if not what]
    order = [*shared, *free] if needs.colocated else free
    for rank, (node, gpu) in enumerate(order[: needs.learner_ranks]):
        nodes[node][gpu] = " + ".join(filter(None, (f"rank {rank}", nodes[node][gpu])))
    return nodes


def has_engine(stage: Any) -> bool:
    """Whether what samples has weights and a cache of its own (vLLM)."""
    return hasattr(stage.sampler, "tensor_parallel")
