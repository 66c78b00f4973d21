"""What the tests of the DeepSpeed learner do on every rank. They return plain values and numpy arrays."""

import contextlib
import gc
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from alignment.algorithms.objective import Objective
from alignment.algorithms.policy_losses import Clip
from alignment.engines import deepspeed_zero
from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
from alignment.engines.deepspeed_rank import DeepSpeedRank
from alignment.engines.policy_learner import PolicyLearner
from alignment.types import Batch
from tests.engines.helpers import Reinforce, grpo, learner_of, lora, make_batch, tiny

OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1, "micro_batch_tokens": 22, "max_grad_norm": 0.5}


@dataclass(frozen=True)
class Call:
    """A function of this module with options: what a world runs."""

    function: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **self.options)


def module_of(kind: str) -> nn.Module:
    """A model by name: tiny, untied, dropout, lora, fresh (a LoRA adapter that does nothing yet), bfloat16, and those
    whose output embeddings are more than a weight: biased, adapted (by LoRA), capped (their logits)."""
    if kind in ("lora", "fresh"):
        module = lora()
        if kind == "fresh":
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if "lora_B" in name:
                        p.zero_()
        return module
    if kind == "dropout":
        return tiny("GPT2", resid_pdrop=0.3)
    if kind == "capped":
        return tiny("Gemma2", final_logit_softcapping=3.0, query_pre_attn_scalar=8)
    if kind == "adapted":
        return lora(targets=["lm_head"], tie_word_embeddings=False)
    if kind == "biased":
        return tiny("Phi", resid_pdrop=0.0, embd_pdrop=0.0)
    return tiny(tie_word_embeddings=kind != "untied").to(torch.bfloat16 if kind == "bfloat16" else torch.float32)


def rank_of(
    kind: str = "tiny",
    total: int = 100,
    reference: bool = False,
    whole_elements: int = 0,
    roles: dict[str, Any] | None = None,
    **options: Any,
) -> DeepSpeedRank:
    """The learner of this rank; at stage 3, weights of no more than ``whole_elements`` stay whole, as small ones do."""
    deepspeed_zero.PERSISTENT_ELEMENTS = whole_elements
    config = DeepSpeedLearnerConfig(ranks=dist.get_world_size(), **(OPTIONS | options))
    return DeepSpeedRank(module_of(kind), config, total, 0, reference, roles)


def embedded(kind: str = "tiny", total: int = 100, reference: bool = False, **options: Any) -> PolicyLearner:
    """The torch learner with the same options."""
    return learner_of(module_of(kind), total, 0, reference, **(OPTIONS | options))


def numbers(weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in weights.items()}


def whole_weights(learner: DeepSpeedRank, form: Any = "merged") -> dict[str, np.ndarray]:
    return numbers({name: t for bucket in learner.weights(4000, form) for name, t in bucket.items()})


def batches(count: int = 5, rows: int = 9) -> list[Batch]:
    return [replace(make_batch(rows, seed), step=seed) for seed in range(count)]


def advance(learner: PolicyLearner, batch: Batch) -> dict[str, float]:
    """Annotates what is needed and makes an update of two epochs and two mini-batches, then one in another slot."""
    batch = learner.annotate(batch, {"old_logp", "reference"})
    metrics = learner.update(batch, grpo(epochs=2, minibatches=2, policy_loss=Clip()))
    return metrics | {f"sft/{k}": v for k, v in learner.update(batch, Objective.supervised(), slot="sft").items()}


def gradients_of_steps(learner: PolicyLearner) -> list[dict[str, np.ndarray]]:
    """A list that every step adds its whole gradients to, as they are before they are clipped."""
    found: list[dict[str, np.ndarray]] = []
    stepper: Any = learner.slots["rl"].stepper
    step = stepper.step

    def observed(loss: Tensor) -> Any:
        whole = {name: p.grad if p.grad is not None else safe_get_full_grad(p) for name, p in learner.trained.items()}
        found.append(numbers({name: gradient for name, gradient in whole.items() if gradient is not None}))
        return step(loss)

    stepper.step = observed
    return found


