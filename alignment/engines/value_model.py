"""Value models: the body of a language model with a head that says what is still to be earned in each state.

A saved one is an ordinary folder of transformers (body, configuration, tokenizer) with two files more:
``value_head.safetensors`` and ``value_model.json``, which says how the head's numbers are read.

Suffixes beside the legend of :mod:`alignment.types`: H the size of a hidden state, M numbers per state.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from alignment.adapters import mark_merged_as
from alignment.algorithms.value_losses import ValueLoss, value_losses
from alignment.errors import UserError
from alignment.models import Tokenizer, no_progress_bars
from alignment.tensorfile import copy_into, read_tensors, write_tensors

Kind = Literal["state", "vocabulary"]
DESCRIPTION, HEAD = "value_model.json", "value_head.safetensors"


@dataclass(frozen=True)
class ValueShape:
    """What a head puts out."""

    loss: ValueLoss
    kind: Kind = "state"
    """``state``: the value of the state that a token leads to, computed there. ``vocabulary``: before the token, that
    of every token at once."""
    streams: int = 0
    """Values per state, one for each reward component; 0: one value for all, and no dimension for it."""

    def __post_init__(self) -> None:
        if self.kind == "vocabulary" and (self.loss.outputs > 1 or self.streams):
            raise UserError("a vocabulary-wide value head has one number per token: use the loss 'scalar', no streams")

    def width(self, vocabulary: int) -> int:
        """Numbers that the head puts out for a hidden state."""
        return vocabulary if self.kind == "vocabulary" else self.loss.outputs * max(1, self.streams)


class ValueHead(nn.Module):
    """A linear layer that begins at zero, so that every state begins with the same value. It computes in its own type.

    Args:
        hidden_size: H.
        vocabulary: V, for a vocabulary-wide head.
        shape: What it puts out.
        lr_ratio: Its learning rate over that of the model that it is on, where the two have one optimizer.
    """

    def __init__(self, hidden_size: int, vocabulary: int, shape: ValueShape, lr_ratio: float = 1.0) -> None:
        super().__init__()
        self.shape, self.lr_ratio = shape, lr_ratio
        self.linear = nn.Linear(hidden_size, shape.width(vocabulary))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_BTH: Tensor, ids_BT: Tensor) -> Tensor:
        """``[B, T, M]``, or ``[B, T, K, M]`` with streams: for the state after each token.

        A vocabulary-wide head knows nothing of the state after the first token, whose value is 0.
        """
        shape = self.shape
        if shape.kind == "vocabulary":
            every_BTV = self.everything(hidden_BTH[:, :-1])
            taken_BT1 = every_BTV.gather(-1, ids_BT[:, 1:, None])
            return torch.cat([torch.zeros_like(taken_BT1[:, :1]), taken_BT1], 1)
        return self._grouped(self.everything(hidden_BTH))

    def everything(self, hidden: Tensor) -> Tensor:
        """All that the head puts out for hidden states ``[..., H]``, in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype)).float()

    def _grouped(self, output: Tensor) -> Tensor:
        streams = self.shape.streams
        return output.unflatten(-1, (streams, self.shape.loss.outputs)) if streams else output


