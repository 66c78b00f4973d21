"""Hands the learner's weights to the sampler."""

from alignment.engines.torch_learner import TorchLearner
from alignment.engines.transformers_sampler import TransformersSampler


def publish(learner: TorchLearner, sampler: TransformersSampler, version: int) -> None:
    """Makes the learner's current weights the sampler's, as policy ``version``.

    The embedded engines hold the very same module, so only the stamp moves.
    """
    assert sampler.module is learner.module, "embedded engines share one module"
    sampler.version = version