def train(
    kind: str, count: int = 5, reference: bool = False, **options: Any
) -> tuple[list[dict[str, float]], dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Metrics of ``count`` updates of mixed kinds, the weights after them, and the gradients of each step."""
    learner = rank_of(kind, reference=reference, **options)
    gradients = gradients_of_steps(learner)
    metrics = [learner.update(batch, grpo()) for batch in batches(count)]
    result = metrics, whole_weights(learner), gradients
    learner.close()
    return result


def annotate(kind: str, **options: Any) -> dict[str, np.ndarray]:
    """Annotated fields before and after two updates, the reference kept from the start."""
    learner, found = rank_of(kind, reference=True, **options), dict[str, np.ndarray]()
    for when, batch in enumerate(batches(2)):
        done = learner.annotate(batch, {"old_logp", "entropy", "reference"})
        for name in ("old_logp_BT", "entropy_BT", "ref_logp_BT"):
            found[f"{name} {when}"] = getattr(done, name).cpu().numpy().copy()
        learner.update(done, grpo())
    learner.close()
    return found


def spoiled(loss: Tensor, what: str, micro: Batch, seen: list[Batch]) -> Tensor:
    """The loss of ``micro``, of which something is not finite on the last rank: ``loss`` (and not the gradient),
    ``gradient`` or ``nothing``; or, ``error``, all ranks fail at the second micro-batch that was ``seen``."""
    seen.append(micro)
    if what == "error" and len(seen) == 2:
        raise ValueError("the second micro-batch")
    if dist.get_rank() < dist.get_world_size() - 1:
        return loss
    if what == "gradient":
        loss.register_hook(lambda gradient: gradient * math.nan)
    return loss + math.inf if what == "loss" else loss


@dataclass(frozen=True)
class Spoiled(Reinforce):
    """:func:`spoiled`."""

    what: str = "nothing"
    seen: list[Batch] = field(default_factory=list)

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().loss(logp_BT, entropy_BT, micro)
        return spoiled(loss, self.what, micro, self.seen), sums


def moments(learner: DeepSpeedRank) -> list[np.ndarray]:
    backend: Any = learner.backend
    return [
        part.of(state).float().cpu().numpy().copy()
        for part in backend.fragments()
        for key, state in sorted(learner.slots["rl"].adamw.state[part.flat].items())
        if key != "step"
    ]


def skip(stage: int, **options: Any) -> dict[str, Any]:
    """A good step, a spoiled loss, a spoiled gradient, an error half way, and a good step: what was left unchanged
    and what was counted."""
    learner = rank_of(zero_stage=stage, total=10, schedule="linear", **options)
    good, other = batches(2)
    learner.update(good, Reinforce())
    before, moved = whole_weights(learner), moments(learner)
    spoiled = [learner.update(good, Spoiled(what=what)) for what in ("loss", "gradient")]
    try:
        learner.update(good, Spoiled(what="error"))
    except ValueError as error:
        assert str(error) == "the second micro-batch"
    after, left = whole_weights(learner), moments(learner)
    last = learner.update(other, Reinforce())
    result = {
        "weights": all(np.array_equal(after[n], before[n]) for n in before),
        "moments": bool(moved) and all(np.array_equal(a, b) for a, b in zip(left, moved, strict=True)),
        "spoiled": spoiled,
        "last": last,
        "final": whole_weights(learner),
        "counts": dict(vars(learner.slots["rl"].counts)),
    }
    learner.close()
    return result


def stop(stage: int) -> str:
    """The message after too many spoiled steps in a row."""
    learner = rank_of(zero_stage=stage, max_skipped_steps=2)
    good = batches(1)[0]
    try:
        for what in ("loss", "nothing", "loss", "loss"):
            learner.update(good, Spoiled(what=what))
    except FloatingPointError as error:
        return str(error)
    finally:
        learner.close()
    return "it did not stop"


def run(
    kind: str,
    steps: Sequence[int],
    load: Path | None = None,
    save: Path | None = None,
    save_after: int | None = None,
    merge_before: Sequence[int] = (),
    **options: Any,
) -> tuple[list[dict[str, float]], str, str]:
    """Loads, advances by batches ``steps``, saves after one of them; metrics, the fingerprint then and at the end.

    Before the steps ``merge_before``, and before saving in their place, the adapter is merged.
    """
    reference = kind != "fresh"
    settings = {"schedule": "cosine", "warmup_steps": 2, "lr": 1e-2, "micro_batch_tokens": 40}
    learner = rank_of(kind, total=6, reference=reference, **settings, **options)
    if load is not None:
        learner.restore(load)
    metrics, saved = list[dict[str, float]](), ""
    for step in steps:
        if step in merge_before:
            learner.merge_adapter(step)
        metrics.append(advance(learner, batches(step + 1)[step]))
        if step == save_after and step + 1 in merge_before:
            learner.merge_adapter(step + 1)
        if save is not None and step == save_after:
            saved = learner.fingerprint()
            learner.save(save)
    result = metrics, saved, learner.fingerprint()
    learner.close()
    return result


def copy(kind: str, load: Path, save: Path, **options: Any) -> str:
    """Restores and saves again; the fingerprint."""
    learner = rank_of(kind, reference=True, **options)
    learner.restore(load)
    learner.save(save)
    found = learner.fingerprint()
    learner.close()
    return found


def publish(kind: str, form: str, bucket_bytes: int, **options: Any) -> list[dict[str, np.ndarray]]:
    """The buckets of the weights after an update."""
    learner = rank_of(kind, **options)
    learner.update(batches(1)[0], grpo())
    buckets = [numbers(bucket) for bucket in learner.weights(bucket_bytes, form)]  # pyright: ignore[reportArgumentType]
    learner.close()
    return buckets


def held(stage: int, dtype: str) -> dict[str, Any]:
    """What the engine holds between updates, in bytes, and how it started: what it printed, and how many elements of
    parameters were whole when DeepSpeed got the model."""
    whole, initialize, said = list[int](), deepspeed.initialize, io.StringIO()

    def observed(**arguments: Any) -> Any:
        whole.append(sum(p.numel() for p in arguments["model"].parameters()))
        return initialize(**arguments)

    deepspeed.initialize = observed
    try:
        with contextlib.redirect_stdout(said):
            learner = rank_of(zero_stage=stage, dtype=dtype)
    finally:
        deepspeed.initialize = initialize
    learner.update(batches(1)[0], Reinforce())
    gc.collect()
    backend: Any = learner.backend
    kinds = [learner.trained, vars(backend.engine.optimizer), learner.slots["rl"].adamw.state]
    found = sum(_storages(kinds, 0, {}).values())
    learner.close()
    return {"bytes": found, "whole": whole, "said": said.getvalue()}


def _storages(value: Any, depth: int, seen: dict[int, int]) -> dict[int, int]:
    """Bytes of every storage that is reached from ``value``, by address."""
    inner: Any = ()
    if isinstance(value, Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        inner = [getattr(value, "ds_tensor", None), value.grad if value.is_leaf else None]
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple, set)):
        inner = value
    elif type(value).__name__.startswith("IPGBucket"):
        inner = vars(value).values()
    for each in inner if depth < 8 else ():
        _storages(each, depth + 1, seen)
    return seen
