"""Shaping by length. Lengths are tokens that the policy sampled; observations of an environment do not count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from alignment.errors import UserError
from alignment.registry import option
from alignment.reward_registry import reward_functions, texts


@reward_functions.register("length", source="this project")
@dataclass(frozen=True)
class Length:
    """A soft penalty: ``-min(per_token * max(0, T - target_tokens), max_penalty)`` for a completion of T tokens."""

    target_tokens: Annotated[int, option("longest completion without a penalty", unit="tokens", ge=0)]
    per_token: Annotated[float, option("penalty of each token beyond it", unit="reward/token", gt=0)] = 0.001
    max_penalty: Annotated[float, option("largest penalty", unit="reward", gt=0)] = 1.0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One value in ``[-max_penalty, 0]`` per completion."""
        over = [max(0, length - self.target_tokens) for length in columns["length_tokens"]]
        return [-min(self.per_token * n, self.max_penalty) if n else 0.0 for n in over]


@reward_functions.register("overlong", source="DAPO, equation 13 (arXiv 2503.14476)")
@dataclass(frozen=True)
class Overlong:
    """Soft overlong punishment: 0 up to a margin before the limit, then linear to -1 at the limit, -1 beyond.

    ``R(T) = clip((max_tokens - cache_tokens - T) / cache_tokens, -1, 0)`` for a completion of T tokens.
    """

    max_tokens: Annotated[int, option("length at which the penalty is complete", unit="tokens", gt=0)] = 20480
    cache_tokens: Annotated[int, option("margin before it in which the penalty grows", unit="tokens", gt=0)] = 4096

    def __post_init__(self) -> None:
        if self.cache_tokens > self.max_tokens:
            raise UserError(f"cache_tokens {self.cache_tokens} cannot be more than max_tokens {self.max_tokens}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One value in ``[-1, 0]`` per completion."""
        free = self.max_tokens - self.cache_tokens
        return [max(-1.0, min(0.0, (free - length) / self.cache_tokens)) for length in columns["length_tokens"]]


@reward_functions.register("relative_length", source="Kimi k1.5, section 2.3.3, length reward (arXiv 2501.12599)")
@dataclass(frozen=True)
class RelativeLength:
    """Short among the completions of the same prompt: ``0.5 - (T - T_min) / (T_max - T_min)``, from 0.5 to -0.5.

    Completions that do not end with the answer get the smaller of that and 0, so that a short wrong one gains nothing.
    All get 0 when all are of one length. With ``column: null`` there are no wrong ones. Deviation: the paper takes
    right or wrong from its verifier, this from whether the completion ends with the answer.
    """

    group_level: ClassVar[bool] = True
    column: Annotated[str | None, option("column of the data set that holds the answer, or null")] = "answer"

    @property
    def columns(self) -> tuple[str, ...]:
        """The data columns it reads."""
        return () if self.column is None else (self.column,)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value in ``[-0.5, 0.5]`` per completion of one prompt; None for all where the row's answer is null."""
        lengths = columns["length_tokens"]
        shortest, span = min(lengths), max(lengths) - min(lengths)
        answers = [None] * len(lengths) if self.column is None else columns[self.column]
        if self.column is not None and None in answers:
            return [None] * len(lengths)
        if not span:
            return [0.0] * len(lengths)
        values = [0.5 - (length - shortest) / span for length in lengths]
        right = [a is None or _ends_with(text, str(a)) for text, a in zip(texts(completions), answers, strict=True)]
        return [value if fine else min(0.0, value) for value, fine in zip(values, right, strict=True)]


def _ends_with(text: str, answer: str) -> bool:
    """Whether the last word of ``text`` is ``answer``: 12 does not end with the answer 2, nor does -2."""
    text, answer = text.rstrip(), answer.strip()
    before = text.removesuffix(answer)[-1:]
    return text.endswith(answer) and not (before.isalnum() or before in tuple("-+.,"))
