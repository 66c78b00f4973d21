"""TRL's own reward functions, by dotted path and unchanged; what we compute ourselves agrees with them."""

from collections.abc import Sequence
from typing import Any

import pytest
from trl.rewards.format_rewards import think_format_reward
from trl.rewards.other_rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from alignment.reward_registry import RewardSpec
from alignment.scoring import Scorer
from alignment.types import Group, Prompt, Rollout, SamplingParams
from rewards import Overlong, Repetition

GOOD, BAD = "<think>so it is</think>4", "<think>so it is 4"


def group(texts: Sequence[str], prompt: Any, ids: Sequence[int] = (1, 2, 3), **row: Any) -> Group:
    common = {"behaviour_logp": (0.0,) * len(ids), "seed": 0, "sampler": "s", "versions": ((0, 0),)}
    rollouts = [
        Rollout(str(i), "p", (1,), tuple(ids), (True,) * len(ids), text=text, finish_reason="stop",
                sampling=SamplingParams(9), **common)
        for i, text in enumerate(texts)
    ]  # fmt: skip
    return Group(0, Prompt("p", {"prompt": prompt, **row}), tuple(rollouts))


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": "2+2?"}], "2+2="], ids=["chat", "text"])
def test_think_format(prompt: Any) -> None:
    with Scorer([RewardSpec("think", function="trl.rewards.think_format_reward")], timeout_s=30) as scorer:
        (scored,) = scorer.score([group([GOOD, BAD], prompt)])
    expected = think_format_reward([[{"role": "assistant", "content": text}] for text in (GOOD, BAD)])
    assert [r.reward for r in scored.rollouts] == expected == [1.0, 0.0]


def test_factories_take_options() -> None:
    ids = [5, 5, 5, 5, 5, 6, 7, 8]
    specs = [
        RewardSpec("r", 1.0, "trl.rewards.get_repetition_penalty_reward", {"ngram_size": 2, "max_penalty": -0.5}),
        RewardSpec(
            "o", 1.0, "trl.rewards.get_soft_overlong_punishment", {"max_completion_len": 10, "soft_punish_cache": 4}
        ),
        RewardSpec("repetition", function=Repetition(n=2, max_penalty=0.5)),
        RewardSpec("overlong", function=Overlong(max_tokens=10, cache_tokens=4)),
    ]
    with Scorer(specs, timeout_s=30) as scorer:
        (scored,) = scorer.score([group(["a"], "p", ids)])
    values = {name: score.value for name, score in scored.rollouts[0].scores.items()}
    theirs = get_repetition_penalty_reward(2, -0.5)([ids])[0], get_soft_overlong_punishment(10, 4)([ids])[0]
    assert (values["r"], values["o"]) == theirs
    assert values["repetition"] == pytest.approx(theirs[0]) and theirs[0] < 0
    assert values["overlong"] == theirs[1] == -0.5


@pytest.mark.parametrize("length", range(1, 14))
def test_length_shaping_agrees_with_trl(length: int) -> None:
    ids = [i * i % 5 for i in range(length)]
    ours = Overlong(max_tokens=10, cache_tokens=4)([""], [""], length_tokens=[length])
    assert ours == get_soft_overlong_punishment(10, 4)([ids])
    assert Repetition(n=3)([""], [""], completion_ids=[ids]) == pytest.approx(get_repetition_penalty_reward(3)([ids]))


def test_accuracy_reward() -> None:
    chat = [{"role": "user", "content": "half?"}]
    texts = [r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}"]
    with Scorer([RewardSpec("accuracy", function="trl.rewards.accuracy_reward")], timeout_s=60) as scorer:
        (scored,) = scorer.score([group(texts, chat, solution=r"$\frac{1}{2}$")])
        (vague,) = scorer.score([group(texts[:1], chat, solution="no formula")])
    assert [r.scores["accuracy"].value for r in scored.rollouts] == [1.0, 0.0]
    assert vague.rollouts[0].scores["accuracy"].status == "skipped"
