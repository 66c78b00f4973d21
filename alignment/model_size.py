"""What a model needs of a GPU's memory, in training and in sampling: estimates for the plan, made without the model.

``docs/clusters.md`` has the formula with a worked example; tests compare its parts with what autograd really keeps.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from alignment.algorithms.masked_preferences import LearnedMasks
from alignment.architectures import Shape
from alignment.critics import ModelCritic
from alignment.recipe_sections import ModelConfig

GIB = 2**30
CONTEXT = int(1.5 * GIB)
"""Of a process on a GPU: the CUDA context, kernels and communication buffers."""
ENGINE_WORK = 3 * GIB
"""Of a vLLM engine beside weights and cache: its context, activations and CUDA graphs."""
BUCKET = 200_000_000
"""Numbers that DeepSpeed's ranks exchange at once, as the learner sets it."""
LIVE = 1_000_000_000
"""Weights that DeepSpeed's stage 3 keeps whole at most; its default."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Precision = Literal["float32", "bfloat16", "autocast"]


@dataclass(frozen=True)
class Training:
    """How a learner holds the model."""

    precision: Precision = "float32"
    """``autocast``: weights in float32, matrix products in bfloat16."""
    zero: bool = False
    """DeepSpeed's ZeRO; in bfloat16 its optimizer keeps weights in float32, too."""
    ranks: int = 1
    zero_stage: int = 0
    """What is split over the ranks: 1 the optimizer, 2 gradients too, 3 weights too."""
    offload: str = "none"
    """What is kept in the memory of the host: the ``optimizer``, or ``parameters`` and the optimizer."""
    checkpointing: bool = False
    micro_batch_tokens: int | None = None
    """None: all rows at once."""
    logits_chunk_mb: float | None = None
    optimizers: int = 1
    """Sets of moments over the same weights: a mixer may have supervised updates of its own."""
    keeps_before: bool = False
    """Whether an update keeps the weights it began with, to measure how far they moved (``update_norm``)."""

    @classmethod
    def of_stage(cls, stage: Any, model: ModelConfig) -> Self:
        """What the learner of a stage holds of the policy."""
        own = cls.of(stage.learner, model)
        if stage.stage in ("sft", "preference", "reward_model"):
            return own
        slots = len(getattr(stage.credited.mixer, "slots", ()))
        return replace(own, optimizers=1 + slots, keeps_before="update_norm" in stage.credited.needs)

    @classmethod
    def of(cls, learner: Any, model: ModelConfig) -> Self:
        """What the options of a learner say; those that it lacks are as in one process."""
        dtype: Precision = getattr(learner, "dtype", model.dtype)
        mixed = dtype == "float32" and getattr(learner, "autocast", "none") == "bfloat16"
        return cls(
            precision="autocast" if mixed else dtype,
            zero=hasattr(learner, "zero_stage"),
            ranks=getattr(learner, "ranks", 1),
            zero_stage=getattr(learner, "zero_stage", 0),
            offload=getattr(learner, "offload", "none"),
            checkpointing=getattr(learner, "gradient_checkpointing", False),
            micro_batch_tokens=getattr(learner, "micro_batch_tokens", None),
            logits_chunk_mb=getattr(learner, "logits_chunk_mb", None),
        )

    @property
    def weight_bytes(self) -> int:
        """Of one parameter that the model computes with."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def masters(self) -> bool:
        """Whether the optimizer has weights of its own, in float32: a copy even where the model is float32."""
        return self.zero and self.zero_stage > 0

    @property
    def whole_gradients(self) -> bool:
        """Whether every rank keeps float32 gradients of all that is trained: DeepSpeed's optimizer for stage 1."""
        return self.zero and self.zero_stage == 1 and self.precision == "bfloat16" and self.offload == "none"

    def trained_bytes(self, model: ModelConfig) -> int:
        """Of one parameter that is trained: in one process adapters are float32 whatever the model is."""
        return 4 if model.lora and not self.zero else self.weight_bytes

    def share(self, stage: int) -> int:
        """Ranks that share what is split from ``stage`` on."""
        return self.ranks if self.zero_stage >= stage else 1


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

    With P parameters of which T are trained, b bytes each (2 in bfloat16, else 4), and R ranks:

    =========== =============================================================================================
    parameters  ``b P``, adapters included; at ZeRO stage 3 divided by R; under autocast also copies of ``2 P``
    reference   as much again, where a component compares with it; none under LoRA, where it is the adapter off
    weights     before the update, ``b T`` (adapters in one process ``4 T``), at stage 3 divided by R, where a component
    before      asks how far it moved (``hypervolume``)
    gradients   ``b T``, of adapters in one process ``4 T``. DeepSpeed: ``4 T``, from stage 2 on divided by R, and a
                copy at the step, ``4 T / R``; at stage 1 in bfloat16 ``2 T`` beside instead of the copy
    optimizer   two moments of AdamW, ``2 b T``; DeepSpeed from stage 1 on: with its own weights, in float32 always,
                ``12 T / R``; two moments more for each further optimizer (``relift``)
    buckets     what ranks exchange at once: two buckets of 200 M numbers, or of the largest weight or all if these are
                more or fewer, and at stage 3 up to 1,000 M weights that are whole for a while
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
    b, t, trained = training.weight_bytes, training.trained_bytes(model), shape.trainable(model.lora)
    tokens = _micro_batch(training, row_tokens, rows)
    logits = 4 * tokens * shape.vocabulary
    chunk = int(2**20 * training.logits_chunk_mb) if training.logits_chunk_mb is not None else logits
    layer = activation_bytes(shape, training.precision)
    between = 2 if training.precision == "bfloat16" else 4
    kept = shape.layers * between * shape.hidden + layer if training.checkpointing else shape.layers * layer
    copies = 2 * shape.parameters if training.precision == "autocast" else 0  # kept for the backward pass alone
    return {
        **_states(shape, model, training, reference, copies),
        "weights before": 0 if training.offload == "parameters" else _before_bytes(training, t, trained),
        "gradients": _gradient_bytes(training, t, trained),
        "buckets": b * _exchanged(shape, training, trained),
        "activations": tokens * kept,
        "logits": 3 * min(logits, chunk),
    }


