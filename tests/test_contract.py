"""The component contract, proven by methods in plain code that fit it unchanged.

Each is written as its users will write it and runs through the real loop. What is checked is what the method promises.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from alignment.algorithms.advantages import DrGrpo, Gae
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.mixers import mixers
from alignment.algorithms.objective import Objective
from alignment.algorithms.policy_losses import Reinforce
from alignment.algorithms.weightings import weightings
from alignment.checkpoint import load_state, save_state
from alignment.critics import ModelCritic
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.online import train_online
from alignment.recipe import OnlineStage
from alignment.types import Batch, Context, Group, Rollout, Signals, TrainState
from tests.tiny import online_job, tiny

SOURCE = "a test"


def stage(**changes: Any) -> OnlineStage:
    """The online stage of the tiny recipe with other components."""
    plain = {"steps": 3, "prompts_per_step": 4, "group_size": 4, "sampling": {"max_tokens": 4}}
    return OnlineStage(**{**plain, "learner": TorchLearnerConfig(lr=1e-3), **changes})


def survives_json(state: TrainState, folder: Any) -> bool:
    folder.mkdir()
    save_state(folder, state)
    return load_state(folder) == state


# 2. Lagrangian advantage streams: Confronting Reward Model Overoptimization with Constrained RLHF (arXiv 2310.04373)


@weightings.register("test_lagrangian", source=SOURCE)
@dataclass(frozen=True)
class Lagrangian:
    """mu-PPO: the first component is the objective, the others must reach their thresholds."""

    thresholds: tuple[float, ...] = (0.4,)
    lr: float = 0.1
    streams: ClassVar[bool] = True

    def init(self) -> dict[str, Any]:
        return {"u": [0.0] * len(self.thresholds)}

    def mix(self, state: Any, adv_KBT: Tensor, batch: Batch) -> Tensor:
        mu = torch.tensor(state["u"]).sigmoid()
        return (len(mu) - mu.sum()) * adv_KBT[0] + torch.einsum("k,kbt->bt", mu, adv_KBT[1:])

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        reached = signals.batch.rewards_BK.nanmean(0)[1:].tolist()
        mu = torch.tensor(state["u"]).sigmoid().tolist()
        steps = zip(state["u"], mu, reached, self.thresholds, strict=True)
        return {"u": [u - self.lr * m * (1 - m) * (j - theta) for u, m, j, theta in steps]}


def test_lagrangian_streams_mix_advantages_and_their_multipliers_learn(tmp_path):
    recipe = tiny(tmp_path, {"rewards": ["exact_match", {"name": "format", "pattern": "[0-9]*"}]})
    chosen = stage(steps=1, algorithm=Algorithm(weighting=Lagrangian(thresholds=(2.0,))))
    with online_job(recipe, chosen) as job:
        state = train_online(job, chosen, job.state)
        assert state.components["weighting"]["u"][0] > 0, "below its threshold a component gains weight"
        assert survives_json(state, tmp_path / "state")


def test_lagrangian_golden_numbers():
    weighting, state = Lagrangian(thresholds=(0.4, 0.4)), {"u": [0.0, 0.0]}
    adv_KBT = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    batch = _plain_batch(rewards=torch.tensor([[0.0, 0.0]]))
    assert weighting.mix(state, adv_KBT, batch).item() == 1 * 1 + 0.5 * 10 + 0.5 * 100
    one = Lagrangian(thresholds=(0.4,)).observe({"u": [0.0]}, _signals(batch))
    assert one["u"][0] == pytest.approx(0.01), "u moves by -lr * mu (1 - mu) * (J - theta)"


# 3. An HPT router: Towards a Unified View of LLM Post-Training (arXiv 2509.04419)


@mixers.register("test_hpt", source=SOURCE)
@dataclass(frozen=True)
class HardGate:
    """A prompt that was solved at most ``gate`` times is learned from its demonstration instead."""

    gate: int = 0

    def route(
        self, state: Any, groups: Sequence[Group], demonstrations: Mapping[str, Sequence[Rollout]], context: Context
    ) -> Mapping[str, list[Group]]:
        def choose(group: Group) -> Group:
            shown = demonstrations.get(group.prompt.key, ())
            solved = sum(bool(r.correct) for r in group.rollouts)
            return group if solved > self.gate or not shown else Group(group.uid, group.prompt, tuple(shown[:1]))

        return {"rl": [choose(group) for group in groups]}

    def coefficients(self, state: Any, batch: Batch) -> None:
        return None


def test_an_hpt_router_turns_failed_prompts_into_supervised_ones(tmp_path):
    same = {"name": "procedural", "task": {"name": "arithmetic", "sizes": [9]}, "split": "train"}
    recipe = tiny(tmp_path, {"data": {"demonstrations": same}})
    learner = TorchLearnerConfig(lr=2e-2)
    chosen = stage(steps=30, learner=learner, algorithm=Algorithm(advantage=DrGrpo(), mixer=HardGate()))
    with online_job(recipe, chosen) as job:
        seen: list[tuple[float, float]] = []
        update = job.engines.learner.update

        def watch(batch: Batch, objective: Any, slot: str = "rl") -> dict[str, float]:
            seen.append((float((batch.source_B == 1).float().mean()), float(batch.adv_BT.abs().sum())))  # pyright: ignore
            return update(batch, objective, slot)

        job.engines.learner.update = watch
        train_online(job, chosen, job.state)
    assert seen[0][0] > 0.5 and seen[0][1] > 0, "an untrained model fails, and is taught"
    assert min(share for share, _ in seen) < 1.0, "and then solves some by itself"


def test_a_batch_of_demonstrations_has_the_gradient_of_their_likelihood():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).requires_grad_()
    logp = torch.zeros(1, 2)
    logp = torch.cat([logp[:, :1], logits.log_softmax(-1)[:, 1:2]], 1)
    objective = Objective(policy_loss=Reinforce(), aggregation=Objective.supervised().aggregation, imitate=True)
    batch = objective.prepare(_plain_batch(rewards=torch.full((1, 1), math.nan)))
    objective.loss(logp, None, batch)[0].backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, torch.tensor([[0.5, -0.7, 0.2]]), atol=1e-6)


# 4. A critic with several epochs and mini-batches: Proximal Policy Optimization (arXiv 1707.06347)


@pytest.mark.parametrize("tokens", [4096, 16])
def test_a_critic_learns_over_several_epochs_beside_the_policy(tmp_path, tokens):
    recipe = tiny(tmp_path, {"rewards": [{"name": "format", "pattern": "[0-4].*"}]})
    learner = TorchLearnerConfig(lr=1e-3, micro_batch_tokens=tokens)
    algorithm = Algorithm(advantage=Gae(), epochs=2, minibatches=2)
    chosen = stage(steps=2, learner=learner, algorithm=algorithm, critic=ModelCritic(lr=1e-2))
    with online_job(recipe, chosen) as job:
        train_online(job, chosen, job.state)
        role = job.engines.learner.roles["critic"]
        assert role.slot.counts.steps == 2 * 2 * 2 and job.engines.learner.slots["rl"].counts.steps == 2 * 2 * 2
        assert role.backend.module.head.linear.weight.abs().sum() > 0


def _plain_batch(rewards: Tensor, tokens: int = 2) -> Batch:
    """One row whose first token is the prompt."""
    shape = (1, tokens)
    return Batch(
        ids_BT=torch.ones(shape, dtype=torch.int64),
        loss_mask_BT=torch.arange(tokens)[None] > 0,
        length_B=torch.tensor([tokens]),
        group_B=torch.zeros(1, dtype=torch.int64),
        source_B=torch.zeros(1, dtype=torch.int8),
        ratio_base_B=torch.zeros(1, dtype=torch.int8),
        temperature_B=torch.ones(1),
        behaviour_logp_BT=torch.zeros(shape),
        rewards_BK=rewards,
        weights_K=torch.ones(rewards.shape[1]),
        scored_B=torch.ones(1, dtype=torch.bool),
        truncated_B=torch.zeros(1, dtype=torch.bool),
        key_B=torch.zeros(1, dtype=torch.int64),
    )


def _signals(batch: Batch) -> Signals:
    return Signals((), batch, {}, None, Context(0, 0))
