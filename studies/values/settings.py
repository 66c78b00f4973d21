"""Sizes of the study: the whole one, and one of seconds that shows that everything works."""

from dataclasses import asdict, dataclass
from typing import Any

from alignment.recipe_sections import ModelConfig

VOCABULARY = 256
_ALPHABET = "".join(chr(0x4E00 + i) for i in range(VOCABULARY - 2))  # two tokens more: padding, end of sequence


@dataclass(frozen=True)
class Settings:
    """Everything that numbers depend on, seeds apart. Rewards are in standard deviations under the frozen policy."""

    prompt_tokens: int = 4
    completion_tokens: int = 12
    """Of every completion: there is no stop token."""
    policy_size: tuple[int, int, int, int] = (64, 2, 4, 160)
    """Hidden size, layers, heads, inner size of an MLP."""
    value_size: tuple[int, int, int, int] = (32, 2, 2, 56)
    text_steps: int = 200
    """Updates that make the frozen policy, on text of a random chain."""
    gold_pairs: float = 0.3
    """Standard deviation of a pair of neighbours' worth, over that of a token's own."""

    labels: int = 4096
    """Completions that the gold reward scores for an arm, in all. Oracles ask it at decode time as well."""
    value_epochs: int = 4
    value_minibatches: int = 64
    ppo_steps: int = 16
    ppo_coefficients: tuple[float, ...] = (1.0, 0.7, 0.5, 0.25)
    """Of the KL in the reward, in standard deviations of reward per nat."""
    betas: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
    top_k: int = 20
    most: int = 128
    """The largest n of best-of-n."""
    pool: int = 256
    """Completions of each prompt that best-of-n is estimated from."""
    eval_prompts: int = 64
    eval_samples: int = 8

    heads: tuple[str, ...] = ("scalar", "two_hot", "hl_gauss")
    noises: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Shares of labels that are corrupted."""
    noise_sd: float = 3.0
    """Of what is added to a corrupted label; its mean is 0."""
    states: int = 64
    """States whose value is known from rollouts."""
    rollouts: int = 256
    """Completions of each such state."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    tuning_seeds: tuple[int, ...] = (100, 101)
    """Learning rates are chosen on these, and nothing is reported of them."""
    tuning_noises: tuple[float, ...] = (0.1,)
    value_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    ppo_lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    tuning_coefficient: float = 0.5
    """At which PPO's learning rate is chosen."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


QUICK = Settings(
    text_steps=30,
    labels=256,
    value_epochs=1,
    value_minibatches=16,
    ppo_steps=2,
    ppo_coefficients=(0.25,),
    betas=(1.0, 4.0),
    most=16,
    pool=32,
    eval_prompts=16,
    eval_samples=4,
    states=8,
    rollouts=16,
    seeds=(0,),
    tuning_seeds=(100,),
    value_lrs=(3e-3, 1e-2),
    ppo_lrs=(3e-3,),
)


def built(size: tuple[int, int, int, int]) -> ModelConfig:
    """A model of the study's vocabulary."""
    hidden, layers, heads, inner = size
    build: dict[str, Any] = {"hidden_size": hidden, "layers": layers, "heads": heads, "kv_heads": heads}
    build |= {"alphabet": _ALPHABET, "intermediate_size": inner, "max_positions": 64}
    return ModelConfig.model_validate({"build": build})
