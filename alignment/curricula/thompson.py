"""What is known of each prompt's pass rate, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import numpy as np

from alignment.curricula.contract import curricula
from alignment.curricula.orders import distinct
from alignment.curricula.outcomes import own
from alignment.registry import option
from alignment.types import Context, Prompt, Signals, keyed_seed

RECENT = 4096
"""Prompts that are kept apart from the others, at most, but for those of one step."""


@curricula.register("thompson", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Thompson:
    """Tracks the pass rate of every prompt that was sampled, and chooses by Thompson sampling.

    Of a prompt with s successes and f failures the belief is ``Beta(1 + s d, 1 + f d)``. ``d`` halves every
    ``half_life`` steps since the prompt was last sampled, because the policy has moved on meanwhile; new counts are
    added to what is left of the old ones. One rate is drawn from each candidate's belief, and the prompts whose draws
    are nearest to ``target`` are chosen, ties to the earlier candidate. A prompt that was never sampled has the uniform
    belief, so it is tried now and then; no model is asked. The state holds sampled prompts only. Steered rollouts do
    not count. Deviation from Thompson sampling as it is known: what is maximised is nearness to a target, not the rate.
    """

    oversample: Annotated[int, option("candidates per prompt that is chosen; 1 chooses them all", ge=1)] = 4
    target: Annotated[float, option("pass rate to be near to", ge=0, le=1)] = 0.5
    half_life: Annotated[float, option("after which evidence counts half", unit="steps", gt=0)] = 50.0

    def init(self) -> dict[str, Any]:
        """``seen`` and ``recent``: successes, failures and the step they are of, by prompt id; ``draws`` counts calls.

        What is in ``recent`` comes first. A step copies that alone, and not a table as long as the data set; the two
        become one when ``recent`` has grown.
        """
        return {"seen": {}, "recent": {}, "draws": 0}

    def candidates(self, n: int) -> int:
        """How many it chooses ``n`` from."""
        return self.oversample * n

    def select(
        self, state: Any, prompts: Sequence[Prompt], n: int, context: Context
    ) -> tuple[list[Prompt], dict[str, Any]]:
        """Those whose drawn rates are nearest to the target, the nearest first."""
        prompts = distinct(prompts, n)
        if len(prompts) <= n:
            return list(prompts), dict(state)
        a, b = self.beliefs(state, prompts, context.step)
        rng = np.random.Generator(np.random.PCG64(keyed_seed("thompson", context.seed, state["draws"])))
        nearest = np.argsort(np.abs(rng.beta(a, b) - self.target), kind="stable")[:n]
        return [prompts[i] for i in nearest.tolist()], {**state, "draws": state["draws"] + 1}

    def beliefs(self, state: Any, prompts: Sequence[Prompt], step: int) -> tuple[np.ndarray[Any, Any], ...]:
        """Both parameters of each prompt's Beta distribution at ``step``."""
        seen, recent, nothing = state["seen"].get, state["recent"].get, (0.0, 0.0, step)
        found = [recent(prompt.id) or seen(prompt.id, nothing) for prompt in prompts]
        right, wrong, then = np.fromiter(chain.from_iterable(found), np.float64, 3 * len(found)).reshape(-1, 3).T
        left = 0.5 ** ((step - then) / self.half_life)
        return 1 + right * left, 1 + wrong * left

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        """The counts with those of all sampled groups, whatever became of them."""
        seen, recent, step = state["seen"], dict(state["recent"]), signals.context.step
        for group in signals.groups:
            verdicts = [r.correct for r in own(group) if r.correct is not None]
            if verdicts:
                at, right = group.prompt.id, sum(verdicts)
                before = recent.get(at) or seen.get(at, (0.0, 0.0, step))
                left = 0.5 ** ((step - before[2]) / self.half_life)
                recent[at] = [before[0] * left + right, before[1] * left + len(verdicts) - right, step]
        if len(recent) > RECENT:
            seen, recent = {**seen, **recent}, {}
        return {**state, "seen": seen, "recent": recent}

    def metrics(self, state: Any) -> dict[str, float]:
        """``seen``: prompts that were sampled at least once."""
        return {"seen": float(len(state["seen"]) + len(state["recent"].keys() - state["seen"].keys()))}
