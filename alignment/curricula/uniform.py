"""Every prompt in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from alignment.curricula.contract import curricula
from alignment.types import Context, Prompt, keyed_seed


@curricula.register("uniform", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Uniform:
    """Every prompt once per epoch, in an order drawn anew for each epoch.

    A batch that crosses the end of an epoch takes the rest of it and the beginning of the next: after any number of
    batches the counts of two prompts differ by at most one.
    """

    draws: ClassVar[bool] = True

    def init(self) -> dict[str, int]:
        """The beginning of the first epoch."""
        return {"epoch": 0, "cursor": 0}

    def select(
        self, state: Mapping[str, int], prompts: Sequence[Prompt], n: int, context: Context
    ) -> tuple[list[Prompt], dict[str, int]]:
        """The next ``n`` prompts. ``cursor`` counts the prompts already taken from ``epoch``."""
        epoch, cursor = state["epoch"], state["cursor"]
        chosen: list[Prompt] = []
        while len(chosen) < n:
            order = _permutation(context.seed, epoch, len(prompts))
            taken = order[cursor : cursor + n - len(chosen)]
            chosen += [prompts[i] for i in taken]
            cursor += len(taken)
            if cursor == len(prompts):
                epoch, cursor = epoch + 1, 0
        return chosen, {"epoch": epoch, "cursor": cursor}


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(keyed_seed("uniform", seed, epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())
