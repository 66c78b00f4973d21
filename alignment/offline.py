"""Training on fixed data. Supervised fine-tuning is the policy gradient of demonstrations with advantage 1."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from alignment.algorithms.objective import Objective
from alignment.job import Job
from alignment.recipe import SftStage
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
    rollouts = [rollout for group in job.data.demonstrations.values() for rollout in group]
    if stage.loss_on == "all":
        rollouts = [whole(rollout) for rollout in rollouts]
    for index in batches(len(rollouts), stage.batch_size, state.stage_step, job.seed):
        job.stop.check()
        job.settled = False
        with job.phases("update"):
            groups = [_group(uid, rollouts[i]) for uid, i in enumerate(index)]
            metrics = supervise(job, groups, state.step, "rl", stage.objective())
        job.evaluate_if_due(state.step + 1)
        state = job.finish_step(state.next_step(), metrics)
        if state.stage_step >= stage.steps:
            break
    return state


def supervise(
    job: Job, groups: Sequence[Group], step: int, slot: str, objective: Objective | None = None
) -> dict[str, float]:
    """One supervised update of ``slot`` on demonstration groups; its metrics under ``<slot>/`` unless it is ``rl``."""
    metrics = job.engines.learner.update(job.collate(groups, step), objective or Objective.supervised(), slot=slot)
    return dict(metrics) if slot == "rl" else {f"{slot}/{name}": value for name, value in metrics.items()}


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


def whole(rollout: Rollout) -> Rollout:
    """The rollout with its prompt made part of what is trained on, and everything else; the first token of a row, which
    nothing precedes, is not."""
    ids = (*rollout.prompt_ids, *rollout.token_ids)
    return replace(
        rollout, prompt_ids=(), token_ids=ids, loss_mask=(True,) * len(ids), behaviour_logp=(0.0,) * len(ids), turns=()
    )


def _order(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(keyed_seed(seed, "epoch", epoch))
    return torch.randperm(size, generator=generator).tolist()


def _group(uid: int, rollout: Rollout) -> Group:
    return Group(uid, Prompt(rollout.prompt_id, {}), (rollout,))
