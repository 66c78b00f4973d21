"""Recipes as JSON values, and what differs between two."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from alignment.recipe_sections import written_reward
from alignment.registry import registry_of
from alignment.reward_registry import RewardSpec


def plain_values(value: Any) -> Any:
    """JSON values of a recipe or any part of it; components become mappings with their name."""
    registry = registry_of(value)
    if registry is not None:
        return registry.dump(value)
    if isinstance(value, RewardSpec):
        return written_reward(value)
    if isinstance(value, BaseModel):
        return {name: plain_values(getattr(value, name)) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_values(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    return value


_MAY_CHANGE = re.compile(
    r"run\.(save_every|rollouts_every|keep_last|flight_steps|alarm_window|sinks(\..+)?)|evaluation\.every|scoring\.workers"
    r"|stages\.\d+\.(steps|cluster(\..+)?|learner\.(ranks|zero_stage|timeout_s))"
)
_IDENTITY = ("run.name", "run.output")
"""Where a run is, which its folder says already: a run that was moved or renamed is the same run."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any, bool]]:
    """What differs between two resolved recipes.

    Returns:
        ``(dotted path, old value, new value, whether a run may continue with it)``; None where a side has no value.
        Steps, cadences, sinks, the cluster, how the learner is spread over processes, and the number of scoring
        workers may change. Where the run is written is no difference.
    """
    before, after = dict(_leaves(old, "")), dict(_leaves(new, ""))
    paths = [path for path in dict.fromkeys([*before, *after]) if path not in _IDENTITY]
    changed = [path for path in paths if (path in before) != (path in after) or before[path] != after[path]]
    return [(path, before.get(path), after.get(path), _MAY_CHANGE.fullmatch(path) is not None) for path in changed]


def _leaves(value: Any, path: str) -> Sequence[tuple[str, Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for key, child in items for leaf in _leaves(child, f"{path}.{key}" if path else str(key))]
    return found or [(path, value)]
