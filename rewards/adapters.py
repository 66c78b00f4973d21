"""Reward functions written for other trainers, as they are. Recipes name an adapter and give it the function's path.

TRL's functions need none: this project calls a reward function as TRL does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignment.reward_registry import texts
from alignment.scoring_worker import resolve

Reward = Callable[..., list[float]]


def verl(compute_score: str, reward_kwargs: Mapping[str, Any] | None = None) -> Reward:
    """A reward from verl's ``compute_score(data_source, solution_str, ground_truth, extra_info)``.

    The ground truth is the column ``answer``; ``data_source`` and ``extra_info`` are the columns of that name, None
    where the data set has none. Of a mapping that the function returns ``score`` is taken.

    Args:
        compute_score: Dotted path of the function.
        reward_kwargs: More keyword arguments for it.
    """
    function, more = resolve(compute_score), dict(reward_kwargs or {})

    def reward(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
        none = [None] * len(completions)
        sources, infos = columns.get("data_source", none), columns.get("extra_info", none)
        scores = [
            function(data_source=source, solution_str=text, ground_truth=truth, extra_info=info, **more)
            for source, text, truth, info in zip(sources, texts(completions), answer, infos, strict=True)
        ]
        return [score["score"] if isinstance(score, Mapping) else score for score in scores]

    return reward


def openrlhf(reward_func: str) -> Reward:
    """A reward from OpenRLHF's ``reward_func(queries, prompts, labels)``.

    Labels are the column ``answer``, queries the prompts with the completions after them. Of a mapping that the
    function returns ``rewards`` is taken. Deviation: of a chat prompt the function sees the messages' contents, one per
    line, since the text that the chat template made of them does not reach rewards.

    Args:
        reward_func: Dotted path of the function.
    """
    function = resolve(reward_func)

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
    ) -> list[float]:
        asked = [p if isinstance(p, str) else "".join(f"{message['content']}\n" for message in p) for p in prompts]
        queries = [prompt + text for prompt, text in zip(asked, texts(completions), strict=True)]
        found = function(queries, asked, list(answer))
        return [float(value) for value in (found["rewards"] if isinstance(found, Mapping) else found)]

    return reward
