"""What a recipe says of a learner. Light: a learner's own module is imported when it is built."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignment.engines.config import Site
from alignment.registry import Registry, option
from alignment.types import Batch

if TYPE_CHECKING:
    from alignment.engines.torch_learner import TorchLearner


@runtime_checkable
class Learner(Protocol):
    """Holds the policy and improves it. It is blind to the algorithm: what it minimises comes as an objective."""

    @property
    def of_prompts(self) -> Collection[str]:
        """Models beside the policy that say something of prompts, by name."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it takes batches."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What it asks to have annotated itself, whatever the objective needs."""
        ...

    def annotate(self, batch: Batch, needs: Any) -> Batch:
        """The batch with what ``needs`` names filled in.

        ``old_logp``, ``logp``, ``entropy``, ``entropy_drift``, ``reference``, ``values``, ``role:NAME``.
        """
        ...

    def update(self, batch: Batch, objective: Any, slot: str = "rl") -> dict[str, float]:
        """Trains on the batch with the optimizer of ``slot``; without an objective, only the models beside the policy.

        Returns:
            Metrics by name.
        """
        ...

    def gram(self, batch: Batch, objective: Any, adv_KBT: Tensor, layers: str | None = None) -> Tensor:
        """``[K, K]``: inner products of the policy's gradients with each of K advantages; nothing is trained."""
        ...

    def predict(self, name: str, prompts: Sequence[Sequence[int]]) -> Tensor:
        """What the model ``name`` expects at the end of each prompt."""
        ...

    def fit(self, name: str, prompts: Sequence[Sequence[int]], targets: Tensor) -> dict[str, float]:
        """Trains the model ``name`` on what came of prompts; metrics by name."""
        ...

    def updates_of(self, name: str) -> int:
        """How many updates the model ``name`` has had."""
        ...

    def refresh_reference(self, share: float = 1.0) -> None:
        """Moves the reference towards the policy, by default the whole way."""
        ...

    def merge_adapter(self, number: int) -> bool:
        """Adds the LoRA adapter to the weights below it for good and begins it anew: a round of iterative training.

        The reference is the model without the new adapter from then on, so no copy of it is kept. Moments were those of
        the adapter that is gone, and begin anew; the schedule of the learning rate goes on. An adapter that does
        nothing yet is left as it is, with its moments.

        Args:
            number: Of the merge, which with the learner's seed determines the new adapter's weights.

        Returns:
            Whether there was anything to add.

        Raises:
            UserError: A weight below the adapter is another layer's as well.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes everything that :meth:`restore` needs for an exact continuation."""
        ...

    def restore(self, folder: Path) -> None:
        """Continues from what :meth:`save` wrote."""
        ...

    def fingerprint(self) -> str:
        """A checksum of the policy's weights."""
        ...

    def close(self) -> None:
        """Ends whatever it started; may be called twice."""
        ...


@runtime_checkable
class LearnerConfig(Protocol):
    """Options of a learner; ``build`` makes it."""

    def build(
        self,
        site: Site,
        total_updates: int,
        seed: int,
        reference: bool = False,
        roles: Mapping[str, Any] | None = None,
    ) -> Any:
        """The learner of ``site.model`` for a stage of ``total_updates`` updates, with ``roles`` beside the policy."""
        ...


learners: Registry[LearnerConfig] = Registry("learners", LearnerConfig, "What takes the optimizer step")


@dataclass(frozen=True)
class LearnerOptions:
    """What learners have in common: AdamW, its schedule and guard, and how much is computed at once.

    Weight decay acts on parameters of two or more dimensions, so not on norms and biases. The schedule counts
    updates, one per batch whatever its epochs and mini-batches, and runs over the stage.
    """

    lr: Annotated[float, option("learning rate after warm-up", gt=0)] = 1e-6
    betas: Annotated[tuple[float, float], option("decay of the first and second moment in AdamW")] = (0.9, 0.999)
    eps: Annotated[float, option("added to the root of the second moment", gt=0)] = 1e-8
    weight_decay: Annotated[float, option("decoupled decay per step, times lr", ge=0)] = 0.0
    max_grad_norm: Annotated[float | None, option("global gradient norm is scaled down to this; null: never", gt=0)] = (
        1.0
    )
    schedule: Annotated[Literal["constant", "linear", "cosine"], option("shape of the learning rate after warm-up")] = (
        "constant"
    )
    warmup_steps: Annotated[int, option("over which the rate rises linearly", unit="updates", ge=0)] = 0
    min_lr_ratio: Annotated[float, option("where linear and cosine end, as a share of lr", ge=0, le=1)] = 0.0
    gradient_checkpointing: Annotated[bool, option("recompute activations in the backward pass, to save memory")] = (
        False
    )
    micro_batch_tokens: Annotated[
        int, option("most tokens of one forward and backward pass, padding included", unit="tokens", ge=1)
    ] = 16384
    packing: Annotated[
        bool, option("the policy reads several rows end to end in one, which saves padding; no row sees another")
    ] = False
    pack_tokens: Annotated[
        int, option("most tokens of such a row, with packing; one that is longer stays alone", unit="tokens", ge=1)
    ] = 4096
    logits_chunk_mb: Annotated[
        float, option("most memory of the logits over the vocabulary that exist at once", unit="MiB", gt=0)
    ] = 128.0
    max_skipped_steps: Annotated[
        int,
        option(
            "consecutive optimizer steps without finite numbers after which training stops",
            unit="optimizer steps",
            ge=1,
        ),
    ] = 3


@learners.register("torch", source="this project", evidence="end to end")
@dataclass(frozen=True)
class TorchLearnerConfig(LearnerOptions):
    """One process, AdamW, on the GPU if there is one.

    Weight decay acts on parameters of two or more dimensions, so not on norms and biases. The schedule counts
    updates, one per batch whatever its epochs and mini-batches, and runs over the stage.
    """

    autocast: Annotated[Literal["none", "bfloat16"], option("precision of matrix products; weights keep their own")] = (
        "none"
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], option("where the policy lives; auto: cuda if available")] = (
        "auto"
    )

    def build(
        self,
        site: Site,
        total_updates: int,
        seed: int,
        reference: bool = False,
        roles: Mapping[str, Any] | None = None,
    ) -> "TorchLearner":
        """The learner of ``site.model``, whose ``module`` is trained in place, for ``total_updates`` updates."""
        from alignment.engines.torch_learner import TorchLearner

        return TorchLearner(site.model.module, self, total_updates, seed, reference, roles)
