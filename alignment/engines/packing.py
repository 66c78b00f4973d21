"""Rows put end to end in one row of the forward pass, none of which sees another.

Positions begin at 0 again with each row. Where a model of transformers is given no attention mask, it takes that as the
beginning of another sequence and attends within each alone: ``sdpa`` and ``eager`` by a mask of blocks, kernels of
flash attention by the variable lengths of one long row (``masking_utils`` and ``modeling_flash_attention_utils`` of
transformers 5.19). A model that does otherwise is found out by trying, and refused. The mask of blocks saves padding,
not the attention between rows, which is computed and hidden: ``pack_tokens`` bounds it.

Suffixes beside the legend of :mod:`alignment.types`: P rows of the forward pass, N trained tokens, H the size of a
hidden state.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from alignment.errors import UserError

FIRST, OTHER, SECOND, THIRD = (3, 1, 4), (2, 0, 5), (1, 5, 2, 6), (2, 6)
"""Rows of the trial. Whatever stands in the place of the first, the others are to give what they give alone."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a micro-batch stand in the forward pass."""

    ids_PT: Tensor
    position_PT: Tensor
    """Within its row, from 0. What fills up the end is a row of its own, which nobody reads."""
    pack_B: Tensor
    """The row of the forward pass that a row is part of."""
    start_B: Tensor
    """Where it begins there."""

    columns: int
    """T of the micro-batch."""

    @classmethod
    def of(cls, ids_BT: Tensor, length_B: Tensor, pack_B: Tensor, body: nn.Module) -> Self:
        """Rows of one ``pack_B`` (numbers from 0, without gaps) end to end in their order.

        All of them in one long row for kernels of flash attention, which tell rows apart in a single one alone.
        """
        if "flash" in str(getattr(body.config, "_attn_implementation", "")):
            pack_B = torch.zeros_like(pack_B)
        same_BB = (pack_B[:, None] == pack_B).tril(-1)
        start_B = (same_BB * length_B).sum(1)
        width = int((start_B + length_B).max())
        row_N, column_N = (torch.arange(ids_BT.shape[1], device=ids_BT.device) < length_B[:, None]).nonzero(
            as_tuple=True
        )
        place_N = (pack_B[row_N], start_B[row_N] + column_N)
        empty_PT = ids_BT.new_zeros(int(pack_B.max()) + 1, width)
        used_P1 = empty_PT.new_zeros(len(empty_PT)).index_add(0, pack_B, length_B)[:, None]
        after_PT = (torch.arange(width, device=ids_BT.device) - used_P1).clamp(min=0)
        return cls(
            empty_PT.index_put(place_N, ids_BT[row_N, column_N]),
            after_PT.index_put(place_N, column_N),
            pack_B,
            start_B,
            ids_BT.shape[1],
        )

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.ids_PT, "position_ids": self.position_PT}

    def place(self, row_N: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens of the micro-batch at these rows and columns stand."""
        return self.pack_B[row_N], self.start_B[row_N] + column_N

    def apart(self, hidden_PTH: Tensor) -> Tensor:
        """``[B, T, H]``: each row alone again; what follows a row's end is not its own."""
        column_T = torch.arange(self.columns, device=hidden_PTH.device)
        column_BT = (self.start_B[:, None] + column_T).clamp(max=hidden_PTH.shape[1] - 1)
        return hidden_PTH[self.pack_B[:, None], column_BT]


def check_packing(body: nn.Module, name: str) -> None:
    """Tries whether the hidden states of rows are the same end to end as alone; in evaluation mode, without gradients.

    Args:
        body: Of a causal language model.
        name: What an error calls the model.

    Raises:
        UserError: They are not.
    """
    if (reason := _why_not(body)) is not None:
        raise UserError(f"learner.packing: {name} cannot read several rows in one: {reason}; set packing to false")


def _why_not(body: nn.Module) -> str | None:
    config: Any = body.config
    if getattr(config.get_text_config(), "attention_chunk_size", None):
        return "it attends within chunks that are counted from the beginning of the whole row"
    try:
        one, other = _hidden(body, FIRST), _hidden(body, OTHER)
    except TypeError as error:
        return f"its body does not take position_ids ({error})"
    if not all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(one, other, strict=True)):
        return "its tokens see the row before their own"
    tokens = [torch.tensor([row], device=one[0].device) % _vocabulary(body) for row in (SECOND, THIRD)]
    alone = [body(input_ids=ids, use_cache=False).last_hidden_state[0].float() for ids in tokens]
    # Sums in another order are rounded otherwise, in half precision by a hundredth.
    limit = 1e-3 if next(body.parameters()).dtype == torch.float32 else 0.05
    if any((a - b).norm() > limit * b.norm() for a, b in zip(one, alone, strict=True)):
        return "its positions do not begin again with each row"
    return None


def _hidden(body: nn.Module, first: tuple[int, ...]) -> list[Tensor]:
    """Of the second row, which follows ``first``, and of the third, which follows that or begins a shorter row."""
    rows = [torch.tensor(row) for row in (first, SECOND, THIRD)]
    device = next(body.parameters()).device
    ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device) % _vocabulary(body)
    length_B = torch.tensor([len(row) for row in rows], device=device)
    layout = Layout.of(ids_BT, length_B, torch.tensor([0, 0, 1], device=device), body)
    hidden_BTH = layout.apart(body(**layout.inputs, use_cache=False).last_hidden_state).float()
    return [hidden_BTH[b, : length_B[b]] for b in (1, 2)]


def _vocabulary(body: Any) -> int:
    return body.get_input_embeddings().weight.shape[0]
