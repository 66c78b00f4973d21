"""Optimizer steps: AdamW, schedules, mini-batches, skipped steps, slots."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.optimizer import lr_at
from alignment.types import Batch
from tests.engines.helpers import Reinforce, assert_close, grpo, learner_of, make_batch, tiny, weights


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.6 + 0.4 * math.cos(math.pi / 4), 0.6, 0.6 - 0.4 * math.cos(math.pi / 4), 0.2]),
    ],
)
def test_learning_rates(schedule: Any, want: list[float]) -> None:
    config = TorchLearnerConfig(lr=1.0, schedule=schedule, warmup_steps=2, min_lr_ratio=0.2)
    assert [lr_at(step, config, 6) for step in range(7)] == pytest.approx(want)
    assert lr_at(100, config, 6) == pytest.approx(want[-1])


def test_the_steps_are_adamws_with_clipping_and_decay_on_matrices_only() -> None:
    batch, module = make_batch(), tiny()
    learner = learner_of(tiny(), total=4, schedule="linear", max_grad_norm=0.5, betas=(0.8, 0.9), eps=1e-4)
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    others = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-4)
    twin = learner_of(module)
    for step in range(3):
        metrics = learner.update(batch, Reinforce())
        minibatch = Reinforce().prepare(batch)
        loss = Reinforce().loss(*twin.backend.forward(minibatch, "value"), minibatch)[0]
        adamw.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), 0.5))
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * (1 - step / 4)
        adamw.step()
        assert norm > 0.5
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics["lr"] == pytest.approx(1e-2 * (1 - step / 4))
        assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
        assert metrics["tokens"] == float(batch.loss_mask_BT.sum())
    assert_close(weights(learner), dict(module.named_parameters()), rtol=1e-4)


def test_a_step_per_mini_batch_and_epoch_over_whole_groups() -> None:
    batch = make_batch(rows=12, group_size=3)
    learner = learner_of(tiny(), max_grad_norm=None)
    groups: list[set[int]] = []

    @dataclass(frozen=True)
    class Watching(Reinforce):
        def prepare(self, minibatch: Batch) -> Batch:
            groups.append(set(minibatch.group_B.tolist()))
            return super().prepare(minibatch)

    metrics = learner.update(batch, Watching(epochs=3, minibatches=2))
    counts = learner.slots["rl"].counts
    assert metrics["optimizer_steps"] == counts.steps == 6 and counts.updates == 1
    assert [len(g) for g in groups] == [2] * 6
    assert all(groups[i] | groups[i + 1] == {0, 1, 2, 3} for i in (0, 2, 4))
    assert len({frozenset(g) for g in groups}) > 2  # epochs differ
    assert metrics["tokens"] == 3 * float(batch.loss_mask_BT.sum())


def test_a_mini_batch_with_nothing_to_train_on_takes_no_step() -> None:
    batch = make_batch(rows=4)
    masked = replace(batch, loss_mask_BT=batch.loss_mask_BT & (batch.group_B == 0)[:, None])
    learner = learner_of(tiny())
    metrics = learner.update(masked, Reinforce(minibatches=2))
    assert (metrics["optimizer_steps"], metrics["empty_minibatches"]) == (1, 1)
    assert all(math.isfinite(value) for value in metrics.values())
    before = weights(learner)
    nothing = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    for objective in (Reinforce(), grpo()):
        metrics = learner.update(nothing, objective)
        assert (metrics["optimizer_steps"], metrics["empty_minibatches"], metrics["tokens"]) == (0, 1, 0)
    assert all(torch.equal(w, before[n]) for n, w in weights(learner).items())
    assert learner.slots["rl"].counts.steps == 1


def test_a_step_without_finite_numbers_is_skipped_and_holds_the_schedule() -> None:
    batch, learner = make_batch(), learner_of(tiny(), total=10, schedule="linear")
    assert batch.adv_BT is not None
    broken = replace(batch, adv_BT=batch.adv_BT * float("inf"))
    learner.update(batch, Reinforce())
    before, fingerprint = weights(learner), learner.fingerprint()
    for _ in range(2):
        metrics = learner.update(broken, Reinforce())
        assert (metrics["skipped_steps"], metrics["optimizer_steps"], metrics["lr"]) == (1, 0, pytest.approx(9e-3))
        assert all(torch.equal(w, before[n]) for n, w in weights(learner).items())
    assert learner.fingerprint() == fingerprint
    good, twin = learner.update(batch, Reinforce()), learner_of(tiny(), total=10, schedule="linear")
    twin.update(batch, Reinforce())
    assert good == pytest.approx(twin.update(batch, Reinforce()))
    assert learner.fingerprint() == twin.fingerprint()  # nothing was left in the accumulators


def test_too_many_skipped_steps_in_a_row_name_what_was_not_finite() -> None:
    batch, learner = make_batch(), learner_of(tiny(), max_skipped_steps=2)
    assert batch.adv_BT is not None
    broken = replace(batch, adv_BT=batch.adv_BT * float("nan"))
    for sample in (broken, batch, broken):
        learner.update(sample, Reinforce())
    with pytest.raises(FloatingPointError, match=r"2 optimizer steps in a row .* loss is nan.*gradient of model\."):
        learner.update(broken, Reinforce())


def test_slots_keep_their_own_moments_and_schedule() -> None:
    batch, learner = make_batch(), learner_of(tiny())
    learner.update(batch, Reinforce())
    moments = {
        n: {k: v.clone() for k, v in learner.slots["rl"].adamw.state[p].items()} for n, p in learner.trained.items()
    }
    before = weights(learner)
    learner.update(make_batch(seed=4), Reinforce(), slot="sft")
    assert any(not torch.equal(w, before[n]) for n, w in weights(learner).items())
    for name, p in learner.trained.items():
        for key, value in learner.slots["rl"].adamw.state[p].items():
            assert torch.equal(value, moments[name][key])
    assert {n: s.counts.steps for n, s in learner.slots.items()} == {"rl": 1, "sft": 1}
    step = learner.slots["sft"].adamw.state[next(iter(learner.trained.values()))]["step"]
    assert float(step) == 1


def test_nothing_to_train_is_an_error() -> None:
    module = tiny()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        learner_of(module)
