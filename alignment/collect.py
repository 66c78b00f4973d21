"""Fills a batch: choose prompts, sample, score, filter, refill in launch order, replay. Nothing is hidden in objects:
what carries over from batch to batch is in the :class:`TrainState` that goes in and comes out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment.curricula import Curriculum, keeps, refill_bound, replays, select_prompts
from alignment.errors import UserError
from alignment.metrics import Phases
from alignment.rollouts import Player, play
from alignment.scoring import Scorer, refuse_failures
from alignment.types import Context, Group, Prompt, RoleHandle, SamplingParams, TrainState


@dataclass(frozen=True)
class Sealed:
    """A full batch of groups and the state that it leaves behind."""

    groups: tuple[Group, ...]
    """To train on: accepted ones in launch order, then replayed ones."""
    sampled: tuple[Group, ...]
    """Everything that was sampled for it, in launch order: what curricula learn from."""
    dropped: Mapping[str, int]
    """Groups left out, by the name of the component that dropped them."""
    state: TrainState
    """The state it was collected from, with curricula and counters moved on."""


@dataclass(frozen=True)
class Collector:
    """Collects one batch at a time. ``collect`` is a function of the state, the weights and the seed alone."""

    player: Player
    scorer: Scorer
    prompts: Sequence[Prompt]
    curricula: Sequence[Curriculum]
    prompts_per_step: int
    group_size: int
    params: SamplingParams
    max_failed_share: float
    seed: int
    roles: Mapping[str, RoleHandle]
    phases: Phases
    steps: int
    """Of the stage; reward functions may ask."""

    def collect(self, state: TrainState) -> Sealed:
        """Samples until ``prompts_per_step`` groups are accepted, within the curricula's refill bound.

        Refills launch exactly as many prompts as are missing and are accepted in launch order, never first-finished
        first, which would favour short completions.

        Raises:
            UserError: The bound was reached with too few groups.
            ScoringFailed: Too many rewards failed.
        """
        accepted: list[Group] = []
        sampled: list[Group] = []
        dropped: dict[str, int] = {}
        states = dict(state.components)
        context = Context(state.step, self.seed, self.roles)
        budget = self.prompts_per_step * (1 + refill_bound(self.curricula))
        while (missing := self.prompts_per_step - len(accepted)) and len(sampled) < budget:
            count = min(missing, budget - len(sampled))
            with self.phases("choose"):
                chosen, states = select_prompts(self.curricula, states, self.prompts, count, context)
            for group in self._sample(chosen, state.launched + len(sampled), state.step):
                sampled.append(group)
                by = keeps(self.curricula, states, group)
                if by is None:
                    accepted.append(group)
                else:
                    dropped[by] = dropped.get(by, 0) + 1
        refuse_failures(sampled, self.max_failed_share)
        if not any(r.reward is not None for g in sampled for r in g.rollouts):
            raise UserError("no reward applied to any rollout of this batch: every component returned None")
        missing = self.prompts_per_step - len(accepted)
        if missing:
            accepted += replays(self.curricula, states, missing, context)
        if not accepted or (len(accepted) < self.prompts_per_step and not _short_allowed(self.curricula)):
            raise UserError(_exhausted(len(accepted), self.prompts_per_step, len(sampled), dropped))
        after = replace(state, launched=state.launched + len(sampled), components=states)
        return Sealed(tuple(accepted), tuple(sampled), dropped, after)

    def _sample(self, prompts: Sequence[Prompt], first_uid: int, step: int) -> list[Group]:
        uids = range(first_uid, first_uid + len(prompts))
        with self.phases("sample"):
            groups = play(self.player, prompts, uids, self.group_size, self.params, self.seed)
        with self.phases("score"):
            return self.scorer.score(groups, step=step, max_steps=self.steps)


def prefetch(collector: Collector, newest: Callable[[], TrainState], max_staleness: int) -> Iterator[Sealed]:
    """Sealed batches, each sampled by a policy at most ``max_staleness`` versions older than the one it trains.

    A slot is taken *before* sampling starts, so the bound covers the time that a batch waits. With a bound of 0,
    the only one that engines sharing one process allow, a batch is collected when it is asked for.

    Args:
        collector: Fills one batch.
        newest: The state after the last update.
        max_staleness: Versions.
    """
    assert max_staleness == 0, "the recipe check admits only 0 for engines that share one process"
    while True:
        yield collector.collect(newest())


def staleness(groups: Sequence[Group], version: int) -> int:
    """How many policy versions the oldest sampled token of ``groups`` is behind ``version``."""
    return max((version - first for g in groups for r in g.rollouts for first, _ in r.versions[:1]), default=0)


def _short_allowed(curricula: Sequence[Curriculum]) -> bool:
    return any(getattr(c, "on_exhausted", "error") == "short" for c in curricula)


def _exhausted(accepted: int, wanted: int, sampled: int, dropped: Mapping[str, Any]) -> str:
    by = ", ".join(f"{count} by {name}" for name, count in sorted(dropped.items())) or "none"
    return (
        f"only {accepted} of the {wanted} groups that a step needs were accepted after sampling {sampled} "
        f"(dropped: {by}). Give the model prompts that it sometimes solves, raise the filter's max_refills, "
        f"or set its on_exhausted to 'short'"
    )
