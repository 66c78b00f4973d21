"""Inner products of the gradients of reward components, for weightings that ask which of them pull together."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from alignment.engines.backend import Backend, policy_only


def gram_of(backend: Backend, accumulate: Callable[[Tensor], None], adv_KBT: Tensor, layers: str | None) -> Tensor:
    """``[K, K]`` float64 on the CPU: ``<g_k, g_j>`` over the policy's trained weights whose names match ``layers``.

    Gradients are gathered one parameter at a time. Each rank keeps its share of them in the host's memory until all K
    are there: ``4 K / ranks`` bytes for each weight. What had been accumulated before is dropped.

    Args:
        backend: Holds the weights.
        accumulate: Adds the gradient with advantages ``adv_BT`` to what the backend has accumulated, which is nothing.
        adv_KBT: Of each component.
        layers: A regular expression that names contain; None: all.

    Raises:
        ValueError: No trained weight has such a name.
    """
    trained = list(policy_only(backend.trained))
    names = [name for name in trained if layers is None or re.search(layers, name)]
    if not names:
        raise ValueError(f"no trained weight has a name with {layers!r} in it; names are like {', '.join(trained[:3])}")
    rank, ranks = backend.share.rank, backend.share.ranks
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for adv_BT in adv_KBT:
        backend.forget_gradients()
        accumulate(adv_BT)
        for name, gradient in backend.gradients(names):
            own = gradient.reshape(-1).tensor_split(ranks)[rank]
            parts[name].append(own.to("cpu", torch.float32, copy=True))
    backend.forget_gradients()
    gram_KK = torch.zeros(len(adv_KBT), len(adv_KBT), dtype=torch.float64)
    for name in names:
        gradients_KN = torch.stack(parts.pop(name)).double()
        gram_KK += gradients_KN @ gradients_KN.T
    return backend.assembled({"gram_KK": gram_KK})["gram_KK"]
