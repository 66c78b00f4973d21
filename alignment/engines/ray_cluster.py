"""Actors on a Ray cluster: placed so that they fit, made ready, waited for with a deadline, and ended with the stage.

Placement groups hold one bundle for each device. An engine has a group of its own, all of it on one machine; the
learner's ranks have one together, or the engines' bundles where both share devices.
"""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

import alignment
from alignment.engines.config import Site
from alignment.engines.ray_config import RayClusterConfig
from alignment.engines.ray_needs import Needs
from alignment.engines.ray_process import Place, Preparation, ending, free_port, hosted, kill_process
from alignment.engines.ray_session import Session
from alignment.errors import EngineFailed, UserError

POLL_S = 0.1
"""How often waiting looks up from what it waits for."""
GRACE_S = 3.0
"""When a rank fails, another may be the one at fault: how long its death may take to be known."""


@dataclass(frozen=True)
class _Slot:
    """Where an actor goes."""

    group: PlacementGroup
    bundle: int
    node_id: str


class RayCluster:
    """Places actors and waits for them.

    Args:
        config: Options.
        needs: Devices that are asked for; the cluster is known to have them.
        site: Which plugins and folders every process needs.
        session: The connection.
    """

    def __init__(self, config: RayClusterConfig, needs: Needs, site: Site, session: Session) -> None:
        self.config, self.needs, self.site, self.session = config, needs, site, session
        self.places: dict[str, Place] = {}
        """Of each actor that was ready, by its id."""
        self._names: dict[str, str] = {}
        self._actors: list[Any] = []
        self._groups: list[PlacementGroup] = []
        self._engine_slots: list[_Slot] = []
        self._learner_slots: list[_Slot] = []
        self._processes: Counter[str] = Counter()  # of each machine, by its id

    @property
    def transport(self) -> str:
        """The name of the transport that suits its devices."""
        return "object_store" if self.needs.device == "cpu" else "ipc" if self.needs.colocated else "nccl"

    def place(self) -> None:
        """Reserves all devices.

        Raises:
            EngineFailed: They are not free within ``start_timeout_s``.
        """
        strict = [placement_group(bundles, strategy="STRICT_PACK") for bundles in self.needs.engine_bundles()]
        own = self.needs.learner_bundles()
        packed = [placement_group(own, strategy="PACK")] if own else []
        self._groups = [*strict, *packed]
        try:
            self.wait([group.ready() for group in self._groups], "devices to be free", self.config.start_timeout_s)
        except EngineFailed as error:
            raise EngineFailed(
                f"{error}. The cluster has them, but others use them, or no machine has those of an engine together:"
                f" free now: {_listed(ray.available_resources())}"
            ) from error
        self._engine_slots = [slots[0] for slots in map(_slots, strict)]
        of_engines = [slot for group in strict for slot in _slots(group)]
        shared = of_engines if self.needs.colocated else []
        slots = [*shared, *(slot for group in packed for slot in _slots(group))][: self.needs.learner_ranks]
        nodes = list(dict.fromkeys(slot.node_id for slot in slots))
        self._learner_slots = sorted(slots, key=lambda slot: nodes.index(slot.node_id))
        self._processes = Counter(slot.node_id for slot in [*of_engines, *slots])

    def learner_actors(self, cls: type, count: int, *args: Any, idle: Callable[[], None] | None = None) -> list[Any]:
        """One actor of ``cls(*args)`` for each rank, ready, in rank order.

        Their environment has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and OMP_NUM_THREADS. Ranks of one
        machine stand side by side. On GPUs LOCAL_RANK is 0, since Ray shows each rank the one that is its own.

        Args:
            cls: Of a module that every process can import.
            count: Ranks; the recipe's.
            args: For the constructor. References to objects in Ray's store arrive as they are.
            idle: Called while waiting; ``site.idle`` if None.

        Raises:
            EngineFailed: One did not become ready; says which and why.
            UserError: What a constructor refused.
        """
        slots = self._learner_slots
        assert count == len(slots), f"room was made for {len(slots)} ranks, not {count}"
        host, port = self._rendezvous(slots[0])
        environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        handles: list[Any] = []
        for rank, slot in enumerate(slots):
            before = sum(other.node_id == slot.node_id for other in slots[:rank])
            local = 0 if self.needs.device == "gpu" else before
            ranks = environment | {"RANK": str(rank), "LOCAL_RANK": str(local)}
            handles.append(self._create(f"learner rank {rank}", cls, args, slot, ranks))
        self.await_ready(handles, "the learner to start", idle)
        return handles

    def engine_actors(
        self,
        cls: type,
        count: int,
        *args: Any,
        environment: Mapping[str, str] | None = None,
        threads: Mapping[str, int] | None = None,
    ) -> list[Any]:
        """One actor of ``cls(*args)`` for each engine, ready; see :meth:`engine_actor`."""
        assert count == len(self._engine_slots), f"room was made for {len(self._engine_slots)} engines, not {count}"
        handles = [self.engine_actor(i, cls, *args, environment=environment, threads=threads) for i in range(count)]
        self.await_ready(handles, "the engines to start")
        return handles

    def engine_actor(
        self,
        index: int,
        cls: type,
        *args: Any,
        environment: Mapping[str, str] | None = None,
        threads: Mapping[str, int] | None = None,
    ) -> Any:
        """An actor of ``cls(*args)`` in the place of engine ``index``, which nothing else may be in; not yet ready.

        With tensor parallelism it holds no device itself: vLLM places its workers in the same placement group. That
        is for GPUs alone; nothing tests it on CPUs.

        Args:
            index: Which engine.
            cls: Of a module that every process can import.
            args: For the constructor.
            environment: More variables of the process.
            threads: By the names of ``ray.method(concurrency_group=...)``, how many calls of those run at once, beside
                all others, which run one after another in the order in which they were made.
        """
        variables = dict(environment or {})
        if (parallel := self.needs.tensor_parallel) > 1:
            variables |= {
                "VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, range(parallel))),
                "VLLM_RAY_PER_WORKER_GPUS": str(self.needs.share().get("GPU", 0.0)),
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without a GPU would be shown none
            }
        name, slot = f"engine {index}", self._engine_slots[index]
        return self._create(name, cls, args, slot, variables, threads, holds_device=parallel == 1)

    def arrived(self, actor: Any, place: Place) -> None:
        """Takes note of where an actor lives: what its ``align_place`` returned."""
        self.places[_id(actor)] = place

    def await_ready(self, handles: Sequence[Any], what: str, idle: Callable[[], None] | None = None) -> None:
        """Waits until the constructors of ``handles`` are done.

        Raises:
            EngineFailed: One died or took longer than ``start_timeout_s``.
            UserError: What a constructor refused.
        """
        refs = [handle.align_place.remote() for handle in handles]
        for handle, place in zip(handles, self.wait(refs, what, self.config.start_timeout_s, idle), strict=True):
            self.arrived(handle, place)

    def wait(
        self, refs: Sequence[Any], what: str, timeout_s: float, idle: Callable[[], None] | None = None
    ) -> list[Any]:
        """The values of ``refs``, in their order.

        Args:
            refs: References that actors' methods returned.
            what: For the message: "the learner to save", say.
            timeout_s: For all of them together.
            idle: Called about ten times a second; may raise to give the wait up. ``site.idle`` if None.

        Raises:
            EngineFailed: An actor died, or the time is over; names who.
            UserError: As an actor raised it. Any other exception of an actor is raised as Ray hands it on: of the type
                that it had, with the actor's traceback in its text.
        """
        deadline, idle = time.monotonic() + timeout_s, idle or self.site.idle
        values: dict[Any, Any] = {}
        pending = list(refs)
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            for ref in ready:
                try:
                    values[ref] = ray.get(ref)
                except RayError as error:
                    raise self.failure(ref, error, what, [*ready, *pending]) from error
            if pending:
                idle()
                if time.monotonic() > deadline:
                    who = ", ".join(map(self.name_of, pending))
                    raise EngineFailed(f"waited {timeout_s:g} s for {what}; no answer from {who}")
        return [values[ref] for ref in refs]

    def failure(self, ref: Any, error: RayError, what: str, others: Sequence[Any] = ()) -> BaseException:
        """The exception to raise for what waiting for ``ref`` raised.

        Args:
            ref: What was waited for.
            error: What Ray raised.
            what: As in :meth:`wait`.
            others: What was waited for at the same time. When one rank dies, the others may be first to complain.
        """
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, UserError):
                return error.cause
            end = time.monotonic() + GRACE_S
            for other in others:
                with contextlib.suppress(RayTaskError, GetTimeoutError):
                    try:
                        ray.get(other, timeout=max(0.0, end - time.monotonic()))
                    except RayActorError as death:
                        return EngineFailed(self._ended(other, death, what))
            return error
        return EngineFailed(self._ended(ref, error, what))

    def name_of(self, actor: Any) -> str:
        """Such as ``engine 2 (process 123 on 10.0.0.7)``, for messages; also of a reference that it returned."""
        key = _id(actor)
        place = self.places.get(key)
        return self._names.get(key, "the cluster") + (f" ({place})" if place else "")

    def _ended(self, ref: Any, error: RayError, what: str) -> str:
        return f"{self.name_of(ref)} died while the run waited for {what}: {ending(error, self.session.folder)}"

    def kill(self, actor: Any) -> None:
        """Ends an actor for good, also one that is stopped and answers nothing."""
        if actor in self._actors:
            self._actors.remove(actor)
        ray.kill(actor, no_restart=True)
        place = self.places.get(_id(actor))
        if place is None:
            return
        if place.node_id == ray.get_runtime_context().get_node_id():
            kill_process(place.pid)
        else:
            _on(place.node_id, kill_process).remote(place.pid)

    def close(self) -> None:
        """Ends all actors and gives their devices back; may be called twice."""
        for actor in list(self._actors):
            self.kill(actor)
        for group in self._groups:
            remove_placement_group(group)
        self._groups = []

    def _create(
        self,
        name: str,
        cls: type,
        args: Sequence[Any],
        slot: _Slot,
        environment: Mapping[str, str],
        threads: Mapping[str, int] | None = None,
        holds_device: bool = True,
    ) -> Any:
        share = self.needs.share()
        strategy = PlacementGroupSchedulingStrategy(slot.group, slot.bundle, placement_group_capture_child_tasks=True)
        options = {
            "num_cpus": share["CPU"],
            "num_gpus": share["GPU"] if holds_device else 0,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": {**self._environment(slot), **environment}},
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        packed = (Preparation(self.site.folders, self.site.plugins), tuple(args))
        remote: Any = ray.remote(concurrency_groups=dict(threads)) if threads else ray.remote  # pyright: ignore
        actor = remote(hosted(cls)).options(**options).remote(packed)
        self._names[_id(actor)] = name
        self._actors.append(actor)
        return actor

    def _environment(self, slot: _Slot) -> dict[str, str]:
        """Variables that every process has."""
        cores = own_cores()
        if not self.session.private:
            cores = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == slot.node_id)
        threads = self.config.threads or max(1, int(cores) // self._processes[slot.node_id])
        paths = [str(Path(alignment.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            # Where the project is run from its source, the current folder may be another one.
            "PYTHONPATH": os.pathsep.join(path for path in paths if path and "site-packages" not in path),
        }
        if self.session.loopback:  # gloo and vLLM would listen on the address of the machine's name
            variables |= {"VLLM_HOST_IP": "127.0.0.1"} | (
                {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
            )
        return {**variables, **self.config.environment}

    def _rendezvous(self, slot: _Slot) -> tuple[str, int]:
        """Address of the machine where rank 0 will be, and a port that is free there."""
        host = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == slot.node_id)
        if slot.node_id == ray.get_runtime_context().get_node_id():
            return host, free_port()
        ref = _on(slot.node_id, free_port).remote()
        return host, self.wait([ref], f"a free port on {host}", self.config.start_timeout_s)[0]


def _id(thing: Any) -> str:
    """The id of an actor, or of the actor whose method returned a reference."""
    return thing._actor_id.hex() if isinstance(thing, ActorHandle) else thing.task_id().actor_id().hex()


def _on(node_id: str, function: Callable[..., Any]) -> Any:
    """A task that runs ``function`` on one machine, whatever else that one does."""
    there: Any = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=there, max_retries=0)(function)


def _slots(group: PlacementGroup) -> list[_Slot]:
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [_Slot(group, bundle, nodes[bundle]) for bundle in range(group.bundle_count)]


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}s" for name in ("GPU", "CPU"))


def own_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
