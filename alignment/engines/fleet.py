"""A weight update to engines that are other processes, of which one may die or hang meanwhile."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from alignment.engines.transport import Patience
from alignment.engines.transport_ends import Peer
from alignment.errors import EngineFailed, UserError

T = TypeVar("T")
PAUSE_S = 0.1
"""Between two looks at the engines."""
GRACE_S = 3.0
"""What an engine was asked for may fail before its death is known."""


class Fleet(Protocol):
    """A sampler whose engines are other processes, watched, and replaced when they are lost."""

    name: str

    @property
    def losses(self) -> int:
        """Engines that were lost so far."""
        ...

    def peers(self) -> Sequence[Peer]:
        """The engines that can be updated; of the same engine the same peer."""
        ...

    def watch(self) -> None:
        """Looks after engines that died or hang.

        Raises:
            EngineFailed: None is left, and none may be started.
        """
        ...

    def idle(self) -> None:
        """What whoever waits for the engines calls; may raise to give the wait up."""
        ...

    def updated(self, version: int, buckets: Sequence[Any] = (), again: Callable[[int], object] | None = None) -> None:
        """All that :meth:`peers` named last have policy ``version`` now, so they can serve.

        Args:
            version: Of the policy.
            buckets: References to packed buckets of all its weights, with which an engine that starts later catches
                up by itself.
            again: Brings the version to such an engine where there are no buckets. Called while the learner rests.
        """
        ...


def fleet_of(sampler: Any, transport: str) -> Fleet:
    """``sampler``, whose engines are processes.

    Raises:
        UserError: Its engine lives in this process; ``transport`` is for others.
    """
    if not hasattr(sampler, "peers"):
        raise UserError(
            f"transport {transport} brings weights to engines in other processes, and sampler {sampler.name!r} lives in"
            " this one; use transport: memory"
        )
    return sampler


def publish_to(fleet: Fleet, version: int, timeout_s: float, attempt: Callable[[Sequence[Peer], Patience], T]) -> T:
    """What ``attempt`` returns for the engines that are there.

    When one is lost meanwhile, the attempt is given up, and made anew with those that are left and with the time that
    it had at first. That ends, since a fleet may lose only so many.

    Args:
        fleet: At least one of its engines is waited for.
        version: Of the policy, for messages.
        timeout_s: For one attempt.
        attempt: The update, given the engines and how to wait for them.

    Raises:
        EngineFailed: From the attempt, when no engine was lost; or none is left.
    """
    while True:
        losses = fleet.losses

        def idle(losses: int = losses) -> None:
            fleet.watch()
            if fleet.losses != losses:
                raise EngineFailed("an engine was lost")
            fleet.idle()

        patience = Patience(f"publishing policy version {version}", timeout_s, idle)
        try:
            return attempt(_present(fleet, patience), patience)
        except EngineFailed:
            if not _lost_more(fleet, losses):
                raise


def _present(fleet: Fleet, patience: Patience) -> Sequence[Peer]:
    """The engines that can be updated; the first of them is waited for, where all had to be replaced."""
    while not (peers := fleet.peers()):
        if time.monotonic() > patience.deadline:
            raise EngineFailed(f"{patience.purpose}: no engine was there within {patience.timeout_s:g} s")
        patience.idle()
        time.sleep(PAUSE_S)
    return peers


def _lost_more(fleet: Fleet, losses: int) -> bool:
    """Whether an engine was lost, which may be known a little later than what it failed to do."""
    end = time.monotonic() + GRACE_S
    while fleet.losses == losses and time.monotonic() < end:
        fleet.watch()
        time.sleep(PAUSE_S)
    return fleet.losses != losses
