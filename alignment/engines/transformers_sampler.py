"""The embedded sampler: decodes any causal language model of transformers, in this process, from the learner's weights.

Rows of a chunk are decoded together and leave it when they finish. A request's random numbers come from a generator
keyed by its seed alone, one number per token, so what is batched with it changes nothing but float rounding.

Suffixes here: N requests of a chunk, P its distinct prompts, M rows still decoding, T positions, L tokens generated,
S stop tokens, V vocabulary, 1 a dimension of size one.
"""

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alignment.engines.config import TransformersSamplerConfig
from alignment.engines.cpu import fitting_threads
from alignment.engines.growing_cache import growing_cache
from alignment.engines.guide import Row, Steered
from alignment.engines.logprobs import evaluating
from alignment.engines.steering import SteeringPlan
from alignment.sampling import check_request
from alignment.types import Completion, Request


class TransformersSampler:
    """Samples completions from ``module``, a causal language model of transformers, wrapped by peft or not.

    The module is shared with the learner: publishing new weights is stamping ``version``.

    Log-probabilities are those of the distribution that was sampled: ``log_softmax(logits / temperature)``, without
    banned tokens, restricted to ``top_k`` and then ``top_p`` and renormalised, in float32. Temperature 0 takes the most
    likely token; its distribution is a point mass, so its log-probability is 0.

    Args:
        module: The model; its device is where decoding happens.
        config: Rows per chunk and autocast.
        plan: What steers requests that have a ``tilt``. Their logits are steered before all else, so that their
            log-probabilities are those of the steered distribution.
    """

    name = "transformers"

    def __init__(self, module: nn.Module, config: TransformersSamplerConfig, plan: SteeringPlan | None = None) -> None:
        self.module, self.config = module, config
        self.version = 0
        wrapped: Any = module
        base = wrapped.get_base_model() if hasattr(module, "get_base_model") else wrapped
        accepted = inspect.signature(base.forward).parameters
        self.takes_positions = "position_ids" in accepted
        # Logits of a whole prompt over a large vocabulary are gigabytes; only the last position is sampled from.
        self.last_logit_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        sizes = [m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)]
        self.flop_per_token = 2 * sum(sizes) / max(1, len(sizes))
        """Of a typical matrix product."""
        self.max_positions: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self.plan = plan
        self.steering = None if plan is None else plan.load(next(module.parameters()).device)
        self._waiting: list[Request] = []
        self._chunk: _Chunk | None = None

    def add(self, requests: Sequence[Request]) -> None:
        """Takes requests; they are decoded in chunks of ``batch_rows``, a chunk to its end before the next begins.

        Raises:
            UserError: A request is empty, asks for no tokens, has a bad option, or is too long for the model.
        """
        for request in requests:
            check_request(request, self.max_positions, 0 if self.plan is None else self.plan.models)
            if self.plan is not None:
                self.plan.check(request)
        self._waiting += requests

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """Decodes until at least one row finishes, whatever ``timeout_s`` says; nothing when nothing is pending.

        Raises:
            FloatingPointError: The model's logits are not finite.
        """
        if self._chunk is None:
            if not self._waiting:
                return []
            # Equal lengths need no padding, and equal prompts side by side are computed once.
            ordered = sorted(self._waiting, key=lambda r: (len(r.prompt_ids), r.prompt_ids))
            rows = self.config.batch_rows
            self._chunk, self._waiting = _Chunk(self, ordered[:rows]), ordered[rows:]
        completions = self._chunk.advance()
        if not self._chunk.unfinished:
            self._chunk = None
        return completions

    def abort(self, ids: Collection[str]) -> None:
        """Forgets requests. Those in the chunk under way are not decoded further."""
        self._waiting = [request for request in self._waiting if request.id not in ids]
        if self._chunk is not None:
            self._chunk.drop(ids)
            if not self._chunk.unfinished:
                self._chunk = None

    def close(self) -> None:
        """Forgets everything; the module is the learner's."""
        self._waiting, self._chunk = [], None


