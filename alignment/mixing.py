"""Demonstrations beside rollouts: found, scored where a mixer asks, and counted."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignment.algorithms.mixers import Demonstrations, Mixer, mixers
from alignment.algorithms.objective import Objective
from alignment.algorithms.state import needs_of
from alignment.data.load import LoadedData
from alignment.errors import UserError
from alignment.job import Job
from alignment.recipe import Recipe, RolloutStage
from alignment.scoring import Scorer
from alignment.types import Context, Group, Rollout

log = logging.getLogger(__name__)


def mix(
    mixer: Mixer, state: Any, groups: Sequence[Group], job: Job, context: Context
) -> tuple[Mapping[str, list[Group]], dict[str, float]]:
    """What the slots of the learner train on, and metrics of what was shown.

    Demonstrations in the slot ``rl`` are scored like rollouts if the mixer needs their rewards.
    """
    slots, metrics = dict(mixer.route(state, groups, job.data.demonstrations, context)), dict[str, float]()
    if "demonstration_rewards" in needs_of(mixer):
        slots["rl"], failed = scored(slots["rl"], job.scorer, context.step)
        metrics["demonstrations_unscored"] = float(failed)
    return slots, metrics | mixing_metrics(mixer, groups, slots, job.data.demonstrations)


def scored(groups: Sequence[Group], scorer: Scorer, step: int) -> tuple[list[Group], int]:
    """The groups with their demonstrations scored, and how many are left out, having no reward.

    A reward that compares the completions of a prompt is shown the demonstrations alone.
    """
    asked = [replace(group, rollouts=tuple(r for r in group.rollouts if _is_shown(r))) for group in groups]
    verdicts = iter(scorer.score([group for group in asked if group.rollouts], step=step))
    missing, whole = 0, list[Group]()
    for group, shown in zip(groups, asked, strict=True):
        judged = iter(next(verdicts).rollouts if shown.rollouts else ())
        rollouts = [next(judged) if _is_shown(r) else r for r in group.rollouts]
        kept = tuple(r for r in rollouts if r.scored or not _is_shown(r))
        missing += len(rollouts) - len(kept)
        whole.append(replace(group, rollouts=kept))
    return [group for group in whole if group.rollouts], missing


def mixing_metrics(
    mixer: Mixer, groups: Sequence[Group], slots: Mapping[str, Sequence[Group]], demonstrations: Demonstrations
) -> dict[str, float]:
    """Of the prompts to train on, ``imitated``, the share that has a demonstration in the slot ``rl``. Of a mixer that
    uses those of the data, ``demonstrations`` in the step, in any slot; and ``without_demonstration``, how many prompts
    would have used one where there is none.

    Empty where no demonstration is used.
    """
    shown = {(name, g.uid, r.id) for name, routed in slots.items() for g in routed for r in g.rollouts if _is_shown(r)}
    uses, prompts = "demonstrations" in needs_of(mixer), {group.uid for group in groups}
    if not shown and not uses:
        return {}
    taught = {uid for name, uid, _ in shown if name == "rl" and uid in prompts}
    imitated = {"imitated": len(taught) / len(prompts)}
    if not uses:
        return imitated
    asks = getattr(mixer, "asks", None)
    without = 0 if asks is None else sum(not demonstrations.get(g.prompt.key) for g in groups if asks(g))
    return imitated | {"demonstrations": float(len(shown)), "without_demonstration": float(without)}


def supervision(mixer: Mixer) -> Objective:
    """Of the slots beside ``rl``: the token mean of negative log-likelihoods."""
    return replace(Objective.supervised(), lr_factor=getattr(mixer, "lr_ratio", 1.0))


def awake(components: Mapping[str, Any], objective: Objective | None) -> dict[str, Any]:
    """The components that learn from a step: where the policy rests, nothing was mixed."""
    return {place: c for place, c in components.items() if objective is not None or place != "mixer"}


def check_demonstrations(recipe: Recipe, data: LoadedData) -> None:
    """Whether the demonstrations can be used by the mixers that want them; says for how many prompts there are some.

    Raises:
        UserError: One is too long for the learner, or a mixer looks them up by prompt and none of the prompts has one.
    """
    for stage in recipe.stages:
        if not isinstance(stage, RolloutStage) or "demonstrations" not in needs_of(stage.credited.mixer):
            continue
        _refuse_long(stage, data)
        if not hasattr(stage.credited.mixer, "asks"):
            continue
        name, covered = mixers.name_of(stage.credited.mixer), sum(p.key in data.demonstrations for p in data.train)
        if not covered:
            ours, theirs = data.train[0], next(r.prompt_id for shown in data.demonstrations.values() for r in shown)
            raise UserError(
                f"stage {stage.name!r}: mixer '{name}' looks for demonstrations of the prompts it trains on, and "
                f"none of the {len(data.train):,} prompts of data.train has one in data.demonstrations (such as "
                f"{ours.origin or ours.id} there and {theirs} here): prompts must be equal as they are shown to the "
                "model, so give both sections the same prompt, chat and system"
            )
        log.info("mixer '%s': %d of %d prompts of data.train have demonstrations", name, covered, len(data.train))


def _refuse_long(stage: RolloutStage, data: LoadedData) -> None:
    budget = getattr(stage.learner, "micro_batch_tokens", None)
    rows = [rollout for shown in data.demonstrations.values() for rollout in shown]
    tokens, longest = max((len(r.prompt_ids) + len(r.token_ids), r.prompt_id) for r in rows)
    if budget is not None and tokens > budget:
        raise UserError(
            f"stage {stage.name!r}: the demonstration {longest} has {tokens:,} tokens, prompt included, more than "
            f"learner.micro_batch_tokens ({budget:,}): raise that, or take long rows out of data.demonstrations"
        )


def _is_shown(rollout: Rollout) -> bool:
    return rollout.source == "demonstration"
