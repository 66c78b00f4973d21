"""Mixers: which rollouts and demonstrations each update learns from, and in what proportion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from alignment.registry import Registry
from alignment.types import Batch, Context, Group, Rollout


@runtime_checkable
class Mixer(Protocol):
    """Routes groups and demonstrations to the learner's slots before credit, and may weigh rows after it."""

    def route(
        self,
        state: Any,
        groups: Sequence[Group],
        demonstrations: Mapping[str, Sequence[Rollout]],
        context: Context,
    ) -> Mapping[str, list[Group]]:
        """Groups by slot, ``rl`` being the main one; ``demonstrations`` are by :attr:`Prompt.key`."""
        ...

    def coefficients(self, state: Any, batch: Batch) -> Tensor | None:
        """``weight_B`` that multiplies each row's policy loss; None is 1."""
        ...


mixers: Registry[Mixer] = Registry("mixers", Mixer, "Which rollouts and demonstrations an update learns from")


@mixers.register("none", source="this project", evidence="end to end")
@dataclass(frozen=True)
class NoMix:
    """All groups as they were sampled, no demonstrations."""

    def route(
        self,
        state: Any,
        groups: Sequence[Group],
        demonstrations: Mapping[str, Sequence[Rollout]],
        context: Context,
    ) -> Mapping[str, list[Group]]:
        return {"rl": list(groups)}

    def coefficients(self, state: Any, batch: Batch) -> None:
        return None
