"""Choosing among samples by value: best of n completions, or of n continuations again and again, around any sampler.

Recorded log-probabilities are those of plain sampling, for each token that was kept. The distribution of what was
*chosen* is another one, which nobody knows: such rollouts are for evaluations and demonstrations, and an importance
ratio must not be taken over them.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from alignment.algorithms.decodings import BestOfN, ChunkRerank, choose, decodings
from alignment.engines.config import SamplerConfig, Site
from alignment.engines.steering import check_vocabulary
from alignment.engines.value_model import ValueModel, load_value_model, locate_value_model
from alignment.errors import UserError
from alignment.sampling import Sampler
from alignment.types import Completion, Request, keyed_seed

ROWS = 32
"""Most sequences that are valued together."""


def build_sampler(config: SamplerConfig, site: Site, learner: Any) -> Sampler:
    """The sampler of ``config`` for ``site``, with whichever decoding the site has.

    Raises:
        UserError: The sampler cannot be built, or a model of the decoding is missing or does not fit the policy.
    """
    decoding = site.decoding
    if not isinstance(decoding, BestOfN | ChunkRerank):
        return config.build(site, learner)
    folder = locate_value_model(decoding.model)
    check_vocabulary(site.model, folder)
    model = load_value_model(folder, getattr(torch, decoding.dtype))
    if model.shape.streams:
        raise UserError(f"{folder} has {model.shape.streams} values per state; decoding needs a model of one value")
    device = next(site.model.module.parameters()).device
    inner = config.build(replace(site, decoding=None), learner)
    return Reranker(
        inner, decoding, model.to("cpu" if device.type == "meta" else device, getattr(torch, decoding.dtype))
    )


@dataclass(slots=True)
class _Choice:
    """A request in the making: what was kept of it, and what there is to choose from next."""

    request: Request
    token_ids: tuple[int, ...] = ()
    logp: tuple[float, ...] = ()
    versions: tuple[tuple[int, int], ...] = ()
    round: int = 0
    waits: set[str] = field(default_factory=set)
    found: dict[str, Completion] = field(default_factory=dict)

    def ask(self, n: int, chunk_tokens: int | None) -> list[Request]:
        """``n`` requests for what comes next. The first of all has the request's own seed."""
        r = self.request
        room = r.params.max_tokens - len(self.token_ids)
        params = replace(r.params, max_tokens=min(room, chunk_tokens or room))
        seeds = [r.seed if self.round == i == 0 else keyed_seed(r.seed, "candidate", self.round, i) for i in range(n)]
        prompt = r.prompt_ids + self.token_ids
        asked = [Request(f"{r.id}:{self.round}:{i}", prompt, params, seed) for i, seed in enumerate(seeds)]
        self.waits, self.found = {one.id for one in asked}, {}
        return asked

    def different(self) -> list[Completion]:
        """What there is to choose from: each sequence of tokens once, in the order of their numbers."""
        ordered = sorted(self.found.values(), key=lambda c: int(c.id.rpartition(":")[2]))
        return list({c.token_ids: c for c in reversed(ordered)}.values())[::-1]

    def take(self, chosen: Completion) -> Completion | None:
        """Keeps what was chosen; the completion, if that is its end."""
        start = len(self.token_ids)
        runs = [(version, start + at) for version, at in chosen.versions]
        if self.versions and runs and runs[0][0] == self.versions[-1][0]:
            runs = runs[1:]
        self.token_ids += chosen.token_ids
        self.logp += chosen.logp
        self.versions += tuple(runs)
        self.round += 1
        if chosen.finish_reason == "length" and len(self.token_ids) < self.request.params.max_tokens:
            return None
        return Completion(self.request.id, self.token_ids, self.logp, chosen.finish_reason, self.versions)


