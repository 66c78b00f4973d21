"""Builds vLLM's engine from a specification, without any weights on disk."""

import logging
from pathlib import Path
from typing import Any

from alignment.engines.vllm_environment import prepare_vllm, undisturbed
from alignment.engines.vllm_spec import BLOCK_TOKENS, GIB, EngineSpec
from alignment.errors import UserError


def on_cpu() -> bool:
    """Whether the vLLM that is installed computes on the CPU."""
    prepare_vllm()
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def build_engine(spec: EngineSpec, folder: Path) -> Any:
    """An ``LLMEngine`` of vLLM with random weights, in this process.

    Args:
        spec: What to build.
        folder: An empty one, for the configuration of the model.

    Raises:
        UserError: vLLM has not this architecture, or no attention for heads of its size.
    """
    (folder / "config.json").write_text(spec.architecture, encoding="utf-8")
    with undisturbed():
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        logging.getLogger("vllm").setLevel(logging.ERROR)
        try:
            args = EngineArgs(model=str(folder), **_arguments(spec, on_cpu()))
            config = args.create_engine_config()
            _check(config)
            if spec.steering is not None:
                from alignment.engines.vllm_guidance import processor_for

                config.model_config.logits_processors = [processor_for(config)]
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"sampler vllm: vLLM cannot run this model: {error}") from error
        engine: Any = LLMEngine.from_vllm_config(config, disable_log_stats=True)
    return engine


def _check(config: Any) -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        size, known = config.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
        if size not in known:
            raise UserError(f"on a CPU its attention has heads of {', '.join(map(str, known))}, not of {size}")


def _arguments(spec: EngineSpec, cpu: bool) -> dict[str, Any]:
    o = spec.options
    dtype = (spec.dtype if cpu else "bfloat16") if o.dtype == "auto" else o.dtype
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "generation_config": "vllm",  # nothing beside what a request says
        "seed": 0,
        "dtype": dtype,
        "max_model_len": spec.max_tokens,
        "tensor_parallel_size": o.tensor_parallel,
        "max_num_seqs": o.max_num_seqs,
        "gpu_memory_utilization": o.gpu_memory_utilization,
        "enable_prefix_caching": o.enable_prefix_caching,
        "enforce_eager": cpu if o.enforce_eager is None else o.enforce_eager,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "alignment.engines.vllm_worker.WeightReceiver",
        "disable_log_stats": True,
    }
    if o.max_num_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = o.max_num_batched_tokens
    if o.kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(o.kv_cache_gb * GIB)
    elif cpu:
        arguments["kv_cache_memory_bytes"] = spec.cpu_cache_bytes
    if cpu:
        arguments["block_size"] = BLOCK_TOKENS
    elif o.sleep:
        arguments["enable_sleep_mode"] = True
    if spec.steering is not None:
        from alignment.engines.vllm_guidance import CONFIG

        arguments["additional_config"] = {CONFIG: spec.steering.to_json()}
    if spec.lora is not None:
        rank = next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= spec.lora.rank)
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    return arguments
