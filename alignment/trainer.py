"""Runs a recipe from its first stage to its last, and continues one that was interrupted."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.algorithms.state import fresh
from alignment.checkpoint import Checkpoints, Saved, load_state
from alignment.data.load import LoadedData, load_data
from alignment.engines.assembly import open_engines
from alignment.errors import EngineFailed, UserError
from alignment.evaluation.evaluate import Evaluation
from alignment.job import Job
from alignment.metrics import Sink, Sinks, StageResult, build_result
from alignment.mixing import check_demonstrations
from alignment.offline import train_supervised
from alignment.online import train_online
from alignment.origin import Origin, copy_policy
from alignment.pair_checks import check_pairs
from alignment.positions import max_positions, too_long
from alignment.preference import train_preferences
from alignment.recipe import (
    OnlineStage,
    PreferenceStage,
    Recipe,
    RecipeError,
    RewardModelStage,
    RolloutStage,
    Stage,
    differences,
    load,
)
from alignment.recipe_folders import missing_folders
from alignment.reward_modelling import train_reward_models, write_members
from alignment.runs import Run, open_run, resolve
from alignment.scoring import Scorer
from alignment.signals import GracefulStop, Stopped
from alignment.stage_checks import unfit_prompts, unknown_layers
from alignment.supervision import check_supervised
from alignment.trackers import make_sinks
from alignment.types import TrainState, keyed_seed

log = logging.getLogger(__name__)

FILES = {
    "recipe.yaml": "the recipe with every default",
    "metrics.jsonl": "one line per step and per evaluation",
    "ledger.jsonl": "what became of every group: trained, dropped or in flight",
    "evaluations.jsonl": "how often each held-out problem was solved, one line per evaluation",
    "rollouts.jsonl": "a sample of what the model wrote, with scores",
    "result.json": "this summary",
    "checkpoints": "what the run continues from; `align export` makes a model folder of one",
    "archive": "groups that may be trained on again",
    "reward_models": "those that a stage has trained",
    "flight": "the last batches, for `align replay`",
    "tensorboard": "curves, for TensorBoard",
}
"""What a run folder may hold, and what it is."""


def train(
    recipe: Recipe | str | Path | Sequence[str | Path],
    *,
    sinks: Sequence[Sink] = (),
    overrides: Sequence[str] = (),
    fresh_start: bool = False,
    init_from: str | None = None,
) -> dict[str, Any]:
    """Trains a recipe, from the start or from where its run folder says that it stopped.

    Ctrl-C and SIGTERM save the last completed step; calling again continues from it.

    Args:
        recipe: A loaded recipe, or the path or paths of its YAML files, merged from left to right.
        sinks: More places for metrics and rollouts, beside those that the recipe names.
        overrides: ``a.b=c`` texts, applied last; only with paths.
        fresh_start: Put an earlier run of this name aside and start again.
        init_from: ``RUN[@step|@best]`` whose policy this run starts from.

    Returns:
        What ``result.json`` holds: ``status`` (``complete`` or ``interrupted``), ``stages``, ``eval``, ``best``,
        ``alarms``, ``data``, ``folder``, ``files``; and ``exit_code``: 0, 130 after Ctrl-C, 75 after SIGTERM.

    Raises:
        RecipeError: The recipe is wrong; every mistake at once. Or completions do not fit the model's positions.
        UserError: The run cannot start, continue or finish for a reason that the user can mend.
    """
    if not isinstance(recipe, Recipe):
        recipe = load([recipe] if isinstance(recipe, str | Path) else list(recipe), overrides)
    if init_from is not None:
        resolve(init_from, recipe.run.output)  # before a folder is made for a run that cannot start
    with open_run(recipe.run.output, recipe.run.name, fresh=fresh_start) as run, GracefulStop() as stop:
        checkpoints = Checkpoints(run.checkpoints, recipe.run.keep_last)
        saved = checkpoints.latest(lambda problem: log.warning("%s", problem))
        state = load_state(saved.folder) if saved else TrainState()
        if saved is not None:
            _refuse_another_start(run, recipe, state, init_from)
        init_from = init_from or run.read_start()
        if run.result.exists() and _is_complete(recipe, state):
            log.warning("%s is complete at step %d; --fresh starts it again", run.folder, state.step)
            return {**run.read_result(), "exit_code": 0}
        if missing := missing_folders(recipe, state.stage):
            raise RecipeError(missing)
        for warning in recipe.warnings:
            log.warning("%s", warning)
        run.write_recipe(recipe.resolved(), recipe.folder)
        run.write_start(init_from)
        with Sinks([*make_sinks(recipe), *sinks]) as sink:
            return _run(recipe, run, checkpoints, saved, state, sink, stop, init_from)


def _run(
    recipe: Recipe,
    run: Run,
    checkpoints: Checkpoints,
    saved: Saved | None,
    state: TrainState,
    sink: Sinks,
    stop: GracefulStop,
    init_from: str | None,
) -> dict[str, Any]:
    """Builds what a job needs, runs its stages and writes ``result.json``."""
    with Scorer.from_recipe(recipe) as scorer:
        origin = _origin(recipe, None if saved else init_from)
        model = origin.make(weights=any(_needs_weights(stage) for stage in recipe.stages))
        data = load_data(recipe, model, scorer)
        if problems := unknown_layers(recipe, model.module) + unfit_prompts(recipe, data.train):
            raise RecipeError(problems)
        check_demonstrations(recipe, data)
        check_supervised(recipe, data, model)
        check_pairs(recipe, data, max_positions(model.module), state.stage)
        if problems := too_long(recipe, max_positions(model.module), data.longest):
            raise RecipeError(problems)
        job = Job(recipe, run, model, scorer, checkpoints, sink, stop, data, state)
        job.ledger.rewind(state.step)
        job.verdicts.rewind(saved.step if saved else -1)
        if saved is not None:
            job.resume(saved)
        sink.start(_description(recipe, run, saved, data))
        try:
            _stages(job, saved)
        except Stopped as stopped:
            if isinstance(stage := job.stage, RewardModelStage) and job.state.stage_step >= stage.steps:
                write_members(job, stage)
            status = "complete" if _is_complete(recipe, job.state) else "interrupted"
            result = _result(job, checkpoints, status, stopped.exit_code)
        else:
            result = _result(job, checkpoints, "complete", 0)
    run.write_result(result)
    sink.finish(result)
    return result


def _origin(recipe: Recipe, init_from: str | None) -> Origin:
    """Where the model comes from when the run begins."""
    policy = None
    if init_from is not None:
        source, which = resolve(init_from, recipe.run.output)
        policy = Checkpoints(Run(source).checkpoints).load(which, log.warning).folder
    return Origin(recipe.located_model(), keyed_seed(recipe.run.seed, "model"), policy)


def _needs_weights(stage: Stage) -> bool:
    """Whether an engine of ``stage`` lives in this process and works on the model's own module."""
    return any(getattr(engine, "needs_module", True) for engine in (stage.learner, stage.sampler))


