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

    Each group gets one of the decisions that the other filter took on the groups of the batch before, or the last one
    of which it kept any, drawn by the run's seed and the group's prompt and number; the first batch, before any
    decision, is kept whole. What an arm with this attains comes from how much is dropped, and not from what. Goes with
    what the other filter goes with. With batches in flight (``max_staleness``) the batch before is the last one that
    was trained on when a group was scored.
    """

    of: Annotated[Curriculum, component(curricula), option("the filter, such as difficulty_filter")]

    def __post_init__(self) -> None:
        others = any(hasattr(self.of, name) for name in ("select", "admits", "replay"))
        if not hasattr(self.of, "keep") or others or isinstance(self.of, Shuffled):
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
        """``decisions`` on the groups of the last batch, the run's seed, and the other filter's own state."""
        return {"decisions": [], "seed": 0, "of": self.of.init() if hasattr(self.of, "init") else None}  # pyright: ignore[reportAttributeAccessIssue]

    def keep(self, state: Any, group: Group) -> bool:
        """As some group of the batch before would have been judged."""
        decisions = state["decisions"]
        drawn = keyed_seed("shuffled", state["seed"], group.prompt.id, group.uid)
        return not decisions or decisions[drawn % len(decisions)]

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        """The decisions on this batch's groups, for the next one's."""
        of: Any = self.of
        decisions = [bool(of.keep(state["of"], group)) for group in signals.groups]
        inner = of.observe(state["of"], signals) if hasattr(of, "observe") else state["of"]
        kept = decisions if any(decisions) else state["decisions"]
        return {"decisions": kept, "seed": signals.context.seed, "of": inner}
