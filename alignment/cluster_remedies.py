"""Changes of a recipe that make a stage fit on a cluster: each is tried on the plan before it is told."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from alignment.cluster_plan import (
    USABLE,
    Hardware,
    Load,
    StageOnCluster,
    has_engine,
    holdings,
    is_local,
    needs_of,
    on_cluster,
    parallel_sizes,
)
from alignment.errors import UserError

MEMORIES = (16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288)
"""Of GPUs that there are, in GiB."""
SUGGESTED = 3
"""Changes that are told when each would do alone."""

NOTHING = (0, 0, 0)
"""What is lacking where a stage fits."""


@dataclass(frozen=True)
class _Change:
    """Other values of options, by part: of ``learner``, ``sampler`` or ``cluster``."""

    options: dict[str, dict[str, Any]]

    @property
    def key(self) -> tuple[tuple[str, ...], ...]:
        """Which options, whatever their values."""
        return tuple((part, *values) for part, values in self.options.items())

    def applied(self, stage: Any) -> Any | None:
        """The stage with them; None where it has no such options or they are as they were."""
        changed: dict[str, Any] = {}
        for part, values in self.options.items():
            component = getattr(stage, part)
            if not is_dataclass(component) or not all(hasattr(component, name) for name in values):
                return None
            try:
                changed[part] = replace(component, **values)  # pyright: ignore[reportArgumentType]
            except UserError:  # options that do not go with the others
                return None
        same = all(getattr(stage, part) == component for part, component in changed.items())
        return None if same else stage.model_copy(update=changed)

    def told(self, stage: Any) -> str:
        """What is to be written into the recipe; nothing of what is there already."""
        changed = [
            (f"{part}.{name}", value)
            for part, values in self.options.items()
            for name, value in values.items()
            if getattr(getattr(stage, part), name) != value
        ]
        return ", ".join(f"{name}: {json.dumps(value).strip(chr(34))}" for name, value in changed)


def _change(part: str, **options: Any) -> _Change:
    """Other values of options of one part."""
    return _Change({part: options})


def planned(name: str, stage: Any, load: Load, hardware: Hardware) -> StageOnCluster:
    """How ``stage`` lies on ``hardware``, whether it fits and, if not, what would make it fit."""
    plan = on_cluster(name, stage, load, hardware)
    if plan.fits:
        return plan
    return replace(plan, remedies=tuple(_remedies(stage, load, hardware)))


def _remedies(stage: Any, load: Load, hardware: Hardware) -> Iterator[str]:
    alone: list[_Change] = []
    together: list[_Change] = []
    changed, lack = stage, _lack(stage, load, hardware)
    for change in _changes(stage, load, hardware):
        other = change.applied(stage)
        if other is None:
            continue
        if _lack(other, load, hardware) == NOTHING:
            alone.append(change)
        further = change.applied(changed)
        less = _lack(further, load, hardware) if further is not None else lack
        if less < lack:
            changed, lack = further, less
            together.append(change)
    if alone:
        first = {change.key: change for change in reversed(alone)}  # of several values of an option
        told = list(dict.fromkeys(change.told(stage) for change in alone if change in first.values()))[:SUGGESTED]
        yield ("this would do: " if len(told) == 1 else "any one of these would do: ") + "; ".join(told)
    elif lack == NOTHING:
        last = {change.key: change for change in together}  # of several values of an option
        yield "these would do together: " + "; ".join(filter(None, (change.told(stage) for change in last.values())))
    else:
        yield from _hardware(stage, load, hardware)


def _lack(stage: Any, load: Load, hardware: Hardware) -> tuple[int, int, int]:
    """GPUs that are missing, problems other than memory, and bytes that are missing on all kinds of GPU."""
    plan, needs = on_cluster("", stage, load, hardware), needs_of(stage)
    total = hardware.nodes * hardware.gpus
    asked = (needs.learner_ranks, needs.engine_devices)
    groups = asked if needs.colocated else (sum(asked),)
    devices = 0 if is_local(stage) else sum(max(0, group - total) for group in groups)
    missing = sum(max(0, -holding.spare) for holding in plan.holdings)
    return devices, len(plan.problems) - sum(holding.spare < 0 for holding in plan.holdings), missing


def _changes(stage: Any, load: Load, hardware: Hardware) -> Iterator[_Change]:
    """What may be changed, the harmless first. A change of precision comes late, for results may then differ."""
    needs, total = needs_of(stage), hardware.nodes * hardware.gpus
    learner, sampler = stage.learner, stage.sampler
    yield from _for_engines(stage, load, hardware)
    yield _change("learner", gradient_checkpointing=True)
    tokens = getattr(learner, "micro_batch_tokens", None) or 0
    while tokens > load.row_tokens:
        tokens = max(tokens // 2, load.row_tokens)
        yield _change("learner", micro_batch_tokens=tokens)
    if getattr(learner, "logits_chunk_mb", 0) > 128:
        yield _change("learner", logits_chunk_mb=128.0)
    for stage_of_zero in (2, 3):
        if getattr(learner, "zero_stage", 3) < stage_of_zero:
            yield _change("learner", zero_stage=stage_of_zero)
    left = total if needs.colocated else total - needs.engine_devices
    if needs.learner_ranks:
        sizes = [n for n in range(1, left + 1) if load.minibatch_rows % n == 0]
        if sizes and sizes[-1] != needs.learner_ranks:
            yield _change("learner", ranks=sizes[-1])
    left = total if needs.colocated else total - needs.learner_ranks
    if needs.engines and not is_local(stage) and (engines := left // needs.tensor_parallel) > 0:
        yield _change("sampler", engines=engines)
    if needs.engines and not needs.colocated and needs.devices > total:  # fewer of both
        engines = max(1, needs.engines * total // needs.devices)
        yield _change("sampler", engines=engines)
        left = total - engines * needs.tensor_parallel
        if sizes := [n for n in range(1, left + 1) if load.minibatch_rows % n == 0]:
            yield _change("learner", ranks=sizes[-1])
    if needs.colocated:
        yield _Change({"cluster": {"placement": "separate"}, "sampler": {"sleep": False}})
    elif has_engine(stage) and not is_local(stage) and not getattr(stage, "max_staleness", 0):
        yield _Change({"cluster": {"placement": "colocated"}, "sampler": {"sleep": True}})
    if getattr(learner, "offload", None) == "none":
        yield _change("learner", offload="optimizer")
    if getattr(learner, "dtype", "bfloat16") == "float32":
        yield _change("learner", dtype="bfloat16")
    if getattr(sampler, "dtype", "bfloat16") == "float32":
        yield _change("sampler", dtype="bfloat16")


def _for_engines(stage: Any, load: Load, hardware: Hardware) -> Iterator[_Change]:
    """Room for weights and cache: the share of a GPU that just fits beside the learner, or more GPUs for an engine."""
    if not has_engine(stage):
        return
    needs = needs_of(stage)
    found, _ = holdings(stage, load, hardware)
    shared = next((h for h in found if "turns" in h.what), None)
    share = min(0.9, int(100 * (USABLE * hardware.memory - load.scoring) / hardware.memory) / 100)
    if shared is not None:
        resting = sum(n for name, n in shared.phases["sampling"].items() if not name.startswith("engine"))
        share = int(100 * (shared.limit - resting) / hardware.memory) / 100
    if share > 0:
        yield _change("sampler", gpu_memory_utilization=share)
    total = hardware.nodes * hardware.gpus
    room = min(needs.engine_devices, total if needs.colocated else total - needs.learner_ranks)
    for size in sorted(parallel_sizes(load.shape, hardware.gpus), key=lambda size: abs(size - needs.tensor_parallel)):
        engines = room // size
        if size != needs.tensor_parallel and engines > 0 and not is_local(stage):
            yield _change("sampler", tensor_parallel=size, engines=engines)


def _hardware(stage: Any, load: Load, hardware: Hardware) -> Iterator[str]:
    """What the stage as it stands would need."""
    total, needed = hardware.nodes * hardware.gpus, 1 if is_local(stage) else needs_of(stage).devices
    if needed > total:
        yield f"it needs {needed} GPUs as it stands, of {total}"
    if all(holding.spare >= 0 for holding in holdings(stage, load, hardware)[0]):
        return
    for memory in MEMORIES:
        found, _ = holdings(stage, load, Hardware(1, needed, memory))
        if memory > hardware.memory_gib and all(holding.spare >= 0 for holding in found):
            yield f"no change of its engines' options would do; GPUs of {memory} GiB would"
            return
    yield "no change of its engines' options would do: spread the learner or an engine over more GPUs"
