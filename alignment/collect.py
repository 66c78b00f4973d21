"""Fills batches: choose prompts, sample, score, filter, refill in launch order, replay.

**Staleness.** A batch that trains policy version ``v`` holds rollouts whose tokens are of the versions from
``v - max_staleness`` to ``v``. This is settled at admission: a group is launched only when, with every group before it
accepted, it would still land in a batch that is trained within ``max_staleness`` versions from now. So nothing is
sampled and then thrown away for its age, and the time that a group waits, in a queue or for an earlier one, counts.
With 0 (lockstep) a batch is launched when it is asked for; with ``k`` up to ``k`` further batches are in flight.

**Launch order.** Groups are taken into batches in the order in which they were launched, never first-finished first,
which would favour short completions.

What carries over a stop is in the :class:`TrainState`: it names the groups that are in flight, and a resumed run
launches exactly those again.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from alignment.curricula import Curriculum, keeps, refill_bound, replays, select_prompts
from alignment.errors import UserError
from alignment.metrics import Phases
from alignment.rollouts import WAIT_S, Player, Playing
from alignment.scoring import Scorer, refuse_failures
from alignment.types import Context, Group, Prompt, RoleHandle, SamplingParams, TrainState

SCORING_S = 0.01
"""Longest wait for a completion while the scorer is at work."""
SCORER_S = 0.1
"""Between two looks at whether to stop, while only the scorer is at work."""


@dataclass(frozen=True)
class Sealed:
    """A full batch of groups and the state that it leaves behind."""

    groups: tuple[Group, ...]
    """To train on: accepted ones in launch order, then replayed ones."""
    sampled: tuple[Group, ...]
    """Everything that was sampled and whose fate was settled, in launch order: what curricula learn from. Groups that
    were dropped on the way to a later batch are among them."""
    dropped_by: Mapping[int, str]
    """The name of the component that left a group out, by the group's uid."""
    state: TrainState
    """The state it was collected from, with curricula, counters and what is in flight moved on."""

    @property
    def fresh(self) -> list[Group]:
        """The groups to train on that were sampled for this batch."""
        sampled = {group.uid for group in self.sampled}
        return [group for group in self.groups if group.uid in sampled]

    @property
    def dropped(self) -> dict[str, int]:
        """Groups left out, by the name of the component that dropped them."""
        return dict(Counter(self.dropped_by.values()))


