"""The arms: each takes a seed's shared start and gives rows ``{"arm", "at", "gold", "kl", "flop", ...}``.

``gold`` is the mean gold reward on prompts that all arms share, in standard deviations under the frozen policy; ``kl``
is in nats per completion against it; ``flop`` is of the models' passes for one completion at decode time.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.algorithms.advantages import Gae
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.decodings import ValueAugmented
from alignment.algorithms.kl_penalties import K1
from alignment.algorithms.objective import Objective
from alignment.algorithms.value_losses import Scalar
from alignment.engines.config import Site
from alignment.engines.guide import Steering
from alignment.engines.value_model import ValueModel, ValueShape, save_value_model
from alignment.models import load_model
from studies.values import measure
from studies.values.models import end_values, explained, role, rows_of
from studies.values.settings import Settings, built
from studies.values.world import SAMPLER, World, drawn, learner_of

Row = dict[str, Any]
PPO_EPOCHS, CRITIC_EPOCHS = 2, 2


def frozen(world: World) -> list[Row]:
    """The policy as it is."""
    prompts = world.prompts(world.settings.eval_prompts, "eval")
    _, reward_PN = world.sample(world.policy.module, prompts, world.settings.eval_samples, "frozen")
    return [_row("frozen", 1, float(reward_PN.mean()), 0.0, _plain_flop(world), labels=0)]


def best_of_n(world: World, model: ValueModel) -> list[Row]:
    """Best of n by the gold reward itself, an oracle at decode time, and by the value model: value re-ranking."""
    settings = world.settings
    prompts = world.prompts(settings.eval_prompts, "eval")
    ids_PNL, reward_PN = world.sample(world.policy.module, prompts, settings.pool, "pool")
    value_PN = end_values(model, prompts, ids_PNL)
    policy, value = _operations(world, model)
    rows: list[Row] = []
    for n in [2**i for i in range(settings.most.bit_length())]:
        kl = measure.best_of_n_kl(n)
        plain = policy * (settings.prompt_tokens + n * (settings.completion_tokens - 1))
        both = measure.flop_reranked(policy, value, settings.prompt_tokens, settings.completion_tokens, n)
        rows.append(_row("oracle", n, _best(reward_PN, reward_PN, n), kl, plain, labels=n))
        rows.append(_row("rerank", n, _best(reward_PN, value_PN, n), kl, both if n > 1 else plain))
    correlation = torch.corrcoef(torch.stack([value_PN.flatten(), reward_PN.flatten()]))[0, 1]
    quality = {
        "explained_variance_end": 1 - float((reward_PN - value_PN).var() / reward_PN.var()),
        "explained_variance": explained(model, prompts, ids_PNL[:, :16], reward_PN[:, :16]),
        "correlation_end": float(correlation),
    }
    return [*rows, {"arm": "value_model", **quality}]


def value_augmented(world: World, model: ValueModel, top_k: int, arm: str = "vas") -> list[Row]:
    """Value-augmented sampling over beta, by the project's sampler and decoding."""
    settings, rows = world.settings, list[Row]()
    prompts = world.prompts(settings.eval_prompts, "eval")
    policy, value = _operations(world, model)
    flop = measure.flop_steered(policy, value, settings.prompt_tokens, settings.completion_tokens, top_k)
    with tempfile.TemporaryDirectory() as folder:
        save_value_model(model, world.policy.tokenizer, Path(folder))
        for beta in settings.betas:
            decoding = ValueAugmented(models=folder, beta=beta, top_k=top_k)
            sampler = SAMPLER.build(Site(world.policy, decoding=decoding), None)
            nats = _Nats()
            assert sampler.steering is not None
            sampler.steering = nats.around(sampler.steering)
            requests = world.requests(prompts, settings.eval_samples, f"{arm} {beta}", decoding.tilt)
            _, reward_PN = world.scored(prompts, drawn(sampler, requests))
            rows.append(_row(arm, beta, float(reward_PN.mean()), nats.total / len(requests), flop))
    return rows


