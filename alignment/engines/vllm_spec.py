"""What a vLLM engine is built from: small enough to travel to another process, checked before one is started."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from alignment.engines.config import Site
from alignment.engines.steering import SteeringPlan
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.errors import UserError
from alignment.origin import Origin
from alignment.sampling import check_request
from alignment.types import Request

GIB = 1 << 30
BLOCK_TOKENS = 32
"""Of the cache, on a CPU: vLLM's kernels want a multiple of it, and what prompts share is shared in whole blocks."""
SMALLEST_TEMPERATURE = 0.01
"""Above 0; vLLM samples with this one where a smaller is asked for."""
MOST_CPU_CACHE = 4 * GIB


@dataclass(frozen=True)
class LoraShape:
    """What vLLM must know of an adapter before the first one comes."""

    rank: int
    alpha: float
    targets: str | tuple[str, ...]


@dataclass(frozen=True)
class EngineSpec:
    """Everything that an engine is built from; it can be pickled.

    Weights are no part of it: they come with the first update. Only an engine that receives adapters alone makes the
    base model itself, from ``origin``.
    """

    options: VllmSamplerConfig
    architecture: str
    """The ``config.json`` of a transformers model."""
    max_tokens: int
    """The longest row, prompt and completion."""
    dtype: str
    """Of the weights that come: what ``auto`` means on a CPU."""
    lora: LoraShape | None = None
    origin: Origin | None = None
    cpu_cache_bytes: int = field(default=0)
    """What the rows need on a CPU, where the recipe does not say it."""
    steering: SteeringPlan | None = None
    """What steers requests that have a ``tilt``; its folders are read where the engine is."""

    @classmethod
    def of(cls, site: Site, options: VllmSamplerConfig) -> Self:
        """The engine for ``site``.

        Raises:
            UserError: vLLM is not installed, or the model or an option is none that it can run.
        """
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "sampler vllm: vLLM is not installed; `make setup` installs it, or use sampler: transformers"
            )
        module: Any = site.model.module
        base = module.get_base_model() if hasattr(module, "get_base_model") else module
        config = base.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = site.row_tokens or positions
        if longest is None:
            raise UserError("sampler vllm: the model has no largest position, so a longest row must be given")
        if positions is not None and longest > positions:
            raise UserError(f"sampler vllm: rows of {longest} tokens exceed the model's {positions} positions")
        described = config.to_dict() | {"architectures": [type(base).__name__]}
        described["dtype"] = dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
        lora = _lora_shape(site) if options.lora == "adapter" else None
        return cls(
            options,
            json.dumps(described, default=str),
            longest,
            dtype,
            lora,
            site.model.origin,
            _cpu_cache_bytes(config.get_text_config(), options, longest, dtype),
            _steering(site),
        )

    def check(self, requests: Sequence[Request]) -> None:
        """Refuses requests that the engine cannot sample.

        Raises:
            UserError: One is empty, asks for no tokens, has a bad option or is too long.
        """
        for request in requests:
            check_request(request, self.max_tokens, 0 if self.steering is None else self.steering.models)
            if self.steering is not None:
                self.steering.check(request)
            if 0 < request.params.temperature < SMALLEST_TEMPERATURE:
                raise UserError(
                    f"request {request.id!r}: temperature is {request.params.temperature}; with vLLM it must be 0"
                    f" (greedy) or at least {SMALLEST_TEMPERATURE}"
                )


def _steering(site: Site) -> SteeringPlan | None:
    plan = SteeringPlan.of(site)
    if plan is not None and plan.name != "value_augmented":
        raise UserError(f"sampler vllm: it has no decoding {plan.name}; use sampler: transformers")
    return plan


def _lora_shape(site: Site) -> LoraShape:
    origin = site.model.origin
    lora = None if origin is None else origin.config.lora
    if lora is None:
        raise UserError("sampler.lora is 'adapter', but the model has no LoRA adapter; use 'merged' or give model.lora")
    return LoraShape(lora.rank, lora.alpha, lora.targets if isinstance(lora.targets, str) else tuple(lora.targets))


def _cpu_cache_bytes(config: Any, options: VllmSamplerConfig, longest: int, dtype: str) -> int:
    """Room for all rows at full length, at most :data:`MOST_CPU_CACHE`, at least for two rows."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = dtype if options.dtype == "auto" else options.dtype
    token = 2 * config.num_hidden_layers * heads * size * getattr(torch, kept).itemsize
    row = token * BLOCK_TOKENS * (longest // BLOCK_TOKENS + 2)
    return max(2 * row, min(options.max_num_seqs * row, MOST_CPU_CACHE))
