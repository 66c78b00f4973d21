"""A learner's weights as an engine wants them: in buckets, by the names that transformers and peft save them under."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import Tensor, nn

from alignment.adapters import merged_names, merged_weights
from alignment.errors import UserError

Form = Literal["merged", "adapter"]


def outgoing(module: nn.Module, form: Form) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of ``module``, each once: tied ones under the name that comes first.

    Args:
        module: Of transformers, inside a ``PeftModel`` or not.
        form: Whole weights, an adapter added to them; or the adapter alone.

    Raises:
        ValueError: The adapter is asked for and there is none.
        UserError: It is asked for alone, and engines have not the base below it, which earlier ones were merged into.
    """
    wrapped: Any = module
    adapted = hasattr(module, "get_base_model")
    if form == "adapter":
        if not adapted:
            raise ValueError("the model has no LoRA adapter to send; send whole weights (form: merged)")
        refuse_merged(module)
        from peft import get_peft_model_state_dict

        named = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    else:
        named = merged_weights(wrapped) if adapted else wrapped.state_dict()
    sent: set[tuple[int, int]] = set()
    for name, tensor in named.items():
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and place in sent:
            continue
        sent.add(place)
        yield name, tensor.detach()


def refuse_merged(module: nn.Module) -> None:
    """Raises UserError where the adapter alone is not the policy."""
    if merged_names(module):
        raise UserError(
            "earlier adapters were merged into the model, so the adapter alone is not the policy: set transport.form "
            "and sampler.lora to 'merged'"
        )


def buckets(named: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Groups of at most ``bucket_bytes``, in order; a tensor that is larger travels alone."""
    bucket, size = dict[str, Tensor](), 0
    for name, tensor in named:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket
