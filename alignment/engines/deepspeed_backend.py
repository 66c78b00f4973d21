"""One rank of several that hold a model together: DeepSpeed's ZeRO behind what a learner asks for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from safetensors import safe_open
from torch import Tensor, nn

from alignment.adapters import adapted_names, is_fresh, merge_adapter, merged_names
from alignment.algorithms.objective import combine
from alignment.engines.backend import (
    Backend,
    Kept,
    checkpoint_gradients,
    frozen_digest,
    head_lr_ratio,
    own_weights,
    packs_of,
    policy_only,
    replaced,
    squared_distance,
    trained_of,
)
from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
from alignment.engines.deepspeed_moments import ZeroAdamW, masters, read_pieces, write_pieces
from alignment.engines.deepspeed_policy import ZeroPolicy
from alignment.engines.deepspeed_zero import (
    Fragment,
    cast,
    engine_options,
    forget_gradients,
    fragments,
    gathered,
    give_back_whole_weights,
    in_parts,
    prepare_deepspeed,
    rewritten,
    shape_of,
    shards_replaced,
)
from alignment.engines.optimizer import HEAD, Slot, adamw_over
from alignment.partition import Cost, Share
from alignment.tensorfile import digest, read_tensors, weights_of, write_tensors


class ZeroBackend:
    """A rank of the process group that ``torch.distributed`` was initialised with.

    Args:
        module: A causal language model of transformers, or any other module, if ``plain``; on the CPU, the same on
            every rank; it belongs to this backend from now on.
        config: Options; ``ranks`` must be the size of the group.
        head: A value head on the language model's hidden states.
        plain: :meth:`forward` runs the module as it is.

    Raises:
        ValueError: Nothing in ``module`` requires a gradient.
    """

    def __init__(
        self, module: nn.Module, config: DeepSpeedLearnerConfig, head: nn.Module | None = None, plain: bool = False
    ) -> None:
        assert dist.get_world_size() == config.ranks, f"{dist.get_world_size()} processes for {config.ranks} ranks"
        self.module, self.config, self.stage, self.head = module.eval(), config, config.zero_stage, head
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        self.trained, self.fresh_adapter = trained_of(module, head), is_fresh(module)
        # Both now: later the weights are cast and in parts.
        below = adapted_names(module) if hasattr(module, "disable_adapter") else []
        self._frozen = frozen_digest(module, self.trained)
        self._frozen_merged = frozen_digest(module, {*self.trained, *below}) if below else self._frozen
        if config.dtype == "float32":
            cast(module, torch.float32)
        self.dtypes = {name: tensor.dtype for name, tensor in weights_of(module).items()}
        if head is not None:
            self.dtypes |= {HEAD + name: tensor.dtype for name, tensor in head.named_parameters()}
        """How weights are written: as the model was made, or in float32 if they are trained so."""
        self.share = Share(dist.get_rank(), config.ranks, cost_of(module), packs_of(config, plain))
        checkpoint_gradients(module, config.gradient_checkpointing, self.device, autocast=False)
        network = module if plain else ZeroPolicy(module, config.logits_chunk_mb, head, config.packing)
        self.adamw = adamw_over(self.trained, config, head_lr_ratio(head))
        prepare_deepspeed()
        options = engine_options(config, list(self.trained.values()))
        if config.zero_stage == 3:
            for each in (module, *([] if head is None else [head])):
                cast(each, getattr(torch, config.dtype))
            in_parts(network, options, self.device)
        self.engine: Any = deepspeed.initialize(model=network, optimizer=self.adamw, config=options)[0]
        self.engine.eval()

    # Computing

    def forward(self, *args: Any) -> Any:
        """All ranks go through the model together, as often as each other."""
        return self.engine(*args)

    def beside(self, module: nn.Module, config: Any) -> Backend:
        return ZeroBackend(module, config, plain=True)

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over ranks, and the loss is a sum over them.
        self.engine.backward(loss * self.share.ranks, scale_wrt_gas=False)

    def gradients(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            p = self.trained[name]
            gradient = p.grad if p.grad is not None or self.stage == 0 else safe_get_full_grad(p)
            yield name, torch.zeros(shape_of(p), device=self.device) if gradient is None else gradient

    def forget_gradients(self) -> None:
        forget_gradients(self.engine, self.stage)

    def slot(self, total_updates: int) -> Slot:
        return Slot(self.config, total_updates, ZeroAdamW(self))

    def joined(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        everyone: list[Any] = [None] * self.share.ranks
        dist.all_gather_object(everyone, {name: float(value) for name, value in sums.items()})
        whole: dict[str, Tensor] = {}
        for part in everyone:
            if part:
                whole = combine(whole, {name: torch.tensor(v, dtype=torch.float64) for name, v in part.items()})
        return whole

    def assembled(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in sorted(fields):  # in the same order everywhere
            dist.all_reduce(fields[name])
        return fields

    # Weights

    def fragments(self) -> Iterator[Fragment]:
        """The parts of trained weights that this rank steps on."""
        return fragments(self.engine, self.trained, self.stage)

    def own_fragments(self) -> Iterator[Fragment]:
        """Those that this rank writes: each element is in one rank's."""
        return iter(()) if self.stage == 0 and self.share.rank else self.fragments()

    def keep(self) -> Kept:
        if self.stage == 3:
            return {name: p.ds_tensor.detach().clone() for name, p in self._sharded()}
        return {name: p.detach().clone() for name, p in policy_only(self.trained).items()}

    @contextmanager
    def using(self, kept: Kept) -> Iterator[None]:
        own = policy_only(self.trained)
        with shards_replaced(self.engine, own, kept) if self.stage == 3 else replaced(own, kept):
            yield

    def distance(self, kept: Kept) -> float:
        if self.stage < 3:  # whole on every rank
            return math.sqrt(float(squared_distance(policy_only(self.trained), kept)))
        square = squared_distance({name: p.ds_tensor for name, p in self._sharded()}, kept)
        return math.sqrt(float(self.assembled({"square": square})["square"]))

    def _sharded(self) -> Iterator[tuple[str, Any]]:
        yield from policy_only(self.trained).items()

    def merge_adapter(self, seed: int) -> bool:
        if self.stage == 3:
            give_back_whole_weights(self.engine)
        if not merge_adapter(self.module, seed, rewritten):
            return False
        for part in self.fragments():
            if "lora_" in part.name:
                part.master.copy_(part.weight)
        return True

    def fingerprint(self) -> str:
        whole = _Whole(weights_of(self.module))
        if self.share.rank == 0:
            found = [digest(whole)]
        else:
            found = [""]
            for name in sorted(whole):
                whole.take_part(name)
        dist.broadcast_object_list(found)
        return found[0]

    def frozen(self) -> str:
        return self._frozen_merged if merged_names(self.module) else self._frozen

    # Persistence

    def write(self, path: Path, kept: Kept | None = None, head: bool = False) -> None:
        """The first rank writes whole weights; under bfloat16 each rank writes its float32 ones beside them."""
        whole: dict[str, Tensor] = {}
        with self.using(kept) if kept is not None else nullcontext():
            for name, tensor in own_weights(self, head).items():
                if kept is not None and name not in self.trained:
                    continue
                exact = kept is None and name in self.trained and self._casts(name)
                with gathered([] if exact else [tensor]):
                    value = safe_get_full_fp32_param(tensor) if exact else tensor
                    if self.share.rank == 0:
                        assert value is not None
                        whole[name] = value.detach().to("cpu", self.dtypes[name], copy=True)
        if self.share.rank == 0:
            write_tensors(path, whole)
        if kept is None and self.config.dtype == "bfloat16":
            parts = (part for part in self.own_fragments() if part.name.startswith(HEAD) == head)
            write_pieces(_float32(path), masters(parts), self.share.rank, self.share.ranks)
        dist.barrier()

    def read(self, path: Path, head: bool = False) -> None:
        own = own_weights(self, head)
        parts = {part.name: part for part in self.fragments() if part.name in own}
        self._check(path, own)
        if self.stage == 3:
            give_back_whole_weights(self.engine)
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, tensor in own.items():
                if self.stage < 3 or name not in self.trained:
                    with rewritten([tensor]):
                        tensor.detach().copy_(file.get_tensor(name))
                if (part := parts.get(name)) is not None:
                    flat = file.get_tensor(name).view(-1)[part.start : part.start + part.size]
                    part.weight.copy_(flat)
                    part.master.copy_(flat)
        if self.config.dtype == "bfloat16":
            read_pieces(_float32(path), [(p.name, p.start, p.master) for p in parts.values()])

    def read_kept(self, path: Path) -> Kept:
        trained = policy_only(self.trained)
        self._check(path, trained)
        whole = read_tensors(path)
        if self.stage < 3:
            return {name: whole[name].to(p.device, p.dtype) for name, p in trained.items()}
        shards = self.keep()
        for name, p in self._sharded():
            start = p.ds_tensor.ds_numel * self.share.rank
            part = whole[name].view(-1)[start : start + p.ds_tensor.ds_numel]
            shards[name][: len(part)].copy_(part)
        return shards

    def _check(self, path: Path, own: Mapping[str, Tensor]) -> None:
        expected = {n: torch.empty(shape_of(t), dtype=self.dtypes[n], device="meta") for n, t in own.items()}
        read_tensors(path, expected)

    def _casts(self, name: str) -> bool:
        """Whether the model computes with less precision than it was made with."""
        return self.config.dtype == "bfloat16" and self.dtypes[name] == torch.float32

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None


_CPU = torch.device("cpu")


class _Whole(Mapping[str, Tensor]):
    """Weights, gathered one by one as they are asked for; every rank has to ask for the same ones in the same order."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        with gathered([self.weights[name]]):
            return self.weights[name].detach().clone()

    def take_part(self, name: str) -> None:
        """Asks for a weight that only others read."""
        with gathered([self.weights[name]]):
            pass

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def cost_of(module: nn.Module) -> Cost:
    """Multiplications that a row takes: with each weight per token, and in causal attention per pair of tokens."""
    config: Any = getattr(module, "config", None)
    per_token = sum(p.numel() for p in module.parameters())
    if config is None:  # it reads what another model puts out
        return Cost(per_token)
    text = config.get_text_config()
    return Cost(per_token, text.num_hidden_layers * text.hidden_size)


def _float32(path: Path) -> Path:
    return path.with_name(f"{path.stem}-float32")
