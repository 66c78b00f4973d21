"""Which kind of prompt to sample, learned by a bandit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from alignment.curricula.contract import curricula
from alignment.curricula.orders import arm_of, arms_of, draw
from alignment.curricula.outcomes import own
from alignment.registry import option
from alignment.types import Context, Prompt, Signals, keyed_seed

SHOWN_ARMS = 32
"""More arms than this are not logged one by one."""


@curricula.register(
    "self_evolving",
    source="Self-Evolving Curriculum for LLM Reasoning (arXiv 2505.14970)",
    evidence="end to end",
)
@dataclass(frozen=True)
class SelfEvolving:
    """A bandit over categories of prompts: an arm is a column's value, or a combination of several (``by``).

    For each prompt an arm is drawn, independently, by ``P(c) = softmax(Q(c) / temperature)``, then its next prompt.
    After the update, with ``r(c)`` the mean over the rollouts of arm c of ``|A_i|``:

    ``Q(c) <- (1 - rate) Q(c) + rate r(c)``, with ``Q_0 = 0``.

    An arm that was not sampled: with ``absent: decay`` its r is 0, which is what the official code does (seen in copies
    of it); with ``hold`` its Q stays. What the paper's text says of it is not known. ``hold`` is safer where there are
    about as many arms as prompts in a batch. Rates and temperatures of the official scripts: 0.5; 1.0 for Countdown,
    0.4 for MATH, 0.2 for two-dimensional puzzles.

    ``A_i`` is computed here, from the rewards of *all* sampled groups by GRPO's formula (``normalise``, ``std``), and
    not read from the batch: behind a filter the batch lacks the groups without an advantage, and |A| would never see
    them. So another advantage, another weighting of rewards or token-level advantages do not reach the bandit. With
    ``std: sample``, as in the official code's advantage, a group (1, 0, 0, 0) gives 0.75; with ``population`` 0.866,
    and in expectation ``2 sqrt(p (1 - p))``.

    Deviations: the softmax is shifted by its maximum; each arm goes through its prompts in epochs of its own (the
    official loader shuffles a copy onto all arms when any runs short); steered rollouts do not count. The official
    code's other objectives (progress of the mean reward) and samplers (epsilon-greedy, normalised Q) are left out.
    """

    draws: ClassVar[bool] = True

    by: Annotated[tuple[str, ...], option("columns whose values name a prompt's arm", min_length=1)] = ("level",)
    rate: Annotated[float, option("weight of the newest reward in Q", gt=0, le=1)] = 0.5
    temperature: Annotated[float, option("of the softmax over Q", gt=0)] = 1.0
    absent: Annotated[Literal["decay", "hold"], option("Q of an arm that was not sampled")] = "decay"
    normalise: Annotated[Literal["std", "none"], option("divide by the group's standard deviation, or do not")] = "std"
    std: Annotated[Literal["sample", "population"], option("divisor of the variance: G - 1 or G")] = "sample"

    def fits(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where a prompt lacks one of the columns."""
        arms_of(prompts, self.by)

    def init(self) -> dict[str, Any]:
        """No arm is known; ``draws`` counts calls and keys the next."""
        return {"q": {}, "cursors": {}, "draws": 0}

    def select(
        self, state: Any, prompts: Sequence[Prompt], n: int, context: Context
    ) -> tuple[list[Prompt], dict[str, Any]]:
        """``n`` prompts of independently drawn arms."""
        arms = arms_of(prompts, self.by)
        weights = self.probabilities({arm: state["q"].get(arm, 0.0) for arm in arms})
        key = keyed_seed("self_evolving", context.seed, state["draws"])
        taken, cursors = draw(arms, weights, state["cursors"], n, context.seed, key)
        after = {"q": {**dict.fromkeys(arms, 0.0), **state["q"]}, "cursors": cursors, "draws": state["draws"] + 1}
        return [prompts[i] for i in taken], after

    def probabilities(self, q: Mapping[str, float]) -> dict[str, float]:
        """``softmax(q / temperature)`` by arm."""
        shares = (torch.tensor(list(q.values()), dtype=torch.float64) / self.temperature).softmax(0).tolist()
        return dict(zip(q, shares, strict=True))

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        """Q after the groups of a batch, kept or not."""
        seen: dict[str, list[float]] = {}
        for group in signals.groups:
            rewards = [r.reward for r in own(group) if r.reward is not None]
            seen.setdefault(arm_of(group.prompt, self.by), []).extend(self.magnitudes(rewards))
        means = {arm: math.fsum(found) / len(found) for arm, found in seen.items() if found}
        q = {arm: value for arm, value in state["q"].items()}
        for arm in sorted(q.keys() | means.keys()):
            if arm in means or self.absent == "decay":
                q[arm] = (1 - self.rate) * q.get(arm, 0.0) + self.rate * means.get(arm, 0.0)
        return {**state, "q": q}

    def magnitudes(self, rewards: Sequence[float]) -> list[float]:
        """``|A_i|`` of a group; 0 where all rewards are equal."""
        if len(set(rewards)) < 2:
            return [0.0] * len(rewards)
        mean = math.fsum(rewards) / len(rewards)
        scale = 1.0
        if self.normalise == "std":
            freedom = len(rewards) - (self.std == "sample")
            scale = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / freedom)
        return [abs(r - mean) / scale for r in rewards]

    def metrics(self, state: Any) -> dict[str, float]:
        """``q/ARM`` and ``share/ARM``, the probability of each arm, for as many arms as can be looked at."""
        q = state["q"]
        if not 0 < len(q) <= SHOWN_ARMS:
            return {"arms": float(len(q))}
        shares = self.probabilities(q)
        return {f"q/{arm}": value for arm, value in q.items()} | {f"share/{arm}": p for arm, p in shares.items()}
