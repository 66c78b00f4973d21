"""What is known of each prompt's pass rate, and how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from zlib import crc32

import numpy as np

from alignment.curricula.contract import curricula
from alignment.curricula.outcomes import own
from alignment.registry import option
from alignment.types import Context, Prompt, Signals, keyed_seed

SHARDS = 8192
NONE: Mapping[str, Sequence[float]] = {}


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
        """``seen``: successes, failures and the step they are of, by shard and prompt id; ``draws`` counts calls.

        Shards, so that a step copies few of them and not a table as long as the data set.
        """
        return {"seen": {}, "prompts": 0, "draws": 0}

    def candidates(self, n: int) -> int:
        """How many it chooses ``n`` from."""
        return self.oversample * n

    def select(
        self, state: Any, prompts: Sequence[Prompt], n: int, context: Context
    ) -> tuple[list[Prompt], dict[str, Any]]:
        """Those whose drawn rates are nearest to the target, the nearest first."""
        if len(prompts) <= n:
            return list(prompts), dict(state)
        a, b = self.beliefs(state, prompts, context.step)
        rng = np.random.Generator(np.random.PCG64(keyed_seed("thompson", context.seed, state["draws"])))
        nearest = np.argsort(np.abs(rng.beta(a, b) - self.target), kind="stable")[:n]
        return [prompts[i] for i in nearest.tolist()], {**state, "draws": state["draws"] + 1}

    def beliefs(self, state: Any, prompts: Sequence[Prompt], step: int) -> tuple[np.ndarray[Any, Any], ...]:
        """Both parameters of each prompt's Beta distribution at ``step``."""
        seen, nothing = state["seen"], (0.0, 0.0, step)
        right, wrong, then = zip(
            *[seen.get(shard(prompt.id), NONE).get(prompt.id, nothing) for prompt in prompts], strict=True
        )
        left = 0.5 ** ((step - np.array(then, dtype=np.float64)) / self.half_life)
        return 1 + np.array(right, dtype=np.float64) * left, 1 + np.array(wrong, dtype=np.float64) * left

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        """The counts with those of all sampled groups, whatever became of them."""
        seen, step, new = dict(state["seen"]), signals.context.step, 0
        for at in sorted({shard(group.prompt.id) for group in signals.groups}):
            seen[at] = dict(seen.get(at, NONE))
        for group in signals.groups:
            verdicts = [r.correct for r in own(group) if r.correct is not None]
            if verdicts:
                part = seen[shard(group.prompt.id)]
                new += group.prompt.id not in part
                before, right = part.get(group.prompt.id, (0.0, 0.0, step)), sum(verdicts)
                left = 0.5 ** ((step - before[2]) / self.half_life)
                part[group.prompt.id] = [before[0] * left + right, before[1] * left + len(verdicts) - right, step]
        return {**state, "seen": seen, "prompts": state["prompts"] + new}

    def metrics(self, state: Any) -> dict[str, float]:
        """``seen``: prompts that were sampled at least once."""
        return {"seen": float(state["prompts"])}


def shard(prompt_id: str) -> str:
    """Where the counts of a prompt stand."""
    return str(crc32(prompt_id.encode()) % SHARDS)
