"""The learner of one rank. Nothing here knows who started the process."""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alignment.engines.deepspeed_backend import ZeroBackend
from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
from alignment.engines.deepspeed_zero import gathered
from alignment.engines.outgoing import Form, buckets, refuse_merged
from alignment.engines.policy_learner import PolicyLearner
from alignment.engines.roles import RoleSpec
from alignment.engines.value_roles import shared_head
from alignment.tensorfile import weights_of


def join_ranks(rank: int, ranks: int, timeout_s: float, local_rank: int = 0) -> None:
    """Makes this process one of ``ranks`` that compute together; they meet at MASTER_ADDR and MASTER_PORT.

    NCCL carries what is on GPUs, gloo the rest. A rank that waits longer than ``timeout_s`` for another raises.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s))


class DeepSpeedRank(PolicyLearner):
    """Trains ``module`` together with the other ranks of the process group; all of them call the same methods alike.

    Each gets the whole batch and works on its share of the rows. What a method returns is the same on every rank.

    Args:
        module: A transformers causal language model, possibly with a peft adapter, on the CPU and the same on every
            rank. It belongs to the learner from now on.
        config: Options.
        total_updates: Length of the schedule: calls of :meth:`update` in one slot.
        seed: Of dropout: its numbers depend on (seed, slot or role, number of its update, rank).
        reference: Keep the weights of now as the reference, in parts at ZeRO stage 3. Nothing is kept while a LoRA
            adapter is fresh.
        roles: Models beside the policy, by name; a text is another name for one of them.

    Raises:
        ValueError: Nothing in ``module`` requires a gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        config: DeepSpeedLearnerConfig,
        total_updates: int,
        seed: int,
        reference: bool = False,
        roles: Mapping[str, RoleSpec | str] | None = None,
    ) -> None:
        backend = ZeroBackend(module, config, shared_head(roles, module.config))
        super().__init__(backend, config, total_updates, seed, reference, roles)

    def weights(self, bucket_bytes: int, form: Form = "merged") -> Iterator[dict[str, Tensor]]:
        """The policy's weights as they are now, whole, in buckets of at most ``bucket_bytes``; a larger comes alone.

        Every rank has to take every bucket. The tensors of one are the receiver's to keep.

        Args:
            bucket_bytes: Of the tensors of one bucket together.
            form: Whole weights by their names in transformers, an adapter added to them; or the adapter alone, by its
                names in peft.

        Raises:
            ValueError: There is no adapter to send.
            UserError: It is asked for alone, and earlier ones were merged into the base.
        """
        if form == "adapter" and not self.has_adapter:
            raise ValueError("the model has no LoRA adapter to send; send whole weights (form: merged)")
        if form == "adapter":
            refuse_merged(self.module)
        return buckets(self._adapter() if form == "adapter" else self._whole(), bucket_bytes)

    @torch.no_grad()
    def _adapter(self) -> Iterator[tuple[str, Tensor]]:
        from peft import get_peft_model_state_dict

        module: Any = self.module
        parameters = dict(module.named_parameters())
        # It only chooses and renames, so that the weights may be in parts.
        for name, tensor in get_peft_model_state_dict(module, parameters, save_embedding_layers=False).items():
            with gathered([tensor]):
                whole = tensor.detach().clone()
            yield name, whole

    @torch.no_grad()
    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        module: Any = self.module
        base = module.get_base_model() if self.has_adapter else module
        layers: dict[str, Any] = {n: m for n, m in base.named_modules() if hasattr(m, "get_delta_weight")}
        adapters = tuple(f"{name}.lora_" for name in layers)
        for name, tensor in weights_of(base).items():
            if name.startswith(adapters):
                continue
            owner, inner, parameter = name.rpartition(".base_layer.")
            adapted = [p for n, p in layers[owner].named_parameters() if "lora_" in n] if inner else []
            with gathered([tensor, *adapted]):
                whole = tensor.detach().clone()
                if adapted and parameter == "weight":
                    delta = layers[owner].get_delta_weight(module.active_adapter)
                    whole = (whole.float() + delta.float()).to(whole.dtype)
            yield f"{owner}.{parameter}" if inner else name, whole


__all__ = ["DeepSpeedRank", "join_ranks"]
