"""One weight update from a learner to engines: its order, its deadline and its checks, whatever carries the bytes.

Every transport (memory, object store, NCCL, CUDA IPC) is a :class:`Sender`, the learner's end, and one :class:`Target`
per engine, driven by :func:`update_weights`:

1. ``target.connect`` and ``sender.connect``, at the same time, where there is something to connect and it is not yet;
2. ``target.pause``: the engine stops at a point where its weights may change. Whether generation in flight goes on
   afterwards or was finished first is the sampler's option, and so the target's business;
3. ``target.begin(version)`` on every engine. From here until ``end`` an engine cannot compute: vLLM takes its layers
   apart and puts each together when all of its tensors have come. So no step of an engine between the two;
4. for each bucket: ``sender.gather`` (under ZeRO-3 every rank takes part), then ``sender.send`` and ``target.load`` at
   the same time, since one waits for the other where they meet on a wire. The next ``gather`` runs beside them;
5. ``sender.finish`` and ``target.end``: each says what it sent or received, and the two must be equal: version, names,
   shapes, bytes and checksum. ``end`` resets the prefix cache;
6. ``target.resume``.

Every call returns a future at once (``ref.future()`` makes one of a Ray reference; :func:`done` calls something in this
process). All of them share one deadline. Past it, or when one fails, both ends are told to abort, and the error names
who was waited for, or who failed, and during what. An engine whose update was aborted holds a mixture of old and new
weights: it must refuse to generate until a later update has ended.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from alignment.engines.checksum import checksum
from alignment.errors import EngineFailed, UserError
from alignment.sampling import Received

log = logging.getLogger(__name__)
T = TypeVar("T")
UNCHANGED = (
    "policy version %d is new, but not one of its weights differs from the last in %s, in which engines keep them:"
    " steps are too small for that precision; raise the learning rate or set sampler.dtype: float32"
)
IDLE_S = 0.1
"""``idle`` is called at least this often while something is waited for."""


class Sender(Protocol):
    """The learner's end of an update."""

    name: str
    """For messages: ``learner``, ``learner rank 1``."""

    def connect(self) -> Future[None]:
        """Meets the targets' ``connect``; done at once when there is nothing to do."""
        ...

    def gather(self) -> Future[Any]:
        """The next bucket, in whatever form :meth:`Target.load` takes it; None after the last. The first call begins.

        At most ``bucket_mb`` of weights, unless one tensor alone is larger.
        """
        ...

    def send(self, bucket: Any) -> Future[None]:
        """Puts a gathered bucket on the wire; done at once where ``load`` brings the bytes itself."""
        ...

    def finish(self, version: int) -> Future[Received]:
        """What was sent since the first :meth:`gather`, in the words of the engines."""
        ...

    def abort(self) -> None:
        """Forgets an update that was begun, and lets go of whoever waits. Neither raises nor waits."""
        ...


class Target(Protocol):
    """One engine's end of an update."""

    name: str
    """For messages: ``vllm engine 2 on node1``."""

    def connect(self) -> Future[None]:
        """Meets the sender's ``connect``; done at once when there is nothing to do."""
        ...

    def pause(self) -> Future[None]:
        """The engine is between two steps and takes none before :meth:`resume`."""
        ...

    def begin(self, version: int) -> Future[None]:
        """What :meth:`load` brings next is policy ``version``."""
        ...

    def load(self, bucket: Any) -> Future[None]:
        """Receives one bucket; every weight is in one bucket of an update."""
        ...

    def end(self) -> Future[Received]:
        """The weights are in use, stamped with their version, and nothing computed with the old ones is used again."""
        ...

    def resume(self) -> Future[None]:
        """The engine works again."""
        ...

    def abort(self) -> None:
        """The update is off; the engine refuses to generate until another has ended. Neither raises nor waits."""
        ...


@dataclass(frozen=True)
class Published:
    """What an update brought."""

    sent: Received
    buckets: int
    changed: bool
    """Whether the weights differ from those of the update before; true for the first."""

    @property
    def metrics(self) -> dict[str, float]:
        """``publish_bytes`` and ``publish_tensors`` to each engine, ``publish_buckets``, ``publish_changed`` (0, 1)."""
        return {
            "publish_bytes": float(self.sent.bytes),
            "publish_tensors": float(self.sent.tensors),
            "publish_buckets": float(self.buckets),
            "publish_changed": float(self.changed),
        }


class Patience:
    """Waits for several ends at once. All waits of one update share its deadline.

    Args:
        purpose: Begins every message: ``publishing policy version 7``.
        timeout_s: From now, in seconds.
        idle: Called at least every ``IDLE_S`` seconds; what it raises ends the wait.
    """

    def __init__(self, purpose: str, timeout_s: float, idle: Callable[[], None] = lambda: None) -> None:
        self.purpose, self.timeout_s, self.idle = purpose, timeout_s, idle
        self.deadline = time.monotonic() + timeout_s

    def wait(self, what: str, pending: Sequence[tuple[str, Future[Any]]]) -> list[Any]:
        """Results of ``pending``, pairs of who is waited for and the future, in order.

        Raises:
            EngineFailed: One failed, or some were not done in time; the message names them and ``what``.
        """
        waiting = {future for _, future in pending}
        while waiting:
            left_s = self.deadline - time.monotonic()
            finished, waiting = wait_for_futures(waiting, max(0.0, min(IDLE_S, left_s)), FIRST_EXCEPTION)
            for name, future in pending:
                if future in finished and (error := future.exception()) is not None:
                    raise self._failed(name, what, error) from error
            if waiting and left_s <= 0:
                late = ", ".join(name for name, future in pending if future in waiting)
                raise EngineFailed(f"{self.purpose}: waited {self.timeout_s:g} s for {late} to {what}")
            if waiting:
                self.idle()
        return [future.result() for _, future in pending]

    def _failed(self, name: str, what: str, error: BaseException) -> BaseException:
        if isinstance(error, UserError) and not isinstance(error, EngineFailed):
            return error
        cause = str(error) or "no message"
        return EngineFailed(f"{self.purpose}: {name} could not {what}: {type(error).__name__}: {cause}")


