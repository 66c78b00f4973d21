"""How the stages of a recipe lie on a cluster, and whether they fit: numbers alone, nothing is started or loaded.

Where processes go is in :mod:`alignment.cluster_layout`, what one needs in :mod:`alignment.model_size`, changes that
would make a stage fit in :mod:`alignment.cluster_remedies`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from alignment.architectures import Shape
from alignment.cluster_layout import Hardware, counted, has_engine, is_local, layout, needs_of
from alignment.engines.config import transports
from alignment.engines.ray_needs import Node
from alignment.model_size import (
    CONTEXT,
    GIB,
    Training,
    cache_bytes_per_token,
    critic_bytes,
    engine_bytes,
    host_bytes,
    resting_bytes,
    training_bytes,
)
from alignment.recipe_sections import ModelConfig

ASLEEP = int(1.5 * GIB)
"""What a vLLM engine keeps while it sleeps: its context and CUDA graphs."""
USABLE = 0.95
"""Share of a GPU that a learner can fill: the allocator's blocks do not fit together without gaps."""
Parts = Mapping[str, int]


@dataclass(frozen=True)
class Load:
    """The model, and what a step asks of it."""

    model: ModelConfig
    shape: Shape
    rows: int
    """Of a step."""
    minibatch_rows: int
    row_tokens: int
    scoring: int = 0
    """What scoring processes keep on one GPU, in bytes (:func:`alignment.scoring_size.scoring_bytes`)."""


@dataclass(frozen=True)
class Holding:
    """GPUs that all hold the same."""

    what: str
    gpus: int
    phases: Mapping[str, Parts]
    """For each phase of a step, what is in memory by what it is for, in bytes."""
    limit: int
    """What may be in memory at once, in bytes."""

    @property
    def fullest(self) -> str:
        """The phase in which most is in memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Most that is in memory at once, in bytes."""
        return sum(self.phases[self.fullest].values())

    @property
    def spare(self) -> int:
        """What is left at the peak, in bytes; less than nothing where it does not fit."""
        return self.limit - self.peak


@dataclass(frozen=True)
class Cache:
    """How many rows of the greatest length the cache of one engine holds."""

    tokens: int
    sequences: int
    wanted: int
    """Rows that an engine gets in a step, as far as it takes them at once."""


@dataclass(frozen=True)
class StageOnCluster:
    """One stage on a cluster."""

    stage: str
    nodes: tuple[tuple[str, ...], ...]
    """For each node, what each of its GPUs holds; "" is nothing. Ray may choose another order."""
    holdings: tuple[Holding, ...]
    cache: Cache | None
    host_bytes: int
    """Of the memory of the node with most learner ranks: all of them load the model there at first."""
    problems: tuple[str, ...] = ()
    """Why it cannot run; empty where it can."""
    remedies: tuple[str, ...] = ()
    """Changes of the recipe that would mend it."""
    notes: tuple[str, ...] = ()
    """What is worth knowing beside."""

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return not self.problems

    @property
    def idle(self) -> int:
        """GPUs that hold nothing."""
        return sum(not held for node in self.nodes for held in node)

    def to_json(self) -> dict[str, Any]:
        """JSON values, what follows from the others among them."""
        kinds = [asdict(h) | {"peak": h.peak, "spare": h.spare, "fullest": h.fullest} for h in self.holdings]
        return asdict(self) | {"holdings": kinds, "fits": self.fits, "idle": self.idle}


def gib(amount: float) -> str:
    """Bytes in words; what would round to nothing in MiB."""
    return f"{amount / GIB:.1f} GiB" if abs(amount) >= 0.05 * GIB else f"{amount / 2**20:.1f} MiB"


