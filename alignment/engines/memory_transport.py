"""Weights from a learner to an engine of the same process: tensors are handed over as they are."""

from typing import Any

from alignment.engines.transport import Patience, update_weights
from alignment.engines.transport_config import MemoryTransportConfig
from alignment.engines.transport_ends import LocalSender, LocalTarget
from alignment.sampling import Received


class MemoryTransport:
    """Publishes from ``learner.weights(...)`` to a sampler that receives weights.

    Args:
        learner: In this process.
        sampler: In this process, a :class:`alignment.sampling.Receiver`.
        config: Size of buckets, deadline, form.
    """

    def __init__(self, learner: Any, sampler: Any, config: MemoryTransportConfig) -> None:
        self.config = config
        self.sender = LocalSender(learner, config.bucket_mb, config.form)
        self.target = LocalTarget(sampler, f"sampler {sampler.name}")
        self.before: Received | None = None

    def publish(self, version: int) -> dict[str, float]:
        """Makes the learner's current weights the sampler's, as policy ``version``; metrics of the update.

        Raises:
            EngineFailed: What arrived is not what was sent, or it took longer than the deadline.
        """
        patience = Patience(f"publishing policy version {version}", self.config.timeout_s)
        published = update_weights(self.sender, [self.target], version, patience, self.before)
        self.before = published.sent
        return published.metrics
