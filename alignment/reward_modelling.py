"""Fitting reward models to pairs, and writing them where rewards of later stages find them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from alignment.algorithms.reward_losses import judged
from alignment.export_values import export_value_model
from alignment.job import Job
from alignment.offline import batches
from alignment.preference import paired
from alignment.recipe import RewardModelStage
from alignment.reference_cache import ReferenceCache
from alignment.types import Batch, Group, TrainState, keyed_seed


def train_reward_models(job: Job, stage: RewardModelStage, state: TrainState) -> TrainState:
    """Fits the members until the stage's steps are done, each in an order of pairs of its own.

    Args:
        job: Engines, data and outputs.
        stage: Sizes, loss and learner.
        state: Where the stage stands, ``stage_step`` 0 for a fresh one. The state after the last step is returned.

    Raises:
        Stopped: A graceful stop was asked for; ``job.state`` is the last completed step.
    """
    pairs, every = job.data.preferences, job.recipe.evaluation.every
    while state.stage_step < stage.steps:
        job.stop.check()
        job.engines.rest()
        job.settled = False
        metrics: dict[str, float] = {}
        with job.phases("update"):
            for i, name in enumerate(stage.member_names):
                seed = keyed_seed(job.seed, stage.name, "order", i)
                index = next(batches(len(pairs), stage.batch_size, state.stage_step, seed))
                batch = paired(job, [pairs[row] for row in index], state.step)
                found = job.engines.learner.update(batch, None, slot=name)
                metrics |= {f"{name}/{key}": value for key, value in found.items()}
        metrics |= _means(metrics, stage.member_names) | {"pairs": float(stage.batch_size)}
        job.evaluate_if_due(state.step + 1)
        ends = state.stage_step + 1 == stage.steps
        if job.data.held_out_preferences and (ends or every and (state.step + 1) % every == 0):
            with job.phases("evaluate"):
                metrics |= {f"held_out/{name}": value for name, value in held_out(job, stage).items()}
        state = job.finish_step(state.next_step(), metrics)
    return state


def held_out(job: Job, stage: RewardModelStage) -> dict[str, float]:
    """:func:`~alignment.algorithms.reward_losses.judged` of held-out pairs: of each member by its name, and of the mean
    of their rewards."""
    pairs = job.data.held_out_preferences
    length_P2 = torch.tensor([[len(r.token_ids) for r in pair.rollouts] for pair in pairs])
    rewards = torch.stack([rewards_of(job, name, pairs) for name in stage.member_names])
    found = judged(rewards.mean(0), length_P2)
    if stage.members > 1:
        for name, reward_P2 in zip(stage.member_names, rewards, strict=True):
            found |= {f"{name}/{key}": value for key, value in judged(reward_P2, length_P2).items()}
    return found


def rewards_of(job: Job, name: str, pairs: Sequence[Group]) -> Tensor:
    """``[P, 2]`` rewards that the member ``name`` gives both sides of pairs."""
    parts = [pairs[at : at + ReferenceCache.TOGETHER] for at in range(0, len(pairs), ReferenceCache.TOGETHER)]
    batches_ = [job.engines.learner.annotate(paired(job, part, 0), {f"reward:{name}"}) for part in parts]
    return torch.cat([_rewards(batch) for batch in batches_]).view(-1, 2)


def write_members(job: Job, stage: RewardModelStage) -> list[Path]:
    """Writes what a stage that is done has trained, unless it is there: ``reward_models/STAGE/member_0`` and so on, in
    the run's folder."""
    folder = members_folder(job.run.folder, stage.name)
    paths = [folder / f"member_{i}" for i in range(stage.members)]
    for name, path in zip(stage.member_names, paths, strict=True):
        if not path.exists():
            export_value_model(f"{job.run.folder}@{job.state.step}", path, name)
    return paths


def members_folder(run: Path, stage: str) -> Path:
    """Where a run's stage writes its reward models."""
    return run / "reward_models" / stage


def _rewards(batch: Batch) -> Tensor:
    assert batch.reward_B is not None
    return batch.reward_B.cpu()


def _means(metrics: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """The means over members of what tells how the stage goes."""
    shown = ("loss", "accuracy", "margin", "grad_norm", "fitted_tokens")
    sums = {key: sum(metrics.get(f"{name}/{key}", 0.0) for name in names) for key in shown}
    tokens = {"tokens": sums.pop("fitted_tokens")}
    return {f"reward_model/{key}": value / len(names) for key, value in sums.items()} | tokens
