"""What goes on inside a language model before each trained token: taken by hooks while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from alignment.errors import UserError

Kind = Literal["mlp", "attention", "residual"]
LAYERS = ("layers", "h")
ATTENTION, MLP = ("self_attn", "attn", "attention"), ("mlp", "feed_forward")
OUTPUTS = {
    "attention": ("o_proj", "c_proj", "out_proj", "dense"),
    "mlp": ("down_proj", "c_proj", "fc2", "dense_4h_to_h"),
}
"""How architectures of transformers call their layers, the parts of a layer, and the last matrix of each part."""


@contextmanager
def taken(
    body: nn.Module, place_N: tuple[Tensor, Tensor], kinds: Sequence[Kind], reduce: Callable[[Tensor], Tensor]
) -> Iterator[dict[Kind, list[Tensor]]]:
    """Inside, running ``body`` fills the dictionary: for each kind, of each layer, ``reduce`` of ``[N, features]``.

    ``mlp``: what the last matrix of a feed-forward part reads, after its activation function; ``attention``: what the
    heads put out, before they are mixed; ``residual``: the hidden state after a layer.

    Args:
        body: A model of transformers without its output embeddings.
        place_N: Rows and columns of the hidden states that are looked at.
        kinds: Which activations.
        reduce: What is kept of them.

    Raises:
        UserError: The parts of this architecture are not known.
    """
    found: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        for layer in _layers(body):
            for kind in kinds:
                part = _part_of(layer, kind)

                def keep(_module: nn.Module, *seen: Any, into: list[Tensor] = found[kind]) -> None:
                    value = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
                    into.append(reduce(value[place_N]))

                hook = part.register_forward_hook if kind == "residual" else part.register_forward_pre_hook
                stack.callback(hook(keep).remove)
        yield found


def layers_of(body: nn.Module) -> int:
    """How many there are.

    Raises:
        UserError: They are not found.
    """
    return len(_layers(body))


def check_parts(body: nn.Module, kinds: Sequence[Kind]) -> None:
    """Looks for what :func:`taken` hooks onto.

    Raises:
        UserError: It is not found.
    """
    for layer in _layers(body):
        for kind in kinds:
            _part_of(layer, kind)


def _layers(body: nn.Module) -> list[nn.Module]:
    for name in LAYERS:
        if isinstance(layers := getattr(body, name, None), nn.ModuleList):
            return list(layers)
    raise UserError(
        f"{type(body).__name__}: its layers are not found, so a loss with masks of tokens cannot look inside"
    )


def _part_of(layer: nn.Module, kind: Kind) -> nn.Module:
    """The layer, or the last matrix of a part of it."""
    if kind == "residual":
        return layer
    parts = ATTENTION if kind == "attention" else MLP
    part = next((p for name in parts if (p := getattr(layer, name, None)) is not None), None)
    matrix = next((m for name in OUTPUTS[kind] if (m := getattr(part, name, None)) is not None), None)
    if matrix is None:
        raise UserError(
            f"{type(layer).__name__}: its {kind} part is not found, and 'mapo' asks for its activations: take another "
            "loss, such as 'dpo'"
        )
    return matrix
