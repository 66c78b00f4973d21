"""What came of a group, in the numbers that curricula learn from."""

from collections.abc import Sequence

from alignment.types import Group, Rollout


def share_correct(rollouts: Sequence[Rollout]) -> float | None:
    """The share of scored ``rollouts`` that are correct by the first reward component; None where none is judged."""
    verdicts = [r.correct for r in rollouts if r.scored and r.correct is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def own(group: Group) -> list[Rollout]:
    """The scored rollouts that the policy drew by itself, without guidance: what says how well *it* does."""
    return [r for r in group.rollouts if r.scored and r.source != "steered"]


def pass_rate(group: Group) -> float | None:
    """The share of correct ones among :func:`own`; None where none is judged."""
    return share_correct(own(group))


def mean_reward(group: Group) -> float | None:
    """The mean reward of :func:`own`; None where none is scored."""
    rewards = [r.reward for r in own(group) if r.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None
