"""Ends of a weight update that write down what is asked of them, and can fail, lie or never answer."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignment.engines.transport import Tally, done
from alignment.sampling import Received

WEIGHTS = {f"layer.{i}.weight": torch.arange(6.0).reshape(2, 3) + i for i in range(4)}
BUCKETS = [{n: WEIGHTS[n] for n in names} for names in (list(WEIGHTS)[:2], list(WEIGHTS)[2:3], list(WEIGHTS)[3:])]
Log = list[tuple[str, ...]]


@dataclass
class Scripted:
    """Does ``log``, and instead of the call in ``instead`` (``"load 2"``, ``"end"``) what stands there."""

    name: str
    log: Log
    instead: Mapping[str, Callable[[], Future[Any]]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    version: int | None = None
    calls: int = 0

    def do(self, what: str, function: Callable[..., Any] = lambda: None, *args: Any) -> Future[Any]:
        self.log.append((self.name, what))
        return self.instead[what]() if what in self.instead else done(function, *args)

    def connect(self) -> Future[Any]:
        return self.do("connect")

    def abort(self) -> None:
        self.log.append((self.name, "abort"))


class FakeSender(Scripted):
    """Sends ``BUCKETS``."""

    def gather(self) -> Future[Any]:
        self.calls += 1
        return self.do(f"gather {self.calls}", self._next)

    def _next(self) -> Mapping[str, Tensor] | None:
        if self.calls > len(BUCKETS):
            return None
        self.tally.add(BUCKETS[self.calls - 1])
        return BUCKETS[self.calls - 1]

    def send(self, bucket: Any) -> Future[Any]:
        return self.do("send")

    def finish(self, version: int) -> Future[Received]:
        return self.do("finish", self.tally.received, version)


class FakeTarget(Scripted):
    """Receives them."""

    def pause(self) -> Future[Any]:
        return self.do("pause")

    def begin(self, version: int) -> Future[Any]:
        self.version = version
        return self.do("begin")

    def load(self, bucket: Mapping[str, Tensor]) -> Future[Any]:
        self.calls += 1
        return self.do(f"load {self.calls}", self.tally.add, bucket)

    def end(self) -> Future[Received]:
        assert self.version is not None
        return self.do("end", self.tally.received, self.version)

    def resume(self) -> Future[Any]:
        return self.do("resume")


def never() -> Future[Any]:
    """A future that is never done: an end that does not come."""
    return Future()


def dies(message: str = "the process is gone") -> Callable[[], Future[Any]]:
    """A call that fails."""

    def fail() -> None:
        raise RuntimeError(message)

    return lambda: done(fail)
