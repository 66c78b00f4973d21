"""A penalty for saying the same thing again and again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from alignment.registry import option
from alignment.reward_registry import reward_functions

_SOURCE = "Demystifying Long Chain-of-Thought Reasoning in LLMs, appendix C.2 (arXiv 2502.03373)"


@reward_functions.register("repetition", source=_SOURCE)
@dataclass(frozen=True)
class Repetition:
    """``-max_penalty * (share of the completion's token n-grams that occurred before)``; 0 for shorter completions.

    The share is ``1 - distinct / all``. Deviation: the paper puts the penalty on the repeating tokens, this on the
    whole completion.
    """

    n: Annotated[int, option("length of an n-gram", unit="tokens", ge=1)] = 3
    max_penalty: Annotated[float, option("penalty of endless repetition", unit="reward", gt=0)] = 1.0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One value in ``(-max_penalty, 0]`` per completion."""
        return [-self.max_penalty * repeated_share(ids, self.n) for ids in columns["completion_ids"]]


def repeated_share(ids: Sequence[int], n: int) -> float:
    """Share of the n-grams of ``ids`` that occurred before, from 0 (all differ) to just under 1."""
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