def holdings(stage: Any, load: Load, hardware: Hardware) -> tuple[list[Holding], Cache | None]:
    """What the GPUs hold, and the cache of an engine, if there is one."""
    training = Training.of_stage(stage, load.model)
    rows = -(-load.minibatch_rows // training.ranks)
    parts = training_bytes(load.shape, load.model, training, load.row_tokens, rows, stage.needs_reference)
    critics = critic_bytes(load.shape, load.model, stage)
    beside = {"reward models": load.scoring} if load.scoring else {}  # on one GPU, whichever that is
    always = {"context": CONTEXT, **({"critics": critics} if critics else {}), **beside}
    update = {**always, **parts}
    rest = {
        **always,
        "learner at rest": resting_bytes(load.shape, load.model, training, stage.needs_reference),
    }
    usable = int(USABLE * hardware.memory)
    needs = needs_of(stage)
    if not has_engine(stage):
        cached = min(load.rows, getattr(stage.sampler, "batch_rows", load.rows)) * load.row_tokens
        cache = cached * cache_bytes_per_token(load.shape, load.model.dtype)
        phases = {"update": update, "sampling": {**rest, "cache": cache}}
        return [Holding("learner and sampler", max(1, needs.learner_ranks), phases, usable)], None
    engine, cache = _engine(stage, load, hardware)
    together = is_local(stage) or needs.colocated
    if together:
        sleeping = {} if keeps_awake(stage) else {"engine asleep": ASLEEP}
        awake = engine if keeps_awake(stage) else {}
        phases = {"update": {**update, **sleeping, **_named(awake)}, "sampling": {**rest, **_named(engine)}}
        both = 1 if is_local(stage) else min(needs.learner_ranks, needs.engine_devices)
        found = [Holding("learner and engine in turns", both, phases, usable)]
        ranks, engines = needs.learner_ranks - both, needs.engine_devices - both
    else:
        found, ranks, engines = [], needs.learner_ranks, needs.engine_devices
    if ranks > 0:
        found.append(Holding("learner", ranks, {"update": update}, usable))
    if engines > 0:
        limit = max(_budget(stage, hardware), usable) if beside else _budget(stage, hardware)
        found.append(Holding("engine", engines, {"sampling": {**engine, **beside}}, limit))
    return found, cache


def _named(engine: Parts) -> dict[str, int]:
    return {f"engine {name}": amount for name, amount in engine.items()}


def _budget(stage: Any, hardware: Hardware) -> int:
    """What an engine may use of each of its GPUs, in bytes; a cache of a given size is not bound by the share."""
    share = 1.0 if stage.sampler.kv_cache_gb is not None else stage.sampler.gpu_memory_utilization
    return int(share * hardware.memory)


def _engine(stage: Any, load: Load, hardware: Hardware) -> tuple[dict[str, int], Cache]:
    """What an engine keeps on each of its GPUs, and its cache. One row always has to fit."""
    sampler, parallel = stage.sampler, stage.sampler.tensor_parallel
    dtype = "bfloat16" if sampler.dtype == "auto" else sampler.dtype  # what vLLM takes on a GPU
    found = engine_bytes(load.shape, dtype, parallel, _budget(stage, hardware))
    if sampler.kv_cache_gb is not None:
        found["cache"] = int(sampler.kv_cache_gb * GIB)
    token = cache_bytes_per_token(load.shape, dtype, parallel)
    tokens = max(0, found["cache"]) // token
    found["cache"] = max(found["cache"], token * load.row_tokens)
    wanted = min(-(-load.rows // sampler.engines), sampler.max_num_seqs)
    return found, Cache(tokens, tokens // load.row_tokens, wanted)


def keeps_awake(stage: Any) -> bool:
    """Whether an engine that shares a GPU keeps its memory while the learner works."""
    return not stage.sampler.sleep


def on_cluster(name: str, stage: Any, load: Load, hardware: Hardware) -> StageOnCluster:
    """How ``stage`` lies on ``hardware``, and whether it fits there. Remedies are left out."""
    found, cache = holdings(stage, load, hardware)
    nodes = layout(stage, hardware)
    ranks = max(sum(held.startswith(("rank", "learner")) for held in node) for node in nodes)
    return StageOnCluster(
        stage=name,
        nodes=tuple(tuple(node) for node in nodes),
        holdings=tuple(found),
        cache=cache,
        host_bytes=ranks * host_bytes(load.shape, load.model, Training.of_stage(stage, load.model)),
        problems=(*unfit(stage, load, hardware), *_short(found)),
        notes=(*_notes(stage, hardware, cache), *_scoring(load)),
    )


def _short(found: Sequence[Holding]) -> list[str]:
    """What does not fit into memory, by how much, and what takes most of it."""
    problems: list[str] = []
    for holding in found:
        if holding.spare < 0:
            parts = sorted(holding.phases[holding.fullest].items(), key=lambda part: -part[1])[:3]
            most = ", ".join(f"{name} {gib(amount)}" for name, amount in parts)
            problems.append(
                f"memory: {holding.what} needs {gib(holding.peak)} in {holding.fullest} and may use "
                f"{gib(holding.limit)}, {gib(-holding.spare)} too much (most of it: {most})"
            )
    return problems


def parallel_sizes(shape: Shape, most: int) -> list[int]:
    """Values of ``tensor_parallel`` up to ``most`` that divide the model: its heads and the MLP, and the key-value
    heads, or are a multiple of those (each GPU then has a copy of one)."""
    return [
        size
        for size in range(1, most + 1)
        if shape.heads % size == 0
        and shape.intermediate % size == 0
        and (shape.kv_heads % size == 0 or size % shape.kv_heads == 0)
    ]


def unfit(stage: Any, load: Load, hardware: Hardware) -> list[str]:
    """Numbers that do not go together, with those that would do."""
    found: list[str] = []
    needs, shape = needs_of(stage), load.shape
    if is_local(stage):
        if needs.learner_ranks or getattr(stage.sampler, "engines", 1) > 1:
            found.append("cluster: 'local' is one process; ranks and several engines need cluster: ray")
        return found
    if has_engine(stage):
        sizes = parallel_sizes(shape, hardware.gpus)
        if needs.tensor_parallel not in sizes and needs.tensor_parallel <= hardware.gpus:
            found.append(
                f"sampler.tensor_parallel: {needs.tensor_parallel} does not divide the model ({shape.heads} heads, "
                f"{shape.kv_heads} key-value heads, {shape.intermediate} in the MLP); {_listed(sizes)} would do"
            )
    nodes = [Node(hardware.gpus, inf)] * hardware.nodes
    if (lacking := needs.shortfall(nodes)) is not None:
        found.append(f"cluster: {lacking}")
    if needs.learner_ranks > load.minibatch_rows:
        found.append(
            f"learner.ranks: {counted(load.minibatch_rows, 'row')} of a mini-batch for {needs.learner_ranks} ranks "
            f"leaves some without any; at most {load.minibatch_rows} would do, or fewer mini-batches"
        )
    lent = stage.transport is None or transports.name_of(stage.transport) == "ipc"
    if needs.colocated and lent and (alone := needs.engine_devices - needs.learner_ranks) > 0:
        found.append(
            f"learner.ranks: {counted(alone, 'GPU')} of engines would have no rank to bring new weights (transport "
            f"ipc); {needs.engine_devices} ranks would do, or transport: object_store"
        )
    return found


def _notes(stage: Any, hardware: Hardware, cache: Cache | None) -> list[str]:
    """What can run, but not as well as it could."""
    found: list[str] = []
    needs = needs_of(stage)
    if getattr(stage.cluster, "device", None) == "cpu":
        found.append("cluster.device is cpu, so ranks and engines stay off these GPUs; set it to auto to use them")
    prompts = getattr(stage, "prompts_per_step", None)
    if prompts and needs.engines > prompts:
        found.append(
            f"{counted(prompts, 'prompt')} of a step for {needs.engines} engines: the completions of a prompt stay "
            "on one engine, so some have nothing to do"
        )
    if cache is not None and 0 < cache.sequences < cache.wanted:
        found.append(
            f"an engine's cache holds {cache.sequences:,} rows of the greatest length at once of the {cache.wanted:,} "
            "that it gets; if all grow as long, the others wait"
        )
    spare = hardware.nodes * hardware.gpus - (1 if is_local(stage) else needs.devices)
    if spare > 0:
        ways = "cluster: ray uses more than one" if is_local(stage) else "raise learner.ranks or sampler.engines"
        found.append(f"{counted(spare, 'GPU')} would be idle; {ways}")
    return found


def _scoring(load: Load) -> list[str]:
    """How reward models take less."""
    if not load.scoring:
        return []
    return [
        f"scoring processes keep {gib(load.scoring)} of reward models on one GPU, here counted on each kind: fewer "
        "scoring.workers, and dtype: bfloat16 or device: cpu of these rewards, take less"
    ]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])
