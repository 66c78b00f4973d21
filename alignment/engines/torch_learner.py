"""The embedded learner: one process, one module, AdamW."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from alignment.engines.backend import OneProcess
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.masked_goal import MaskedGoal
from alignment.engines.outgoing import Form, buckets, outgoing
from alignment.engines.policy_learner import MAIN_SLOT, PolicyLearner, PolicyObjective
from alignment.engines.roles import RoleSpec
from alignment.engines.token_masks import MASKS, MaskRole
from alignment.engines.value_roles import shared_head
from alignment.types import Batch


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

    def update(self, batch: Batch, objective: PolicyObjective | None, slot: str = MAIN_SLOT) -> dict[str, float]:
        """As :meth:`PolicyLearner.update`, also for an objective whose loss has masks of tokens.

        What learns masks is stepped on after the policy, with gradients of the same loss: ``masks/grad_norm``.
        """
        if getattr(objective, "token_masks", None) is None:
            return super().update(batch, objective, slot)
        assert objective is not None
        own, role = self.slot(slot), self.roles.get(MASKS)
        assert role is None or isinstance(role, MaskRole)
        goal = MaskedGoal(
            self.backend, objective, self.annotate, own.counts, reference=self._reference_weights, masks=role
        )
        assert goal.epochs == goal.minibatches == 1, "one step of the policy, and so one of the masks"
        if role is not None and role.slot is not None:
            role.slot.begin()
        with self._training():
            metrics = {"tokens": 0.0} | self._fit(slot, goal, goal.loss, batch.to(self.device), own, self.backend)
        if role is not None and role.slot is not None and metrics["optimizer_steps"]:
            metrics["masks/grad_norm"] = role.slot.step(torch.tensor(metrics["loss"], device=self.device))[1]
        return metrics

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
