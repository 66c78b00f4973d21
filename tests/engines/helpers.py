"""Tiny models and batches for the engine tests."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.objective import Objective
from alignment.algorithms.value_losses import Scalar, ValueLoss
from alignment.algorithms.values import state_mask
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.torch_learner import TorchLearner
from alignment.engines.value_model import ValueShape
from alignment.engines.value_roles import ValueRoleSpec
from alignment.types import Batch

SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"vocab_size": 19, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0}


def tiny(architecture: str = "Qwen3", seed: int = 0, **options: Any) -> nn.Module:
    """A random causal language model of a few thousand parameters, without dropout unless asked."""
    torch.manual_seed(seed)
    sizes = GPT2_SIZES | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if architecture == "GPT2" else SIZES
    config = getattr(transformers, f"{architecture}Config")(**(sizes | options))
    model_class = "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
    module = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for p in module.parameters():  # far enough from 0 that every token matters
            p.add_(0.2 * torch.randn(p.shape))
    return module.eval()


def chunk_mb(tokens: int, vocabulary: int = 19) -> float:
    """What ``logits_chunk_mb`` must be for chunks of ``tokens`` in float32."""
    return (tokens + 0.5) * 4 * vocabulary / 2**20


def make_batch(rows: int = 8, seed: int = 0, group_size: int = 2, width: int = 11) -> Batch:
    """Rows of several lengths and temperatures, one of them unscored, with advantages and two reward components."""
    g = torch.Generator().manual_seed(seed)
    length_B = torch.randint(5, width + 1, (rows,), generator=g)
    length_B[0] = width
    position_T = torch.arange(width)
    present_BT = position_T < length_B[:, None]
    mask_BT = present_BT & (position_T >= 3) & (torch.rand(rows, width, generator=g) < 0.8)
    mask_BT[:, 4] = True
    mask_BT[1:2] = False
    ids_BT = torch.randint(1, 19, (rows, width), generator=g) * present_BT
    return Batch(
        ids_BT=ids_BT,
        loss_mask_BT=mask_BT,
        length_B=length_B,
        group_B=torch.arange(rows) // group_size,
        source_B=torch.zeros(rows, dtype=torch.int8),
        ratio_base_B=torch.zeros(rows, dtype=torch.int8),
        temperature_B=0.7 + 0.1 * (torch.arange(rows) % 4),
        behaviour_logp_BT=-torch.rand(rows, width, generator=g) * mask_BT,
        rewards_BK=torch.rand(rows, 2, generator=g),
        weights_K=torch.ones(2),
        scored_B=mask_BT.any(1),
        truncated_B=torch.zeros(rows, dtype=torch.bool),
        key_B=torch.arange(rows),
        adv_BT=torch.randn(rows, 1, generator=g).expand(rows, width).clone(),
        objectives=("a", "b"),
        step=3,
        seed=5,
    )


def widen(batch: Batch, extra: int, fill: int = 7) -> Batch:
    """The same rows with ``extra`` more columns of padding, filled with junk."""
    changes: dict[str, Tensor] = {}
    for name in ("ids_BT", "loss_mask_BT", "behaviour_logp_BT", "adv_BT"):
        value = getattr(batch, name)
        junk = {"loss_mask_BT": False, "ids_BT": fill}.get(name, float("nan"))
        changes[name] = torch.cat([value, torch.full((len(batch), extra), junk, dtype=value.dtype)], 1)
    return replace(batch, **changes)


@dataclass(frozen=True)
class Reinforce:
    """``-mean over trained tokens of adv * logp``, minus ``entropy_bonus`` times the mean entropy."""

    epochs: int = 1
    minibatches: int = 1
    entropy_bonus: float = 0.0
    lr_factor: float = 1.0
    update_norm: bool = False

    @property
    def entropies(self) -> Literal["none", "value", "gradient"]:
        return "gradient" if self.entropy_bonus else "value"

    @property
    def wants_logp(self) -> bool:
        return False

    def prepare(self, minibatch: Batch) -> Batch:
        mask = minibatch.loss_mask_BT.float()
        return replace(minibatch, scale_BT=mask / mask.sum().clamp(min=1))

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert micro.adv_BT is not None and micro.scale_BT is not None and entropy_BT is not None
        mask = micro.loss_mask_BT
        loss_BT = -torch.where(mask, micro.adv_BT, 0) * logp_BT - self.entropy_bonus * entropy_BT
        sums = {"tokens": mask.sum(), "entropy": entropy_BT.detach().sum(), "logp_max": logp_BT.detach()[mask].max()}
        return (micro.scale_BT * loss_BT).sum(), sums

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        plain = ("tokens", "logp_max")
        return {n: float(v) if n in plain else float(v / sums["tokens"]) for n, v in sums.items()}


def learner_of(
    module: nn.Module,
    total: int = 100,
    seed: int = 0,
    reference: bool = False,
    roles: Mapping[str, Any] | None = None,
    **options: Any,
) -> TorchLearner:
    """A learner on the CPU with a rate high enough to see weights move."""
    config = TorchLearnerConfig(**({"lr": 1e-2, "device": "cpu", "weight_decay": 0.1, "max_grad_norm": None} | options))
    return TorchLearner(module, config, total, seed, reference, roles)


@dataclass(frozen=True)
class Made:
    """An origin whose model is :func:`tiny`."""

    seed: int = 3
    architecture: str = "Qwen3"

    def make(self) -> Any:
        return SimpleNamespace(module=tiny(self.architecture, seed=self.seed))


def critic(loss: ValueLoss = Scalar(), kind: Any = "state", streams: int = 0, **options: Any) -> ValueRoleSpec:  # noqa: B008
    """A value model of its own, of two epochs and mini-batches."""
    plain: dict[str, Any] = {"options": {"lr": 1e-2}, "epochs": 2, "minibatches": 2}
    return ValueRoleSpec(ValueShape(loss, kind, streams), Made(), **(plain | options))  # pyright: ignore[reportArgumentType]


def with_returns(batch: Batch, streams: int = 0) -> Batch:
    """Returns that the tokens tell, for the states that may have one; and values from before."""
    target = torch.where(state_mask(batch.loss_mask_BT), batch.ids_BT.float() / 19, torch.nan)
    if streams:
        target = torch.stack([target * (k + 1) for k in range(streams)], -1)
    return replace(batch, returns_BT=target, values_BT=torch.zeros_like(target))


def lora(seed: int = 0, dropout: float = 0.0, targets: Any = "all-linear", **options: Any) -> nn.Module:
    """:func:`tiny` with a random adapter on every linear layer, or those that are named."""
    module = tiny(seed=seed, **options)
    torch.manual_seed(seed + 1)
    config = LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(module, config)  # pyright: ignore[reportArgumentType]


def weights(learner: TorchLearner) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in learner.module.named_parameters()}


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], rtol: float = 1e-5) -> None:
    """Relative to the largest number of each tensor."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=rtol * max(1e-2, float(b[name].detach().abs().max())))


def grpo(**options: Any) -> Objective:
    """The default algorithm's objective."""
    return Objective.of(Algorithm(**options), {})
