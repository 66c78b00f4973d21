"""Online reinforcement learning (GRPO, PPO, ...) and the fitting of values: one loop, read it top to bottom."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from alignment.algorithms.advantages import advantage_metrics
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import component_advantages, credit
from alignment.algorithms.mixers import Mixer, NoMix
from alignment.algorithms.objective import Objective
from alignment.algorithms.state import MEASURED, observe, report
from alignment.algorithms.values import batch_metrics
from alignment.collect import Collector, staleness
from alignment.critics import HeadCritic
from alignment.engines.roles import handles, passed
from alignment.evaluation.evaluate import Evaluation
from alignment.flight import Watched
from alignment.guidance import guided_metrics
from alignment.job import Job
from alignment.metrics import read_again, read_tokens, summarise
from alignment.mixing import awake, mix, supervision
from alignment.offline import supervise
from alignment.recipe import RolloutStage
from alignment.types import Batch, Group, Signals, TrainState


def train_online(job: Job, stage: RolloutStage, state: TrainState) -> TrainState:
    """Samples, scores, credits, updates and publishes until the stage's steps are done.

    Args:
        job: Engines, data and outputs.
        stage: Components and sizes.
        state: Where the stage stands, ``stage_step`` 0 for a fresh one. The state after the last step is returned.

    Raises:
        Stopped: A graceful stop was asked for; ``job.state`` is the last completed step.
        UserError: A batch could not be filled, or too many rewards failed.
        EngineFailed: Of the learner's processes one died, or of the sampler's all did.
    """
    algorithm, learner, phases = stage.credited, job.engines.learner, job.phases
    components, collector = stage.components(), _collector(job, stage)
    job.publish(state.step)

    while state.stage_step < stage.steps:
        sealed = collector.collect(state)
        job.engines.rest()
        states, context = sealed.state.components, collector.context(sealed.state.step)
        objective = None if stage.policy_rests(state.stage_step) else Objective.of(algorithm, states)
        mixer = algorithm.mixer if objective else NoMix()
        slots, shown = mix(mixer, states.get("mixer"), stage.trained(sealed.groups), job, context)
        lag = staleness(slots["rl"], state.step)
        with phases("annotate"), job.meanwhile(collector.pump):
            needs = algorithm.needs | (objective.needs(staleness=lag) | learner.needs if objective else frozenset())
            batch = learner.annotate(job.collate(slots["rl"], sealed.state.step), needs - MEASURED)
            read = read_tokens(batch, isinstance(stage.values, HeadCritic))
        with phases("credit"):
            batch = credit(batch, algorithm, states)
        job.settled = False
        with phases("update"), job.meanwhile(collector.pump):
            gram_KK, read_back = _gram(job, algorithm, batch, objective)
            watched = Watched(objective) if objective and job.engines.in_process else objective
            metrics = read_again(read, learner.update(batch, watched)) | batch_metrics(batch) | advantage_metrics(batch)
            metrics |= _taught(job, mixer, slots, state.step) | read_back
        metrics |= job.publish(sealed.state.step + 1) | {"staleness": float(lag)}
        evaluation = job.evaluate_if_due(sealed.state.step + 1)
        with phases("record"):
            before = job.evaluations.get(sealed.state.step)
            signals = Signals(sealed.sampled, batch, metrics, _flat(evaluation), context, _flat(before), gram_KK)
            state = replace(sealed.state.next_step(), components=observe(awake(components, objective), states, signals))
            job.record_batch(state, batch, watched, states, metrics)
            metrics |= summarise(sealed.sampled, sealed.dropped) | guided_metrics(sealed.sampled) | shown
            metrics |= report(components, state.components) | passed(collector.roles)
        state = job.finish_step(state, metrics, sealed)
        del sealed, slots, batch, watched, signals  # the next batch has the memory to itself
    collector.close()
    return state


def _taught(job: Job, mixer: Mixer, slots: Mapping[str, Sequence[Group]], step: int) -> dict[str, float]:
    """Supervised updates in the slots beside ``rl``, each with an optimizer of its own; their metrics."""
    metrics: dict[str, float] = {}
    for slot in sorted(slots.keys() - {"rl"}):
        metrics |= supervise(job, slots[slot], step, slot, supervision(mixer))
    return metrics


def _gram(
    job: Job, algorithm: Algorithm, batch: Batch, objective: Objective | None
) -> tuple[Tensor | None, dict[str, float]]:
    """Inner products of the components' gradients on ``batch``, where a weighting asks for them, and what they cost."""
    if objective is None or "gram" not in algorithm.needs:
        return None, {}
    layers = getattr(algorithm.weighting, "layers", None)
    gram_KK = job.engines.learner.gram(batch, objective, component_advantages(batch, algorithm), layers)
    return gram_KK, {"gram/fitted_tokens": float(len(gram_KK) * batch.length_B.sum())}


def _flat(evaluation: Evaluation | None) -> dict[str, float] | None:
    return None if evaluation is None else evaluation.flat()


def _collector(job: Job, stage: RolloutStage) -> Collector:
    """What fills the stage's batches."""
    player, archive = job.player(stage.environment), job.open_archive(stage)
    return Collector(
        player=player,
        scorer=job.scorer,
        prompts=job.data.train,
        curricula=stage.curricula,
        prompts_per_step=stage.prompts_per_step,
        params=stage.params(job.params(stage.sampling)),
        max_failed_share=job.recipe.scoring.max_failed_share,
        seed=job.seed,
        roles=handles(job.engines.learner, player.tokens_of),
        phases=job.phases,
        steps=stage.steps,
        max_staleness=stage.max_staleness,
        archive=archive and archive.group,
    )
