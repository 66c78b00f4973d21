"""Every prompt in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from alignment.curricula.contract import curricula
from alignment.curricula.orders import next_of
from alignment.types import Context, Prompt


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
        taken, epoch, cursor = next_of("uniform", context.seed, state["epoch"], state["cursor"], len(prompts), n)
        return [prompts[i] for i in taken], {"epoch": epoch, "cursor": cursor}