def _micro_batch(training: Training, row_tokens: int, rows: int) -> int:
    """Most tokens of a micro-batch: a row is never cut."""
    return max(row_tokens, min(training.micro_batch_tokens or rows * row_tokens, rows * row_tokens))


def masking_bytes(shape: Shape, training: Training, masks: Any, tokens: int) -> int:
    """What preferences with masks of tokens keep of the reference during a micro-batch, in bytes: its logits, ``4 V`` a
    token, and, where masks are learned, its hidden states, ``b L H``, and for each network two float32 copies."""
    states = 0
    if isinstance(masks, LearnedMasks):
        states = shape.layers * shape.hidden * (training.weight_bytes + (16 if masks.independent else 8))
    return tokens * (4 * shape.vocabulary + states)


def resting_bytes(shape: Shape, model: ModelConfig, training: Training, reference: bool) -> int:
    """What of :func:`training_bytes` one rank keeps between updates: parameters, reference and optimizer. DeepSpeed
    keeps its float32 gradients too at stage 1 in bfloat16 (``4 T``) and at stage 3 (``4 T / R``, and one bucket)."""
    trained, kept = shape.trainable(model.lora), 0
    if training.whole_gradients:
        kept = 4 * trained
    elif training.zero and training.zero_stage == 3:
        kept = training.weight_bytes * _bucket(shape, trained)
        kept += 4 * trained // training.ranks if training.offload == "none" else 0
    return sum(_states(shape, model, training, reference).values()) + kept


def _states(shape: Shape, model: ModelConfig, training: Training, reference: bool, copies: int = 0) -> dict[str, int]:
    """Weights and moments on one rank's GPU, in bytes; ``copies`` of weights count as weights."""
    b, t, trained = training.weight_bytes, training.trained_bytes(model), shape.trainable(model.lora)
    whole = b * shape.parameters + (t * trained if model.lora else 0)
    held = 0 if training.offload == "parameters" else whole // training.share(3)
    return {
        "parameters": held + copies,
        "reference": b * shape.parameters // training.share(3) if reference and model.lora is None else 0,
        "optimizer": 0 if training.offload != "none" else _optimizer_bytes(training, t, trained),
    }


def _before_bytes(training: Training, each: int, trained: int) -> int:
    """What an update began with, kept where the weights are."""
    return each * trained // training.share(3) if training.keeps_before else 0


def _gradient_bytes(training: Training, each: int, trained: int) -> int:
    if not training.zero:
        return each * trained
    if training.whole_gradients:
        return 4 * trained + 2 * trained
    step = 4 * trained // training.ranks if training.masters and training.offload == "none" else 0
    return 4 * trained // training.share(2) + step


