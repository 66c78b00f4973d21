"""The sizes of decoders: from a ``config.json``, from a recipe's ``build``, and from a table for models on the hub, so
that a plan needs neither a network nor weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from alignment.recipe_sections import Lora, ModelConfig

SPECIAL_TOKENS = 2
"""Of a character-level model: padding and end of sequence."""
CONTROL_TOKENS = 2
MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder in the manner of Llama and Qwen: gated MLP, grouped-query attention."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    tied: bool
    """The output layer is the embedding."""
    head_norms: bool = False
    """Queries and keys have norms of their own (Qwen3)."""
    biases: bool = False
    """Queries, keys and values have biases (Qwen2)."""
    positions: int | None = None
    """The longest sequence in tokens; None where it is not known."""

    @classmethod
    def of(cls, model: ModelConfig) -> Self | None:
        """The shape that ``model.build``, the ``config.json`` in the folder ``model.path`` or, for a hub id, the table
        here gives; None for other models and other kinds of model."""
        if model.build is not None:
            b = model.build
            sizes = (b.hidden_size, b.layers, b.heads, b.kv_heads, b.hidden_size // b.heads, b.intermediate_size)
            vocabulary = len(b.alphabet) + SPECIAL_TOKENS + (CONTROL_TOKENS if model.control else 0)
            norms = b.architecture == "qwen3"
            return cls(vocabulary, *sizes, tied=True, head_norms=norms, positions=b.max_positions)
        file = Path(model.path or "") / "config.json"
        if file.is_file():
            return cls.read(json.loads(file.read_text(encoding="utf-8")))
        return KNOWN.get(model.path or "")  # pyright: ignore[reportReturnType] - nothing derives from this class

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self | None:
        """The shape that the content of a ``config.json`` describes; None for other kinds of model."""
        if config.get("model_type") not in MODEL_TYPES:
            return None
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            vocabulary=config["vocab_size"],
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            head_norms=config["model_type"] == "qwen3",
            biases=config["model_type"] == "qwen2",
            positions=config.get("max_position_embeddings"),
        )

    @property
    def query_size(self) -> int:
        """Numbers in the queries of a token."""
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Numbers in the keys of a token in one layer; its values are as many."""
        return self.kv_heads * self.head_size

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear maps of one layer."""
        query, keys = self.query_size, self.kv_size
        attention = [(self.hidden, query), (self.hidden, keys), (self.hidden, keys), (query, self.hidden)]
        gated = [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return attention + gated

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        norms = 2 * self.hidden + (2 * self.head_size if self.head_norms else 0)
        biases = self.query_size + 2 * self.kv_size if self.biases else 0
        return sum(inputs * outputs for inputs, outputs in self.linears) + norms + biases

    @property
    def parameters(self) -> int:
        """All parameters."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    def trainable(self, lora: Lora | None) -> int:
        """Parameters that are trained. Under LoRA ``rank (inputs + outputs)`` for each adapted map; named targets are
        taken as if they were all of them."""
        if lora is None:
            return self.parameters
        return self.layers * sum(lora.rank * (inputs + outputs) for inputs, outputs in self.linears)


def _family(
    name: str, shapes: Mapping[str, Shape], *variants: tuple[str, int | None], only: str | None = None
) -> dict[str, Shape]:
    """Hub ids ``name`` with the size and each variant's ending put in, and that variant's positions."""
    return {
        name.format(size) + ending: replace(shape, positions=positions)
        for size, shape in shapes.items()
        if only is None or size in only.split()
        for ending, positions in variants
    }


_QWEN2_5 = {
    "0.5B": Shape(151936, 896, 24, 14, 2, 64, 4864, tied=True, biases=True),
    "1.5B": Shape(151936, 1536, 28, 12, 2, 128, 8960, tied=True, biases=True),
    "3B": Shape(151936, 2048, 36, 16, 2, 128, 11008, tied=True, biases=True),
    "7B": Shape(152064, 3584, 28, 28, 4, 128, 18944, tied=False, biases=True),
    "14B": Shape(152064, 5120, 48, 40, 8, 128, 13824, tied=False, biases=True),
    "32B": Shape(152064, 5120, 64, 40, 8, 128, 27648, tied=False, biases=True),
    "72B": Shape(152064, 8192, 80, 64, 8, 128, 29568, tied=False, biases=True),
}
_QWEN3 = {
    "0.6B": Shape(151936, 1024, 28, 16, 8, 128, 3072, tied=True, head_norms=True),
    "1.7B": Shape(151936, 2048, 28, 16, 8, 128, 6144, tied=True, head_norms=True),
    "4B": Shape(151936, 2560, 36, 32, 8, 128, 9728, tied=True, head_norms=True),
    "8B": Shape(151936, 4096, 36, 32, 8, 128, 12288, tied=False, head_norms=True),
    "14B": Shape(151936, 5120, 40, 40, 8, 128, 17408, tied=False, head_norms=True),
    "32B": Shape(151936, 5120, 64, 64, 8, 128, 25600, tied=False, head_norms=True),
}
_LLAMA3_1 = {
    "8B": Shape(128256, 4096, 32, 32, 8, 128, 14336, tied=False),
    "70B": Shape(128256, 8192, 80, 64, 8, 128, 28672, tied=False),
}
_TULU3 = {"8B": replace(_LLAMA3_1["8B"], vocabulary=128264)}  # eight tokens more; from memory
_R1_DISTILL = {
    "1.5B": replace(_QWEN2_5["1.5B"], tied=False),
    "7B": _QWEN2_5["7B"],
    "14B": _QWEN2_5["14B"],
    "32B": _QWEN2_5["32B"],
}

KNOWN: Mapping[str, Shape] = {
    **_family("Qwen/Qwen2.5-{}", _QWEN2_5, ("", None), ("-Instruct", 32768)),
    **_family("Qwen/Qwen2.5-Math-{}", _QWEN2_5, ("", 4096), ("-Instruct", 4096), only="1.5B 7B"),
    "Elliott/Qwen2.5-Math-7B-16k-think": replace(_QWEN2_5["7B"], positions=16384),  # as its name says; not looked up
    **_family("Qwen/Qwen3-{}", _QWEN3, ("", 40960)),
    **_family("Qwen/Qwen3-{}-Base", _QWEN3, ("", 32768), only="0.6B 1.7B 4B 8B 14B"),
    **_family("meta-llama/Llama-3.1-{}", _LLAMA3_1, ("", 131072), ("-Instruct", 131072)),
    **_family("allenai/Llama-3.1-Tulu-3-{}", _TULU3, ("", 131072), ("-DPO", 131072), ("-SFT", 131072)),
    **_family("deepseek-ai/DeepSeek-R1-Distill-Qwen-{}", _R1_DISTILL, ("", 131072)),
}
"""Shapes by hub id, as their ``config.json`` gives them; a test compares their parameters with the published totals.
Positions are left open where sources disagree."""
