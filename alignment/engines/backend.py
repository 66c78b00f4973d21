"""How a learner's weights are kept, run and stepped on: in one process here, in one rank of several elsewhere."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from alignment.adapters import is_fresh, merge_adapter, merged_names
from alignment.engines.cpu import checkpoint_contexts, float32_attention
from alignment.engines.learner_config import LearnerOptions, TorchLearnerConfig
from alignment.engines.logprobs import LogProbs
from alignment.engines.optimizer import HEAD, AdamW, Slot
from alignment.partition import Share
from alignment.tensorfile import copy_into, digest, read_tensors, weights_of, write_tensors

T = TypeVar("T")
Kept = dict[str, Tensor]
"""A copy of the trained weights, or of this rank's part of them."""


class Backend(Protocol):
    """What one process and one rank of several do unlike. Where ranks work together, all of them call alike."""

    module: nn.Module
    """The transformers model, possibly inside a peft adapter; or a value model."""
    head: nn.Module | None
    """A value head on the policy's hidden states: trained with it, and no part of its weights."""
    trained: dict[str, nn.Parameter]
    """By name; those of ``head`` begin with :data:`alignment.engines.optimizer.HEAD`."""
    device: torch.device
    share: Share
    """Which rows of a batch are computed here."""
    fresh_adapter: bool
    """Whether the model had an adapter that did nothing when the learner was made."""

    def forward(self, *args: Any) -> Any:
        """Runs what the backend was made for: :meth:`alignment.engines.logprobs.LogProbs.run`, or a module."""
        ...

    def beside(self, module: nn.Module, config: Any) -> "Backend":
        """Another model with weights and optimizers of its own, in the same processes; :meth:`forward` runs it."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Inside, the module is run."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of this rank's part of the loss; ``last`` is the last before a step.

        What is no weight of the backend gets ``share.ranks`` times its gradient.
        """
        ...

    def gradients(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Whole gradients that :meth:`backward` accumulated, one parameter at a time; every rank takes all of them."""
        ...

    def forget_gradients(self) -> None:
        """Drops what was accumulated."""
        ...

    def slot(self, total_updates: int) -> Slot:
        """A new optimizer over the trained weights."""
        ...

    def joined(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums for metrics (``*_max``: maxima) over all ranks; a rank that had no rows brings none."""
        ...

    def assembled(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fields of a whole batch from those that each rank has in its own rows."""
        ...

    def keep(self) -> Kept:
        """A copy of the trained weights as they are now."""
        ...

    def using(self, kept: Kept) -> AbstractContextManager[None]:
        """The module computes with the weights that were kept, inside."""
        ...

    def distance(self, kept: Kept) -> float:
        """Euclidean, from what :meth:`keep` kept to the weights that the model computes with now."""
        ...

    def merge_adapter(self, seed: int) -> bool:
        """As :func:`alignment.adapters.merge_adapter`. Moments of the adapter that is gone are left as they are."""
        ...

    def fingerprint(self) -> str:
        """:func:`alignment.tensorfile.digest` of all weights."""
        ...

    def frozen(self) -> str:
        """A checksum of the weights that training does not change."""
        ...

    def write(self, path: Path, kept: Kept | None = None, head: bool = False) -> None:
        """Writes whole weights: what training changes, or what was kept of it; of ``head``, or of all but that."""
        ...

    def read(self, path: Path, head: bool = False) -> None:
        """Takes the weights that :meth:`write` wrote, in place."""
        ...

    def read_kept(self, path: Path) -> Kept:
        """What was kept, from what :meth:`write` wrote."""
        ...

    def close(self) -> None:
        """Ends whatever it started; may be called twice."""
        ...


class OneProcess:
    """A module in this process, trained in place.

    Args:
        module: A causal language model of transformers; or any other module, if ``plain``.
        config: Options.
        head: A value head on the language model's hidden states.
        plain: :meth:`forward` runs the module as it is.

    Raises:
        ValueError: Nothing in ``module`` requires a gradient.
    """

    def __init__(
        self, module: nn.Module, config: TorchLearnerConfig, head: nn.Module | None = None, plain: bool = False
    ) -> None:
        self.config, self.share = config, Share(pack_tokens=packs_of(config, plain))
        name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        self.device = torch.device(name)
        self.module = module.to(self.device).eval()
        self.head = None if head is None else head.to(self.device)
        self.trained, self.fresh_adapter = trained_of(module, self.head), is_fresh(module)
        self.autocast = config.autocast == "bfloat16"
        checkpoint_gradients(module, config.gradient_checkpointing, self.device, self.autocast)
        self._forward: Callable[..., Any] = module
        if not plain:
            self._forward = LogProbs(module, config.logits_chunk_mb, self.autocast, self.head, config.packing).run
        self._frozen: tuple[frozenset[str], str] | None = None

    def forward(self, *args: Any) -> Any:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self._forward(*args)

    def beside(self, module: nn.Module, config: Any) -> Backend:
        return OneProcess(module, config, plain=True)

    def computing(self) -> AbstractContextManager[None]:
        return float32_attention(self.device, self.autocast)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def gradients(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            p = self.trained[name]
            yield name, torch.zeros_like(p) if p.grad is None else p.grad

    def forget_gradients(self) -> None:
        for p in self.trained.values():
            p.grad = None

    def slot(self, total_updates: int) -> Slot:
        return Slot(self.config, total_updates, AdamW(self.trained, self.config, head_lr_ratio(self.head)))

    def joined(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return sums

    def assembled(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return fields

    def keep(self) -> Kept:
        return {name: p.detach().clone() for name, p in policy_only(self.trained).items()}

    @contextmanager
    def using(self, kept: Kept) -> Iterator[None]:
        with replaced(policy_only(self.trained), kept):
            yield

    def distance(self, kept: Kept) -> float:
        return math.sqrt(float(squared_distance(policy_only(self.trained), kept)))

    def merge_adapter(self, seed: int) -> bool:
        return merge_adapter(self.module, seed)

    def fingerprint(self) -> str:
        return digest(weights_of(self.module))

    def frozen(self) -> str:
        merged = merged_names(self.module)
        if self._frozen is None or self._frozen[0] != merged:
            self._frozen = merged, frozen_digest(self.module, self.trained)
        return self._frozen[1]

    def write(self, path: Path, kept: Kept | None = None, head: bool = False) -> None:
        write_tensors(path, own_weights(self, head) if kept is None else kept)

    def read(self, path: Path, head: bool = False) -> None:
        own = own_weights(self, head)
        copy_into(own, read_tensors(path, own))

    def read_kept(self, path: Path) -> Kept:
        return {name: tensor.to(self.device) for name, tensor in read_tensors(path, policy_only(self.trained)).items()}

    def close(self) -> None:
        """There is nothing to end."""


def packs_of(config: LearnerOptions, plain: bool) -> int | None:
    """How many tokens of rows the policy reads end to end; None where each row stays alone, as in other models."""
    return config.pack_tokens if config.packing and not plain else None


def trained_of(module: nn.Module, head: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name; those of a value head beside the model begin with :data:`HEAD`.

    Raises:
        ValueError: The model has none.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
    return trained | ({} if head is None else {HEAD + name: p for name, p in head.named_parameters()})


def head_lr_ratio(head: nn.Module | None) -> float:
    """The learning rate of a value head over that of the model that it is on."""
    return 1.0 if head is None else head.lr_ratio  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def policy_only(trained: Mapping[str, T]) -> dict[str, T]:
    """What of ``trained`` is no part of a value head."""
    return {name: p for name, p in trained.items() if not name.startswith(HEAD)}


def squared_distance(tensors: Mapping[str, Tensor], kept: Kept) -> Tensor:
    """A float64 scalar, summed parameter by parameter."""
    squares = [(t.detach().double() - kept[name].double()).square().sum() for name, t in tensors.items()]
    return torch.stack(squares).sum()


def own_weights(backend: Backend, head: bool) -> dict[str, Tensor]:
    """What :meth:`Backend.write` writes."""
    if not head:
        return changing(backend.module, backend.trained)
    assert backend.head is not None, "there is no head"
    return {HEAD + name: tensor for name, tensor in backend.head.named_parameters()}


@contextmanager
def replaced(parameters: Mapping[str, nn.Parameter], by: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters have other values."""
    own = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = by[name]
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]


def checkpoint_gradients(module: nn.Module, wanted: bool, device: torch.device, autocast: bool) -> None:
    """Turns the recomputation of activations on or off; an earlier learner of the same module may have set it."""
    if not hasattr(module, "gradient_checkpointing_enable"):
        return
    if wanted:
        contexts = partial(checkpoint_contexts, device, autocast)
        module.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})  # pyright: ignore[reportCallIssue]
    else:
        module.gradient_checkpointing_disable()  # pyright: ignore[reportCallIssue]


def changing(module: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """What training changes: trained parameters, those that an adapter was merged into, and buffers of the model."""
    merged = merged_names(module)
    still = {name for name, _ in module.named_parameters()} - merged
    return {name: tensor for name, tensor in weights_of(module).items() if name in trained or name not in still}


def frozen_digest(module: nn.Module, trained: Collection[str]) -> str:
    """A checksum of all other weights."""
    moving = changing(module, trained)
    return digest({name: tensor for name, tensor in weights_of(module).items() if name not in moving})
