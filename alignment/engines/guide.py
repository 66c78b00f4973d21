"""What steers a policy's logits while it decodes: value models, or pairs of language models, each with its own cache.

One implementation serves all samplers: they say which row of logits belongs to which request, how many tokens it has
and how it wants to be steered, and get the row back steered. Rows that are not to be steered keep every bit.

Suffixes as in :mod:`alignment.engines.alongside`, and J models or pairs.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from alignment.algorithms.decodings import emulate, tilt_logits
from alignment.engines.alongside import Alongside
from alignment.engines.value_model import ValueModel


class Steering(Protocol):
    """Models beside the policy, with caches over the rows that joined."""

    def join(self, prefixes: Sequence[Sequence[int]]) -> list[int]:
        """Takes rows with the tokens that they have; a number for each, by which it is known."""
        ...

    def leave(self, handles: Sequence[int]) -> None:
        """Forgets rows."""
        ...

    def steer(
        self, logits_MV: Tensor, handles: Sequence[int], token_M: Tensor, grew: Sequence[bool], tilt_MJ: Tensor
    ) -> Tensor:
        """New logits of these rows; ``token_M`` is the token that each got since, where it ``grew``."""
        ...


class Guide:
    """Value-augmented sampling; see :class:`alignment.algorithms.decodings.ValueAugmented`.

    Args:
        models: Value models, on the policy's device; shared, while the caches are this object's.
        top_k: Candidates; 0: all tokens.
        centre: Whether values are relative to the mean of the candidates.
    """

    def __init__(self, models: Sequence[ValueModel], top_k: int, centre: bool) -> None:
        self.models, self.top_k, self.centre = models, top_k, centre
        self.rows = min(_vocabulary(model.body) for model in models)
        """Tokens that all models know. A policy's output may have more rows than its tokenizer has tokens."""
        self.bodies = [
            Alongside(model.body, _hidden, "value model", remembers=model.shape.kind == "vocabulary")
            for model in models
        ]

    def join(self, prefixes: Sequence[Sequence[int]]) -> list[int]:
        known = [[min(token, self.rows - 1) for token in ids] for ids in prefixes]
        first, *others = [body.join(known) for body in self.bodies]
        assert all(other == first for other in others), "all models have the same rows"
        return first

    def leave(self, handles: Sequence[int]) -> None:
        for body in self.bodies:
            body.leave(handles)

    @torch.no_grad()
    def steer(
        self, logits_MV: Tensor, handles: Sequence[int], token_M: Tensor, grew: Sequence[bool], tilt_MJ: Tensor
    ) -> Tensor:
        known_MV = logits_MV[:, : self.rows]
        candidates_MK = known_MV.topk(min(self.top_k or self.rows, known_MV.shape[1])).indices
        values_MKJ = self.values(handles, token_M, grew, candidates_MK)
        return tilt_logits(logits_MV, candidates_MK, values_MKJ, tilt_MJ, centre=self.centre)

    def values(self, handles: Sequence[int], token_M: Tensor, grew: Sequence[bool], candidates_MK: Tensor) -> Tensor:
        """``[M, K, J]`` float32: of the state that each candidate leads to, by each model, in one pass of each."""
        token_M = token_M.clamp(max=self.rows - 1)
        found: list[Tensor] = []
        for model, body in zip(self.models, self.bodies, strict=True):
            if model.shape.kind == "vocabulary":
                last_MH, _ = body.step(handles, token_M, grew)
                every_MV = model.shape.loss.readout(model.head.everything(last_MH)[..., None])
                found.append(every_MV.gather(1, candidates_MK))
            else:
                _, at_MKH = body.step(handles, token_M, grew, candidates_MK)
                assert at_MKH is not None
                found.append(model.shape.loss.readout(model.head.everything(at_MKH)))
        return torch.stack(found, -1)


class Emulator:
    """Emulated fine-tuning; see :class:`alignment.algorithms.decodings.Emulated`.

    Args:
        models: J tuned causal language models, then the J that these were tuned from, on the policy's device.
        top_p: Tokens outside the policy's nucleus stay impossible.
    """

    def __init__(self, models: Sequence[Any], top_p: float) -> None:
        self.bodies = [Alongside(model, _logits, "emulated fine-tuning", remembers=True) for model in models]
        self.top_p = top_p
        self.rows = min(_vocabulary(model) for model in models)
        """Tokens that all models know; see :class:`Guide`."""

    def join(self, prefixes: Sequence[Sequence[int]]) -> list[int]:
        known = [[min(token, self.rows - 1) for token in ids] for ids in prefixes]
        first, *others = [body.join(known) for body in self.bodies]
        assert all(other == first for other in others), "all models have the same rows"
        return first

    def leave(self, handles: Sequence[int]) -> None:
        for body in self.bodies:
            body.leave(handles)

    @torch.no_grad()
    def steer(
        self, logits_MV: Tensor, handles: Sequence[int], token_M: Tensor, grew: Sequence[bool], tilt_MJ: Tensor
    ) -> Tensor:
        token_M = token_M.clamp(max=self.rows - 1)
        found = [body.step(handles, token_M, grew)[0] for body in self.bodies]
        tuned_JMV, base_JMV = torch.stack(found[: len(found) // 2]), torch.stack(found[len(found) // 2 :])
        return emulate(logits_MV, tuned_JMV, base_JMV, tilt_MJ, top_p=self.top_p)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of logits that is to be steered."""

    key: Hashable
    """Of the request, as long as it decodes."""
    length: int
    """Tokens that it has, prompt included."""
    tilt: tuple[float, ...]
    tokens: Callable[[], Sequence[int]]
    """All of them; asked for where the row is new."""


class Steered:
    """Keeps a :class:`Steering` in step with a sampler's rows, which come, grow, pause and go."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering
        self._known: dict[Hashable, tuple[int, int]] = {}
        """Handle and length of each row."""

    def __call__(self, logits_MV: Tensor, rows: Sequence[Row | None], token_M: Tensor) -> Tensor:
        """Steered logits; the very tensor that was given where no row wants to be steered.

        Args:
            logits_MV: The policy's, before temperature.
            rows: None for those that are not steered. A row that is not among them is forgotten.
            token_M: int64: the last token of each row.
        """
        index = [m for m, row in enumerate(rows) if row is not None]
        wanted = [row for row in rows if row is not None]
        now = {row.key: row.length for row in wanted}
        gone = [key for key, (_, seen) in self._known.items() if key not in now or now[key] - seen not in (0, 1)]
        if gone:
            self.steering.leave([self._known.pop(key)[0] for key in gone])
        if not wanted:
            return logits_MV
        grew = [row.key in self._known and self._known[row.key][1] < row.length for row in wanted]
        new = [row for row in wanted if row.key not in self._known]
        joined = self.steering.join([row.tokens() for row in new]) if new else []
        self._known |= {row.key: (handle, row.length) for row, handle in zip(new, joined, strict=True)}
        handles = [self._known[row.key][0] for row in wanted]
        self._known |= {row.key: (handle, row.length) for row, handle in zip(wanted, handles, strict=True)}
        index_M = torch.tensor(index, device=logits_MV.device)
        tilt_MJ = torch.tensor([row.tilt for row in wanted], dtype=torch.float32, device=logits_MV.device)
        steered_MV = self.steering.steer(logits_MV[index_M], handles, token_M[index_M], grew, tilt_MJ)
        return logits_MV.index_copy(0, index_M, steered_MV)


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _hidden(output: Any) -> Tensor:
    return output.last_hidden_state


def _logits(output: Any) -> Tensor:
    return output.logits.float()
