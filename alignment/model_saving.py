"""Saves models as ordinary folders."""

from pathlib import Path
from typing import Any

from alignment.adapters import merged_names, merged_weights
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
        UserError: ``merge`` is off, and there is no adapter, or its base has no place to be loaded from: it was built,
            or earlier adapters were merged into it.
    """
    module: Any = model.module
    adapted = hasattr(module, "get_base_model")
    with no_progress_bars():
        if not merge:
            if not adapted:
                raise UserError("the model has no LoRA adapter to save; save the whole weights (merged)")
            if merged_names(module):
                raise UserError("earlier adapters were merged into the adapter's base: save whole weights (merged)")
            if not module.active_peft_config.base_model_name_or_path:
                raise UserError("the adapter's base was built, so there is nowhere to load it from; save it merged")
            module.save_pretrained(folder, save_embedding_layers=False)  # "auto" asks the hub
        elif adapted:
            module.get_base_model().save_pretrained(folder, state_dict=merged_weights(module))
        else:
            module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