class Reranker:
    """A sampler around another: each request is sampled ``n`` times, and one sample is chosen by value.

    Random numbers, those of the choice too, depend on the request's seed alone.

    Args:
        sampler: Samples; nobody else uses it.
        decoding: How many, how long and how to choose.
        model: Says the value of the state that a sample ends in.
    """

    def __init__(self, sampler: Sampler, decoding: BestOfN | ChunkRerank, model: ValueModel) -> None:
        self.sampler, self.decoding, self.model = sampler, decoding, model
        self.name = f"{sampler.name}+{decodings.name_of(decoding)}"
        self.longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._choices: dict[str, _Choice] = {}
        """By id of the request."""
        self._of: dict[str, str] = {}
        """The request that a sampler's request is for."""

    def add(self, requests: Sequence[Request]) -> None:
        """Takes requests, whose ids differ from all that are pending.

        Raises:
            UserError: One of them cannot be sampled or valued; then none was taken.
        """
        for request in requests:
            if self.decoding.n > 1 and request.params.temperature == 0:
                raise UserError(
                    f"request {request.id!r}: {self.decoding.n} samples at temperature 0 are all the same; set a"
                    " temperature above 0"
                )
            length = len(request.prompt_ids) + request.params.max_tokens
            if self.longest is not None and length > self.longest:
                raise UserError(
                    f"request {request.id!r}: {length} tokens, prompt and completion, exceed the {self.longest}"
                    " positions of the value model"
                )
        self._ask([_Choice(request) for request in requests])

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """Samples and chooses until a request finishes or the time is over; empty when nothing is pending."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._choices:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready: list[_Choice] = []
            for completion in self.sampler.poll(left):
                choice = self._choices[self._of.pop(completion.id)]
                choice.waits.remove(completion.id)
                choice.found[completion.id] = completion
                if not choice.waits:
                    ready.append(choice)
            finished = self._decide(ready)
            if finished or (deadline is not None and time.monotonic() >= deadline):
                return finished
        return []

    def abort(self, ids: Collection[str]) -> None:
        """Forgets requests: no completion comes for them. Unknown ids are ignored."""
        gone = [choice for i in ids if (choice := self._choices.pop(i, None)) is not None]
        waits = {i for choice in gone for i in choice.waits}
        for i in waits:
            del self._of[i]
        self.sampler.abort(waits)

    def close(self) -> None:
        """Ends the sampler; may be called twice."""
        self._choices, self._of = {}, {}
        self.sampler.close()

    def _ask(self, choices: Sequence[_Choice]) -> None:
        asked = {c.request.id: c.ask(self.decoding.n, self.decoding.chunk_tokens) for c in choices}
        self.sampler.add([request for requests in asked.values() for request in requests])
        self._choices |= {choice.request.id: choice for choice in choices}
        self._of |= {request.id: i for i, requests in asked.items() for request in requests}

    def _decide(self, ready: Sequence[_Choice]) -> list[Completion]:
        """Chooses for each; what is complete now. The others are asked for their next continuations."""
        options = [choice.different() for choice in ready]
        rows = [
            choice.request.prompt_ids + choice.token_ids + completion.token_ids
            for choice, found in zip(ready, options, strict=True)
            for completion in found
        ]
        values = values_of(self.model, rows).split([len(found) for found in options])
        done: list[Completion] = []
        further: list[_Choice] = []
        for choice, found, value_N in zip(ready, options, values, strict=True):
            uniform = keyed_seed(choice.request.seed, "choice", choice.round) / 2**63
            completion = choice.take(found[choose(value_N, self.decoding.beta, uniform)])
            if completion is None:
                further.append(choice)
            else:
                del self._choices[choice.request.id]
                done.append(completion)
        if further:
            self._ask(further)
        return done


@torch.no_grad()
def values_of(model: ValueModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """``[N]`` float32, on the CPU: the value of the state after the last token of each of N rows, at least one long."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # together with rows of like length
    values = torch.empty(len(rows))
    for start in range(0, len(rows), ROWS):
        part = order[start : start + ROWS]
        lengths = torch.tensor([len(rows[i]) for i in part], device=device)
        width = int(lengths.max())
        ids_BT = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in part], device=device)
        found_B1 = model.values(ids_BT).gather(1, lengths[:, None] - 1)
        values[torch.tensor(part)] = found_B1[:, 0].float().cpu()
    return values