def _stages(job: Job, saved: Saved | None) -> None:
    """Every stage that is not done yet, each with an optimizer of its own on the same model."""
    while True:
        stage = job.stage
        if job.state.stage_step < stage.steps:
            _run_stage(job, stage, saved)
        elif saved is not None and job.model_has_weights:
            copy_policy(saved.folder, job.model.module)
        if isinstance(stage, RewardModelStage):
            write_members(job, stage)
            job.scorer.restart()
        if job.state.stage + 1 == len(job.recipe.stages):
            return
        assert job.model.origin is not None
        job.model.origin = replace(job.model.origin, policy=job.checkpoints.folder_of(job.state.step))
        job.state = replace(job.state, stage=job.state.stage + 1, stage_step=0, components={})
        saved = None


def _run_stage(job: Job, stage: Stage, saved: Saved | None) -> None:
    """What is left of a stage. Its last step is saved: the next stage's processes begin from that checkpoint."""
    seed = keyed_seed(job.seed, "learner", job.state.stage)
    columns = [spec.column for spec in job.recipe.reward_specs]
    with open_engines(stage, job.site, seed, columns) as job.engines:
        if saved is not None:
            job.engines.learner.restore(saved.folder / "learner")
        elif job.state.stage_step == 0:
            job.state = replace(job.state, components=fresh(stage.components()))
        try:
            job.evaluate_if_due(job.state.step)
            match stage:
                case RewardModelStage():
                    train_reward_models(job, stage, job.state)
                case PreferenceStage():
                    train_preferences(job, stage, job.state)
                case RolloutStage():
                    train_online(job, stage, job.state)
                case _:
                    train_supervised(job, stage, job.state)
        except (Stopped, UserError):
            try:
                job.save()  # while the learner is there
            except EngineFailed as error:
                log.warning("step %d could not be saved: %s", job.state.step, error)
            raise
    if not job.engines.in_process and job.model_has_weights:
        copy_policy(job.checkpoints.folder_of(job.state.step), job.model.module)


