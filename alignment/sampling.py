"""What samples completions: the contract of a sampler, of one with weights of its own, and how to use them.

A sampler takes requests at any time and gives completions as they finish, so that several users (training, an
evaluation) can have requests in flight at once, and weights can change between two tokens.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from alignment.errors import UserError
from alignment.types import Completion, Request


@dataclass(frozen=True, slots=True)
class Received:
    """What a sampler says after an update of its weights: what arrived, so that the learner can compare."""

    version: int
    tensors: int
    bytes: int
    checksum: int
    """:func:`alignment.engines.checksum.checksum` of every tensor that arrived."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By name; so that an error can say which tensor is missing or has another shape."""
    unchanged_in: str = field(default="", compare=False)
    """Where new weights came, and none of those that are kept differs from before: the type in which they are kept."""


@runtime_checkable
class Sampler(Protocol):
    """Samples completions. It knows tokens only; turns, scoring and groups are the collector's business.

    :func:`alignment.sampling.submit` samples some requests and waits for them.
    """

    name: str

    def add(self, requests: Sequence[Request]) -> None:
        """Takes requests, whose ids differ from all that are pending. Those of one prompt should come together.

        Raises:
            UserError: One of them cannot be sampled; then none was taken.
        """
        ...

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """What finished since the last call, each once, in any order; empty when nothing is pending.

        An engine in this process works until something finishes or the time is over; a remote one is waited for.

        Args:
            timeout_s: How long at most; 0 takes what is there, None waits until the engine's own deadline.

        Raises:
            EngineFailed: No engine is left, or none answered within its deadline; the message names them.
        """
        ...

    def abort(self, ids: Collection[str]) -> None:
        """Forgets requests: no completion comes for them. Unknown ids are ignored."""
        ...

    def close(self) -> None:
        """Ends whatever it started; may be called twice."""
        ...


@runtime_checkable
class Receiver(Protocol):
    """A sampler with weights of its own. A transport hands it new ones, bucket by bucket."""

    def begin_update(self, version: int) -> None:
        """What :meth:`load` brings next is policy ``version``."""
        ...

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """Some of the weights, by their names in transformers; every weight is in one bucket of an update."""
        ...

    def end_update(self) -> Received:
        """The new weights are in use, and nothing computed with the old ones is used again."""
        ...


def submit(sampler: Sampler, requests: Sequence[Request]) -> Iterator[Completion]:
    """Completions of ``requests`` as they finish, each once. Closing the iterator early aborts the others.

    Nothing else may be pending in ``sampler``: its completions would be lost.

    Raises:
        UserError: At once: a request cannot be sampled.
    """
    sampler.add(requests)
    return _stream(sampler, {request.id for request in requests})


def _stream(sampler: Sampler, waited_for: set[str]) -> Iterator[Completion]:
    try:
        while waited_for:
            for completion in sampler.poll():
                waited_for.discard(completion.id)
                yield completion
    finally:
        sampler.abort(waited_for)


def check_request(request: Request, max_positions: int | None, models: int = 0) -> None:
    """Refuses what no sampler can do.

    Args:
        request: To be sampled.
        max_positions: Longest sequence of the model, in tokens; None where it has no bound.
        models: What the sampler's decoding steers with, each of which a ``tilt`` has a number for.

    Raises:
        UserError: It is empty, asks for no tokens, has a bad option, or is too long for the model.
    """
    p, length = request.params, len(request.prompt_ids)
    problems = (
        (length == 0, "its prompt has no tokens"),
        (p.max_tokens < 1, f"max_tokens is {p.max_tokens}; it must be at least 1"),
        (not p.temperature >= 0.0, f"temperature is {p.temperature}; it must be 0 (greedy) or more"),
        (not 0.0 < p.top_p <= 1.0, f"top_p is {p.top_p}; it must be above 0 and at most 1 (1 is off)"),
        (p.top_k < 0, f"top_k is {p.top_k}; it must be 0 (off) or more"),
        (
            bool(p.tilt) and len(p.tilt) != models,
            f"tilt has {len(p.tilt)} numbers, and the sampler's decoding steers with {models or 'no'} models",
        ),
        (
            max_positions is not None and length + p.max_tokens > max_positions,
            f"{length} prompt tokens + max_tokens {p.max_tokens} exceed the model's {max_positions} positions",
        ),
    )
    for wrong, what in problems:
        if wrong:
            raise UserError(f"request {request.id!r}: {what}")
