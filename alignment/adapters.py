"""LoRA adapters and the weights below them: added to a copy of these, or for good.

Training with an adapter leaves the weights below it as they were loaded, so checkpoints hold the adapter alone. Once an
adapter has been merged that is no longer so, and the model says it: :func:`merged_names`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from alignment.errors import UserError

Whole = Callable[[Sequence[Tensor]], AbstractContextManager[None]]
"""Inside, parameters that are kept in parts are whole, and what is written to them stays."""


def _as_they_are(_parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


def merged_weights(module: Any) -> dict[str, Tensor]:
    """Weights of a ``PeftModel`` under its base model's names, each adapted one with ``alpha / rank * B A`` added.

    peft's own ``merge_adapter`` changes the model, and taking the update off again does not give the same bits.
    """
    base = module.get_base_model()
    layers = dict(_layers(base))
    adapters = tuple(f"{name}.lora_" for name in layers)
    weights: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        if name.startswith(adapters):
            continue
        owner, inner, parameter = name.rpartition(".base_layer.")
        if inner and parameter == "weight":
            tensor = _sum(layers[owner], tensor, module.active_adapter)
        weights[f"{owner}.{parameter}" if inner else name] = tensor.contiguous()
    return weights


@torch.no_grad()
def merge_adapter(module: Any, seed: int, whole: Whole = _as_they_are) -> bool:
    """Adds the adapter to the weights below it, as :func:`merged_weights` does, and begins it anew, doing nothing.

    An adapter that does nothing yet is left as it is. Global random state is not changed.

    Args:
        module: A ``PeftModel``, changed in place.
        seed: Of the new adapter's random weights.
        whole: For parameters that several processes hold in parts: one layer's are whole at a time.

    Returns:
        Whether there was anything to add.

    Raises:
        UserError: A weight below the adapter is another layer's as well, which would be changed with it.
    """
    layers = dict(_layers(module))
    _refuse_shared(module, layers)
    if is_fresh(module, whole):
        return False
    devices = [p.device for p in module.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for layer in layers.values():
            weight = layer.get_base_layer().weight
            with whole([weight, *(p for name, p in layer.named_parameters() if "lora_" in name)]):
                weight.copy_(_sum(layer, weight, module.active_adapter))
                layer.reset_lora_parameters(module.active_adapter, True)
    mark_merged(module, adapted_names(module))
    return True


def adapted_names(module: nn.Module) -> list[str]:
    """The weights below the adapter that it changes."""
    return [f"{name}.base_layer.weight" for name, _ in _layers(module)]


def is_fresh(module: nn.Module, whole: Whole = _as_they_are) -> bool:
    """Whether there is an adapter and it does nothing yet, so that the policy of now is the model without it."""
    zero_at_first = ("lora_B", "lora_embedding_A")
    parameters = [p for n, p in module.named_parameters() if p.requires_grad and any(z in n for z in zero_at_first)]
    if not hasattr(module, "disable_adapter"):
        return False
    with whole(parameters):
        return not any(p.any() for p in parameters)


def merged_names(module: nn.Module) -> frozenset[str]:
    """Parameters below the adapter that are no longer as they were loaded, because an adapter was added to them."""
    return getattr(module, "names_of_merged_weights", frozenset())


def mark_merged(module: nn.Module, names: Collection[str]) -> None:
    """Says that the parameters ``names`` have had an adapter added, so that they are saved with what is trained."""
    module.names_of_merged_weights = frozenset(names)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def mark_merged_as(module: nn.Module, other: nn.Module) -> None:
    """Says of ``module`` what is known of ``other``, with which it shares parameters, by its own names for them."""
    known = dict(other.named_parameters())
    merged = {id(known[name]) for name in merged_names(other)}
    mark_merged(module, [name for name, p in module.named_parameters() if id(p) in merged])


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer))


def _sum(layer: Any, weight: Tensor, adapter: str) -> Tensor:
    """``weight`` with the adapter's update, added in float32."""
    return (weight.float() + layer.get_delta_weight(adapter).detach().float()).to(weight.dtype)


def _refuse_shared(module: nn.Module, layers: dict[str, Any]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        if len(found := owners[id(layer.get_base_layer().weight)]) > 1:
            raise UserError(
                f"model.lora.targets: {name} has one weight with another layer ({' and '.join(found)}), so its adapter "
                "cannot be merged without changing that one: take it out of the targets"
            )
