"""How many devices the processes of a stage need, and whether a cluster has them. Plain numbers: nothing is started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Bundle = dict[str, float]


@dataclass(frozen=True)
class Node:
    """What one machine of a cluster has, in use or not."""

    gpus: float
    cpus: float


@dataclass(frozen=True)
class Needs:
    """Devices of the learner's ranks and of the engines. 0 of either: it lives in the process of the run itself."""

    learner_ranks: int
    engines: int
    tensor_parallel: int = 1
    colocated: bool = False
    device: Literal["gpu", "cpu"] = "cpu"
    cpus_per_process: float = 1.0
    max_staleness: int = 0
    """Batches that are in flight while one is learned from: more than 0 only where nothing is shared."""

    @classmethod
    def of(cls, stage: Any, colocated: bool, device: Literal["gpu", "cpu"], cpus_per_process: float) -> "Needs":
        """What ``stage`` needs: ``ranks`` of its learner, ``engines`` and ``tensor_parallel`` of its sampler."""
        sampler, learner = getattr(stage, "sampler", None), getattr(stage, "learner", None)
        ranks, engines = getattr(learner, "ranks", 0), getattr(sampler, "engines", 0)
        parallel = getattr(sampler, "tensor_parallel", 1)
        stale = getattr(stage, "max_staleness", 0)
        return cls(ranks, engines, parallel, colocated and ranks > 0 < engines, device, cpus_per_process, stale)

    @property
    def engine_devices(self) -> int:
        """Devices of all engines."""
        return self.engines * self.tensor_parallel

    @property
    def devices(self) -> int:
        """Devices of everything; colocated engines share the learner's."""
        if self.colocated:
            return max(self.learner_ranks, self.engine_devices)
        return self.learner_ranks + self.engine_devices

    @property
    def processes(self) -> int:
        """Ranks and engines, a process of each device of an engine among them."""
        return self.learner_ranks + self.engine_devices

    @property
    def cpus(self) -> float:
        """Cores that Ray is asked for."""
        return self.devices * self._bundle()["CPU"]

    def engine_bundles(self) -> list[list[Bundle]]:
        """For each engine, which needs them on one machine, a bundle for each of its devices."""
        return [[self._bundle() for _ in range(self.tensor_parallel)] for _ in range(self.engines)]

    def learner_bundles(self) -> list[Bundle]:
        """One for each rank that does not share an engine's."""
        own = self.learner_ranks - (self.engine_devices if self.colocated else 0)
        return [self._bundle() for _ in range(own)]

    def share(self) -> Bundle:
        """What one process takes of a bundle: all of it, or its half where learner and engine share."""
        part = 0.5 if self.colocated else 1.0
        return {"GPU": part if self.device == "gpu" else 0.0, "CPU": self.cpus_per_process}

    def shortfall(self, nodes: Sequence[Node]) -> str | None:
        """What a cluster of ``nodes`` lacks, and what could be changed; None where it has enough."""
        unit = "GPU" if self.device == "gpu" else "CPU"
        each = 1.0 if self.device == "gpu" else self._bundle()["CPU"]
        has = [node.gpus if self.device == "gpu" else node.cpus for node in nodes]
        fit = sum(int(amount / each + 1e-9) for amount in has)
        there = f"the cluster has {_count(sum(has), unit)} on {_count(len(nodes), 'node')}"
        if self.devices > fit:
            return f"{self._asked(unit, each)}; {there}. {self._remedy(fit)}"
        per_node = sorted((int(amount / each + 1e-9) for amount in has), reverse=True)
        if self.engines and sum(count // self.tensor_parallel for count in per_node) < self.engines:
            return (
                f"each of {_count(self.engines, 'engine')} needs {_count(self.tensor_parallel * each, unit)} on one"
                f" node (tensor_parallel {self.tensor_parallel}); {there}, at most"
                f" {_count(max(has, default=0), unit)} on one. Lower sampler.tensor_parallel"
                " or sampler.engines, or use larger nodes"
            )
        if (cpus := sum(node.cpus for node in nodes)) + 1e-9 < self.cpus:
            return (
                f"the run asks Ray for {_count(self.cpus, 'CPU')} ({_count(self.devices, 'device')} with"
                f" {self._bundle()['CPU']:g} each); the cluster has {_count(cpus, 'CPU')}."
                " Lower cluster.cpus_per_process"
            )
        return None

    def _bundle(self) -> Bundle:
        cpus = self.cpus_per_process * (2 if self.colocated else 1)
        return {"GPU": 1.0, "CPU": cpus} if self.device == "gpu" else {"CPU": cpus}

    def _asked(self, unit: str, each: float) -> str:
        parts = [
            _count(self.learner_ranks * each, f"learner {unit}") if self.learner_ranks else "",
            _count(self.engine_devices * each, f"engine {unit}") if self.engines else "",
        ]
        asked = " + ".join(part for part in parts if part)
        shared = f", shared, so {_count(self.devices * each, unit)}" if self.colocated else ""
        return f"the run needs {asked}{shared}"

    def _remedy(self, fit: int) -> str:
        ways: list[str] = []
        if self.device == "gpu" and self.learner_ranks and self.engines and not self.colocated:
            together = max(self.learner_ranks, self.engine_devices)
            also = " and max_staleness to 0" if self.max_staleness else ""
            ways += [f"set cluster.placement to colocated{also}"] if together <= fit else []
        ways += ["lower learner.ranks"] if self.learner_ranks > 1 else []
        ways += ["lower sampler.engines"] if self.engines > 1 else []
        ways += ["lower sampler.tensor_parallel"] if self.tensor_parallel > 1 else []
        ways += ["lower cluster.cpus_per_process"] if self.device == "cpu" else []
        ways += ["set cluster.device to cpu"] if self.device == "gpu" and not fit else []
        text = ", ".join([*ways, "or use a larger cluster" if ways else "use a larger cluster"])
        return text[0].upper() + text[1:]


def nodes_of(listing: Sequence[Mapping[str, Any]]) -> list[Node]:
    """The live machines in what ``ray.nodes()`` returns."""
    alive = [entry["Resources"] for entry in listing if entry["Alive"]]
    return [Node(resources.get("GPU", 0.0), resources.get("CPU", 0.0)) for resources in alive]


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
