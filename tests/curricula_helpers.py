"""Groups and signals for tests of curricula: rollouts that are right or wrong, and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.score import Score
from alignment.types import Batch, Context, Group, Prompt, RoleHandle, Rollout, SamplingParams, Signals, keyed_seed


def prompts(count: int, **columns: Sequence[Any]) -> list[Prompt]:
    """Prompts ``p0``, ``p1``, ... with further columns."""
    rows = [{"prompt": str(i), **{name: values[i] for name, values in columns.items()}} for i in range(count)]
    return [Prompt(f"p{i}", row) for i, row in enumerate(rows)]


def group(
    prompt: Prompt, rewards: Sequence[float | None], uid: int = 0, version: int = 0, steered: Sequence[int] = ()
) -> Group:
    """A group with these rewards, of two sampled tokens each; ``steered`` rollouts had help."""
    rollouts = []
    for i, reward in enumerate(rewards):
        score = Score(reward, "ok" if reward is not None else "skipped")
        rollouts.append(
            Rollout(
                id=f"{uid}/{i}",
                prompt_id=prompt.id,
                prompt_ids=(1,),
                token_ids=(2, 3),
                loss_mask=(True, True),
                behaviour_logp=(-0.1 * (i + 1), -1 / 3),
                text="x",
                finish_reason="stop",
                seed=i,
                sampler="test",
                sampling=SamplingParams(2),
                source="steered" if i in steered else "policy",
                versions=((version, 0),),
                scores={"right": score},
                reward=reward,
            )
        )
    return Group(uid, prompt, tuple(rollouts))


def batch_of(groups: Sequence[Group], adv: Sequence[float]) -> Batch:
    """The batch of ``groups`` with one advantage per rollout, at both of its tokens."""
    rollouts = [r for g in groups for r in g.rollouts]
    rows = len(rollouts)
    mask_BT = torch.tensor([[False, True, True]]).expand(rows, 3)
    return Batch(
        ids_BT=torch.ones(rows, 3, dtype=torch.int64),
        loss_mask_BT=mask_BT,
        length_B=torch.full((rows,), 3),
        group_B=torch.tensor([i for i, g in enumerate(groups) for _ in g.rollouts]),
        source_B=torch.zeros(rows, dtype=torch.int8),
        ratio_base_B=torch.zeros(rows, dtype=torch.int8),
        temperature_B=torch.ones(rows),
        behaviour_logp_BT=torch.zeros(rows, 3),
        rewards_BK=torch.zeros(rows, 1),
        weights_K=torch.ones(1),
        scored_B=torch.ones(rows, dtype=torch.bool),
        truncated_B=torch.zeros(rows, dtype=torch.bool),
        key_B=torch.tensor([keyed_seed(r.id) for r in rollouts]),
        adv_BT=torch.tensor(list(adv))[:, None] * mask_BT,
    )


def signals(
    groups: Sequence[Group], step: int = 0, batch: Batch | None = None, roles: Mapping[str, RoleHandle] | None = None
) -> Signals:
    """What curricula observe after ``groups`` were sampled at ``step``."""
    return Signals(groups, batch, {}, None, Context(step, 0, roles or {}))  # pyright: ignore[reportArgumentType]


class Table:
    """A prompt value model that is a table, fitted by gradient steps on the squared error."""

    def __init__(self, values: Mapping[str, float], lr: float = 0.0) -> None:
        self.table, self.lr, self.version, self.asked = dict(values), lr, 0, 0

    def values(self, prompts: Sequence[Prompt]) -> Tensor:
        self.asked += len(prompts)
        return torch.tensor([self.table[p.id] for p in prompts], dtype=torch.float64)

    def fit(self, prompts: Sequence[Prompt], targets: Tensor) -> Mapping[str, float]:
        self.version += 1
        for prompt, target in zip(prompts, targets.tolist(), strict=True):
            self.table[prompt.id] += 2 * self.lr * (target - self.table[prompt.id])
        return {}
