"""The embedded learner: one process, one module, AdamW."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from alignment.engines.backend import OneProcess
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.outgoing import Form, buckets, outgoing
from alignment.engines.policy_learner import MAIN_SLOT, PolicyLearner, PolicyObjective
from alignment.engines.roles import RoleSpec
from alignment.engines.value_roles import shared_head


class TorchLearner(PolicyLearner):
    """Trains ``module`` in place.

    Args:
        module: A transformers causal language model, possibly with a peft adapter. What requires a gradient is
            trained. A sampler may share it; outside :meth:`update` it is in evaluation mode.
        config: Options.
        total_updates: Length of the schedule: calls of :meth:`update` in one slot.
        seed: Of dropout, the only random choice here: its numbers depend on (seed, slot or role, number of its update).
        reference: Keep the weights of now as the reference. Nothing is kept while a LoRA adapter is fresh: the
            reference is then the model without it.
        roles: Models beside the policy, by name; a text is another name for one of them.

    Raises:
        ValueError: Nothing in ``module`` requires a gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TorchLearnerConfig,
        total_updates: int,
        seed: int,
        reference: bool = False,
        roles: Mapping[str, RoleSpec | str] | None = None,
    ) -> None:
        backend = OneProcess(module, config, shared_head(roles, module.config))
        super().__init__(backend, config, total_updates, seed, reference, roles)

    def weights(self, bucket_bytes: int, form: Form = "merged") -> Iterator[dict[str, Tensor]]:
        """The policy's weights as they are now, in buckets of at most ``bucket_bytes``; a larger tensor comes alone.

        They are the learner's own memory where nothing had to be computed: not to be changed, nor used after the next
        update.

        Args:
            bucket_bytes: Of the tensors together.
            form: Whole weights by their names in transformers, an adapter added to them; or the adapter alone, by its
                names in peft.

        Raises:
            ValueError: There is no adapter to send.
        """
        return buckets(outgoing(self.module, form), bucket_bytes)


__all__ = ["MAIN_SLOT", "PolicyObjective", "TorchLearner"]
