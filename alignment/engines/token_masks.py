"""Learned masks of tokens: small networks that read the reference's hidden states and are trained beside the policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment.algorithms.masked_preferences import LearnedMasks
from alignment.engines.activations import Kind, check_parts, layers_of
from alignment.engines.backend import Backend
from alignment.engines.logprobs import body_of
from alignment.engines.optimizer import Slot
from alignment.models import Model
from alignment.types import Batch

MASKS = "masks"
"""The role's name."""
ACTIVE: tuple[Kind, ...] = ("mlp", "attention", "residual")
"""Beside the logits, what :class:`~alignment.algorithms.masked_preferences.Mapo` takes masks from."""
READ: tuple[Kind, ...] = ("residual",)
"""What networks make masks of."""
EXACT = {"autocast": "none", "dtype": "float32"}
"""Options of learners, whichever they have, with which the networks compute in float32."""


class MaskNetwork(nn.Module):
    """A mask from the hidden states of all layers: ``relu(sum_l a_l relu(w_l norm(h_l) + b_l))``, with dropout of both.

    So it is exactly 0 where nothing speaks for a token, and has no upper bound. The authors' code begins with mixing
    weights ``a`` of either sign, with which a mask may be 0 everywhere and then stays so, as nothing has a gradient:
    here they begin with the same sizes, and above 0.

    Args:
        layers: L.
        hidden_size: H.
        dropout: Of the layers' scores and of the mask.
    """

    def __init__(self, layers: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.score = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in range(layers))
        self.mix = nn.Linear(layers, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.mix.weight.abs_()

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """``[N]`` from ``[N, H]`` of each layer."""
        scores = [score(self.norm(h_NH.float())) for score, h_NH in zip(self.score, states, strict=True)]
        scores_NL = self.dropout(torch.cat(scores, -1).relu())
        return self.dropout(self.mix(scores_NL).relu())[:, 0]


class MaskNetworks(nn.Module):
    """One network for ratios and divergences alike, or one for each."""

    def __init__(self, count: int, layers: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.networks = nn.ModuleList(MaskNetwork(layers, hidden_size, dropout) for _ in range(count))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """``[N, 2]``: the mask of ratios and that of divergences."""
        masks = [network(states) for network in self.networks]
        return torch.stack([masks[0], masks[-1]], -1)


class MaskRole:
    """The networks beside the policy. Their gradients come with the policy's loss, and their step is after its own.

    Args:
        backend: Of :class:`MaskNetworks`.
        slot: Their optimizer.
    """

    of_prompts = False
    provides: tuple[str, ...] = ()

    def __init__(self, backend: Backend, slot: Slot) -> None:
        self.backend = backend
        self.slot: Slot | None = slot

    def begin(self, lr_factor: float) -> None:
        """Begins an update."""
        assert self.slot is not None
        self.slot.begin(lr_factor)

    def backward(self, mask_N2: Tensor, leaf_N2: Tensor, ranks: int, last: bool) -> None:
        """Takes the gradient of masks further, through the networks.

        Args:
            mask_N2: What the networks put out.
            leaf_N2: The same, as the policy's loss was given it: :meth:`Backend.backward` gave it its gradient.
            ranks: How many times too large that is.
            last: The last time before a step.
        """
        assert leaf_N2.grad is not None
        self.backend.backward((mask_N2 * leaf_N2.grad).sum() / ranks, last)

    def step(self, loss: float) -> float:
        """A step with the gradients of an update that the policy has made one with; the global gradient norm."""
        assert self.slot is not None
        return self.slot.step(torch.tensor(loss, device=self.backend.device))[1]

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        """Nothing: masks are learned, so they are made where the loss is."""
        return {}


def check_inside(masks: Any, policy: Model) -> None:
    """Refuses a policy whose parts are not found that masks are made from, before anything is started.

    Raises:
        UserError: So it is.
    """
    check_parts(body_of(policy.module), READ if isinstance(masks, LearnedMasks) else ACTIVE)


@dataclass(frozen=True)
class MaskRoleSpec:
    """Masks for the layers of whatever the policy is."""

    masks: LearnedMasks
    seed: int
    """Of their first weights."""

    def check(self, policy: Model) -> None:
        """They read what the reference, a policy, computes."""
        check_inside(self.masks, policy)

    def build(self, backend: Backend, config: Any, total_updates: int) -> MaskRole:
        """The role in the process of ``backend``, the policy's.

        Raises:
            UserError: The layers of the policy are not found.
        """
        module: Any = backend.module
        layers, text = layers_of(body_of(module)), module.config.get_text_config()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            count = 2 if self.masks.independent else 1
            networks = MaskNetworks(count, layers, text.hidden_size, self.masks.dropout)
        exact = {name: value for name, value in EXACT.items() if hasattr(config, name)}
        own = backend.beside(networks, replace(config, weight_decay=self.masks.weight_decay, **exact))
        return MaskRole(own, own.slot(total_updates))
