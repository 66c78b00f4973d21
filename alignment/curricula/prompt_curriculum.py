"""Prompts that are predicted to be neither too easy nor too hard."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from alignment.algorithms.tokens import share_down
from alignment.curricula.contract import curricula
from alignment.curricula.orders import distinct
from alignment.curricula.outcomes import mean_reward
from alignment.registry import option
from alignment.types import Context, Prompt, Signals, keyed_seed

ROLE = "prompt_value"


@curricula.register(
    "prompt_curriculum",
    source="Prompt Curriculum Learning for Efficient LLM Post-Training (arXiv 2510.01135)",
    evidence="end to end",
)
@dataclass(frozen=True)
class PromptCurriculum:
    """Of ``oversample`` times as many candidates, the prompts whose predicted reward is nearest to ``target``.

    ``B = the m candidates x with the smallest |V(x) - target|``, greedily, ties to the earlier candidate. ``V`` is the
    stage's ``prompt_value``: after the update it is fitted to the mean reward of each sampled group, by
    ``sum_x (V(x) - mean_i r_i)^2`` with the loss ``scalar``, or by the loss that it is given. So at step t it is one
    step behind, as in the paper. It is fitted to all groups, before any filter: after one it would lean to the middle.
    Steered rollouts do not count. A ``read_out`` learns with its critic and is left as it is here.

    Oversampling 4 and target 0.5 are the paper's, from summaries of it. It trains ``V`` on the chosen prompts alone, so
    what it never chooses it never learns about; ``explore_frac`` (this project's; 0 as published) gives that share of
    the prompts, rounded down, to picks at random among the other candidates. Learning rate and optimizer of ``V`` are
    not known from the paper. Rewards other than 0 to 1 need another target.
    """

    needs: ClassVar[tuple[str, ...]] = (f"role:{ROLE}",)

    oversample: Annotated[int, option("candidates per prompt that is chosen; 1 chooses them all", ge=1)] = 4
    target: Annotated[float, option("predicted mean reward to be near to")] = 0.5
    explore_frac: Annotated[float, option("share of prompts picked at random instead", ge=0, le=1)] = 0.0

    def init(self) -> dict[str, Any]:
        """``version`` of the model that chose last, the mean of what it predicted for the chosen and for all, and its
        error on the last groups. The model itself has a checkpoint of its own."""
        return {"version": 0, "chosen": None, "candidates": None, "error": None}

    def candidates(self, n: int) -> int:
        """How many it chooses ``n`` from."""
        return self.oversample * n

    def select(
        self, state: Any, prompts: Sequence[Prompt], n: int, context: Context
    ) -> tuple[list[Prompt], dict[str, Any]]:
        """The nearest first, then those that explore. As many candidates as are wanted are taken as they come."""
        prompts = distinct(prompts, n)
        if len(prompts) <= n:
            return list(prompts), dict(state)
        role = context.roles[ROLE]
        values_C = role.values(prompts).double()
        key = keyed_seed("explore", context.seed, context.step, prompts[0].id)
        picked = nearest(values_C, self.target, n, share_down(self.explore_frac, n), key)
        means = {"chosen": float(values_C[picked].mean()), "candidates": float(values_C.mean())}
        return [prompts[i] for i in picked], {**state, "version": role.version, **means}

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        """Fits the model to what came of all sampled groups."""
        found = [(g.prompt, mean) for g in signals.groups if (mean := mean_reward(g)) is not None]
        if not found:
            return dict(state)
        role, prompts = signals.context.roles[ROLE], [prompt for prompt, _ in found]
        targets = torch.tensor([mean for _, mean in found])
        error = float((role.values(prompts).double() - targets.double()).abs().mean())
        role.fit(prompts, targets)
        return {**state, "version": role.version, "error": error}

    def metrics(self, state: Any) -> dict[str, float]:
        """What was predicted for candidates and chosen, and ``error``, its mean distance from what then came."""
        return {name: state[name] for name in ("chosen", "candidates", "error") if state[name] is not None}


def nearest(values_C: Tensor, target: float, n: int, explore: int, key: int) -> list[int]:
    """Indices of the ``n - explore`` values nearest to ``target``, ties to the first; then ``explore`` of the others.

    The others are drawn without replacement and depend on ``key`` alone.
    """
    distance_C = (values_C - target).abs()
    taken = torch.sort(distance_C, stable=True).indices[: n - explore]
    if not explore:
        return taken.tolist()
    left = torch.ones(len(values_C), dtype=torch.bool)
    left[taken] = False
    others = left.nonzero()[:, 0]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(key))
    return [*taken.tolist(), *others[order[:explore]].tolist()]
