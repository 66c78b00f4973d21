"""What a model needs of a GPU's memory, in training and in sampling: estimates for the plan, made without the model.

``docs/clusters.md`` has the formula with a worked example; tests compare its parts with what autograd really keeps.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from alignment.architectures import Shape
from alignment.recipe_sections import ModelConfig

GIB = 2**30
CONTEXT = int(1.5 * GIB)
"""Of a process on a GPU: the CUDA context, kernels and communication buffers."""
ENGINE_WORK = 3 * GIB
"""Of a vLLM engine beside weights and cache: its context, activations and CUDA graphs."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Precision = Literal["float32", "bfloat16", "autocast"]


@dataclass(frozen=True)
class Training:
    """How a learner holds the model."""

    precision: Precision = "float32"
    """``autocast``: weights in float32, matrix products in bfloat16."""
    masters: bool = False
    """Beside weights in bfloat16 the optimizer keeps them in float32 (DeepSpeed)."""
    ranks: int = 1
    zero_stage: int = 0
    """What is split over the ranks: 1 the optimizer, 2 gradients too, 3 weights too."""
    offload: frozenset[str] = frozenset()
    """Of ``optimizer`` and ``parameters``, what is kept in the memory of the host."""
    checkpointing: bool = False
    micro_batch_tokens: int | None = None
    """None: all rows at once."""
    logits_chunk_mb: float | None = None

    @classmethod
    def of(cls, learner: Any, model: ModelConfig) -> Self:
        """What the options of a learner say; those that it lacks are as in one process."""
        dtype = getattr(learner, "dtype", model.dtype)
        dtype = model.dtype if dtype == "auto" else dtype
        mixed = dtype == "float32" and getattr(learner, "autocast", "none") == "bfloat16"
        return cls(
            precision="autocast" if mixed else "bfloat16" if _BYTES[dtype] == 2 else "float32",
            masters=hasattr(learner, "zero_stage") and _BYTES[dtype] == 2,
            ranks=getattr(learner, "ranks", 1),
            zero_stage=getattr(learner, "zero_stage", 0),
            offload=_offloaded(getattr(learner, "offload", "none")),
            checkpointing=getattr(learner, "gradient_checkpointing", False),
            micro_batch_tokens=getattr(learner, "micro_batch_tokens", None),
            logits_chunk_mb=getattr(learner, "logits_chunk_mb", None),
        )

    @property
    def weight_bytes(self) -> int:
        """Of one parameter."""
        return 2 if self.precision == "bfloat16" else 4

    def trained_bytes(self, model: ModelConfig) -> int:
        """Of one parameter that is trained: in one process adapters are float32 whatever the model is."""
        return 4 if model.lora and not self.masters else self.weight_bytes

    def optimizer_bytes(self, model: ModelConfig) -> int:
        """Of AdamW for one parameter that is trained: two moments and, with masters, weights and gradients in
        float32."""
        return 16 if self.masters else 2 * self.trained_bytes(model)

    def share(self, stage: int) -> int:
        """Ranks that share what is split from ``stage`` on."""
        return self.ranks if self.zero_stage >= stage else 1


def _offloaded(option: str | None) -> frozenset[str]:
    """``none``, ``optimizer`` or something that names parameters, which takes the optimizer along."""
    if option in (None, "none"):
        return frozenset()
    return frozenset({"optimizer"} if option == "optimizer" else {"optimizer", "parameters"})


def max_positions(model: ModelConfig) -> int | None:
    """The longest sequence of the model, in tokens, as its ``config.json`` or the table of architectures says; None
    where neither does."""
    file = Path(model.path or "") / "config.json"
    if model.path is None:
        return None
    if file.is_file():  # any kind of model, not only those with a known shape
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return config.get("text_config", config).get("max_position_embeddings")
    shape = Shape.of(model)
    return shape.positions if shape else None


def activation_bytes(shape: Shape, precision: Precision) -> int:
    """What one token leaves in one layer for the backward pass, in bytes.

    In float32: three tensors of the hidden size at each norm (its input, the normalised input, and the result that the
    linear maps read), queries, keys, values and the attention's output, and four of the intermediate size; the input of
    a norm is float32 in bfloat16 models as well. Attention itself is taken to keep nothing (flash or sdpa).
    """
    wide = 4 if precision == "float32" else 2
    hidden = {"float32": 24, "bfloat16": 16, "autocast": 26}[precision]
    heads = 2 * wide + ((8 if precision == "float32" else 6) if shape.head_norms else 0)
    return hidden * shape.hidden + heads * (shape.query_size + shape.kv_size) + 4 * wide * shape.intermediate


