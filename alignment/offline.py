"""Training on fixed data. Supervised fine-tuning is the policy gradient of demonstrations with advantage 1."""

from collections.abc import Iterator, Sequence

import torch

from alignment.algorithms.objective import Objective
from alignment.job import Job
from alignment.recipe import SftStage
from alignment.supervision import lesson
from alignment.types import Group, Prompt, Rollout, TrainState, keyed_seed


def train_supervised(job: Job, stage: SftStage, state: TrainState) -> TrainState:
    """Fits demonstrations by their negative log-likelihood until the stage's steps are done.

    Args:
        job: Engines, data and outputs.
        stage: Sizes and the learner.
        state: Where the stage stands, ``stage_step`` 0 for a fresh one.

    Returns:
        The state after the last step.

    Raises:
        Stopped: A graceful stop was asked for; ``job.state`` is the last completed step.
    """
    shown = lesson(stage, job.data, f"stages.{state.stage}", job.control_ids, job.seed)
    for index in batches(len(shown.rollouts), stage.batch_size, state.stage_step, job.seed):
        job.stop.check()
        job.engines.rest()
        job.settled = False
        with job.phases("update"):
            groups = [_group(uid, shown.rollouts[i]) for uid, i in enumerate(index)]
            batch = shown.weighted(job.collate(groups, state.step), index)
            metrics = job.engines.learner.update(batch, stage.supervision())
        job.evaluate_if_due(state.step + 1)
        state = job.finish_step(state.next_step(), metrics)
        if state.stage_step >= stage.steps:
            break
    return state


def supervise(job: Job, groups: Sequence[Group], step: int, slot: str, objective: Objective) -> dict[str, float]:
    """One supervised update of ``slot`` on demonstration groups; its metrics under ``<slot>/``."""
    metrics = job.engines.learner.update(job.collate(groups, step), objective, slot=slot)
    return {f"{slot}/{name}": value for name, value in metrics.items()}


def batches(size: int, batch_size: int, start: int, seed: int) -> Iterator[list[int]]:
    """Batches of row indices from the one numbered ``start`` on, for ever.

    Rows are drawn without replacement in an order keyed by ``(seed, epoch)``. A batch that meets the end of an epoch
    takes its remaining rows from the next one: no row is skipped and none is seen twice in an epoch.
    """
    epoch, at = divmod(start * batch_size, size)
    order = _order(size, seed, epoch)
    while True:
        batch: list[int] = []
        while len(batch) < batch_size:
            if at == size:
                epoch, at = epoch + 1, 0
                order = _order(size, seed, epoch)
            take = order[at : at + batch_size - len(batch)]
            batch += take
            at += len(take)
        yield batch


def _order(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(keyed_seed(seed, "epoch", epoch))
    return torch.randperm(size, generator=generator).tolist()


def _group(uid: int, rollout: Rollout) -> Group:
    return Group(uid, Prompt(rollout.prompt_id, {}), (rollout,))
