"""Runs benchmarks on a checkpoint, one after another, and goes on where an interrupted evaluation stopped."""

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignment.algorithms.decodings import Decoding, decodings
from alignment.control import control_ids
from alignment.durable import digest
from alignment.engines.config import Site, TransformersSamplerConfig
from alignment.engines.reranking import build_sampler
from alignment.environments import SingleTurn
from alignment.errors import UserError
from alignment.evaluation.benchmarks import Chosen, choose
from alignment.evaluation.data import Prepared, Selection, prepare
from alignment.evaluation.decoding import describe_decoding, longest_row
from alignment.evaluation.model import Dtype, dtype_of, fingerprint, open_checkpoint
from alignment.evaluation.results import Record, record, summarise
from alignment.evaluation.store import Store, open_store
from alignment.evaluation.view import Progress
from alignment.models import Model, stop_ids
from alignment.rollouts import Player, play
from alignment.scoring import Scorer, ScoringFailed
from alignment.signals import GracefulStop, Stopped
from alignment.types import FAILED, keyed_seed

MAX_FAILED_SHARE = 0.1
"""Of the samples of a benchmark that may stay without a verdict because their scoring failed."""


@dataclass(frozen=True)
class Options:
    """What to evaluate, and how."""

    checkpoint: str
    """A model folder, a hub id, or ``RUN[@step|@best]``."""
    tasks: Sequence[str]
    """Names of benchmarks and procedural tasks."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Local files by name of the benchmark."""
    samples: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    selection: Selection = Selection()
    seed: int = 0
    output: Path | None = None
    """Folder; None is ``evaluations/`` and the names of the checkpoint and of a decoding."""
    batch_rows: int = 32
    """Completions that are sampled together."""
    workers: int = 1
    """Processes that score, for each kind of reward."""
    dtype: Dtype | None = None
    plugins: Sequence[str] = ()
    """Modules that register benchmarks, tasks or rewards."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of benchmarks, by name of the benchmark."""
    decoding: Decoding | None = None
    """None: the policy's own distribution."""

    @property
    def folder(self) -> Path:
        """Where the evaluation is written."""
        name = re.sub(r"[^A-Za-z0-9._@-]", "_", Path(self.checkpoint).expanduser().resolve().name)
        decoded = "" if self.decoding is None else f"-{decodings.name_of(self.decoding)}"
        return self.output or Path("evaluations") / f"{name}{decoded}"


@dataclass(frozen=True)
class Work:
    """What sampling and scoring takes."""

    player: Player
    stop_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]
    tilt: tuple[float, ...]
    seed: int
    batch_rows: int
    store: Store
    progress: Progress


def evaluate_checkpoint(options: Options, progress: Progress) -> dict[str, Any]:
    """Measures a checkpoint. Ctrl-C and SIGTERM keep what is finished; calling again goes on from there.

    Args:
        options: What, and how.
        progress: Is told how far it is.

    Returns:
        What ``results.json`` holds; and ``exit_code``: 0, 130 after Ctrl-C, 75 after SIGTERM, and ``folder``.

    Raises:
        UserError: A name, file, checkpoint or option is wrong, the folder holds another evaluation, or more than 10 %
            of a benchmark's samples could not be scored.
    """
    _import_plugins(options.plugins)
    numbers = (options.samples, options.temperature, options.max_tokens)
    chosen = choose(options.tasks, options.data, *numbers, settings=options.settings)
    loaded = [(one, one.load()) for one in chosen]
    with GracefulStop() as stop, ExitStack() as stack:
        scorers = _scorers(chosen, options, stack)
        model = open_checkpoint(options.checkpoint, options.dtype)
        config = TransformersSamplerConfig(batch_rows=options.batch_rows)
        sampler = build_sampler(config, Site(model, decoding=options.decoding), None)
        control = control_ids(model.tokenizer, model.module)
        positions = longest_row(model, options.decoding)
        if positions is not None:
            positions -= len(control[:1])
        prepared = [
            prepare(one, dataset, scorers[one.name], model.tokenizer, positions, options.selection)
            for one, dataset in loaded
        ]
        config = _config(options, model, prepared)
        store = stack.enter_context(open_store(options.folder, config))
        stack.enter_context(progress)
        check = _checking(stop, progress)
        player = Player(sampler, model.tokenizer, SingleTurn(), max(p.longest for p in prepared), check, control[:1])
        ids = stop_ids(model.tokenizer, model.module)
        tilt = () if options.decoding is None else options.decoding.tilt
        work = Work(player, ids, control, tilt, options.seed, options.batch_rows, store, progress)
        return {**_run(work, prepared, scorers, stop), "folder": str(options.folder)}


