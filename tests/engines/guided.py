"""Small value models in folders, and steered distributions by brute force: full forward passes, no cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment.algorithms.decodings import ValueAugmented
from alignment.algorithms.value_losses import Scalar, ValueLoss
from alignment.engines.config import Site, TransformersSamplerConfig
from alignment.engines.value_model import Kind, ValueModel, ValueShape, load_value_model, save_value_model
from alignment.models import Model, Tokenizer, _character_tokenizer
from alignment.sampling import Sampler, submit
from alignment.types import Completion, Request
from tests.engines.helpers import tiny

ALPHABET = "abcdefghijklmnopq"
"""With the tokenizer's two special tokens, as many as :func:`tiny` models have."""


def tokenizer(alphabet: str = ALPHABET) -> Tokenizer:
    return _character_tokenizer(alphabet)


def value_folder(
    folder: Path,
    seed: int = 5,
    *,
    architecture: str = "Qwen3",
    loss: ValueLoss | None = None,
    kind: Kind = "state",
    streams: int = 0,
    alphabet: str = ALPHABET,
    body: nn.Module | None = None,
) -> Path:
    """A saved value model with random weights, whose values differ by about 1."""
    shape = ValueShape(loss or Scalar(), kind, streams)
    model = ValueModel.of(
        body or tiny(architecture, seed, hidden_size=24) if architecture != "GPT2" else tiny("GPT2"), shape
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for p in model.head.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    save_value_model(model, tokenizer(alphabet), folder)
    return folder


def site(module: nn.Module, decoding: Any = None, row_tokens: int = 0) -> Site:
    return Site(Model(module, tokenizer(), "policy"), row_tokens, decoding=decoding)


def sampler(module: nn.Module, decoding: Any = None, **options: Any) -> Sampler:
    return TransformersSamplerConfig(**options).build(site(module, decoding), None)


def run(sampler: Sampler, requests: Sequence[Request]) -> dict[str, Completion]:
    found = {c.id: c for c in submit(sampler, requests)}
    assert found.keys() == {r.id for r in requests}
    return found


@torch.no_grad()
def exact_logp(
    policy: nn.Module, models: Sequence[ValueModel], decoding: ValueAugmented, request: Request, tokens: Sequence[int]
) -> Tensor:
    """``[L, V]`` log-probabilities before each of ``tokens``, written without the code that is tested."""
    ids, start = [*request.prompt_ids, *tokens], len(request.prompt_ids)
    logits = policy(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double()
    count = decoding.top_k or logits.shape[1]
    candidates = [row.argsort(descending=True, stable=True)[:count].tolist() for row in logits]
    for model, beta in zip(models, request.params.tilt, strict=True):
        for t, own in enumerate(candidates):
            values = model.values(torch.tensor([[*ids[: start + t], a] for a in own]))[:, -1].double()
            logits[t, own] += beta * (values - (values.mean() if decoding.centre else 0.0))
    return (logits / request.params.temperature).log_softmax(-1)


def worst(
    policy: nn.Module, decoding: ValueAugmented, requests: Sequence[Request], found: Mapping[str, Completion]
) -> float:
    """The largest difference of a recorded log-probability from that of :func:`exact_logp`."""
    models = [load_value_model(Path(folder)) for folder in decoding.addresses]
    differences = []
    for request in requests:
        tokens, logp = found[request.id].token_ids, found[request.id].logp
        exact = exact_logp(policy, models if request.params.tilt else [], decoding, request, tokens)
        taken = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        differences.append(float((taken - torch.tensor(logp)).abs().max()))
    return max(differences)