class ValueModel(nn.Module):
    """A body of transformers and a :class:`ValueHead`.

    Args:
        body: Gives ``last_hidden_state``; that of a causal language model, possibly with adapters in it.
        shape: What the head puts out.
    """

    def __init__(self, body: nn.Module, shape: ValueShape) -> None:
        super().__init__()
        config: Any = body.config
        text = config.get_text_config()
        self.config = config
        self.rows: int = text.vocab_size
        """Of its embeddings. A policy's output may have more, which no token has."""
        self.body = body
        self.head = ValueHead(text.hidden_size, text.vocab_size, shape)
        self.shape = shape

    @classmethod
    def of(cls, language_model: nn.Module, shape: ValueShape) -> Self:
        """A value model with the body of a causal language model, which is the very same module afterwards.

        Adapters that were merged into that body are part of what is saved of the value model.
        """
        inner: Any = language_model
        inner = inner.get_base_model() if hasattr(language_model, "get_base_model") else inner
        model = cls(inner.base_model, shape)
        mark_merged_as(model, language_model)
        return model

    def forward(self, ids_BT: Tensor) -> Tensor:
        """What the head puts out for the state after each token; rows are padded on the right."""
        ids_BT = ids_BT.clamp(max=self.rows - 1)
        hidden_BTH = self.body(input_ids=ids_BT, use_cache=False).last_hidden_state
        return self.head(hidden_BTH, ids_BT)

    def values(self, ids_BT: Tensor) -> Tensor:
        """``[B, T]`` float32 values of the states after each token, ``[B, T, K]`` with streams."""
        return self.shape.loss.readout(self(ids_BT))

    def gradient_checkpointing_enable(self, options: Any) -> None:
        """As the body does it."""
        self.body.gradient_checkpointing_enable(options)  # pyright: ignore[reportCallIssue]

    def gradient_checkpointing_disable(self) -> None:
        """As the body does it."""
        self.body.gradient_checkpointing_disable()  # pyright: ignore[reportCallIssue]


def save_value_model(model: ValueModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a folder that :func:`load_value_model` reads. Adapters are to be merged before."""
    with no_progress_bars():
        model.body.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(folder)
    write_tensors(folder / HEAD, model.head.state_dict())
    shape = model.shape
    about = {"loss": value_losses.dump(shape.loss), "kind": shape.kind, "streams": shape.streams}
    (folder / DESCRIPTION).write_text(json.dumps(about, indent=1), encoding="utf-8")


def is_value_model(folder: Path) -> bool:
    """Whether the folder holds a saved value model."""
    return (folder / DESCRIPTION).is_file()


def read_shape(folder: Path) -> ValueShape:
    """What the head of a saved value model puts out.

    Raises:
        UserError: The folder holds none.
    """
    try:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if about["kind"] not in get_args(Kind) or type(about["streams"]) is not int or about["streams"] < 0:
            raise ValueError(f"kind {about['kind']!r} and streams {about['streams']!r} are not what this version knows")
        return ValueShape(value_losses.build(about["loss"]), about["kind"], about["streams"])
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{folder} is no value model ({DESCRIPTION}: {error}); `align export --role critic` writes one"
        ) from error


def load_value_model(folder: Path, dtype: torch.dtype = torch.float32) -> ValueModel:
    """A saved value model, in evaluation mode on the CPU.

    Raises:
        UserError: The folder holds none, or its weights do not fit.
    """
    from transformers import AutoModel

    shape = read_shape(folder)
    try:
        with no_progress_bars():
            body, about = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: its model cannot be loaded: {error}") from error
    if about["missing_keys"]:
        raise UserError(f"{folder}: its weights lack {', '.join(sorted(about['missing_keys'])[:3])}; export it again")
    model = ValueModel(body, shape)
    try:
        read_head(model, folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder / HEAD}: {error}") from error
    return model.eval()


def read_head(model: ValueModel, folder: Path) -> None:
    """Takes the head of a saved value model of the same shape.

    Raises:
        ValueError: It is of another size.
    """
    own = model.head.state_dict()
    copy_into(own, read_tensors(folder / HEAD, own))


def locate_value_model(address: str) -> Path:
    """The folder of the value model at ``address``.

    Raises:
        UserError: There is none.
    """
    folder = Path(address).expanduser()
    if is_value_model(folder):
        return folder.resolve()
    what = f"holds no {DESCRIPTION}" if folder.is_dir() else "does not exist"
    raise UserError(f"value model {address}: the folder {what}; `align export --role critic` writes that of a run")


def open_value_model(address: str, dtype: torch.dtype = torch.float32) -> ValueModel:
    """The value model at ``address``, in evaluation mode on the CPU.

    Raises:
        UserError: There is none, or it cannot be loaded.
    """
    return load_value_model(locate_value_model(address), dtype)
