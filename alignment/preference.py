"""Learning from pairs: given ones, or those that are sampled, scored and paired as training goes on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from alignment.algorithms.state import observe, report
from alignment.collect import Collector, Sealed
from alignment.engines.roles import handles, passed
from alignment.job import Job
from alignment.metrics import read_again, read_tokens, summarise
from alignment.offline import batches
from alignment.pairings import compared
from alignment.recipe import PreferenceStage
from alignment.reference_cache import ReferenceCache
from alignment.types import Batch, Context, Group, RoleHandle, Signals, TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed:
    """Where pairs come from, one step at a time."""

    take: Callable[[TrainState], tuple[list[Group], Sealed | None]]
    """The pairs of a step, and what was sampled for it and for the steps after it, if anything was."""
    context: Callable[[int], Context]
    """What components may know at a step."""
    roles: Mapping[str, RoleHandle] = field(default_factory=dict)
    """Models that curricula ask."""
    close: Callable[[], None] = lambda: None
    """At the end."""


def train_preferences(job: Job, stage: PreferenceStage, state: TrainState) -> TrainState:
    """Learns from pairs until the stage's steps are done.

    Args:
        job: Engines, data and outputs.
        stage: Losses, reference, and where pairs come from.
        state: Where the stage stands, ``stage_step`` 0 for a fresh one. The state after the last step is returned.

    Raises:
        Stopped: A graceful stop was asked for; ``job.state`` is the last completed step.
        UserError: A batch of samples could not be filled, too many rewards failed, or a file of the run is gone.
    """
    learner = job.engines.learner
    if state.stage_step == 0 and stage.needs_reference and any(map(stage.reference.share, range(1, stage.steps + 1))):
        learner.refresh_reference()  # one that moves is kept from the start, also under LoRA
    job.engines.rest()
    cache = _cache(job, stage, state)
    state, before = _measured_before(job, state)
    feed = _sampled(job, stage) if stage.samples else _given(job, stage)
    while state.stage_step < stage.steps:
        job.stop.check()
        if stage.merges(state.stage_step):
            # The weights with the adapter are the same bits before and after, so samplers need not be told; and a step
            # that is taken up again finds this done, and does nothing.
            learner.merge_adapter(state.stage_step)
        pairs, sealed = feed.take(state)
        state = state if sealed is None else sealed.state
        batch, metrics = _update(job, stage, pairs, state, cache) if pairs else (None, {})
        metrics, before = {**before, **metrics}, {}
        if batch is None:
            log.warning("step %d: no two completions of a prompt differ in reward: there is no pair", state.step + 1)
        job.settled = False
        if stage.needs_reference and (share := stage.reference.share(state.stage_step + 1)):
            learner.refresh_reference(share)
        evaluation = job.evaluate_if_due(state.step + 1)
        flat = None if evaluation is None else evaluation.flat()
        if batch is not None or sealed is not None:
            seen = () if sealed is None else sealed.sampled
            known = job.collate(seen, state.step) if batch is None else batch
            signals = Signals(seen, known, metrics, flat, feed.context(state.step))
            state = replace(state, components=_observed(stage, state.components, signals, sampled=sealed is not None))
        if sealed is not None:
            metrics |= summarise(sealed.sampled, sealed.dropped)
        metrics |= {"pairs": float(sum(len(pair.rollouts) == 2 for pair in pairs))}
        metrics |= report(stage.components(), state.components) | passed(feed.roles)
        state, after = _measured_after(job, stage, state)
        state = job.finish_step(state.next_step(), metrics | after, sealed)
    feed.close()
    return state


def _update(
    job: Job, stage: PreferenceStage, pairs: Sequence[Group], state: TrainState, cache: ReferenceCache | None
) -> tuple[Batch, dict[str, float]]:
    """One update on ``pairs``: the batch as it was learned from, and metrics."""
    learner, objective = job.engines.learner, stage.objective(state.components)
    with job.phases("annotate"):
        needs = objective.needs - ({"reference"} if cache else set())
        batch = learner.annotate(_compared(job, stage, pairs, state.step), needs)
        read = read_tokens(batch)
        batch = batch if cache is None else cache.filled(batch, pairs)
    job.settled = False
    with job.phases("update"):
        return batch, read_again(read, learner.update(batch, objective))


def _given(job: Job, stage: PreferenceStage) -> Feed:
    """Pairs of the data, each epoch in an order of its own."""
    pairs, size = job.data.preferences, getattr(stage.pairs, "batch_size", 1)

    def take(state: TrainState) -> tuple[list[Group], None]:
        job.engines.rest()
        index = next(batches(len(pairs), size, state.stage_step, job.seed))
        return [pairs[i] for i in index], None

    return Feed(take, lambda step: Context(step, job.seed))


def _sampled(job: Job, stage: PreferenceStage) -> Feed:
    """Rounds: all that a round's steps learn from is sampled by the policy that begins it, and kept in the archive."""
    every, archive = getattr(stage.pairs, "every", 1), job.open_rounds()
    player, per_step = job.player(stage.environment), stage.prompts_per_step
    collector = Collector(
        player=player,
        scorer=job.scorer,
        prompts=job.data.train,
        curricula=stage.curricula,
        prompts_per_step=per_step * every,
        params=stage.params(job.params(stage.sampling)),
        max_failed_share=job.recipe.scoring.max_failed_share,
        seed=job.seed,
        roles=handles(job.engines.learner, player.tokens_of),
        phases=job.phases,
        steps=stage.steps,
    )

    def take(state: TrainState) -> tuple[list[Group], Sealed | None]:
        place, sealed = state.stage_step % every, None
        if place == 0:
            job.publish(state.step)
            sealed = collector.collect(state)
        job.engines.rest()
        if sealed is not None:
            taken: Sequence[Group] = sealed.groups[:per_step]
        else:
            taken = archive.groups(state.step - place, place * per_step, per_step)
        return [pair for group in taken for pair in stage.pairs.pairs(group)], sealed

    return Feed(take, collector.context, collector.roles, collector.close)


