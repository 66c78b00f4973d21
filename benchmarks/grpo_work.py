"""The work that both sides of `grpo_vs_trl.py` do: a model, a tokenizer, prompts, sizes, and how much arithmetic."""

import dataclasses
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL = 3
"""Tokens of the vocabulary that no prompt holds."""


@dataclass(frozen=True)
class Work:
    """One GRPO step: every completion has exactly ``completion_tokens`` tokens."""

    prompts: int = 8
    group_size: int = 8
    prompt_tokens: int = 32
    completion_tokens: int = 128
    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 688
    layers: int = 4
    heads: int = 8
    lr: float = 1e-3
    max_grad_norm: float = 1.0
    clip: float = 0.2
    precision: str = "float32"
    warmup_steps: int = 2
    measured_steps: int = 10
    threads: int = 1
    seed: int = 0

    @property
    def steps(self) -> int:
        """All of them."""
        return self.warmup_steps + self.measured_steps

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group_size

    @property
    def tokens(self) -> int:
        """Completion tokens of a step."""
        return self.rows * self.completion_tokens

    def gflop(self) -> dict[str, float]:
        """Multiplications and additions that cannot be left out, by phase.

        Sampling: every token once through the layers, the completion's through the output layer, each prompt once.
        Update: forward and twice that backward over whole rows, the output layer at completion tokens only.
        """
        body = 2 * self.layers * self.hidden * (4 * self.hidden + 3 * self.intermediate)
        head = 2 * self.hidden * self.vocabulary
        length = self.prompt_tokens + self.completion_tokens
        attention = 2 * self.layers * self.hidden * length * length  # causal: half of 4 layers hidden length^2
        sampled = self.tokens + self.prompts * self.prompt_tokens
        return {
            "sample": (sampled * body + self.tokens * head + self.rows * attention) / 1e9,
            "update": 3 * (self.rows * length * body + self.tokens * head + self.rows * attention) / 1e9,
        }


def prepare(folder: Path, work: Work) -> None:
    """Writes model, tokenizer, prompts, the reward and the sizes, for both sides to read."""
    save_model(folder / "model", work)
    shutil.copy(Path(__file__).with_name("parity_reward.py"), folder / "step_reward.py")
    drawn = random.Random(work.seed)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(work.prompts * work.steps):
            words = (f"t{drawn.randrange(SPECIAL, work.vocabulary)}" for _ in range(work.prompt_tokens))
            file.write(json.dumps({"prompt": " ".join(words), "parity": drawn.randrange(2)}) + "\n")
    (folder / "work.json").write_text(json.dumps(dataclasses.asdict(work)), encoding="utf-8")


def save_model(folder: Path, work: Work) -> None:
    """Writes a random model of these sizes and its tokenizer."""
    _model(work).save_pretrained(folder)
    _tokenizer(work).save_pretrained(folder)


def read(folder: Path) -> Work:
    """The sizes that :func:`prepare` wrote."""
    return Work(**json.loads((folder / "work.json").read_text(encoding="utf-8")))


def checksum(module: Any) -> float:
    """Of all weights, in float64: equal weights give equal numbers."""
    return float(sum((i + 1) * p.detach().double().abs().sum() for i, p in enumerate(module.parameters())))


def _model(work: Work) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(work.seed)
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        max_position_embeddings=work.prompt_tokens + work.completion_tokens,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def _tokenizer(work: Work) -> Any:
    """One word, one token: ``t7`` is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, EOS, UNKNOWN, *(f"t{i}" for i in range(SPECIAL, work.vocabulary))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )
