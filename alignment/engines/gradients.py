"""Gradients of a mini-batch; and inner products of those of reward components, for weightings that ask which of them
pull together.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from alignment.algorithms.objective import combine
from alignment.engines.backend import Backend, policy_only
from alignment.errors import UserError
from alignment.types import Batch

Part = tuple[Tensor, dict[str, Tensor], *tuple[Callable[[bool], None], ...]]
"""A micro-batch's loss, sums for metrics, and what goes backward after that loss has: through models that are not the
backend's. It is told whether it is the last time before a step."""


def accumulate(
    backend: Backend, loss_of: Callable[[Batch], Part], minibatch: Batch, budget: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of a mini-batch, accumulated over this rank's micro-batches of at most ``budget`` tokens.

    Returns:
        This rank's part of the loss, and of the sums that ``loss_of`` gave with it.
    """
    total, sums = torch.zeros((), device=backend.device), dict[str, Tensor]()
    micros = backend.share.micro_batches(minibatch, budget)
    for i, (_, micro) in enumerate(micros):
        with backend.computing():
            loss, parts, *beyond = loss_of(micro)
        for backward in (partial(backend.backward, loss), *beyond):
            backward(i == len(micros) - 1)
        total += loss.detach()
        if parts:
            sums = combine(sums, parts)
    return total, sums


def gram_of(backend: Backend, gradient_of: Callable[[Tensor], None], adv_KBT: Tensor, layers: str | None) -> Tensor:
    """``[K, K]`` float64 on the CPU: ``<g_k, g_j>`` over the policy's trained weights whose names match ``layers``.

    Gradients are gathered one parameter at a time. Each rank keeps its share of them in the host's memory until all K
    are there: ``4 K / ranks`` bytes for each weight. What had been accumulated before is dropped.

    Args:
        backend: Holds the weights.
        gradient_of: Adds the gradient with advantages ``adv_BT`` to what the backend has accumulated, which is nothing.
        adv_KBT: Of each component.
        layers: A regular expression that names contain; None: all.

    Raises:
        UserError: No trained weight has such a name.
    """
    trained = list(policy_only(backend.trained))
    names = [name for name in trained if layers is None or re.search(layers, name)]
    if not names:
        raise UserError(f"no trained weight has a name with {layers!r} in it; names are like {', '.join(trained[:3])}")
    rank, ranks = backend.share.rank, backend.share.ranks
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for adv_BT in adv_KBT:
        backend.forget_gradients()
        gradient_of(adv_BT)
        for name, gradient in backend.gradients(names):
            own = gradient.reshape(-1).tensor_split(ranks)[rank]
            parts[name].append(own.to("cpu", torch.float32, copy=True))
    backend.forget_gradients()
    gram_KK = torch.zeros(len(adv_KBT), len(adv_KBT), dtype=torch.float64)
    for name in names:
        gradients_KN = torch.stack(parts.pop(name)).double()
        gram_KK += gradients_KN @ gradients_KN.T
    return backend.assembled({"gram_KK": gram_KK})["gram_KK"]