def ppo(world: World, coefficient: float, lr: float) -> list[Row]:
    """PPO with a critic of the value model's size, on as many labelled completions as the value model has."""
    settings = world.settings
    module = copy.deepcopy(world.policy.module)
    algorithm = Algorithm(
        advantage=Gae(lam=0.95, critic_lam=1.0, truncation="end"),
        kl=K1(coefficient=coefficient),
        epochs=PPO_EPOCHS,
        minibatches=2,
    )
    critic = role(world, "scalar", 3e-3, epochs=CRITIC_EPOCHS, minibatches=4)
    learner = learner_of(module, lr, settings.ppo_steps, world.seed, {"critic": critic}, warmup_steps=2)
    objective = Objective.of(algorithm, {})
    rows = settings.labels // settings.ppo_steps
    for step in range(settings.ppo_steps):
        prompts = world.prompts(rows // 4, f"ppo {step}")
        batch = replace(world.batch(module, prompts, 4, f"ppo {step}"), step=step)
        batch = credit(learner.annotate(batch, algorithm.needs | objective.needs()), algorithm, {})
        learner.update(batch, objective)
    prompts = world.prompts(settings.eval_prompts, "eval")
    ids_PNL, reward_PN = world.sample(module, prompts, settings.eval_samples, "ppo")
    kl = measure.sequence_kl(module, world.policy.module, rows_of(prompts, ids_PNL), settings.prompt_tokens)
    return [_row("ppo", coefficient, float(reward_PN.mean()), kl, _plain_flop(world))]


def training(settings: Settings) -> dict[str, int]:
    """Operations that it takes to make a value model and a policy of PPO from labels, drawing completions included."""
    policy = measure.operations_per_token(load_model(built(settings.policy_size), 0).module)
    critic = ValueModel.of(load_model(built(settings.value_size), 0).module, ValueShape(Scalar()))
    value = measure.operations_per_token(critic)
    drawing = settings.labels * measure.flop_plain(policy, settings.prompt_tokens, settings.completion_tokens)
    tokens = settings.labels * (settings.prompt_tokens + settings.completion_tokens)
    fitted = measure.flop_training(value, tokens, 1, settings.value_epochs)
    # Old and reference log-probabilities are a pass of the policy each, values one of the critic.
    moved = measure.flop_training(policy, tokens, 2, PPO_EPOCHS) + measure.flop_training(
        value, tokens, 1, CRITIC_EPOCHS
    )
    return {"value_model": drawing + fitted, "ppo": drawing + moved}


class _Nats:
    """Adds up, over steered rows, how far steering takes each token's distribution from the policy's."""

    def __init__(self) -> None:
        self.total = 0.0

    def around(self, make: Callable[[], Steering]) -> Callable[[], Any]:
        return lambda: _Measured(make(), self)


class _Measured:
    def __init__(self, steering: Steering, nats: _Nats) -> None:
        self.steering, self.nats = steering, nats
        self.join, self.leave = steering.join, steering.leave

    def steer(
        self, logits_MV: Tensor, handles: Sequence[int], token_M: Tensor, grew: Sequence[bool], tilt_MJ: Tensor
    ) -> Tensor:
        steered_MV = self.steering.steer(logits_MV, handles, token_M, grew, tilt_MJ)
        new, old = steered_MV.log_softmax(-1), logits_MV.log_softmax(-1)
        self.nats.total += float((new.exp() * (new - old)).sum(dtype=torch.float64))
        return steered_MV


def _row(arm: str, at: float, gold: float, kl: float, flop: int, **more: Any) -> Row:
    return {"arm": arm, "at": at, "gold": gold, "kl": kl, "flop": flop, **more}


def _operations(world: World, model: ValueModel) -> tuple[int, int]:
    return measure.operations_per_token(world.policy.module), measure.operations_per_token(model)


def _plain_flop(world: World) -> int:
    operations = measure.operations_per_token(world.policy.module)
    return measure.flop_plain(operations, world.settings.prompt_tokens, world.settings.completion_tokens)


def _best(reward_PN: Tensor, rank_by_PN: Tensor, n: int) -> float:
    pairs = zip(reward_PN.tolist(), rank_by_PN.tolist(), strict=True)
    return sum(measure.best_of(reward, rank_by, n) for reward, rank_by in pairs) / len(reward_PN)
