"""What is counted and estimated: best-of-n without bias, operations per completion, gold at a KL, intervals."""

from collections.abc import Sequence
from math import comb

import numpy as np
import torch
from torch import Tensor, nn

from alignment.algorithms.decodings import best_of_n_kl
from alignment.studies.statistics import seed_interval as interval


def best_of(reward_N: Sequence[float], rank_by_N: Sequence[float], n: int) -> float:
    """Expected reward of the best by ``rank_by_N`` among ``n`` drawn without replacement from all N: no bias.

    ``sum_i C(i - 1, n - 1) / C(N, n) reward_(i)`` over rewards in rising order of what they are ranked by.

    Raises:
        ValueError: Not ``1 <= n <= N``.
    """
    total = len(reward_N)
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} cannot be estimated from {total} completions; take 1 to {total}")
    order = np.argsort(np.asarray(rank_by_N), kind="stable")
    share = np.array([comb(i, n - 1) / comb(total, n) for i in range(total)])
    return float(share @ np.asarray(reward_N, dtype=np.float64)[order])


def operations_per_token(module: nn.Module) -> int:
    """``2 * parameters`` of the linear layers, which a pass over one token costs; looking an embedding up is none.

    An output layer counts, whether it shares the embedding's weights or not. Attention over earlier tokens, small
    beside it for completions as short as these, is left out.
    """
    return 2 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def flop_plain(policy: int, prompt: int, length: int) -> int:
    """Of one completion by the policy alone: the last token need not be fed. ``policy`` is per token."""
    return policy * (prompt + length - 1)


def flop_reranked(policy: int, value: int, prompt: int, length: int, n: int) -> int:
    """Of the best of ``n``: the prompt once, ``n`` completions, and every token of them through the value model."""
    return policy * (prompt + n * (length - 1)) + value * (prompt + n * length)


def flop_steered(policy: int, value: int, prompt: int, length: int, top_k: int) -> int:
    """Of value-augmented sampling: beside the policy, the value model reads each token and ``top_k`` candidates."""
    return flop_plain(policy, prompt, length) + value * (prompt + length - 1 + top_k * length)


def flop_training(operations: int, tokens: int, read: int, epochs: int) -> int:
    """Of a model that reads ``tokens`` ``read`` times and learns from them ``epochs`` times, 3 passes each time."""
    return operations * tokens * (read + 3 * epochs)


def at_kl(points: Sequence[tuple[float, float]], kl: float) -> float:
    """Gold that a family of policies attains within ``kl`` nats.

    Between the two members next to ``kl`` it is interpolated: to use one or the other at random attains that. Where
    all members stay below ``kl``, it is the gold of the farthest.

    Args:
        points: (nats, gold) of the members, the frozen policy at 0 among them.
        kl: At least 0.
    """
    nats, gold = np.array(sorted(points), dtype=np.float64).T
    return float(np.interp(kl, nats, gold))


def sequence_kl(module: nn.Module, frozen: nn.Module, ids_NT: Tensor, prompt: int) -> float:
    """Mean over sampled completions of the sum over positions of ``KL(module || frozen)``, over all tokens, in nats."""
    total = 0.0
    with torch.no_grad():
        for rows in ids_NT.split(512):
            logp, ref = (m(input_ids=rows).logits[:, prompt - 1 : -1].log_softmax(-1) for m in (module, frozen))
            total += float((logp.exp() * (logp - ref)).sum(dtype=torch.float64))
    return total / len(ids_NT)


__all__ = [
    "at_kl",
    "best_of",
    "best_of_n_kl",
    "flop_plain",
    "flop_reranked",
    "flop_steered",
    "flop_training",
    "interval",
    "operations_per_token",
    "sequence_kl",
]
