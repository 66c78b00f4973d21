"""Saves models as ordinary folders, and adds LoRA adapters to the weights they belong to."""

from pathlib import Path
from typing import Any

from torch import Tensor

from alignment.errors import UserError
from alignment.models import Model, no_progress_bars


def save_model(model: Model, folder: str | Path, merge: bool = True) -> None:
    """Writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load. The model itself is not changed.

    Args:
        model: What to save.
        folder: Is made if need be.
        merge: Whole weights, a LoRA adapter added to them. Otherwise the adapter alone; its base is then loaded from
            where it was.

    Raises:
        UserError: ``merge`` is off, and there is no adapter, or its base has no place to be loaded from.
    """
    module: Any = model.module
    adapted = hasattr(module, "get_base_model")
    with no_progress_bars():
        if not merge:
            if not adapted:
                raise UserError("the model has no LoRA adapter to save; save the whole weights (merged)")
            if not module.active_peft_config.base_model_name_or_path:
                raise UserError("the adapter's base was built, so there is nowhere to load it from; save it merged")
            module.save_pretrained(folder, save_embedding_layers=False)  # "auto" asks the hub
        elif adapted:
            module.get_base_model().save_pretrained(folder, state_dict=merged_weights(module))
        else:
            module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def merged_weights(module: Any) -> dict[str, Tensor]:
    """Weights of a ``PeftModel`` under its base model's names, each adapted one with ``alpha / rank * B A`` added.

    peft's own ``merge_adapter`` changes the model, and taking the update off again does not give the same bits.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = module.get_base_model()
    layers: dict[str, Any] = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    adapters = tuple(f"{name}.lora_" for name in layers)
    weights: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        if name.startswith(adapters):
            continue
        owner, inner, parameter = name.rpartition(".base_layer.")
        if inner and parameter == "weight":
            delta = layers[owner].get_delta_weight(module.active_adapter).detach()
            tensor = (tensor.float() + delta.float()).to(tensor.dtype)
        weights[f"{owner}.{parameter}" if inner else name] = tensor.contiguous()
    return weights
