"""Scores texts with a saved reward model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alignment.batching import plan_micro_batches
from alignment.control import prompt_cue
from alignment.engines.value_model import load_value_model, locate_value_model
from alignment.errors import UserError
from alignment.models import encode_prompt


class RewardScorer:
    """A reward model in this process, with its own tokenizer.

    Args:
        folder: Of a saved value model: reward models are such, read at the end.
        device: ``cpu`` or ``cuda``.
        dtype: Of the model's body; its head is float32.

    Raises:
        UserError: There is none, or its head has a value for every next token, which is no reward.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoTokenizer

        place = locate_value_model(str(folder))
        self.model = load_value_model(place, dtype).to(device)
        if self.model.shape.kind != "state" or self.model.shape.streams:
            raise UserError(f"{place} is a value model with more than one number for a state, so no reward model")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(place)
        self.cue = prompt_cue(self.tokenizer, self.model)
        self.device = device

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], ended: Sequence[bool], batch_tokens: int = 16384
    ) -> list[float]:
        """Rewards, in the order of the completions.

        Args:
            prompts: Texts or chat messages.
            completions: Texts.
            ended: Whether the completion was ended by the policy: then an end-of-sequence token follows it.
            batch_tokens: Of a pass, padding included; a longer row goes alone.
        """
        rows = [
            (*encode_prompt(self.tokenizer, p), *self.cue, *encode_prompt(self.tokenizer, c), *self._end(e))
            for p, c, e in zip(prompts, completions, ended, strict=True)
        ]
        length_B = torch.tensor([len(row) for row in rows])
        found = torch.zeros(len(rows))
        for index in plan_micro_batches(length_B, max(batch_tokens, int(length_B.max()))):
            width = int(length_B[index].max())
            ids_BT = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in index.tolist()])
            values_BT = self.model.values(ids_BT.to(self.device)).cpu()
            found[index] = values_BT[torch.arange(len(index)), length_B[index] - 1]
        return found.tolist()

    def _end(self, ended: bool) -> tuple[int, ...]:
        return (self.tokenizer.eos_token_id,) if ended and self.tokenizer.eos_token_id is not None else ()
