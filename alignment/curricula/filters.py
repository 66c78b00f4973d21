"""Which scored groups are trained on."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from alignment.curricula.contract import curricula
from alignment.curricula.outcomes import share_correct
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import Group


@curricula.register(
    "difficulty_filter",
    source="Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning (arXiv 2504.03380); "
    "with the band (0, 1), DAPO: An Open-Source LLM Reinforcement Learning System at Scale (arXiv 2503.14476)",
    evidence="end to end",
)
@dataclass(frozen=True)
class DifficultyFilter:
    """Keeps groups whose pass rate lies inside a band, and samples other prompts in place of the rest.

    Keep iff ``low < p < high``, with ``p`` the share of a group's scored rollouts that are correct by the first reward
    component. Balanced filtering is ``low = 1 - high``; dynamic sampling (DAPO, section 3.2) is the band (0, 1):
    ``0 < #correct < group size``. With ``measure: reward``, ``p`` is the mean reward, and a group whose rewards are all
    equal is dropped wherever its mean lies; without bounds that is the whole rule.

    Sampling goes on until the batch is full, and groups are taken in launch order: taking those that finish first
    would favour short completions. ``max_refills`` bounds it (verl: ``max_num_gen_batches``, 10 in its examples).

    The paper compares several bands; which of them and which group size did best could not be confirmed, so the
    defaults are this project's. The paper's bound ``KL(pi_init || pi*) >= p (1 - p) / (2 beta^2)`` is a second-order
    expansion and not a bound (see :func:`optimum_kl`); it is no reason to prefer p = 1/2 over a skewed band.
    Deviations: unscored rollouts are left out; what is missing is sampled instead of a further full batch; no group is
    carried over to a later batch in lockstep, because no more are launched than are missing.
    """

    min_group_size: ClassVar[int] = 2

    low: Annotated[float | None, option("lower end of the band; null: none (only for reward)")] = 0.2
    high: Annotated[float | None, option("upper end of the band; null: none (only for reward)")] = 0.8
    measure: Annotated[
        Literal["pass_rate", "reward"],
        option("what must lie inside: the share of correct rollouts, or the mean reward"),
    ] = "pass_rate"
    inclusive: Annotated[bool, option("whether the ends belong to the band")] = False
    max_refills: Annotated[
        int, option("how many batches may be sampled beyond the first to fill one", unit="batches", ge=0)
    ] = 10
    on_exhausted: Annotated[
        Literal["error", "short"], option("past max_refills: stop the run, or train on the groups there are")
    ] = "error"

    def __post_init__(self) -> None:
        low, high = self.low, self.high
        if self.measure == "pass_rate" and (low is None or high is None or not 0 <= low <= high <= 1):
            raise UserError(f"low and high ({low}, {high}) must be shares, 0 <= low < high <= 1; null is for rewards")
        if low is not None and high is not None and (low > high or (low == high and not self.inclusive)):
            raise UserError(f"low ({low}) must be below high ({high})")

    def keep(self, state: Any, group: Group) -> bool:
        """Whether ``group`` lies inside the band. One without a verdict does not."""
        if self.measure == "pass_rate":
            rate = share_correct(group.rollouts)
            return rate is not None and self._inside(rate)
        rewards = group.rewards
        return len(set(rewards)) > 1 and self._inside(math.fsum(rewards) / len(rewards))

    def keeps_rate(self, rate: float) -> bool:
        """Whether it keeps a group with this share of correct rollouts, where a reward is 1 if correct and else 0."""
        return self._inside(rate) and (self.measure == "pass_rate" or 0 < rate < 1)

    def _inside(self, value: float) -> bool:
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return low <= value <= high if self.inclusive else low < value < high


def informative_share(p: float, n: int) -> float:
    """``1 - p^n - (1 - p)^n``: how likely ``n`` rollouts of pass rate ``p`` are not all right or all wrong."""
    return 1 - p**n - (1 - p) ** n


def optimum_kl(p: float, beta: float) -> float:
    """``KL(pi_init || pi*) = log(1 - p + p exp(1 / beta)) - p / beta``, exact for a binary reward.

    ``pi*`` is the optimum of reward minus ``beta`` times the KL from ``pi_init``, ``p`` the pass rate of ``pi_init``.
    The second-order expansion is ``p (1 - p) / (2 beta^2)``. The maximum is at ``beta - 1 / (exp(1 / beta) - 1)``.
    """
    return math.log1p(p * math.expm1(1 / beta)) - p / beta
