"""What is known here of DeepSpeed's insides: options, and where each stage of ZeRO keeps which part of a weight.

ZeRO ("Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054) keeps float32 weights and
AdamW's moments in flat partitions, one per rank, and at stage 3 the working weights as well. A :class:`Fragment` is the
part of one parameter in this rank's partition: with them, moments are saved under the parameters' names, and any number
of ranks can read them.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import safe_set_full_grad
from torch import Tensor, nn

from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig

PERSISTENT_ELEMENTS = 100_000
"""At stage 3, weights with fewer are kept whole on every rank between passes."""
BUCKET_ELEMENTS = 200_000_000
"""Most gradients that are summed over ranks at once."""


@dataclass(frozen=True)
class Fragment:
    """A run of a parameter's elements, in row-major order, whose float32 values this rank steps on."""

    name: str
    start: int
    flat: Tensor
    """The optimizer's own parameter, which keys its state."""
    offset: int
    size: int
    weight: Tensor
    """One-dimensional view of the same elements of the weight that the model computes with."""

    @property
    def master(self) -> Tensor:
        """One-dimensional view of the float32 values."""
        return self.of(self.flat)

    def of(self, like_flat: Tensor) -> Tensor:
        """The part of a tensor that is laid out as :attr:`flat` is, such as a moment."""
        return like_flat.detach().view(-1).narrow(0, self.offset, self.size)


def prepare_deepspeed() -> None:
    """Before the first engine of a process: no chatter, and no compiler for an operation that only inference uses."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    bf16_optimizer.see_memory_usage = _say_nothing  # it prints, and collects garbage, which takes a second
    bf16_optimizer.print_rank_0 = _say_nothing
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        # On a CPU DeepSpeed would compile a reduction through shared memory, which takes a minute and needs g++ and
        # ninja. Only its inference engine calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _say_nothing(*_: Any, **__: Any) -> None:
    """In the place of what prints."""


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes parameters of ``dtype``, in place. Buffers stay: some need their digits (rotary frequencies)."""
    for p in module.parameters():
        p.data = p.data.to(dtype)


def in_parts(policy: nn.Module, options: Mapping[str, Any], device: torch.device) -> None:
    """For stage 3: parameters are divided one by one, so that ``device`` never holds them all; buffers move whole."""
    deepspeed.zero.Init(module=policy, config_dict_or_path=dict(options))
    for buffer in policy.buffers():
        buffer.data = buffer.data.to(device)


def engine_options(config: DeepSpeedLearnerConfig, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """DeepSpeed's own configuration for a learner that trains ``parameters``."""
    sizes, cuda = [p.numel() for p in parameters], torch.cuda.is_available()
    bucket = max(max(sizes), min(BUCKET_ELEMENTS, sum(sizes)))
    bucket += bucket % 2  # DeepSpeed's allgather buckets must be even
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": cuda,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    options: dict[str, Any] = {
        # The learner cuts micro-batches and counts itself; these two only have to agree.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW is quick on a CPU too, and needs no compiler
    }
    if config.dtype == "bfloat16":
        options["bf16"] = {"enabled": True, "check_grad_overflow": True}
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options


def fragments(engine: Any, trained: Mapping[str, nn.Parameter], stage: int) -> Iterator[Fragment]:
    """This rank's part of each trained parameter that it has a part of; all of each at stage 0."""
    for name, p in trained.items():
        if stage == 0:
            yield Fragment(name, 0, p, 0, p.numel(), p.detach().view(-1))
        elif stage < 3:
            if (mapped := p._hp_mapping) is not None:  # pyright: ignore[reportAttributeAccessIssue]
                here, there = mapped.lp_fragment_address, mapped.hp_fragment_address
                flat = engine.basic_optimizer.param_groups[mapped.param_group_index]["params"][0]
                weight = p.detach().view(-1).narrow(0, here.start, here.numel)
                yield Fragment(name, here.start, flat, there.start, there.numel, weight)
        else:
            zero, shard = engine.optimizer, p.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
            group, offset, padded = zero.grad_position[zero.get_param_id(p)]
            start = padded * engine.global_rank
            if (size := min(padded, p.ds_numel - start)) > 0:  # pyright: ignore[reportAttributeAccessIssue]
                flat = zero.fp32_partitioned_groups_flat[group]
                yield Fragment(name, start, flat, offset, size, shard.detach().view(-1)[:size])


def forget_gradients(engine: Any, stage: int) -> None:
    """What was accumulated since the last step is dropped: an error may have ended an update between micro-batches."""
    zero = engine.optimizer
    if stage == 0:
        engine.zero_grad()
        return
    zero.zero_grad(set_to_none=True)
    if isinstance(zero, bf16_optimizer.BF16_Optimizer):
        return
    zero.averaged_gradients.clear()  # in place: parameters know this very dictionary
    if stage < 3:
        zero.all_grad_tensors.clear()
        zero.micro_step_id = -1  # DeepSpeed's "no micro-batch yet"; at stage 3 zero_grad sets it
        zero._epilogue_ran_this_backward = False


def spoil_gradients(engine: Any, trained: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """From stage 1 on: makes the global norm NaN on all ranks, which have to call this alike."""
    if isinstance(engine.optimizer, bf16_optimizer.BF16_Optimizer):  # bfloat16 at stage 1
        for gradients in engine.optimizer.fp32_groups_gradients_flat:
            gradients.fill_(math.nan)
        return
    smallest = min(trained.values(), key=lambda p: shape_of(p).numel())
    safe_set_full_grad(smallest, torch.full(shape_of(smallest), math.nan, device=device))


def shape_of(p: Tensor) -> torch.Size:
    """The whole shape of a parameter, which is empty on each rank at stage 3."""
    return getattr(p, "ds_shape", p.shape)


def gathered(parameters: Sequence[Tensor], written_by: int | None = None) -> AbstractContextManager[None]:
    """Inside, ``parameters`` are whole: to be read, unless a rank writes. Every rank has to enter."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=written_by) if sharded else nullcontext()


def rewritten(parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Inside, ``parameters`` are whole, and what the first rank makes of them stays; every rank has to enter.

    The optimizer's float32 values of them do not follow.
    """
    return gathered(parameters, written_by=0)


def give_back_whole_weights(engine: Any) -> None:
    """At stage 3: those that are still gathered on this rank are forgotten, so that a change of its parts is seen.

    The engine's own ``empty_partition_cache`` would have Python's garbage collected as well, which takes a second.
    """
    engine.optimizer.empty_partition_cache()


@contextmanager
def shards_replaced(engine: Any, trained: Mapping[str, Any], shards: Mapping[str, Tensor]) -> Iterator[None]:
    """At stage 3: inside, each rank's parts of the weights are others."""
    give_back_whole_weights(engine)
    own = {name: p.ds_tensor.data for name, p in trained.items()}
    try:
        for name, p in trained.items():
            p.ds_tensor.data = shards[name]
        yield
    finally:
        give_back_whole_weights(engine)
        for name, p in trained.items():
            p.ds_tensor.data = own[name]
