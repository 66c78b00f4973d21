"""What is learned of demonstrations that were judged: the objectives of "Pretraining Language Models with Human
Preferences" (arXiv 2302.08582) for whole demonstrations, beside their plain likelihood.

A judgement is a column of the data: a ``score``, of which less is better, as there, or a ``reward``, of which more is.
An imitation turns judgements into one weight for each demonstration, once for all of the data, and names the loss that
the weight multiplies. The paper judges sentences, or lines of code, apart, and weighs their tokens; here a
demonstration is judged as a whole. Its objective that leaves documents out (filtering) needs no objective here: leave
the rows out of the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignment.algorithms.policy_losses import PolicyLoss, Reinforce
from alignment.registry import Registry, option
from alignment.types import Batch

PAPER = "Pretraining Language Models with Human Preferences (arXiv 2302.08582)"
LEAST_REST = 1e-7
"""Of ``1 - p`` inside a logarithm: float32 knows no ``p`` between this and 1."""


@runtime_checkable
class Imitation(Protocol):
    """What a demonstration counts for, by what it was judged to be worth."""

    @property
    def column(self) -> str | None:
        """The column of the data that holds the judgement; None: it needs none."""
        ...

    @property
    def policy_loss(self) -> PolicyLoss:
        """The loss that weights multiply, of which minus the log-probability is the plain case."""
        ...

    def weights(self, judgements: Sequence[float], prompts: Sequence[str]) -> list[float]:
        """The weight of each demonstration.

        Args:
            judgements: What the column says of each; without a column, as many zeros.
            prompts: The key of each one's prompt: equal for equal prompts.
        """
        ...


imitations: Registry[Imitation] = Registry("imitations", Imitation, "What is learned of a demonstration")


@imitations.register("likelihood", source="maximum likelihood", evidence="end to end")
@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood, of all demonstrations alike."""

    @property
    def column(self) -> None:
        """None is needed."""

    @property
    def policy_loss(self) -> PolicyLoss:
        """``-log p``."""
        return Reinforce()

    def weights(self, judgements: Sequence[float], prompts: Sequence[str]) -> list[float]:
        """1 for each."""
        return [1.0] * len(judgements)


@dataclass(frozen=True)
class Unlike:
    """``-log p``, and ``log(1 - p)`` in rows of negative weight, so that the weight times it is ``-|w| log(1 - p)``.

    By a logit the gradient of ``-log(1 - p)`` is ``p`` at most, however close to 1 it comes. Beyond
    :data:`LEAST_REST` of 1 there is none.
    """

    def __call__(self, logp_BT: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.weight_BT is not None, "rows are weighted before any loss is taken"
        unwanted_BT = batch.weight_BT < 0
        rest_BT = (-torch.expm1(logp_BT)).clamp(min=LEAST_REST)
        # Both branches are differentiated, and that which is not taken must be finite.
        rest_BT = torch.where(unwanted_BT, rest_BT, 1.0)
        return torch.where(unwanted_BT, rest_BT.log(), -logp_BT), {"unwanted": unwanted_BT.float()}


@imitations.register("unlikelihood", source=PAPER, evidence="end to end")
@dataclass(frozen=True)
class Unlikelihood:
    """``-log p`` of tokens whose row scores at most ``threshold``, ``-alpha log(1 - p)`` of all others.

    Unlikelihood training is of "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319).
    """

    score: Annotated[str, option("column of the score; less is better", min_length=1)]
    threshold: Annotated[float, option("largest score of a demonstration to imitate")]
    alpha: Annotated[float, option("weight of those not to imitate", gt=0)] = 1.0

    @property
    def column(self) -> str:
        """The score."""
        return self.score

    @property
    def policy_loss(self) -> PolicyLoss:
        """See :class:`Unlike`."""
        return Unlike()

    def weights(self, judgements: Sequence[float], prompts: Sequence[str]) -> list[float]:
        """1, or ``-alpha`` above the threshold."""
        return [1.0 if score <= self.threshold else -self.alpha for score in judgements]


@imitations.register("reward_weighted", source=PAPER, evidence="end to end")
@dataclass(frozen=True)
class RewardWeighted:
    """Reward-weighted regression: ``-exp(r / beta) log p``. Weights are not normalised.

    From Peters and Schaal, "Reinforcement Learning by Reward-Weighted Regression for Operational Space Control" (2007).
    The paper's reward is minus its score.
    """

    reward: Annotated[str, option("column of the reward; more is better", min_length=1)]
    beta: Annotated[float, option("temperature: the larger, the more alike weights are", gt=0)] = 1.0

    @property
    def column(self) -> str:
        """The reward."""
        return self.reward

    @property
    def policy_loss(self) -> PolicyLoss:
        """``-log p``."""
        return Reinforce()

    def weights(self, judgements: Sequence[float], prompts: Sequence[str]) -> list[float]:
        """``exp(r / beta)``; infinite where that is too large for a number."""
        return _exponential(judgements, self.beta)


@imitations.register("advantage_weighted", source=PAPER, evidence="end to end")
@dataclass(frozen=True)
class AdvantageWeighted:
    """Advantage-weighted regression: ``-clip(exp((r - V) / beta), 0, clip) log p``, V a mean reward.

    From "Advantage-Weighted Regression" (arXiv 1910.00177). Deviation: the paper learns V(s) for each token with a head
    on the policy, by a squared error that is part of the loss (``alpha w NLL + (1 - alpha) (r - V)^2``); here V is the
    mean reward of the data, or of the prompt's demonstrations, and there is no such term.
    """

    reward: Annotated[str, option("column of the reward; more is better", min_length=1)]
    beta: Annotated[float, option("temperature: the larger, the more alike weights are", gt=0)] = 1.0
    clip: Annotated[float, option("largest weight", gt=0)] = 1000.0
    baseline: Annotated[
        Literal["all", "prompt"], option("whose mean reward V is: of all demonstrations, or of the same prompt's")
    ] = "all"

    @property
    def column(self) -> str:
        """The reward."""
        return self.reward

    @property
    def policy_loss(self) -> PolicyLoss:
        """``-log p``."""
        return Reinforce()

    def weights(self, judgements: Sequence[float], prompts: Sequence[str]) -> list[float]:
        """``clip(exp((r - V) / beta), 0, clip)``."""
        together = prompts if self.baseline == "prompt" else [""] * len(judgements)
        groups: dict[str, list[float]] = {}
        for key, reward in zip(together, judgements, strict=True):
            groups.setdefault(key, []).append(reward)
        means: Mapping[str, float] = {key: fmean(rewards) for key, rewards in groups.items()}
        advantages = [reward - means[key] for key, reward in zip(together, judgements, strict=True)]
        return [min(weight, self.clip) for weight in _exponential(advantages, self.beta)]


def _exponential(values: Sequence[float], beta: float) -> list[float]:
    return (torch.tensor(values, dtype=torch.float64) / beta).exp().tolist()