def _description(recipe: Recipe, run: Run, saved: Saved | None, data: LoadedData) -> dict[str, Any]:
    """What sinks are told at the start."""
    return {
        "name": recipe.run.name,
        "folder": str(run.folder),
        "recipe": recipe.resolved(),
        "stages": [{"name": s.name, "stage": s.stage, "steps": s.steps} for s in recipe.stages],
        "data": data.report,
        "resumed_from": saved.step if saved else None,
    }


def _refuse_another_start(run: Run, recipe: Recipe, state: TrainState, init_from: str | None) -> None:
    """A run continues as it was started; only what is still to come may get longer, and outputs may change."""
    if init_from is not None and init_from != run.read_start():
        raise UserError(
            f"{run.folder} has checkpoints already and was not started from {init_from}; leave --init-from out to "
            f"continue it, or add --fresh to start again (the old run is kept aside)"
        )
    done = {f"stages.{i}.steps" for i in range(state.stage)}
    refused = [d for d in differences(run.read_recipe(), recipe.resolved()) if not d[3] or d[0] in done]
    if refused:
        changes = "\n".join(f"  {path}: {old!r} in the run, {new!r} now" for path, old, new, _ in refused)
        raise UserError(
            f"{run.folder} was started with another recipe:\n{changes}\n"
            f"Put the old values back, start again with --fresh (the old run is kept aside), or give the new run "
            f"another run.name and --init-from {run.folder}@best"
        )


def _is_complete(recipe: Recipe, state: TrainState) -> bool:
    return state.stage == len(recipe.stages) - 1 and state.stage_step >= recipe.stages[-1].steps


def _result(job: Job, checkpoints: Checkpoints, status: Any, exit_code: int) -> dict[str, Any]:
    """What ``result.json`` holds. The run is measured from the start of its first online stage, if it has one."""
    stages, start = [], 0
    online = next((i for i, s in enumerate(job.recipe.stages) if isinstance(s, OnlineStage)), 0)
    for i, stage in enumerate(job.recipe.stages[: job.state.stage + 1]):
        steps = job.state.stage_step if i == job.state.stage else stage.steps
        before, after = _measured(job, start), _measured(job, start + steps)
        stages.append(
            StageResult(
                stage.name,
                stage.stage,
                steps,
                job.seconds.get(stage.name, 0.0),
                job.labels(i),
                before,
                after,
                job.measured(stage.name),
            )
        )
        start += steps
    best = checkpoints.best
    return {
        **build_result(
            status=status,
            stages=stages,
            before=stages[min(online, len(stages) - 1)].before,
            after=stages[-1].after,
            best={"step": best.step, "accuracy": best.value} if best else None,
            folder=job.run.folder,
            alarms=job.alarms.report(),
            files={
                name: what for name, what in FILES.items() if name == "result.json" or (job.run.folder / name).exists()
            },
        ),
        "data": dict(job.data.report),
        "exit_code": exit_code,
    }


def _measured(job: Job, step: int) -> dict[str, Any] | None:
    """The evaluation of a step as reports show it."""
    found: Evaluation | None = job.evaluations.get(step)
    if found is None:
        return None
    return {"accuracy": found.accuracy, "interval": list(found.interval), "n": found.problems}
