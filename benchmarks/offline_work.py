"""The work that both sides of `dpo_vs_trl.py` do: a model, a tokenizer, rows, sizes, and how much arithmetic."""

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import grpo_work

KINDS = ("dpo", "sft")
LENGTHS = ("mixed", "equal")


@dataclass(frozen=True)
class Work:
    """One step, on every row there is: what it learns from is the same on both sides, in whatever order."""

    kind: Literal["dpo", "sft"] = "dpo"
    lengths: Literal["mixed", "equal"] = "mixed"
    """Of completions: log-normal, as answers in public sets of pairs are of unlike length, or all alike."""
    rows: int = 32
    """Pairs, or twice as many demonstrations."""
    prompt_tokens: int = 32
    median_tokens: int = 96
    """Of completions, with their end-of-sequence token."""
    spread: float = 0.6
    """Of the logarithm of a length."""
    most_tokens: int = 320
    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 688
    layers: int = 4
    heads: int = 8
    lr: float = 1e-4
    beta: float = 0.1
    max_grad_norm: float = 1.0
    precision: str = "float32"
    warmup_steps: int = 2
    measured_steps: int = 12
    threads: int = 1
    seed: int = 0

    @property
    def steps(self) -> int:
        """All of them."""
        return self.warmup_steps + self.measured_steps

    def completions(self) -> list[int]:
        """The length of each of the ``2 rows`` completions, the same for both kinds."""
        if self.lengths == "equal":
            return [self.median_tokens] * (2 * self.rows)
        drawn = random.Random(self.seed)
        found = (self.median_tokens * math.exp(drawn.gauss(0, self.spread)) for _ in range(2 * self.rows))
        return [min(self.most_tokens, max(4, round(n))) for n in found]

    @property
    def tokens(self) -> int:
        """Of a step, prompts included and padding not."""
        return sum(n + self.prompt_tokens for n in self.completions())

    def gflop(self) -> float:
        """Multiplications and additions of a step that cannot be left out.

        Forward and twice that backward over whole rows, the output layer at completion tokens only; with a reference
        one more forward.
        """
        body = 2 * self.layers * self.hidden * (4 * self.hidden + 3 * self.intermediate)
        head = 2 * self.hidden * self.vocabulary
        lengths = self.completions()
        attention = sum(2 * self.layers * self.hidden * (n + self.prompt_tokens) ** 2 for n in lengths)
        forward = self.tokens * body + sum(lengths) * head + attention
        return (4 if self.kind == "dpo" else 3) * forward / 1e9

    def padded(self) -> float:
        """How many tokens a step has if all rows are filled up to the longest, as a multiple of those there are."""
        return 2 * self.rows * (max(self.completions()) + self.prompt_tokens) / self.tokens

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The sizes that :func:`prepare` wrote."""
        return cls(**json.loads((folder / "work.json").read_text(encoding="utf-8")))


def prepare(folder: Path, work: Work) -> None:
    """Writes model, tokenizer, rows and the sizes, for both sides to read."""
    model = grpo_work.Work(
        vocabulary=work.vocabulary,
        hidden=work.hidden,
        intermediate=work.intermediate,
        layers=work.layers,
        heads=work.heads,
        prompt_tokens=work.prompt_tokens,
        completion_tokens=work.most_tokens,
        seed=work.seed,
    )
    grpo_work.save_model(folder / "model", model)
    drawn = random.Random(work.seed + 1)

    def words(count: int) -> str:
        return " ".join(f"t{drawn.randrange(grpo_work.SPECIAL, work.vocabulary)}" for _ in range(count))

    def completion(tokens: int) -> str:
        return " " + words(tokens - 1)  # a space between it and the prompt; both sides add the end of the sequence

    lengths = work.completions()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in _rows(work.kind, lengths):
            columns = {name: completion(length) for name, length in row.items()}
            file.write(json.dumps({"prompt": words(work.prompt_tokens), **columns}) + "\n")
    (folder / "work.json").write_text(json.dumps(dataclasses.asdict(work)), encoding="utf-8")


def _rows(kind: str, lengths: Sequence[int]) -> list[dict[str, int]]:
    if kind == "sft":
        return [{"completion": n} for n in lengths]
    return [{"chosen": a, "rejected": b} for a, b in zip(lengths[::2], lengths[1::2], strict=True)]
