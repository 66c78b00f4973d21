"""How new weights enter a vLLM engine: whole ones, or a LoRA adapter over a base that stays."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from alignment.engines.checksum import checksum
from alignment.engines.transport import Tally
from alignment.engines.vllm_spec import EngineSpec, LoraShape
from alignment.engines.vllm_worker import with_news
from alignment.errors import UserError
from alignment.sampling import Received

NAME, NUMBER = "policy", 1
ADAPTER_MARKS = (".lora_A.", ".lora_B.", ".lora_embedding_")


class Entrance(Protocol):
    """Where an engine's weights come in."""

    @property
    def request(self) -> Any:
        """The ``LoRARequest`` that every request names; None without an adapter."""
        ...

    def begin(self) -> None:
        """An update begins; one that was given up half way is forgotten."""
        ...

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """A part of it."""
        ...

    def end(self, version: int) -> Received:
        """What arrived."""
        ...


def entrance(spec: EngineSpec, engine: Any, folder: Path, base: Mapping[str, Tensor] | None) -> Entrance:
    """The entrance that ``spec`` asks for, with the base below an adapter in place.

    Args:
        spec: Of the engine.
        engine: vLLM's.
        folder: For files of adapters.
        base: Weights below the adapter, by their names in transformers; None makes them from ``spec.origin``.
    """
    whole = Whole(engine)
    if spec.lora is None:
        return whole
    if base is None:
        assert spec.origin is not None, "who names an adapter says where its base comes from"
        base = base_weights(spec.origin.make().module)
    whole.begin()
    whole.load(base)
    whole.end(0)
    return AdapterAlone(spec.lora, engine, folder)


def base_weights(module: Any) -> dict[str, Tensor]:
    """Weights of the model below the adapter of a ``PeftModel``, by their names without it."""
    named = module.get_base_model().named_parameters()
    marks = ("lora_", "base_layer.")
    return {
        n.replace(marks[1], ""): p.detach() for n, p in named if not any(s.startswith(marks[0]) for s in n.split("."))
    }


class Whole:
    """All weights of the model. vLLM's workers check that each has its place and that none is missing."""

    request = None

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def begin(self) -> None:
        self.engine.collective_rpc("begin_weights")

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """Hands a bucket to the workers.

        Raises:
            UserError: It is an adapter.
        """
        if any(mark in name for name in bucket for mark in ADAPTER_MARKS):
            raise UserError("the transport brings a LoRA adapter, but sampler.lora is 'merged'; set both to the same")
        self.engine.collective_rpc("load_bucket", args=({name: t.detach() for name, t in bucket.items()},))

    def end(self, version: int) -> Received:
        """What every worker received.

        Raises:
            ValueError: They did not receive the same.
        """
        first, *others = self.engine.collective_rpc("end_weights", args=(version,))
        for number, other in enumerate(others, start=1):
            if other != first:
                raise ValueError(f"worker {number} of the engine received {other.checksum:#x}, and the first another")
        return first


class AdapterAlone:
    """The adapter takes the place of the one before it, for completions in flight as well."""

    def __init__(self, shape: LoraShape, engine: Any, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        self.shape, self.engine, self.folder = shape, engine, folder / "adapter"
        self.request = LoRARequest(NAME, NUMBER, str(self.folder))
        self.tensors: dict[str, Tensor] = {}
        self.in_use: tuple[int, int] | None = None

    def begin(self) -> None:
        self.tensors = {}

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """Keeps a bucket.

        Raises:
            UserError: It is no adapter.
        """
        if not all(any(mark in name for mark in ADAPTER_MARKS) for name in bucket):
            raise UserError("the transport brings whole weights, but sampler.lora is 'adapter'; set both to the same")
        self.tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in bucket.items()}

    def end(self, version: int) -> Received:
        """Loads the adapter from files, which is the one way that vLLM has for workers of any number."""
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        tally, dtype = Tally(), self.engine.model_config.dtype
        tally.add(self.tensors)
        kept = checksum({name: tensor.to(dtype) for name, tensor in self.tensors.items()})
        targets = self.shape.targets if isinstance(self.shape.targets, str) else list(self.shape.targets)
        about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.shape.rank, "lora_alpha": self.shape.alpha}
        self.folder.mkdir(exist_ok=True)
        (self.folder / "adapter_config.json").write_text(json.dumps(about | {"target_modules": targets}), "utf-8")
        save_file(self.tensors, self.folder / "adapter_model.safetensors")
        self.engine.add_lora(LoRARequest(NAME, NUMBER, str(self.folder), load_inplace=True))
        self.tensors = {}
        before, self.in_use = self.in_use, (tally.checksum, kept)
        return with_news(tally.received(version), before, self.in_use, dtype)
