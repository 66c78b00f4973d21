"""What a running job holds: engines, data, outputs, and what happens after each step."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from alignment.alarms import Alarms
from alignment.algorithms.objective import Objective
from alignment.archive import GroupArchive
from alignment.batching import collate
from alignment.checkpoint import Checkpoints, Saved, save_state
from alignment.collect import Sealed
from alignment.control import control_ids
from alignment.data.load import LoadedData
from alignment.durable import digest
from alignment.engines.assembly import Engines
from alignment.engines.config import Site
from alignment.environments import Environment
from alignment.errors import UserError
from alignment.evaluation.evaluate import Evaluation, evaluate
from alignment.flight import FlightRecorder, Watched
from alignment.ledger import Ledger, Verdicts
from alignment.metrics import Phases, Record, Sink, entropy_change
from alignment.models import Model, decode, stop_ids
from alignment.positions import max_positions
from alignment.recipe import OnlineStage, PreferenceStage, Recipe, RewardModelStage, RolloutStage, Sampling, Stage
from alignment.rollouts import Player
from alignment.runs import Run
from alignment.scoring import Scorer
from alignment.signals import GracefulStop
from alignment.types import Batch, Group, SamplingParams, TrainState, keyed_seed

log = logging.getLogger(__name__)


@dataclass
class Job:
    """The one mutable object of a run. ``state`` is always the last *completed* step."""

    recipe: Recipe
    run: Run
    model: Model
    scorer: Scorer
    checkpoints: Checkpoints
    sink: Sink
    stop: GracefulStop
    data: LoadedData
    state: TrainState = field(default_factory=TrainState)
    phases: Phases = field(default_factory=Phases)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    """By run step."""
    alarms: Alarms = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock time by stage name, over all resumes."""
    engines: Engines = field(init=False)
    """Of the stage that is under way."""
    archive: GroupArchive | None = None
    """Where curricula that replay find groups of earlier steps; None where none of them replays."""
    saved_step: int | None = None
    settled: bool = True
    """False between an update of the learner and the step that ``state`` counts it as: nothing may be saved then."""
    _clock: float = field(default_factory=time.monotonic)
    _meanwhile: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.alarms = Alarms(self.recipe.run.alarm_window)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.recipe.run.seed

    @property
    def site(self) -> Site:
        """What engines are built for."""
        recipe, stage = self.recipe, self.stage
        longest = [recipe.evaluation.sampling.max_tokens]
        longest += [stage.sampling.max_tokens] if isinstance(stage, RolloutStage) and stage.samples else []
        need = recipe.data.max_prompt_tokens + len(self.control_ids[:1]) + max(longest)
        folders = tuple(map(str, recipe.plugin_folders))
        positions = max_positions(self.model.module) or need
        return Site(self.model, min(need, positions), None, recipe.plugins, folders, self.idle)

    @property
    def control_ids(self) -> tuple[int, ...]:
        """:func:`alignment.control.control_ids` of the model."""
        return control_ids(self.model.tokenizer, self.model.module)

    @property
    def model_has_weights(self) -> bool:
        """Whether the model's module in this process is more than shapes."""
        return not any(p.is_meta for p in self.model.module.parameters())

    @property
    def ledger(self) -> Ledger:
        """What became of every group."""
        return Ledger(self.run.folder / "ledger.jsonl")

    @property
    def verdicts(self) -> Verdicts:
        """What evaluations found, problem by problem."""
        return Verdicts(self.run.folder / "evaluations.jsonl")

    @property
    def stage(self) -> Stage:
        """The stage that is under way."""
        return self.recipe.stages[self.state.stage]

    def open_archive(self, stage: RolloutStage) -> GroupArchive | None:
        """What curricula of ``stage`` replay from; None where none replays."""
        replays = any(hasattr(curriculum, "replay") for curriculum in stage.curricula)
        self.archive = self._archive() if replays else None
        return self.archive

    def open_rounds(self) -> GroupArchive:
        """Where a preference stage keeps what it sampled, for the steps of the round and for a resumed run."""
        self.archive = self._archive()
        return self.archive

    def _archive(self) -> GroupArchive:
        """One for the whole run, as old as any of its stages may ask: a resumed run may go back to another stage."""
        stages = [stage for stage in self.recipe.stages if isinstance(stage, RolloutStage)]
        ages = [getattr(c, "max_age", 0) for stage in stages for c in stage.curricula if hasattr(c, "replay")]
        ages += [getattr(stage.pairs, "every", 1) for stage in stages if isinstance(stage, PreferenceStage)]
        return GroupArchive(self.run.folder / "archive", self.data.train, max(ages))

    def player(self, environment: Environment) -> Player:
        """Plays episodes of ``environment`` with the current weights; a stop is noticed between two completions.

        Not while the learner is ahead of ``state``: the step is completed first.
        """
        limit, engines, cue = self.recipe.data.max_prompt_tokens, self.engines, self.control_ids[:1]
        return Player(
            engines.sampler, self.model.tokenizer, environment, limit, self._check_stop, cue, playing=engines.playing
        )

    def publish(self, version: int) -> dict[str, float]:
        """Makes the learner's weights the sampler's, as policy ``version``; metrics of the transport."""
        with self.phases("publish"):
            return self.engines.publish(version)

    def idle(self) -> None:
        """What whoever waits for another process calls about ten times a second.

        Raises:
            Stopped: A stop was asked for, and the learner is not ahead of ``state``.
        """
        if self._meanwhile is not None:
            self._meanwhile()
        self._check_stop()

    @contextmanager
    def meanwhile(self, work: Callable[[], None]) -> Iterator[None]:
        """Lets :meth:`idle` do ``work`` inside."""
        self._meanwhile = work
        try:
            yield
        finally:
            self._meanwhile = None

    def params(self, sampling: Sampling) -> SamplingParams:
        """The sampler's parameters, with the model's own stop tokens and without its control tokens."""
        return sampling.params(stop_ids(self.model.tokenizer, self.model.module), self.control_ids)

    def collate(self, groups: Sequence[Group], step: int) -> Batch:
        """The tensors of ``groups``, on the learner's device."""
        specs = self.recipe.reward_specs
        pad_id = self.model.tokenizer.pad_token_id
        assert pad_id is not None, "load_model sets a padding token"
        batch = collate(groups, pad_id, [s.column for s in specs], [s.weight for s in specs], step, self.seed)
        return batch.to(self.engines.learner.device)

    def evaluate_if_due(self, step: int) -> Evaluation | None:
        """Evaluates the published policy when ``step`` is due: by the cadence, and at both ends of a stage."""
        config = self.recipe.evaluation
        stage_step = self.state.stage_step + step - self.state.step
        due = stage_step in (0, self.stage.steps) or bool(config.every and step % config.every == 0)
        rests = stage_step > 0 and self.stage.policy_rests(stage_step - 1)
        if not self.data.held_out or not due or rests or step in self.evaluations:
            return None
        self.publish(step)
        with self.phases("evaluate"):
            found = evaluate(
                self.player(self.recipe.evaluation_environment),
                self.scorer,
                self.data.held_out,
                self.params(config.sampling),
                config.samples,
                keyed_seed(self.seed, "evaluation"),
                self.recipe.scoring.max_failed_share,
            )
        self.evaluations[step] = found
        self.verdicts.append(step, found.verdicts)
        self.sink.log(self._record(step, stage_step, "eval", found.flat()))
        return found

    def record_batch(
        self,
        state: TrainState,
        batch: Batch,
        watched: Watched | Objective | None,
        states: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        """Keeps the batch for ``align replay``; one that did not train the policy has nothing to compute again."""
        if (keep := self.recipe.run.flight_steps) and watched is not None:
            recorder = FlightRecorder(self.run.flight, keep, lambda i: decode(self.model.tokenizer, [i]))
            recorder.record(batch, watched, states, state.stage, state.step, metrics)

    def finish_step(self, state: TrainState, metrics: Mapping[str, float], sealed: Sealed | None = None) -> TrainState:
        """Counts, logs and, when due, saves a completed step; then stops if a stop was asked for.

        Returns:
            ``state`` with its counters moved on.

        Raises:
            Stopped: By Ctrl-C or SIGTERM, once the step is complete.
        """
        groups = sealed.sampled if sealed else ()
        if sealed:
            self.ledger.append(state.step, sealed)
            if self.archive is not None:
                self.archive.add(sealed.state.step, sealed.fresh)
                self.archive.prune([state.step, *self.checkpoints.steps()])
            change, counters = entropy_change(state.counters, self.stage.name, metrics)
            seen = {"verdicts": sum(r.scored for g in groups for r in g.rollouts)}
            seen |= {"demonstrations": metrics["demonstrations"]} if metrics.get("demonstrations") else {}
            counts = {f"{what}/{self.stage.name}": count for what, count in seen.items()}
            counts = {name: counters.get(name, 0) + count for name, count in counts.items()}
            state = replace(state, counters={**counters, **counts})
            metrics = {**metrics, **change}
        self.state, self.settled = state, True
        self._tick()
        timed = self.phases.flush(**{name: int(metrics.get(name, 0)) for name in ("tokens", "rollouts")})
        self.sink.log(self._record(state.step, state.stage_step, "train", {**metrics, **timed}))
        self._look_for_trouble(metrics)
        every = self.recipe.run.rollouts_every
        if groups and every and (state.step % every == 0 or state.stage_step == 1):
            self.sink.rollouts(state.step, self.stage.name, groups)
        if self._save_due():
            self.save()
        self.stop.check()
        return state

    def labels(self, stage: int) -> dict[str, int]:
        """What a stage learned from: demonstrations it was shown, or verdicts on its own rollouts."""
        config = self.recipe.stages[stage]
        steps = self.state.stage_step if stage == self.state.stage else config.steps
        if isinstance(config, PreferenceStage) and not config.samples:
            what = "pairs" if all(len(pair.rollouts) == 2 for pair in self.data.preferences) else "judgements"
            return {what: min(len(self.data.preferences), steps * getattr(config.pairs, "batch_size", 1))}
        if isinstance(config, RolloutStage):
            counted = self.state.counters
            shown = int(counted.get(f"demonstrations/{config.name}", 0))
            verdicts = {"verdicts on its own rollouts": int(counted.get(f"verdicts/{config.name}", 0))}
            return verdicts | ({"demonstrations": shown} if shown else {})
        if isinstance(config, RewardModelStage):
            return {"pairs": min(len(self.data.preferences), steps * config.batch_size)}
        shown = sum(len(rollouts) for rollouts in self.data.demonstrations.values())
        return {"demonstrations": min(shown, steps * config.batch_size)}

    def measured(self, stage: str) -> dict[str, dict[str, float]]:
        """What a stage measured at its ends, beside evaluations: counters like ``ranking/before/STAGE``."""
        found: dict[str, dict[str, float]] = {}
        for name, value in self.state.counters.items():
            what, end, of = name.split("/", 2) if name.count("/") >= 2 else ("", "", "")
            if of == stage and end in ("before", "after"):
                found.setdefault(what, {})[end] = value
        return found

    def resume(self, saved: Saved) -> None:
        """Takes back what the checkpoint says beside learner and state.

        Raises:
            UserError: The data is not what it was: the rest of the run would not be the rest of that run.
        """
        changed = [name for name, known in saved.meta["data"].items() if self.data.digests.get(name) != known]
        if changed:
            where = ", ".join(f"data.{name}" for name in changed)
            raise UserError(
                f"{self.run.folder} was trained on other rows of {where}; put the data back as it was, or start again "
                f"with --fresh (the old run is kept aside)"
            )
        self.saved_step = saved.step
        self.seconds = dict(saved.meta["seconds"])
        self.alarms = Alarms.from_json(self.recipe.run.alarm_window, saved.meta["alarms"])
        for step, found in saved.meta["evaluations"].items():
            self.evaluations[int(step)] = Evaluation(**{**found, "interval": tuple(found["interval"])})

    def save(self) -> None:
        """Publishes a checkpoint of the last completed step, once; not while the learner is ahead of it."""
        if self.state.step in (0, self.saved_step) or not self.settled:
            return
        with self.phases("save"):
            self._tick()
            evaluations = {
                str(step): {**asdict(replace(e, verdicts={})), "interval": list(e.interval)}
                for step, e in self.evaluations.items()
            }
            meta = {"seconds": self.seconds, "evaluations": evaluations, "data": self.data.digests}
            meta["alarms"] = self.alarms.to_json()
            world_size = getattr(self.stage.learner, "ranks", 1)
            about = {"config_hash": digest(self.recipe.resolved()), "world_size": world_size}
            self.checkpoints.save(self.state.step, self._write, {**meta, **about})
        if self._is_best():
            self.checkpoints.mark_best(self.state.step, self.evaluations[self.state.step].accuracy)
        self.saved_step = self.state.step

    def _look_for_trouble(self, metrics: Mapping[str, float]) -> None:
        """Says which alarms begin with this step."""
        stage, state = self.stage, self.state
        if isinstance(stage, OnlineStage) and not stage.policy_rests(state.stage_step - 1):
            place, compares = f"stages.{state.stage}", stage.values is None
            for alarm in self.alarms.after(state.step, stage.name, place, metrics, of_groups=compares):
                log.warning("step %d: %s", state.step, alarm)

    def _check_stop(self) -> None:
        if self.settled:
            self.stop.check()

    def _write(self, folder: Path) -> None:
        self.engines.learner.save(folder / "learner")
        save_state(folder, self.state)

    def _save_due(self) -> bool:
        every = self.recipe.run.save_every
        ends = self.state.stage_step >= self.stage.steps
        return ends or bool(every and self.state.step % every == 0) or self._is_best()

    def _is_best(self) -> bool:
        """Whether the last completed step was evaluated, and as better than every checkpoint before it."""
        here, best = self.evaluations.get(self.state.step), self.checkpoints.best
        return here is not None and here.accuracy > (best.value if best else -math.inf)

    def _record(
        self, step: int, stage_step: int, kind: Literal["train", "eval"], metrics: Mapping[str, float]
    ) -> Record:
        stage = self.stage
        return Record(step, stage.name, stage_step, stage.steps, metrics, kind)

    def _tick(self) -> None:
        """Adds the time since the last tick to the stage's."""
        now = time.monotonic()
        self.seconds[self.stage.name] = self.seconds.get(self.stage.name, 0.0) + now - self._clock
        self._clock = now