def update_weights(
    sender: Sender, targets: Sequence[Target], version: int, patience: Patience, before: Received | None = None
) -> Published:
    """Brings the sender's weights to every target, in the order that this module describes.

    Args:
        sender: The learner's end.
        targets: The engines' ends, at least one.
        version: Of the policy; engines stamp what they sample with it.
        patience: The deadline.
        before: What the update before this one sent, to see whether anything changed.

    Raises:
        EngineFailed: An end failed or was late, or an engine received something else than was sent. Then the update
            is aborted at both ends, and the targets stay paused.
    """
    assert targets, "an update needs an engine to go to"
    ends: list[Sender | Target] = [*targets, sender]  # in this order: a sender in this process waits for the targets
    try:
        patience.wait("connect", [(end.name, end.connect()) for end in ends])
        patience.wait("pause", [(t.name, t.pause()) for t in targets])
        patience.wait("begin", [(t.name, t.begin(version)) for t in targets])
        buckets = _send_buckets(sender, targets, patience)
        [sent] = patience.wait("finish", [(sender.name, sender.finish(version))])
        received = patience.wait("end", [(t.name, t.end()) for t in targets])
        for target, record in zip(targets, received, strict=True):
            compare(sender.name, sent, target.name, record)
        patience.wait("resume", [(t.name, t.resume()) for t in targets])
        if kept := next((record.unchanged_in for record in received if record.unchanged_in), ""):
            log.warning(UNCHANGED, version, kept)
    except BaseException:
        for end in (sender, *targets):
            end.abort()
        raise
    return Published(sent, buckets, before is None or sent.checksum != before.checksum)


def _send_buckets(sender: Sender, targets: Sequence[Target], patience: Patience) -> int:
    """Gathers the next bucket while one is under way, so two exist at once. Returns their number."""
    count = 0
    [bucket] = patience.wait("gather bucket 1", [(sender.name, sender.gather())])
    while bucket is not None:
        count += 1
        # Receivers first: on a wire the sender's part may block its process until they are there.
        loading = [(target.name, target.load(bucket)) for target in targets]
        sending = [(sender.name, sender.send(bucket))]
        gathering = sender.gather()
        patience.wait(f"pass on bucket {count}", loading + sending)
        [bucket] = patience.wait(f"gather bucket {count + 1}", [(sender.name, gathering)])
    return count


def compare(sender: str, sent: Received, target: str, received: Received) -> None:
    """Refuses weights that are not those that were sent.

    Raises:
        EngineFailed: Another version, other names or shapes, or another checksum; the message says which tensors.
    """
    if received == sent:
        return
    head = f"policy version {sent.version}: what {target} received is not what {sender} sent"
    if received.version != sent.version:
        raise EngineFailed(f"{head}: it says that its weights are version {received.version}")
    if missing := sent.shapes.keys() - received.shapes.keys():
        raise EngineFailed(f"{head}: {_listed(missing)} did not arrive ({len(missing)} of {sent.tensors} tensors)")
    if unknown := received.shapes.keys() - sent.shapes.keys():
        raise EngineFailed(f"{head}: nobody sent {_listed(unknown)}")
    for name, shape in sent.shapes.items():
        if received.shapes[name] != shape:
            raise EngineFailed(f"{head}: {name} has shape {list(received.shapes[name])} instead of {list(shape)}")
    counts = [f"{r.tensors} tensors, {r.bytes} bytes, checksum {r.checksum:#x}" for r in (received, sent)]
    raise EngineFailed(f"{head}: {counts[0]} instead of {counts[1]}")


def _listed(names: Any) -> str:
    known = sorted(names)
    return ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")


@dataclass
class Tally:
    """Counts tensors as they pass, bucket by bucket. Both ends use it, so what they say can be compared.

    The checksum of several buckets is the sum of theirs modulo ``2^64``, as :func:`checksum` itself adds up tensors.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bytes: int = 0
    checksum: int = 0

    def add(self, bucket: Mapping[str, Tensor]) -> None:
        """Counts a bucket.

        Raises:
            ValueError: A tensor of the bucket was counted before.
        """
        if again := bucket.keys() & self.shapes.keys():
            raise ValueError(f"{_listed(again)} came twice in one update")
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in bucket.items()}
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in bucket.values())
        self.checksum = (self.checksum + checksum(bucket)) % (1 << 64)

    def received(self, version: int) -> Received:
        """The record of what was counted."""
        return Received(version, len(self.shapes), self.bytes, self.checksum, dict(self.shapes))


def done(function: Callable[..., T], *args: Any) -> Future[T]:
    """A finished future with what ``function(*args)`` returned or raised: an end in this process."""
    future: Future[T] = Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future