@dataclass(slots=True)
class _Flight:
    """A group from its launch until a batch takes it."""

    playing: Playing
    group: Group | None = None
    """Once it is scored."""
    dropped_by: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether it will be trained on."""
        return self.group is not None and self.dropped_by is None


@dataclass
class Collector:
    """Collects one batch at a time. In lockstep, ``collect`` is a function of the state, the weights and the seed."""

    player: Player
    scorer: Scorer
    prompts: Sequence[Prompt]
    curricula: Sequence[Curriculum]
    prompts_per_step: int
    params: Sequence[SamplingParams]
    """Of each rollout of a group."""
    max_failed_share: float
    seed: int
    roles: Mapping[str, RoleHandle]
    phases: Phases
    steps: int
    """Of the stage; reward functions may ask."""
    max_staleness: int = 0
    """Policy versions that a token may be behind the policy that it trains."""
    archive: Callable[[int, int], Group] | None = None
    """For curricula that replay."""
    flights: deque[_Flight] = field(default_factory=deque)
    """In launch order: everything that was launched and that no batch has taken yet."""
    _by_uid: dict[int, _Flight] = field(default_factory=dict)
    """Those that are not judged yet."""
    _sampling: int = 0
    """How many of these are still being sampled."""
    _ready: list[_Flight] = field(default_factory=list)
    """Sampled, and not yet with the scorer."""
    _scoring: tuple[list[_Flight], Future[list[Group]]] | None = None
    _dropped: int = 0
    """Of the flights."""
    _full: bool = False
    """Whether the next batch is complete."""
    _step: int = 0
    _states: Mapping[str, Any] = field(default_factory=dict)
    """Of the curricula, as they were when they last chose."""
    _failure: Exception | None = None
    _scorers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "scoring"))

    def collect(self, state: TrainState) -> Sealed:
        """Waits until the next ``prompts_per_step`` groups in launch order are accepted, and launches what may follow.

        Raises:
            UserError: The curricula's refill bound was reached with too few groups.
            ScoringFailed: Too many rewards failed.
            EngineFailed: The sampler has no engine left.
        """
        if self._failure is not None:
            raise self._failure
        self._launch_again(state)
        states, launched = dict(state.components), state.launched
        self._step, self._states = state.step, states
        context = self.context(state.step)
        while True:
            if count := self._admissible(state):
                with self.phases("choose"):
                    chosen, states = select_prompts(self.curricula, states, self.prompts, count, context)
                self._states = states
                self._launch(chosen, range(launched, launched + count))
                launched += count
            if self._full or not self._by_uid:
                break
            self._wait()
        taken = self._take()
        groups = [f.group for f in taken if f.accepted and f.group is not None]
        sampled = [f.group for f in taken if f.group is not None]
        dropped_by = {f.playing.uid: f.dropped_by for f in taken if f.dropped_by is not None}
        refuse_failures(sampled, self.max_failed_share)
        if not any(r.reward is not None for g in sampled for r in g.rollouts):
            raise UserError("no reward applied to any rollout of this batch: every component returned None")
        lag = staleness(groups, state.step)
        assert lag <= self.max_staleness, f"a group is {lag} policy versions old, more than {self.max_staleness}"
        if missing := self.prompts_per_step - len(groups):
            groups += replays(self.curricula, states, missing, context)
        if not groups or (len(groups) < self.prompts_per_step and not _short_allowed(self.curricula)):
            raise UserError(_exhausted(len(groups), self.prompts_per_step, len(sampled), dropped_by.values()))
        in_flight = [[f.playing.uid, f.playing.prompt.id] for f in self.flights]
        after = replace(state, launched=launched, components=states, in_flight=in_flight)
        return Sealed(tuple(groups), tuple(sampled), dropped_by, after)

    def context(self, step: int) -> Context:
        """What components may know at ``step``."""
        return Context(step, self.seed, self.roles, self.archive)

    def pump(self) -> None:
        """Takes in and scores what has finished meanwhile, without waiting: for whoever waits for the learner.

        A failure, whatever it is, is raised by the next :meth:`collect`: the step that is under way is completed first.
        """
        if self._failure is not None:
            return
        try:
            self.player.pump(0.0)
            self._score(wait=False)
        except Exception as error:
            self._failure = error

    def close(self) -> None:
        """Forgets what is in flight."""
        self.player.abandon([f.playing for f in self.flights])
        self._scorers.shutdown(wait=True, cancel_futures=True)

    def _admissible(self, state: TrainState) -> int:
        """How many groups may be launched now.

        In lockstep what was dropped is replaced when all others are judged, so that which prompts are chosen does not
        depend on who finished first.
        """
        if self.max_staleness == 0 and self._by_uid:
            return 0
        wanted = self.prompts_per_step * min(self.max_staleness + 1, self.steps - state.stage_step)
        launched, refills = len(self.flights), self.prompts_per_step * refill_bound(self.curricula)
        return max(0, min(wanted - (launched - self._dropped), wanted + refills - launched))

    def _launch(self, prompts: Sequence[Prompt], uids: Sequence[int]) -> None:
        with self.phases("sample"):
            started = self.player.start(prompts, uids, self.params, self.seed, "")
        flights = [_Flight(playing) for playing in started]
        self.flights += flights
        self._by_uid |= {f.playing.uid: f for f in flights}
        self._sampling += len(flights)

    def _launch_again(self, state: TrainState) -> None:
        """What was in flight when the state was saved, where that is not so in this process."""
        if state.in_flight and not self.flights:
            by_id = {prompt.id: prompt for prompt in self.prompts}
            self._launch([by_id[id_] for _, id_ in state.in_flight], [uid for uid, _ in state.in_flight])

    def _wait(self) -> None:
        """Samples and scores until something happened."""
        with self.phases("sample"):
            if self._sampling:
                self.player.pump(WAIT_S if self._scoring is None else SCORING_S)
                self.player.check()
        with self.phases("score"):
            self._score(wait=not self._sampling)

    def _score(self, wait: bool) -> None:
        """Keeps the scorer busy, and takes its answer when it is there, or when it is all that is waited for."""
        self._begin_scoring()
        if self._scoring is not None and (wait or self._scoring[1].done()):
            self._judge(*self._scoring)
            self._begin_scoring()

    def _begin_scoring(self) -> None:
        """Hands finished groups to the scorer, if it is idle: in lockstep all at once, else as they come."""
        finished, self.player.finished[:] = list(self.player.finished), []
        self._ready += [self._by_uid[playing.uid] for playing in finished]
        self._sampling -= len(finished)
        if self._scoring is not None or not self._ready or (self.max_staleness == 0 and self._sampling):
            return
        self._ready.sort(key=lambda f: f.playing.uid)  # a reward may depend on what came before
        groups = [f.playing.seal(self.player.sampler.name) for f in self._ready]
        score = self._scorers.submit(self.scorer.score, groups, step=self._step, max_steps=self.steps)
        self._scoring, self._ready = (self._ready, score), []

    def _judge(self, flights: Sequence[_Flight], scored: Future[list[Group]]) -> None:
        """Takes the scorer's answer, once it is there, and lets the curricula keep or drop."""
        while not wait([scored], SCORER_S).done:
            self.player.check()
        for flight, group in zip(flights, scored.result(), strict=True):
            flight.group, flight.dropped_by = group, keeps(self.curricula, self._states, group)
            self._dropped += flight.dropped_by is not None
            del self._by_uid[flight.playing.uid]
        self._scoring = None
        self._full = sum(f.accepted for f in self._head()) == self.prompts_per_step

    def _head(self) -> Iterator[_Flight]:
        """The flights of the next batch, as far as they are judged."""
        accepted = 0
        for flight in self.flights:
            if flight.group is None or accepted == self.prompts_per_step:
                return
            accepted += flight.accepted
            yield flight

    def _take(self) -> list[_Flight]:
        """Removes the next batch from the flights, and all that was dropped.

        So a state never names a group as in flight whose fate is settled. If it did, a resumed run would sample it
        again, other weights might make it an accepted one, and there would be more of these than the bound admits.
        """
        head = len(list(self._head()))
        taken, left = [], []
        for place, flight in enumerate(self.flights):
            (taken if place < head or flight.dropped_by is not None else left).append(flight)
        self.flights, self._dropped = deque(left), 0
        self._full = sum(f.accepted for f in self._head()) == self.prompts_per_step
        return taken


def staleness(groups: Sequence[Group], version: int) -> int:
    """How many policy versions the oldest sampled token of ``groups`` is behind ``version``."""
    return max((version - first for g in groups for r in g.rollouts for first, _ in r.versions[:1]), default=0)


def _short_allowed(curricula: Sequence[Curriculum]) -> bool:
    return any(getattr(c, "on_exhausted", "error") == "short" for c in curricula)


def _exhausted(accepted: int, wanted: int, sampled: int, dropped_by: Iterable[str]) -> str:
    by = ", ".join(f"{count} by {name}" for name, count in sorted(Counter(dropped_by).items())) or "none"
    short = ", or set its on_exhausted to 'short'" if accepted else "; on_exhausted 'short' needs one group at least"
    return (
        f"only {accepted} of the {wanted} groups that a step needs were accepted after sampling {sampled} "
        f"(dropped: {by}). Give the model prompts that it sometimes solves, or raise the filter's max_refills{short}"
    )
