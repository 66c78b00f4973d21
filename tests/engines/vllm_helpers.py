"""Models that vLLM runs on a CPU (its attention has heads of 32 at least), samplers and requests for its tests."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment.engines.config import Site
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.engines.vllm_engine import VllmEngine
from alignment.engines.vllm_sampler import VllmSampler
from alignment.models import Model
from alignment.sampling import Received
from alignment.types import Completion, Request, SamplingParams
from tests.engines.helpers import tiny

PROMPTS = tuple(tuple((7 * i + 3 * j) % 17 + 1 for j in range(40 + 3 * i)) for i in range(4))
"""Longer than a block of the cache."""


def small(architecture: str = "Qwen3", seed: int = 0, **options: Any) -> nn.Module:
    """:func:`tiny` with heads that vLLM has."""
    sizes = {"hidden_size": 32, "max_position_embeddings": 128, "tie_word_embeddings": False}
    heads = {"head_dim": 32} if architecture == "Qwen3" else {"num_attention_heads": 1, "head_dim": 32}
    return tiny(architecture, seed, **(sizes | heads | options))


def site_of(module: nn.Module, row_tokens: int = 96, **options: Any) -> Site:
    """A site without a tokenizer, which no sampler needs."""
    tokenizer: Any = None
    return Site(Model(module, tokenizer, "tiny", **options), row_tokens)


def sampler_of(module: nn.Module, row_tokens: int = 96, **options: Any) -> VllmSampler:
    """A sampler with the weights of ``module``, as version 0."""
    chosen: dict[str, Any] = {"max_num_seqs": 16} | options
    config = VllmSamplerConfig(**chosen)
    sampler = VllmSampler(site_of(module, row_tokens), config)
    publish(sampler, module, 0)
    return sampler


def publish(engine: VllmEngine | VllmSampler, module: nn.Module, version: int) -> Received:
    """All weights of ``module`` in two buckets."""
    named = list(module.named_parameters())
    engine.begin_update(version)
    for part in (named[::2], named[1::2]):
        engine.load(dict(part))
    return engine.end_update()


def requests(count: int, max_tokens: int = 12, first: int = 0, **options: Any) -> list[Request]:
    """Two samples of each prompt, each with a seed of its own."""
    params = SamplingParams(max_tokens, **options)
    return [
        Request(f"{first + i}.{i % 2}", PROMPTS[i // 2 % len(PROMPTS)], params, 1000 + first + i) for i in range(count)
    ]


def longer(request: Request, max_tokens: int) -> Request:
    """The same request for more or fewer tokens."""
    return replace(request, params=replace(request.params, max_tokens=max_tokens))


def drain(sampler: VllmSampler) -> dict[str, Completion]:
    """All completions, by id."""
    return {c.id: c for c in polled(sampler)}


def polled(sampler: VllmSampler) -> Iterator[Completion]:
    """Completions in the order that they come."""
    while found := sampler.poll():
        yield from found


@torch.no_grad()
def logp_of(module: nn.Module, request: Request, token_ids: Iterable[int], first: int = 0) -> Tensor:
    """Of each sampled token under ``module``, at the request's temperature; without top-k and top-p."""
    ids = torch.tensor([[*request.prompt_ids, *token_ids]])
    logits = module(ids).logits.float() / (request.params.temperature or 1.0)
    start = len(request.prompt_ids) - 1
    logp = logits.log_softmax(-1)[0, start:-1].gather(-1, ids[0, start + 1 :, None])[:, 0]
    return logp[first:]


def worst(module: nn.Module, asked: Iterable[Request], completions: dict[str, Completion], first: int = 0) -> float:
    """The largest difference of a recorded log-probability from ``module``'s."""
    pairs = [(r, completions[r.id]) for r in asked]
    return max(
        float((logp_of(module, r, c.token_ids, first) - torch.tensor(c.logp[first:])).abs().max())
        for r, c in pairs
        if len(c.token_ids) > first
    )
