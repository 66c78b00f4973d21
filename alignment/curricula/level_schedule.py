"""Levels of procedural tasks, opened one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from alignment.curricula.contract import curricula
from alignment.curricula.orders import OfPrompts, arms_of, draw
from alignment.curricula.outcomes import pass_rate
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import Context, Prompt, Signals, keyed_seed


@curricula.register("level_schedule", source="this project", evidence="end to end")
@dataclass(frozen=True)
class LevelSchedule:
    """Opens the next level when the newest one is solved often enough.

    Levels are the values of a column of numbers, from the least to the greatest; tasks have one, ``level``. Prompts are
    drawn from the open levels: of the newest with probability ``newest``, otherwise of one of the others, each as
    likely. When the last ``window`` groups of the newest level have a mean pass rate of at least ``threshold``, the
    next level opens and counting begins anew. Groups count before any filter, steered rollouts do not. A level that was
    opened stays open.
    """

    draws: ClassVar[bool] = True

    by: Annotated[str, option("column that holds the level, a number")] = "level"
    start: Annotated[int, option("levels that are open from the beginning", ge=1)] = 1
    threshold: Annotated[float, option("mean pass rate that opens the next level", gt=0, le=1)] = 0.7
    window: Annotated[int, option("groups of the newest level that it is taken over", unit="groups", ge=1)] = 64
    newest: Annotated[float, option("share of prompts from the newest level, where others are open", gt=0, le=1)] = 0.5

    def fits(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where the column is not in every prompt, or holds no numbers."""
        _levels(prompts, self.by)

    def init(self) -> dict[str, Any]:
        """``levels`` is not known before the data is seen; ``rates`` are the latest of the newest open level."""
        return {"levels": [], "open": self.start, "rates": [], "cursors": {}, "draws": 0}

    def select(
        self, state: Any, prompts: Sequence[Prompt], n: int, context: Context
    ) -> tuple[list[Prompt], dict[str, Any]]:
        """``n`` prompts of open levels, which are drawn independently."""
        levels = _levels(prompts, self.by)
        names = list(levels)[: state["open"]]
        weights = {names[-1]: 1.0}
        if others := names[:-1]:
            weights = dict.fromkeys(others, (1 - self.newest) / len(others)) | {names[-1]: self.newest}
        key = keyed_seed("level_schedule", context.seed, state["draws"])
        taken, cursors = draw(levels, weights, state["cursors"], n, context.seed, key)
        after = {**state, "levels": list(levels), "open": len(names), "cursors": cursors, "draws": state["draws"] + 1}
        return [prompts[i] for i in taken], after

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        """The rates of the newest level after a batch, and whether they open the next."""
        if not state["levels"]:
            return dict(state)
        level = state["levels"][state["open"] - 1]
        found = [pass_rate(group) for group in signals.groups if str(group.prompt.row[self.by]) == level]
        rates = [*state["rates"], *(rate for rate in found if rate is not None)][-self.window :]
        full, more = len(rates) == self.window, state["open"] < len(state["levels"])
        if full and more and sum(rates) / len(rates) >= self.threshold:
            return {**state, "open": state["open"] + 1, "rates": []}
        return {**state, "rates": rates}

    def metrics(self, state: Any) -> dict[str, float]:
        """``open``, levels that are open, and ``rate``, the mean pass rate of the newest so far."""
        rates = state["rates"]
        return {"open": float(state["open"])} | ({"rate": sum(rates) / len(rates)} if rates else {})


def _by_number(prompts: Sequence[Prompt], by: str) -> Mapping[str, np.ndarray[Any, Any]]:
    arms = arms_of(prompts, (by,))
    try:
        return {level: arms[level] for level in sorted(arms, key=float)}
    except ValueError as error:
        raise UserError(
            f"level_schedule orders prompts by the numbers in their column {by!r}, and {error}: name another in 'by'"
        ) from error


_levels = OfPrompts(_by_number)
"""The indices of the prompts of each level, from the least to the greatest."""