def _optimizer_bytes(training: Training, each: int, trained: int) -> int:
    moments = 2 * (4 if training.masters else each) * training.optimizers
    return (moments + 4 * training.masters) * trained // training.share(1)


def _exchanged(shape: Shape, training: Training, trained: int) -> int:
    """Numbers that are in buffers for the other ranks at once; one rank alone has them as well."""
    if not training.zero:
        return 0
    return 2 * _bucket(shape, trained) + (min(LIVE, shape.parameters) if training.zero_stage == 3 else 0)


def _bucket(shape: Shape, trained: int) -> int:
    """Numbers that one of DeepSpeed's buffers holds."""
    largest = shape.vocabulary * shape.hidden if trained == shape.parameters else 0
    return max(largest, min(BUCKET, trained))


def host_bytes(shape: Shape, model: ModelConfig, training: Training) -> int:
    """What one learner rank takes of its host's memory, in bytes: the whole model while it is loaded, later what is
    offloaded; the larger of both."""
    t, trained = training.trained_bytes(model), shape.trainable(model.lora)
    loading = max(_BYTES[model.dtype], training.weight_bytes) * shape.parameters
    weights = training.weight_bytes * shape.parameters // training.share(3) + _before_bytes(training, t, trained)
    optimizer = _optimizer_bytes(training, t, trained) + 4 * trained // training.share(2)
    return max(loading, {"none": 0, "optimizer": optimizer}.get(training.offload, weights + optimizer))


def cache_bytes_per_token(shape: Shape, dtype: str, tensor_parallel: int = 1) -> int:
    """Keys and values of one token on one of ``tensor_parallel`` GPUs; with fewer heads than GPUs each has one."""
    heads = -(-shape.kv_heads // tensor_parallel)
    return 2 * shape.layers * heads * shape.head_size * _BYTES[dtype]


def engine_bytes(shape: Shape, dtype: str, tensor_parallel: int, budget: int) -> dict[str, int]:
    """What a vLLM engine does with ``budget`` bytes of each of its GPUs: weights ``b P / tensor_parallel``, room to
    work, and the cache, which takes the rest (less than nothing where the budget is too small)."""
    weights = _BYTES[dtype] * shape.parameters // tensor_parallel
    return {"weights": weights, "work": ENGINE_WORK, "cache": budget - weights - ENGINE_WORK}


def critic_bytes(shape: Shape, model: ModelConfig, stage: Any) -> int:
    """What one rank keeps of value models of their own between updates (:func:`resting_bytes`), in bytes.

    Their own update comes after the policy's and takes no more than that, if they are no larger. A model whose
    ``config.json`` is not at hand counts as large as the policy.
    """
    total = 0
    if stage.stage == "reward_model":
        own = stage.model or model
        found = Shape.of(own) if stage.model is not None else shape
        total += stage.members * resting_bytes(found or shape, own, Training.of(stage.learner, own), reference=False)
    for critic in (getattr(stage, "values", None), getattr(stage, "prompt_value", None)):
        if isinstance(critic, ModelCritic):
            own = critic.model or model
            found = Shape.of(own) if critic.model is not None else shape
            total += resting_bytes(found or shape, own, Training.of(stage.learner, own), reference=False)
    return total


def memory_bytes(shape: Shape, model: ModelConfig, stage: Any, rows: int, row_tokens: int) -> dict[str, int]:
    """What a step keeps at its peak in each process that learns, in bytes: :func:`training_bytes`, value models of
    their own as ``critics``, :func:`masking_bytes` as ``masks`` and, where the model that is trained samples as well,
    the ``cache`` of the rows that are sampled together.

    The allocator, the framework itself and temporary buffers are not counted.
    """
    training = Training.of_stage(stage, model)
    found = training_bytes(shape, model, training, row_tokens, -(-rows // training.ranks), stage.needs_reference)
    if critics := critic_bytes(shape, model, stage):
        found["critics"] = critics
    for loss in getattr(stage, "losses", ()):
        if (masks := getattr(loss, "token_masks", None)) is not None:
            tokens = _micro_batch(training, row_tokens, -(-rows // training.ranks))
            found["masks"] = masking_bytes(shape, training, masks, tokens)
    if stage.samples and not hasattr(stage.sampler, "tensor_parallel"):
        cached = min(rows, getattr(stage.sampler, "batch_rows", rows))
        found["cache"] = cached * row_tokens * cache_bytes_per_token(shape, model.dtype)
    return {**found, "total": sum(found.values())}
