"""Two evaluations on the same problems, compared problem by problem."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.evaluation.decoding import decoding_identity, shown_decoding
from alignment.evaluation.results import accuracies
from alignment.evaluation.statistics import compare
from alignment.evaluation.store import CONFIG, RESULTS, read_json, read_records

MUST_AGREE = {"prompt template": ("source", "prompt"), "chat": ("chat",), "reward": ("reward",)}
"""Without these, what differs would not be the checkpoint alone."""
MAY_DIFFER = {"samples": ("samples",), "sampling": ("sampling",)}


def compare_folders(a: Path, b: Path) -> dict[str, Any]:
    """Compares the evaluation in ``b`` with the one in ``a``, on the problems that both have.

    Returns:
        ``a`` and ``b``: folder, checkpoint and decoding of each. ``tasks``: for each that both completed, the fields of
        :class:`alignment.evaluation.statistics.Paired` and ``only_a``, ``only_b``, how many problems only one of them
        has a verdict on, which are left out. ``notes``: what else differs.

    Raises:
        UserError: A folder holds no evaluation, they have no task or problem in common, or a task was put to the two
            in different ways.
    """
    configs = [_config(folder) for folder in (a, b)]
    names = [name for name in configs[0]["tasks"] if name in configs[1]["tasks"]]
    if not names:
        there = " and ".join(f"{', '.join(c['tasks']) or 'none'} in {f}" for c, f in zip(configs, (a, b), strict=True))
        raise UserError(f"the two evaluations have no task in common that both completed: {there}")
    notes = [
        f"{name} is in {folder} only"
        for folder, own, other in ((a, *configs), (b, *configs[::-1]))
        for name in own["tasks"]
        if name not in other["tasks"]
    ]
    dtypes = [config["checkpoint"].get("dtype") for config in configs]
    if dtypes[0] != dtypes[1]:
        notes.append(f"the checkpoints were loaded in different numbers: {dtypes[0]} in A, {dtypes[1]} in B (--dtype)")
    told = [shown_decoding(config.get("decoding")) for config in configs]
    if decoding_identity(configs[0].get("decoding")) != decoding_identity(configs[1].get("decoding")):
        notes.append(f"they were decoded differently: {told[0]} in A, {told[1]} in B")
    tasks: dict[str, Any] = {}
    for name in names:
        first, second = (config["tasks"][name] for config in configs)
        _refuse_differences(name, first, second)
        notes += _remarks(name, first, second)
        tasks[name] = _compared(name, a, b)
        left_out = tasks[name]["only_a"] + tasks[name]["only_b"]
        if left_out:
            notes.append(f"{name}: {left_out} problems have a verdict in one evaluation only and are left out")
    sides = {
        side: {"folder": str(folder), "checkpoint": config["checkpoint"]["address"], "decoding": decoding}
        for side, folder, config, decoding in zip("ab", (a, b), configs, told, strict=True)
    }
    return {**sides, "tasks": tasks, "notes": notes}


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} holds no evaluation (it has no {CONFIG}); give the --output folder of `align eval`")
    if not (folder / RESULTS).exists():
        raise UserError(f"no task of {folder} is complete yet; repeat its command to go on")
    return read_json(folder / RESULTS)


def _compared(name: str, a: Path, b: Path) -> dict[str, Any]:
    first, second = (accuracies(read_records(folder, name)) for folder in (a, b))
    both = [problem for problem in first if problem in second]
    if not both:
        raise UserError(f"{name}: the two evaluations have no problem in common: {a} and {b} are of other data")
    found = compare([first[p] for p in both], [second[p] for p in both])
    return {**asdict(found), "only_a": len(first) - len(both), "only_b": len(second) - len(both)}


def _refuse_differences(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    different = [
        f"  {what}: {_get(first, path)!r} in A, {_get(second, path)!r} in B"
        for what, path in MUST_AGREE.items()
        if _get(first, path) != _get(second, path)
    ]
    if different:
        raise UserError(
            f"{name} was put to the two in different ways, so a difference would not be the checkpoints':\n"
            + "\n".join(different)
            + "\nEvaluate one of them again as the other was"
        )


def _remarks(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    remarks = [
        f"{name}: {what} differ: {_get(first, path)} in A, {_get(second, path)} in B"
        for what, path in MAY_DIFFER.items()
        if _get(first, path) != _get(second, path)
    ]
    if first["data"]["sha256"] != second["data"]["sha256"]:
        origins = f"{first['data']['origin']} in A, {second['data']['origin']} in B"
        remarks.append(f"{name}: the data is not the same ({origins}); problems that both have are compared")
    return remarks


def _get(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key)  # pyright: ignore[reportAssignmentType]
    return config