def _compared(job: Job, stage: PreferenceStage, pairs: Sequence[Group], step: int) -> Batch:
    """The batch of ``pairs``, and of what else the losses ask for."""
    shown = job.data.demonstrations if stage.guided else None
    return _sided(job, *compared(pairs, stage.mismatched, shown), step)


def paired(job: Job, pairs: Sequence[Group], step: int) -> Batch:
    """The batch of ``pairs``, whose rows say which side they are on."""
    return _sided(job, *compared(pairs, False, None), step)


def _sided(job: Job, groups: Sequence[Group], sides: Sequence[int], step: int) -> Batch:
    """The batch of ``groups``, with the side and the score of every row.

    Losses of pairs are of the policy itself, however its completions were sampled: log-probabilities are those at
    temperature 1.
    """
    batch = job.collate(groups, step)
    rewards = [r.reward for group in groups for r in group.rollouts]
    reward_B = torch.tensor([torch.nan if r is None else r for r in rewards], dtype=torch.float32)
    side_B = torch.tensor(sides, dtype=torch.int8)
    return replace(
        batch,
        side_B=side_B.to(batch.ids_BT.device),
        reward_B=reward_B.to(batch.ids_BT.device),
        temperature_B=torch.ones_like(batch.temperature_B),
    )


def _observed(stage: PreferenceStage, states: Mapping[str, Any], signals: Signals, *, sampled: bool) -> dict[str, Any]:
    """The states after a step: losses learn from pairs, curricula from what was sampled, where anything was."""
    components = stage.components()
    learn = {place: c for place, c in components.items() if sampled or place.startswith("losses.")}
    return observe(learn, states, signals)


def _cache(job: Job, stage: PreferenceStage, state: TrainState) -> ReferenceCache | None:
    """The reference's log-probabilities of all pairs, where they are kept in its place."""
    if stage.reference.kept or not stage.compares:
        return None
    path = job.run.folder / f"reference-{stage.name}.safetensors"
    if state.stage_step > 0:
        return ReferenceCache.read(path)
    with job.phases("annotate"):
        found = ReferenceCache.of(job.data.preferences, lambda pairs: _policy_logp(job, pairs))
        found.write(path)
    return found


def _policy_logp(job: Job, pairs: Sequence[Group]) -> Batch:
    return job.engines.learner.annotate(job.collate(pairs, 0), {"old_logp"}).to("cpu")


def ranking_accuracy(job: Job) -> float:
    """The share of held-out pairs of which the policy gives the preferred completion the higher probability.

    Source: Preference Learning Algorithms Do Not Learn Preference Rankings (arXiv 2405.19534).
    """
    pairs, right = job.data.held_out_preferences, 0
    for start in range(0, len(pairs), ReferenceCache.TOGETHER):
        batch = _policy_logp(job, pairs[start : start + ReferenceCache.TOGETHER])
        assert batch.old_logp_BT is not None
        logp_P2 = batch.old_logp_BT.sum(1).view(-1, 2)
        right += int((logp_P2[:, 0] > logp_P2[:, 1]).sum())
    return right / len(pairs)


def _measured_before(job: Job, state: TrainState) -> tuple[TrainState, dict[str, float]]:
    """Held-out pairs as the stage begins; the state remembers it for the summary."""
    if state.stage_step > 0 or not job.data.held_out_preferences:
        return state, {}
    with job.phases("evaluate"):
        found = ranking_accuracy(job)
    counters = {**state.counters, f"ranking/before/{job.stage.name}": found}
    return replace(state, counters=counters), {"held_out/ranking_before": found}


def _measured_after(job: Job, stage: PreferenceStage, state: TrainState) -> tuple[TrainState, dict[str, float]]:
    """Held-out pairs after the step that is about to be completed, where an evaluation is due."""
    every = job.recipe.evaluation.every
    due = state.stage_step + 1 == stage.steps or bool(every and (state.step + 1) % every == 0)
    if not due or not job.data.held_out_preferences:
        return state, {}
    with job.phases("evaluate"):
        found = ranking_accuracy(job)
    counters = {**state.counters, f"ranking/after/{stage.name}": found}
    return replace(state, counters=counters), {"held_out/ranking": found}


__all__ = ["ranking_accuracy", "train_preferences"]