class _Chunk:
    """Requests that are decoded together."""

    def __init__(self, sampler: TransformersSampler, requests: Sequence[Request]) -> None:
        self.sampler, self.requests = sampler, requests
        self.device = next(sampler.module.parameters()).device
        params = [r.params for r in requests]
        longest = max(p.max_tokens for p in params)
        self.max_tokens_M = self._tensor([p.max_tokens for p in params])
        self.temperature_M = self._tensor([p.temperature for p in params], torch.float32)
        self.top_k_M = self._tensor([p.top_k for p in params])
        self.top_p_M = self._tensor([p.top_p for p in params], torch.float32)
        self.truncates = any(p.top_k > 0 or p.top_p < 1.0 for p in params)
        self.stop_MS = self._tensor(_filled([p.stop_ids for p in params]))
        self.banned_MS = self._tensor(_filled([p.banned_ids for p in params]))
        self.row_M = torch.arange(len(requests), device=self.device)
        self.uniform_NL = torch.from_numpy(_uniforms(requests, longest)).to(self.device)
        self.token_NL = torch.zeros(len(requests), longest, dtype=torch.int64, device=self.device)
        self.logp_NL = torch.zeros(len(requests), longest, dtype=torch.float32, device=self.device)
        self.cache: DynamicCache | None = None
        self.mask_MT: Tensor | None = None
        self.position_M = self._tensor([len(r.prompt_ids) for r in requests])
        self.steered = Steered(sampler.steering()) if sampler.steering is not None else None
        self.generated = 0
        self.versions: list[tuple[int, int]] = []

    def _tensor(self, values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    @property
    def unfinished(self) -> bool:
        """Whether any row still decodes."""
        return len(self.row_M) > 0

    @torch.no_grad()
    def advance(self) -> list[Completion]:
        """Decodes until at least one row finishes; returns those that did.

        Gradient mode, evaluation mode and autocast are set here and not around the iterator: between two completions
        the consumer's code runs, and may train the same module.
        """
        autocast = self.sampler.config.autocast == "bfloat16"
        with evaluating(self.sampler.module), torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            while True:
                logits_MV = self._prefill() if self.cache is None else self._decode(self.cache)
                done_M = self._sample(logits_MV)
                if done_M.any():
                    return self._retire(done_M)

    def _prefill(self) -> Tensor:
        """Computes each distinct prompt once, left-padded, and gives every request its copy of the cache."""
        place = {ids: i for i, ids in enumerate(dict.fromkeys(r.prompt_ids for r in self.requests))}
        width = max(len(ids) for ids in place)
        ids_PT = self._tensor([[*[0] * (width - len(ids)), *ids] for ids in place])
        mask_PT = self._tensor([[*[0] * (width - len(ids)), *[1] * len(ids)] for ids in place])
        cache = growing_cache(self.sampler.module)
        padded = any(len(ids) < width for ids in place)
        logits_PV = self._forward(ids_PT, cache, mask_PT if padded else None, (mask_PT.cumsum(1) - 1).clamp(min=0))
        prompt_M = self._tensor([place[r.prompt_ids] for r in self.requests])
        if len(place) < len(self.requests):
            cache.batch_select_indices(prompt_M)
        self.cache, self.mask_MT = cache, mask_PT[prompt_M] if padded else None
        return logits_PV[prompt_M]

    def _decode(self, cache: DynamicCache) -> Tensor:
        if self.mask_MT is not None:
            self.mask_MT = torch.cat([self.mask_MT, self.mask_MT.new_ones(len(self.row_M), 1)], dim=1)
        last_M1 = self.token_NL[self.row_M, self.generated - 1][:, None]
        logits_MV = self._forward(last_M1, cache, self.mask_MT, self.position_M[:, None])
        self.position_M = self.position_M + 1
        return logits_MV

    def _forward(self, ids: Tensor, cache: DynamicCache, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Logits ``[rows, V]`` of the token after ``ids``, in float32; ``cache`` grows by ``ids``."""
        extra = {"position_ids": positions} if self.sampler.takes_positions else {}
        flop = ids.numel() * self.sampler.flop_per_token
        with fitting_threads(self.device, flop, self.sampler.config.autocast == "bfloat16"):
            out = self.sampler.module(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **extra,
                **self.sampler.last_logit_only,
            )
        return out.logits[:, -1].float()

    def _sample(self, logits_MV: Tensor) -> Tensor:
        """Draws one token per row and records it; returns which rows are finished by it."""
        if self.sampler.version != (self.versions[-1][0] if self.versions else None):
            self.versions.append((self.sampler.version, self.generated))
        uniform_M = self.uniform_NL[self.row_M, self.generated]
        if self.steered is not None:
            last_M = self.token_NL[self.row_M, max(0, self.generated - 1)]
            logits_MV = self.steered(logits_MV, [self._steered_row(n) for n in self.row_M.tolist()], last_M)
        if self.banned_MS.shape[1]:
            row_N, column_N = (self.banned_MS >= 0).nonzero(as_tuple=True)
            logits_MV = logits_MV.index_put((row_N, self.banned_MS[row_N, column_N]), logits_MV.new_tensor(-torch.inf))
        if self.truncates:
            logits_MV = truncate(logits_MV, self.temperature_M, self.top_k_M, self.top_p_M)
        token_M, logp_M = draw(logits_MV, self.temperature_M, uniform_M)
        if not logp_M.isfinite().all():
            raise FloatingPointError(
                f"the model of sampler {self.sampler.name!r} (version {self.sampler.version}) gives logits that are not"
                " finite: training has diverged; lower the learning rate or clip gradients harder"
            )
        self.token_NL[self.row_M, self.generated] = token_M
        self.logp_NL[self.row_M, self.generated] = logp_M
        self.generated += 1
        return (token_M[:, None] == self.stop_MS).any(1) | (self.max_tokens_M <= self.generated)

    def _steered_row(self, n: int) -> Row | None:
        request = self.requests[n]
        if not any(request.params.tilt):
            return None
        # Every row joins at its first token, so its tokens are those of its prompt.
        length = len(request.prompt_ids) + self.generated
        return Row(n, length, request.params.tilt, lambda: request.prompt_ids)

    def _retire(self, done_M: Tensor) -> list[Completion]:
        """Takes finished rows out of the batch and makes their completions."""
        rows = self.row_M[done_M]
        last_M = self.token_NL[rows, self.generated - 1]
        stopped = (last_M[:, None] == self.stop_MS[done_M]).any(1).tolist()
        tokens, logp = self.token_NL[rows, : self.generated].tolist(), self.logp_NL[rows, : self.generated].tolist()
        versions = tuple(self.versions)
        completions = [
            Completion(self.requests[n].id, tuple(t), tuple(p), "stop" if stop else "length", versions)
            for n, t, p, stop in zip(rows.tolist(), tokens, logp, stopped, strict=True)
        ]
        self._keep((~done_M).nonzero()[:, 0])
        return completions

    def drop(self, ids: Collection[str]) -> None:
        """Takes the rows of these requests out of the batch."""
        self._keep(self._tensor([m for m, n in enumerate(self.row_M.tolist()) if self.requests[n].id not in ids]))

    def _keep(self, keep: Tensor) -> None:
        """Leaves only the rows with these indices in the batch."""
        for name in (
            "row_M",
            "max_tokens_M",
            "temperature_M",
            "top_k_M",
            "top_p_M",
            "stop_MS",
            "banned_MS",
            "position_M",
        ):
            setattr(self, name, getattr(self, name)[keep])
        if self.mask_MT is not None:
            self.mask_MT = self.mask_MT[keep]
        if len(keep) and self.cache is not None:
            self.cache.batch_select_indices(keep)


def _filled(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Tokens of each row, filled up with -1."""
    width = max(map(len, rows))
    return [[*row, *[-1] * (width - len(row))] for row in rows]


def truncate(logits_MV: Tensor, temperature_M: Tensor, top_k_M: Tensor, top_p_M: Tensor) -> Tensor:
    """Sets logits outside ``top_k`` and ``top_p`` to minus infinity.

    ``top_k`` keeps the k largest (0: all; ties in favour of the smaller token id). Then ``top_p`` keeps the smallest
    set of most likely tokens, under ``softmax(logits / temperature)`` renormalised over those k, whose probability
    reaches ``top_p`` (1: all). The nucleus of "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751).
    """
    sorted_MV, order_MV = logits_MV.sort(dim=1, descending=True, stable=True)
    rank_V = torch.arange(logits_MV.shape[1], device=logits_MV.device)
    beyond_k_MV = (rank_V >= top_k_M[:, None]) & (top_k_M[:, None] > 0)
    scaled_MV = (sorted_MV / _divisor(temperature_M)[:, None]).masked_fill(beyond_k_MV, -torch.inf)
    prob_MV = scaled_MV.softmax(dim=1, dtype=torch.float64)
    # The mass before a token decides, so the most likely one always stays. Rounding may bring that mass to 1 before
    # the last token: rows without a nucleus are left alone.
    beyond_p_MV = (prob_MV.cumsum(1) - prob_MV >= top_p_M[:, None]) & (top_p_M[:, None] < 1.0)
    beyond_p_MV[:, 0] = False
    return logits_MV.masked_fill(
        torch.zeros_like(beyond_k_MV).scatter(1, order_MV, beyond_k_MV | beyond_p_MV), -torch.inf
    )


def draw(logits_MV: Tensor, temperature_M: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution at ``uniform_M`` in [0, 1); temperature 0 is greedy.

    Returns:
        Tokens (int64) and their log-probabilities (float32) under the distribution that was inverted.
    """
    logp_MV = (logits_MV / _divisor(temperature_M)[:, None]).log_softmax(dim=1)
    cdf_MV = logp_MV.exp().cumsum(1, dtype=torch.float64)
    # Below the total, since no uniform number is above 1 - 2^-53; and to the right of equal values of the distribution
    # function: a token of probability 0 is never chosen.
    target_M1 = uniform_M[:, None] * cdf_MV[:, -1:]
    token_M1 = torch.searchsorted(cdf_MV, target_M1, right=True).clamp(max=logits_MV.shape[1] - 1)
    logp_M = logp_MV.gather(1, token_M1)[:, 0]
    greedy_M = temperature_M == 0.0
    if not greedy_M.any():
        return token_M1[:, 0], logp_M
    # NaN stays NaN for greedy rows too: it is how divergence is noticed.
    return torch.where(greedy_M, logits_MV.argmax(1), token_M1[:, 0]), torch.where(greedy_M, logp_M - logp_M, logp_M)


def _divisor(temperature_M: Tensor) -> Tensor:
    return torch.where(temperature_M == 0.0, 1.0, temperature_M)


def _uniforms(requests: Sequence[Request], length: int) -> np.ndarray:
    """``[N, length]`` numbers in [0, 1): entry ``t`` depends on the request's seed and ``t`` alone (Philox 4x64)."""
    values = np.zeros((len(requests), length))
    for row, request in zip(values, requests, strict=True):
        if request.params.temperature > 0.0:
            row[: request.params.max_tokens] = np.random.Generator(np.random.Philox(key=request.seed)).random(
                request.params.max_tokens
            )
    return values