def training_bytes(
    shape: Shape, model: ModelConfig, training: Training, row_tokens: int, rows: int, reference: bool
) -> dict[str, int]:
    """An estimate of what one rank keeps on its GPU at the peak of an update, in bytes, by what it is for.

    With P parameters of which T are trained, b bytes each (2 in bfloat16, else 4), and R ranks of which each holds a
    share of the optimizer from ZeRO stage 1 on, of gradients from 2 on and of weights from 3 on:

    =========== =============================================================================================
    parameters  ``b P``, adapters included; under autocast also their copies in bfloat16, ``2 P``
    reference   ``b P``, where a component compares with it; none under LoRA, where it is the adapter off
    gradients   ``b T``; ``4 T`` for adapters in one process, which are float32
    optimizer   two moments of AdamW, each as large as gradients; DeepSpeed in bfloat16: ``16 T``, the moments, weights
                and, at the step, gradients in float32
    gathered    at stage 3, what is whole for a moment: two layers, or the embedding if that is larger, ``b`` each
    activations of one micro-batch: :func:`activation_bytes` per token and layer, or, with gradient checkpointing, the
                input of every layer and one layer whole
    logits      of one chunk: logits and two buffers as large, in float32
    =========== =============================================================================================

    Args:
        shape: Of the model.
        model: Says whether LoRA is used.
        training: How the learner holds it.
        row_tokens: Of the longest row.
        rows: Of an update on this rank, to bound a micro-batch.
        reference: Whether a frozen copy is kept.
    """
    b, total, trained = training.weight_bytes, shape.parameters, shape.trainable(model.lora)
    t = training.trained_bytes(model)
    whole = b * total + (t * trained if model.lora else 0)
    held = 0 if "parameters" in training.offload else whole // training.share(3)
    tokens = max(row_tokens, min(training.micro_batch_tokens or rows * row_tokens, rows * row_tokens))
    logits = 4 * tokens * shape.vocabulary
    chunk = int(2**20 * training.logits_chunk_mb) if training.logits_chunk_mb is not None else logits
    layer = activation_bytes(shape, training.precision)
    between = 2 if training.precision == "bfloat16" else 4
    kept = shape.layers * between * shape.hidden + layer if training.checkpointing else shape.layers * layer
    moments = training.optimizer_bytes(model) * trained // training.share(1)
    return {
        "parameters": held + (2 * total if training.precision == "autocast" else 0),
        "reference": b * total // training.share(3) if reference and model.lora is None else 0,
        "gradients": t * trained // training.share(2),
        "optimizer": 0 if "optimizer" in training.offload else moments,
        "gathered": b * max(2 * shape.layer_parameters, shape.vocabulary * shape.hidden)
        if training.share(3) > 1
        else 0,
        "activations": tokens * kept,
        "logits": 3 * min(logits, chunk),
    }


def host_bytes(shape: Shape, model: ModelConfig, training: Training) -> int:
    """What one rank keeps in the memory of its host because of offloading, in bytes."""
    trained = shape.trainable(model.lora)
    parameters = training.weight_bytes * shape.parameters // training.share(3)
    moments = training.optimizer_bytes(model) * trained // training.share(1)
    return ("parameters" in training.offload) * parameters + ("optimizer" in training.offload) * moments


def resting_bytes(parts: Mapping[str, int]) -> int:
    """Of what :func:`training_bytes` found, what stays between updates."""
    return sum(parts[name] for name in ("parameters", "reference", "optimizer"))


def cache_bytes_per_token(shape: Shape, dtype: str, tensor_parallel: int = 1) -> int:
    """Keys and values of one token on one of ``tensor_parallel`` GPUs; with fewer heads than GPUs each has one."""
    heads = -(-shape.kv_heads // tensor_parallel)
    return 2 * shape.layers * heads * shape.head_size * _BYTES[dtype]


def engine_bytes(shape: Shape, dtype: str, tensor_parallel: int, budget: int) -> dict[str, int]:
    """What a vLLM engine does with ``budget`` bytes of each of its GPUs: weights ``b P / tensor_parallel``, room to
    work, and the cache, which takes the rest (less than nothing where the budget is too small)."""
    weights = _BYTES[dtype] * shape.parameters // tensor_parallel
    return {"weights": weights, "work": ENGINE_WORK, "cache": budget - weights - ENGINE_WORK}


def memory_bytes(shape: Shape, model: ModelConfig, stage: Any, rows: int, row_tokens: int) -> dict[str, int]:
    """What a step keeps at its peak in each process that learns, in bytes: :func:`training_bytes` and, where the model
    that is trained samples as well, the ``cache`` of the rows that are sampled together.

    The allocator, the framework itself and temporary buffers are not counted.
    """
    training = Training.of(stage.learner, model)
    found = training_bytes(shape, model, training, row_tokens, -(-rows // training.ranks), stage.needs_reference)
    if stage.stage == "online" and not hasattr(stage.sampler, "tensor_parallel"):
        cached = min(rows, getattr(stage.sampler, "batch_rows", rows))
        found["cache"] = cached * row_tokens * cache_bytes_per_token(shape, model.dtype)
    return {**found, "total": sum(found.values())}
