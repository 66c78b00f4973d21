"""How large a model is and what a step of it keeps in memory: estimates for the plan, made without the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from alignment.recipe_sections import Lora, ModelConfig

SPECIAL_TOKENS = 2
"""Of a character-level model: padding and end of sequence."""
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder in the manner of Llama and Qwen3: gated MLP, grouped-query attention, no biases."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    tied: bool
    """The output layer is the embedding."""
    head_norms: bool
    """Queries and keys have norms of their own (Qwen3)."""

    @classmethod
    def of(cls, model: ModelConfig) -> Self | None:
        """The shape that ``model.build`` or the ``config.json`` in the folder ``model.path`` gives; None for a hub id
        and for other kinds of model."""
        if model.build is not None:
            b = model.build
            vocabulary = len(b.alphabet) + SPECIAL_TOKENS
            head_size = b.hidden_size // b.heads
            sizes = (b.hidden_size, b.layers, b.heads, b.kv_heads, head_size, b.intermediate_size)
            return cls(vocabulary, *sizes, tied=True, head_norms=b.architecture == "qwen3")
        file = Path(model.path or "") / "config.json"
        if not file.is_file():
            return None
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if config.get("model_type") not in ("llama", "qwen3"):
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
        )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear maps of one layer."""
        query, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(self.hidden, query), (self.hidden, keys), (self.hidden, keys), (query, self.hidden)]
        gated = [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return attention + gated

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = 2 * self.hidden + (2 * self.head_size if self.head_norms else 0)
        layer = sum(inputs * outputs for inputs, outputs in self.linears) + norms
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    def trainable(self, lora: Lora | None) -> int:
        """Parameters that are trained. Under LoRA ``rank (inputs + outputs)`` for each adapted map; named targets are
        taken as if they were all of them."""
        if lora is None:
            return self.parameters
        return self.layers * sum(lora.rank * (inputs + outputs) for inputs, outputs in self.linears)


def max_positions(model: ModelConfig) -> int | None:
    """The longest sequence that the ``config.json`` in the folder ``model.path`` allows, in tokens; None without one,
    and where it does not say."""
    file = Path(model.path or "") / "config.json"
    if model.path is None or not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config.get("text_config", config).get("max_position_embeddings")


def memory_bytes(shape: Shape, model: ModelConfig, stage: Any, rows: int, row_tokens: int) -> dict[str, int]:
    """An estimate of what one step keeps in memory at its peak, in bytes, by what it is for.

    ========== ==============================================================================================
    parameters all of them in their dtype, adapters included
    reference  a frozen copy, where a component compares with it; none under LoRA
    gradients  one for each trained parameter
    optimizer  two moments of AdamW for each trained parameter, in its dtype
    activations of one micro-batch: per token and layer 8 hidden + 4 intermediate numbers, or 1 hidden and one whole
               layer with gradient checkpointing
    logits     of one chunk: logits and two buffers as large, in float32
    cache      keys and values of the rows that are sampled together
    ========== ==============================================================================================

    The allocator, the framework itself and temporary buffers are not counted.
    """
    size, trained = _BYTES[model.dtype], shape.trainable(model.lora)
    learner = stage.learner
    tokens = min(getattr(learner, "micro_batch_tokens", rows * row_tokens), rows * row_tokens)
    tokens = max(tokens, row_tokens)
    layer = 8 * shape.hidden + 4 * shape.intermediate
    checkpointed = getattr(learner, "gradient_checkpointing", False)
    kept = shape.layers * shape.hidden + layer if checkpointed else shape.layers * layer
    computed = 2 if getattr(learner, "autocast", "none") == "bfloat16" else size
    logits = 4 * tokens * shape.vocabulary
    chunk = int(2**20 * getattr(learner, "logits_chunk_mb", logits / 2**20))
    cached = min(rows, getattr(stage.sampler, "batch_rows", rows))
    found = {
        "parameters": size * (shape.parameters + (trained if model.lora else 0)),
        "reference": size * shape.parameters if stage.needs_reference and model.lora is None else 0,
        "gradients": size * trained,
        "optimizer": 2 * size * trained,
        "activations": computed * tokens * kept,
        "logits": 3 * min(logits, chunk),
    }
    if stage.stage == "online":
        found["cache"] = size * cached * row_tokens * shape.layers * 2 * shape.kv_heads * shape.head_size
    return {**found, "total": sum(found.values())}
