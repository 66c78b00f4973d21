"""Value models: fitted by the project's learner to labelled completions, a quarter of the policy's size."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignment.algorithms.advantages import Gae
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.value_losses import HlGauss, Scalar, TwoHot, ValueLoss
from alignment.algorithms.values import prediction_metrics
from alignment.engines.value_model import Kind, ValueModel, ValueShape
from alignment.engines.value_roles import ValueRoleSpec
from alignment.origin import Origin
from alignment.types import Batch, keyed_seed
from studies.values.settings import Settings, built
from studies.values.world import World, learner_of

HEADS: dict[str, ValueLoss] = {
    "scalar": Scalar(),
    "two_hot": TwoHot(low=-5.0, high=5.0, bins=50),
    "hl_gauss": HlGauss(low=-5.0, high=5.0, bins=50),
}
MONTE_CARLO = Algorithm(advantage=Gae(lam=1.0, critic_lam=1.0, truncation="end", normalise="none"), correction=None)
"""Targets as a recipe's stage ``value`` makes them: the reward of the completion, which always ends by its length."""


def role(
    world: World, head: str, lr: float, kind: Kind = "state", epochs: int = 1, minibatches: int = 1
) -> ValueRoleSpec:
    """A fresh value model beside the policy."""
    origin = Origin(built(world.settings.value_size), keyed_seed(world.seed, "value model"))
    return ValueRoleSpec(ValueShape(HEADS[head], kind), origin, None, {"lr": lr}, epochs, minibatches)


def fit(world: World, head: str, lr: float, labelled: Batch, kind: Kind = "state") -> ValueModel:
    """A value model fitted to ``labelled``, over several epochs at a rate that falls to 0."""
    settings = world.settings
    spec = role(world, head, lr, kind, minibatches=settings.value_minibatches)
    learner = learner_of(
        world.policy.module, lr, settings.value_epochs, world.seed, {"critic": spec}, schedule="linear"
    )
    batch = credit(learner.annotate(labelled, MONTE_CARLO.needs), MONTE_CARLO, {})
    for epoch in range(settings.value_epochs):
        learner.update(replace(batch, step=epoch), None)
    model = learner.roles["critic"].backend.module
    assert isinstance(model, ValueModel)
    return model.eval()


@torch.no_grad()
def value_of(model: ValueModel, ids_NT: Tensor) -> Tensor:
    """``[N, T]`` values of the states after each token."""
    return torch.cat([model.values(rows) for rows in ids_NT.split(2048)])


def end_values(model: ValueModel, prompts: Sequence[tuple[int, ...]], ids_PNL: Tensor) -> Tensor:
    """``[P, N]`` values of completions at their ends: what they are ranked by."""
    return value_of(model, rows_of(prompts, ids_PNL))[:, -1].view(ids_PNL.shape[:2])


def rows_of(prompts: Sequence[tuple[int, ...]], ids_PNL: Tensor) -> Tensor:
    """``[P * N, T]`` prompts and completions."""
    prompt_PN = torch.tensor(prompts)[:, None].expand(-1, ids_PNL.shape[1], -1)
    return torch.cat([prompt_PN, ids_PNL], -1).flatten(0, 1)


def explained(model: ValueModel, prompts: Sequence[tuple[int, ...]], ids_PNL: Tensor, reward_PN: Tensor) -> float:
    """Explained variance of the reward over the states of completions that the model was not fitted to."""
    ids_NT = rows_of(prompts, ids_PNL)
    mask_NT = (torch.arange(ids_NT.shape[1]) >= len(prompts[0])).expand(ids_NT.shape)
    target_NT = reward_PN.flatten()[:, None].expand(ids_NT.shape)
    return prediction_metrics(value_of(model, ids_NT), target_NT, mask_NT)["explained_variance"]


def corrupted(labelled: Batch, share: float, settings: Settings, seed: int) -> Batch:
    """``labelled`` with noise of mean 0 added to a share of its rewards, chosen at random."""
    g = torch.Generator().manual_seed(keyed_seed(seed, "noise", share))
    rows = len(labelled)
    wrong_B = torch.randperm(rows, generator=g) < round(share * rows)
    noise_B = settings.noise_sd * torch.randn(rows, generator=g)
    return replace(labelled, rewards_BK=labelled.rewards_BK + torch.where(wrong_B, noise_B, 0.0)[:, None])
