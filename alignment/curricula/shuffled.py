"""A filter with nothing to tell: another one's decisions, dealt out to groups at random."""

from dataclasses import dataclass
from typing import Annotated, Any

from alignment.curricula.contract import Curriculum, curricula
from alignment.errors import UserError
from alignment.registry import component, option
from alignment.types import Group, Signals, keyed_seed


@curricula.register("shuffled", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Shuffled:
    """For studies: drops as many groups as another filter does, but not the same ones.

    Each group gets one of the decisions that the other filter takes on the groups of the batch before, drawn by its
    prompt and number; the first batch, before any decision, is kept whole. What an arm with this attains comes from
    how much is dropped, and not from what. Goes with what the other filter goes with.
    """

    of: Annotated[Curriculum, component(curricula), option("the filter, such as difficulty_filter")]

    def __post_init__(self) -> None:
        if not hasattr(self.of, "keep") or any(hasattr(self.of, other) for other in ("select", "admits", "replay")):
            raise UserError(
                f"'{curricula.name_of(self.of)}' is not a filter alone, whose decisions could be shuffled; 'of' takes "
                "difficulty_filter, or a curriculum of yours with keep and none of select, admits and replay"
            )

    @property
    def max_refills(self) -> int:
        """That of the other one."""
        return getattr(self.of, "max_refills", 0)

    @property
    def on_exhausted(self) -> str:
        """That of the other one."""
        return getattr(self.of, "on_exhausted", "error")

    @property
    def min_group_size(self) -> int:
        """That of the other one."""
        return getattr(self.of, "min_group_size", 1)

    def init(self) -> dict[str, Any]:
        """``decisions`` on the groups of the last batch, and the other filter's own state."""
        return {"decisions": [], "of": self.of.init() if hasattr(self.of, "init") else None}  # pyright: ignore[reportAttributeAccessIssue]

    def keep(self, state: Any, group: Group) -> bool:
        """As some group of the batch before would have been judged."""
        decisions = state["decisions"]
        return not decisions or decisions[keyed_seed("shuffled", group.prompt.id, group.uid) % len(decisions)]

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        """The decisions on this batch's groups, for the next one's."""
        of: Any = self.of
        decisions = [bool(of.keep(state["of"], group)) for group in signals.groups]
        inner = of.observe(state["of"], signals) if hasattr(of, "observe") else state["of"]
        return {"decisions": decisions or state["decisions"], "of": inner}