def _config(options: Options, model: Model, prepared: Sequence[Prepared]) -> dict[str, Any]:
    checkpoint = {"address": options.checkpoint, "fingerprint": fingerprint(model), "dtype": dtype_of(model)}
    decoding = describe_decoding(options.decoding)
    return {
        "checkpoint": checkpoint,
        **({} if decoding is None else {"decoding": decoding}),
        "seed": options.seed,
        "tasks": {p.chosen.name: p.config() for p in prepared},
    }


def _run(work: Work, prepared: Sequence[Prepared], scorers: Mapping[str, Scorer], stop: GracefulStop) -> dict[str, Any]:
    chunks = {p.chosen.name: max(1, work.batch_rows // p.chosen.samples) for p in prepared}
    done = {
        p.chosen.name: work.store.finished(p.chosen.name, [q.id for q in p.prompts], chunks[p.chosen.name])
        for p in prepared
    }
    for p in prepared:
        work.progress.add(p.chosen.name, len(p.prompts), p.chosen.samples, len(done[p.chosen.name]))
    results: dict[str, Any] = work.store.write_results({})
    try:
        for p in prepared:
            name = p.chosen.name
            records = _measure(work, p, scorers[name], done[name], chunks[name], stop)
            results = work.store.write_results({name: summarise(records, p.chosen.samples)})
    except Stopped as stopped:
        return {**results, "exit_code": stopped.exit_code}
    return {**results, "exit_code": 0}


def _measure(
    work: Work, prepared: Prepared, scorer: Scorer, done: Sequence[Record], chunk: int, stop: GracefulStop
) -> list[Record]:
    """All records of a benchmark: those that are done and the rest, which is sampled and scored chunk by chunk."""
    chosen, records = prepared.chosen, list(done)
    params = replace(chosen.sampling.params(work.stop_ids, work.banned_ids), tilt=work.tilt)
    if len(records) < len(prepared.prompts):
        work.progress.begin(chosen.name)
    for start in range(len(records), len(prepared.prompts), chunk):
        stop.check()
        prompts = prepared.prompts[start : start + chunk]
        # The random numbers of a sample hang on the problem and the sample's number, not on what else is evaluated.
        uids = [keyed_seed(prompt.id) for prompt in prompts]
        groups = play(work.player, prompts, uids, chosen.samples, params, work.seed)
        new = [record(group) for group in scorer.score(groups)]
        _refuse_failures(chosen, [*records, *new], len(prepared.prompts))
        work.store.append(chosen.name, new)
        records += new
        work.progress.finished(len(records))
    return records


def _refuse_failures(chosen: Chosen, records: Sequence[Record], problems: int) -> None:
    """Stops as soon as it is certain that too many samples of a benchmark stay without a verdict."""
    failed = [(r, s) for r in records for s in r["samples"] if s["status"] in FAILED]
    total = problems * chosen.samples
    if len(failed) > MAX_FAILED_SHARE * total:
        first, sample = failed[0]
        raise ScoringFailed(
            f"{chosen.name}: {len(failed)} samples so far could not be scored, more than {MAX_FAILED_SHARE:.0%} of all "
            f"{total}, so what is left would be a biased sample. The first: reward {chosen.reward.column!r} on problem "
            f"{first['problem']}: {sample['detail'] or sample['status']}"
        )


def _scorers(chosen: Sequence[Chosen], options: Options, stack: ExitStack) -> dict[str, Scorer]:
    """One for each benchmark; benchmarks with equal rewards share theirs."""
    by_reward: dict[str, Scorer] = {}
    found: dict[str, Scorer] = {}
    for one in chosen:
        key = digest(one.reward.wire())
        if key not in by_reward:
            scorer = Scorer([one.reward], options.workers, plugins=options.plugins, sys_path=[str(Path.cwd())])
            by_reward[key] = stack.enter_context(scorer)
        found[one.name] = by_reward[key]
    return found


def _checking(stop: GracefulStop, progress: Progress) -> Callable[[], None]:
    """What is called at each completion."""

    def check() -> None:
        progress.sampled()
        stop.check()

    return check


def _import_plugins(plugins: Sequence[str]) -> None:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: a module beside us never takes the place of an installed one
    for module in ("rewards", *plugins):
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever a user's module may do when it is imported
            raise UserError(f"cannot import '{module}': {type(error).__name__}: {error}") from error
