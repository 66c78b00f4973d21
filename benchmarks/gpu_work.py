"""What the measurements and tests on a GPU work on: a model of Qwen3-0.6B's shape with random weights, long rows, and
how many operations they take."""

import time
from dataclasses import dataclass, field

import torch
from torch import nn

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.objective import Objective
from alignment.types import Batch

VOCABULARY = 151_936
ROW_TOKENS = 4096


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3 model; the defaults are those of Qwen3-0.6B."""

    layers: int = 28
    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 3072
    vocabulary: int = VOCABULARY
    positions: int = 8192

    def build(self, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
        """The model with random weights, those of the embedding and the head tied."""
        from transformers import AutoModelForCausalLM, Qwen3Config

        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
        )
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()

    def training_flop(self, row_tokens: int) -> float:
        """Operations per token of a forward and a backward pass, without what is computed again.

        Three times the forward pass: two for each weight of a matrix, the head's included and the embedding's not, and
        in each layer, for scores and for their use, two for each of the ``row_tokens / 2`` positions before a token.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (2 * queries + 2 * keys + 3 * self.intermediate)
        weights = self.layers * layer + self.vocabulary * self.hidden
        return 3 * (2 * weights + self.layers * 2 * 2 * queries * row_tokens / 2)


def long_batch(rows: int, row_tokens: int = ROW_TOKENS, vocabulary: int = VOCABULARY, seed: int = 0) -> Batch:
    """Rows without padding, trained on from the second token on, with random advantages."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, vocabulary, (rows, row_tokens), generator=generator)
    mask_BT = torch.ones(rows, row_tokens, dtype=torch.bool)
    mask_BT[:, 0] = False
    small = {name: torch.zeros(rows, dtype=torch.int8) for name in ("source_B", "ratio_base_B")}
    flags = {"scored_B": torch.ones(rows, dtype=torch.bool), "truncated_B": torch.zeros(rows, dtype=torch.bool)}
    return Batch(
        ids_BT=ids_BT,
        loss_mask_BT=mask_BT,
        length_B=torch.full((rows,), row_tokens),
        group_B=torch.arange(rows) // 2,
        key_B=torch.arange(rows),
        temperature_B=torch.ones(rows),
        behaviour_logp_BT=torch.full((rows, row_tokens), -12.0) * mask_BT,
        rewards_BK=torch.rand(rows, 1, generator=generator),
        weights_K=torch.ones(1),
        adv_BT=torch.randn(rows, 1, generator=generator).expand(rows, row_tokens).clone(),
        objectives=("reward",),
        step=seed,
        seed=seed,
        **small,
        **flags,
    )


@dataclass
class Stopwatch:
    """Seconds of what runs on the current GPU, the best of several times."""

    seconds: list[float] = field(default_factory=list)

    def __enter__(self) -> "Stopwatch":
        torch.cuda.synchronize()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def best(self) -> float:
        """The shortest."""
        return min(self.seconds)


def matrix_rate(size: int = 8192, times: int = 20) -> float:
    """Operations per second of the card's bfloat16 matrix product, measured now: what MFU is a share of."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    watch = Stopwatch()
    for _ in range(5):
        with watch:
            for _ in range(times):
                torch.mm(a, b, out=product)
    return 2.0 * size**3 * times / watch.best


def copy_rate(size_bytes: int = 1 << 30, times: int = 20) -> float:
    """Bytes per second that a plain copy on the card brings to their new place: the limit of a weight update."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    watch = Stopwatch()
    for _ in range(5):
        with watch:
            for _ in range(times):
                target.copy_(source)
    return size_bytes * times / watch.best


def objective() -> Objective:
    """Of the default algorithm."""
    return Objective.of(Algorithm(), {})
