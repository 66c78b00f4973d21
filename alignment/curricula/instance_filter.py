"""Prompts that teach nothing are left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from alignment.curricula.contract import curricula
from alignment.curricula.outcomes import own
from alignment.registry import option
from alignment.types import Context, Prompt, Signals


@curricula.register(
    "instance_filter",
    source="Reinforcement Fine-Tuning Naturally Mitigates Forgetting in Continual Post-Training (arXiv 2507.05386): "
    "rollout-based instance filtering",
    evidence="end to end",
)
@dataclass(frozen=True)
class InstanceFilter:
    """Leaves out the prompts on which the policy never succeeded, whichever curriculum draws them.

    A prompt is left out once its last ``rollouts`` rollouts in a row were all wrong; with ``drop_mastered`` also once
    they were all right. One success (or, with that, one failure) begins the count anew.

    The method, whose mechanics are known from memory and from secondary sources: before a task, the policy that enters
    it answers each prompt N times, and training goes on with the prompts that it solved at least once. N and the
    threshold of success are not known; here a success is a rollout that is correct by the first reward component.

    Differences from that pass: there is no pass. Prompts are judged by the groups that training samples anyway, so the
    first epoch trains on hopeless prompts too, which give no gradient but cost rollouts; the policy that judges is the
    one of the moment, not the one that entered the task; and a prompt is judged again whenever it is sampled.
    ``recheck_every`` lets prompts in again after so many steps, since what was hopeless may not stay so.
    """

    rollouts: Annotated[int, option("in a row, all alike, that settle it", unit="rollouts", ge=1)] = 8
    drop_mastered: Annotated[bool, option("leave out prompts that are always solved, too")] = False
    recheck_every: Annotated[
        int | None, option("steps after which a prompt is let in again; null: never", unit="steps", ge=1)
    ] = None

    def init(self) -> dict[str, Any]:
        """``runs``: rollouts in a row that were wrong (below 0) or right, by prompt id, where it matters; ``dropped``:
        the step at which a prompt was left out."""
        return {"runs": {}, "dropped": {}}

    def admits(self, state: Any, prompt: Prompt, context: Context) -> bool:
        """Whether it was not left out, or long enough ago."""
        since = state["dropped"].get(prompt.id)
        return since is None or (self.recheck_every is not None and context.step - since >= self.recheck_every)

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        """Judges the prompts of all sampled groups."""
        runs, dropped = dict(state["runs"]), dict(state["dropped"])
        for group in signals.groups:
            verdicts = [r.correct for r in own(group) if r.correct is not None]
            if not verdicts:
                continue
            at = group.prompt.id
            run = self.run(runs.pop(at, 0), verdicts)
            dropped.pop(at, None)
            if abs(run) >= self.rollouts:
                dropped[at] = signals.context.step
            elif run:
                runs[at] = run
        return {"runs": runs, "dropped": dropped}

    def run(self, before: int, verdicts: Sequence[bool]) -> int:
        """Rollouts in a row that were wrong (as a negative number) or, if that counts, right, after a group.

        The rollouts of a group have no order: one with both begins anew.
        """
        if any(verdicts) and (not all(verdicts) or not self.drop_mastered):
            return 0
        added = len(verdicts) if verdicts[0] else -len(verdicts)
        return before + added if before * added > 0 else added

    def metrics(self, state: Any) -> dict[str, float]:
        """``dropped``: prompts that are left out."""
        return {"dropped": float(len(state["dropped"]))}


def admission_probability(p: float, n: int) -> float:
    """``1 - (1 - p)^n``: how likely a prompt of pass rate ``p`` is solved at least once in ``n`` rollouts."""
    return 1 - (1 - p) ** n
