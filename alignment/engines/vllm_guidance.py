"""Steering inside vLLM: logits processors for both of its model runners, over one implementation.

vLLM loads the class by name in each worker and applies it to float32 logits before penalties and temperature. Under
tensor parallelism every worker does the same work on the same logits. The older runner keeps a batch in which requests
have places and move; the newer one ("Model Runner V2", on GPUs) gives each request a slot, and tokens stay on the GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from alignment.engines.guide import Row, Steered
from alignment.engines.steering import SteeringPlan

CONFIG, PARAMETER = "steering", "tilt"
"""Keys of vLLM's ``additional_config`` and of a request's ``extra_args``."""


def processor_for(config: Any) -> str:
    """The class, by the name that vLLM loads it by, for the model runner that ``config`` leads to."""
    return f"{__name__}:{'SlotProcessor' if config.use_v2_model_runner else 'BatchProcessor'}"


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that is to be steered."""

    key: int
    tilt: tuple[float, ...]
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    """vLLM's own list, which grows."""

    def row(self) -> Row:
        return Row(self.key, len(self.prompt) + len(self.output), self.tilt, lambda: [*self.prompt, *self.output])


class BatchProcessor(LogitsProcessor):
    """For the older model runner.

    Args:
        vllm_config: Its ``additional_config`` has the :class:`SteeringPlan`.
        device: Of logits and models.
        is_pin_memory: Not used.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.steered = Steered(_load(vllm_config, device)())
        self.device = device
        self.asked: dict[int, _Asked] = {}
        """By place in the batch."""
        self._count = 0

    def is_argmax_invariant(self) -> bool:
        """No: it is what a greedy request is steered by."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests through the batch; in vLLM's order: removed, added, moved."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self.asked.pop(place, None)
        for place, params, prompt, output in batch_update.added:
            self.asked.pop(place, None)
            tilt = _tilt(params)
            if any(tilt):
                assert prompt is not None, "requests are tokens"
                self.asked[place] = _Asked(self._count, tilt, prompt, output)
                self._count += 1
        for a, b, direction in batch_update.moved:
            first, second = self.asked.pop(a, None), self.asked.pop(b, None)
            if first is not None:
                self.asked[b] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                self.asked[a] = second

    def apply(self, logits: Tensor) -> Tensor:
        """Steers the rows of requests that ask for it."""
        asked = [self.asked.get(place) for place in range(len(logits))]
        last = [(one.output or one.prompt)[-1] if one else 0 for one in asked]
        rows = [one.row() if one else None for one in asked]
        return self.steered(logits, rows, torch.tensor(last, device=self.device))


class SlotProcessor(LogitsProcessorV2):
    """For Model Runner V2. Without speculative decoding: one row of logits per request.

    Args:
        vllm_config: Its ``additional_config`` has the :class:`SteeringPlan`.
        req_states: vLLM's tokens and lengths of each slot.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.states = req_states
        self._config = vllm_config
        self._steered: Steered | None = None
        self.asked: dict[int, _Asked] = {}
        """By slot. A slot is used again without a word when its request has ended."""
        self._count = 0
        # With sleep mode this runs where memory is taken that is emptied at each sleep, and nobody would fill it again.
        if not vllm_config.model_config.enable_sleep_mode:
            self._open()

    def _open(self) -> Steered:
        self._steered = self._steered or Steered(_load(self._config, self.states.device)())
        return self._steered

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Whether the request in this slot is steered."""
        self.asked.pop(req_idx, None)
        tilt = _tilt(sampling_params)
        if any(tilt):
            self.asked[req_idx] = _Asked(self._count, tilt)
            self._count += 1
        return any(tilt)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Steers the rows of requests that ask for it."""
        assert len(logits) == len(ctx.idx_mapping_np), "there is no speculative decoding"
        lengths = ctx.seq_lens_upper_bound_np[: len(logits)].tolist()
        rows = [self._row(slot, length) for slot, length in zip(ctx.idx_mapping_np.tolist(), lengths, strict=True)]
        return self._open()(logits, rows, ctx.input_ids.long())

    def _row(self, slot: int, length: int) -> Row | None:
        one = self.asked.get(slot)
        # A prompt that is computed in parts: nothing is sampled before the last of them.
        if one is None or length < int(self.states.prefill_len.np[slot]):
            return None
        return Row(one.key, length, one.tilt, lambda: self.states.all_token_ids.gpu[slot, :length].tolist())


def _load(config: Any, device: torch.device) -> Callable[[], Any]:
    return SteeringPlan.from_json(config.additional_config[CONFIG]).load(device)


def _tilt(params: Any) -> tuple[float, ...]:
    return tuple((params.extra_args or {}).get(PARAMETER, ()))
