"""A small online step for the tests of the flight recorder and of replay: a real learner on a tiny model."""

from pathlib import Path

import torch

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.objective import Objective
from alignment.algorithms.state import fresh
from alignment.flight import FlightRecorder, Watched
from alignment.types import Batch
from tests.engines.helpers import learner_of, tiny


def sampled_batch(groups: int = 4, group_size: int = 4, width: int = 9) -> Batch:
    """Rows of several lengths with two reward components, the second not always applicable; one row is unscored."""
    g = torch.Generator().manual_seed(1)
    rows = groups * group_size
    length_B = torch.randint(5, width + 1, (rows,), generator=g)
    position_T = torch.arange(width)
    mask_BT = (position_T >= 3) & (position_T < length_B[:, None])
    scored_B = torch.arange(rows) != 2
    rewards_BK = torch.stack([torch.arange(rows) % 3 == 0, torch.rand(rows, generator=g)], 1).float()
    rewards_BK[5, 1] = torch.nan
    return Batch(
        ids_BT=torch.randint(1, 13, (rows, width), generator=g),
        loss_mask_BT=mask_BT & scored_B[:, None],
        length_B=length_B,
        group_B=torch.arange(rows) // group_size,
        source_B=torch.zeros(rows, dtype=torch.int8),
        ratio_base_B=torch.zeros(rows, dtype=torch.int8),
        temperature_B=torch.ones(rows),
        behaviour_logp_BT=-2.5 * mask_BT.float(),
        rewards_BK=rewards_BK,
        weights_K=torch.tensor([1.0, 0.5]),
        scored_B=scored_B,
        truncated_B=torch.zeros(rows, dtype=torch.bool),
        key_B=torch.arange(rows) * 7919 + 11,
        objectives=("exact", "short"),
        step=6,
        seed=3,
    )


def record_step(folder: Path, algorithm: Algorithm, *, watched: bool = True, step: int = 7) -> dict[str, float]:
    """Does one online step and records it; returns the learner's metrics."""
    learner = learner_of(tiny(), reference=True, lr=3e-2, micro_batch_tokens=40)  # several micro-batches in an update
    with torch.no_grad():
        for weight in learner.trained.values():  # away from the reference, so that a KL penalty is not 0
            weight.add_(0.1 * torch.ones_like(weight))
    states = fresh(algorithm.components())
    objective = Objective.of(algorithm, states)
    batch = learner.annotate(sampled_batch(), objective.needs() | algorithm.needs)
    batch = credit(batch, algorithm, states)
    used = Watched(objective) if watched else objective
    metrics = learner.update(batch, used)
    text = dict(enumerate("_0123456789+=")).__getitem__
    FlightRecorder(folder, keep=4, token_text=text).record(batch, used, states, 0, step, metrics)
    return metrics


def exact(completions: list[str], **_: object) -> list[float]:
    """A reward for recipes to name; replay never calls it."""
    raise AssertionError(f"replay scored {completions}")


short = exact
