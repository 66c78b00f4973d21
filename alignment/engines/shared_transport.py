"""The transport of engines that share one module."""

from dataclasses import dataclass

from alignment.engines.torch_learner import TorchLearner
from alignment.engines.transformers_sampler import TransformersSampler


@dataclass(frozen=True)
class Shared:
    """Stamps the version: what the learner trains is what the sampler samples from."""

    learner: TorchLearner
    sampler: TransformersSampler

    def __post_init__(self) -> None:
        assert self.sampler.module is self.learner.module, "engines that share weights hold one module"

    def publish(self, version: int) -> dict[str, float]:
        """Makes the learner's current weights the sampler's, as policy ``version``."""
        self.sampler.version = version
        return {}
