"""Regression against classification: how far fitted values are from those that many rollouts show."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.engines.transformers_sampler import TransformersSampler
from alignment.engines.value_model import ValueModel
from alignment.types import keyed_seed
from studies.values.models import value_of
from studies.values.world import SAMPLER, World, drawn


@dataclass(frozen=True)
class KnownStates:
    """States, and the value of each."""

    prefixes: list[tuple[int, ...]]
    value_N: Tensor
    """Mean gold reward of many completions of each."""


def known_states(world: World) -> KnownStates:
    """States of completions that nothing is fitted to, of all lengths, with their value from rollouts."""
    settings = world.settings
    prompts = world.prompts(settings.states, "states")
    ids_P1L, _ = world.sample(world.policy.module, prompts, 1, "states")
    g = torch.Generator().manual_seed(keyed_seed(world.seed, "states"))
    kept = torch.randint(0, settings.completion_tokens, (settings.states,), generator=g).tolist()
    rows = [p + tuple(ids[:n]) for p, ids, n in zip(prompts, ids_P1L[:, 0].tolist(), kept, strict=True)]
    done = drawn(TransformersSampler(world.policy.module, SAMPLER), world.requests(rows, settings.rollouts, "known"))
    whole_NT = torch.tensor([r + c.token_ids for r, c in zip(_each(rows, settings.rollouts), done, strict=True)])
    start = settings.prompt_tokens
    reward_N = world.gold(whole_NT[:, start - 1], whole_NT[:, start:])
    return KnownStates(rows, reward_N.view(settings.states, -1).mean(1))


def error(model: ValueModel, known: KnownStates) -> float:
    """Mean squared error of predicted values, as a share of the variance of values over states."""
    width = max(map(len, known.prefixes))
    ids_NT = torch.tensor([[*row, *[0] * (width - len(row))] for row in known.prefixes])
    last_N1 = torch.tensor([[len(row) - 1] for row in known.prefixes])
    predicted_N = value_of(model, ids_NT).gather(1, last_N1)[:, 0]
    return float((predicted_N - known.value_N).square().mean() / known.value_N.var(unbiased=False))


def _each(rows: list[Any], times: int) -> list[Any]:
    return [row for row in rows for _ in range(times)]
