"""One GPU for the engine and the learner in turns: who sleeps when.

    generate -> rest: the engine gives its memory up -> annotate, update
             -> publish: wake the weights -> update them -> wake the cache -> generate

The cache comes last, so that while the new weights travel (buckets, and under ZeRO-3 gathered parameters) its memory is
still free.
"""

import gc
from collections.abc import Callable
from typing import Literal, Protocol

import torch

from alignment.engines.config import Transport


class Sleeper(Protocol):
    """An engine, or several, that can give up the memory of its GPU and take it again."""

    def sleep(self) -> None:
        """Gives up weights and cache; no request may be pending. Weights need not survive: all of them come anew."""
        ...

    def wake(self, what: Literal["weights", "cache"]) -> None:
        """Takes memory again, for the weights first; generation is possible after both."""
        ...


class Colocated:
    """A transport that puts the engine to sleep while the learner works.

    The loop calls :meth:`rest` when it has its completions, before the learner touches the batch, and :meth:`publish`
    when the learner is done.

    Args:
        transport: Moves the weights.
        sleeper: The sampler of ``transport``, or something that stands for all its engines.
        release: Learners in other processes give memory that they have cached and do not use back to the GPU; for this
            process that is done here.
    """

    def __init__(self, transport: Transport, sleeper: Sleeper, release: Callable[[], None] = lambda: None) -> None:
        self.transport, self.sleeper, self.release = transport, sleeper, release
        self.asleep = False

    def rest(self) -> None:
        """The learner may use the whole GPU until the next :meth:`publish`. Nothing happens when it already may."""
        if not self.asleep:
            # Set first: an engine that failed half asleep must not be taken for awake.
            self.asleep = True
            self.sleeper.sleep()

    def publish(self, version: int) -> dict[str, float]:
        """Wakes the weights, updates them, wakes the cache; an engine that is awake is just updated.

        Raises:
            EngineFailed: From the transport. The engine then stays without a cache, so it cannot generate.
        """
        if not self.asleep:
            return self.transport.publish(version)
        self.release()
        if torch.cuda.is_initialized():  # PyTorch keeps freed memory for itself, where the engine cannot take it
            gc.collect()
            torch.cuda.empty_cache()
        self.sleeper.wake("weights")
        metrics = self.transport.publish(version)
        self.sleeper.wake("cache")
        self.asleep = False
        return metrics
