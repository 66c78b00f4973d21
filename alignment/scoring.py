"""Scores groups of rollouts in worker processes that can be killed. A failure is never a reward of 0.

A rollout gets one :class:`~alignment.types.Score` per reward column, with a status, and their weighted sum as its
reward. It stays unscored when a column failed (``error``, ``timeout``) or when none applied.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from alignment.errors import UserError
from alignment.reward_registry import RewardSpec
from alignment.scoring_pool import Pool
from alignment.scoring_process import Call
from alignment.scoring_worker import PROVIDED, Sample, Verdict, pack
from alignment.types import FAILED, Group, Prompt, Rollout, Score

ROWS_PER_CHECK = 64
"""Rows of the data set in one call of a reward's ``check``."""
ABSENT = Score(None, "skipped", "the environment gave no such score")


class ScoringFailed(UserError):
    """Too many rollouts could not be scored; says how many, by reward and status, and why the first one failed."""


class ScoringOptions(Protocol):
    """The ``scoring`` block of a recipe."""

    @property
    def workers(self) -> int: ...  # noqa: D102
    @property
    def timeout_s(self) -> float: ...  # noqa: D102


class ScoringRecipe(Protocol):
    """What scoring needs to know of a recipe."""

    @property
    def reward_specs(self) -> Sequence[RewardSpec]: ...  # noqa: D102
    @property
    def scoring(self) -> ScoringOptions: ...  # noqa: D102
    @property
    def plugins(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def folder(self) -> Path: ...  # noqa: D102
    @property
    def run(self) -> Any: ...  # noqa: D102
    @property
    def plugin_folders(self) -> Sequence[Path]: ...  # noqa: D102


class Scorer:
    """Scores groups in worker processes, which live from ``with`` to the end of it.

    Each call of a reward function gets the completions of one prompt and ``timeout_s`` seconds for each of them. When
    it hangs, dies or raises, they are tried one by one, so that only the one at fault is lost; to lose no time with
    the others, that already happens after a quarter of the timeout, unless the function is known to be slow. Thus a
    function sees some or all completions of a prompt. One that compares them must be ``group_level``: it always sees
    them all, in one call, and fails for all.

    What a reward function writes to standard output is discarded; standard error is the parent's.

    Args:
        specs: The reward columns, in the recipe's order.
        workers: Processes.
        timeout_s: For one call, in seconds.
        plugins: Modules that a worker imports first; they register rewards.
        sys_path: Folders that join the end of the workers' module path.

    Raises:
        UserError: Two rewards share a column, or an argument is out of range.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        workers: int = 1,
        timeout_s: float = 10.0,
        plugins: Sequence[str] = (),
        sys_path: Sequence[str] = (),
    ) -> None:
        doubles = [name for name, count in Counter(s.column for s in specs).items() if count > 1]
        if doubles:
            raise UserError(f"two rewards are called {doubles[0]!r}; give one of them another name ('as' or 'name')")
        if workers < 1 or not timeout_s > 0:
            raise UserError(f"scoring needs workers >= 1 and timeout_s > 0, not {workers} and {timeout_s}")
        self.specs = tuple(specs)
        self._computed = [spec for spec in specs if spec.function is not None]
        rewards = [spec.wire() for spec in self._computed]
        setup = {"rewards": rewards, "plugins": list(plugins), "sys_path": [str(p) for p in sys_path]}
        self._pool = Pool(setup, setup["sys_path"], workers, timeout_s)
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def from_recipe(cls, recipe: ScoringRecipe) -> Self:
        """The scorer that a recipe describes; modules beside the recipe can be imported."""
        options, folders = recipe.scoring, [str(folder) for folder in recipe.plugin_folders]
        specs = [spec.located(recipe.folder, recipe.run.folder) for spec in recipe.reward_specs]
        return cls(specs, options.workers, options.timeout_s, recipe.plugins, folders)

    def __enter__(self) -> Self:
        if self._computed:
            self._pool.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all worker processes, and with them what another thread is scoring; may be called twice."""
        if not self._closed:
            self._closed = True
            self._pool.interrupt()
            with self._lock:
                self._pool.close()

    def restart(self) -> None:
        """Starts the workers anew, so that they load what was not there before, and waits for them.

        Raises:
            UserError: One cannot be started.
        """
        if self._computed:
            with self._lock:
                self._pool.restart()

    def check(self, columns: Iterable[str] | None = None, where: str = "the data set") -> None:
        """Waits for the workers to be ready, so that what cannot be imported shows before a run starts.

        Args:
            columns: Those that every row of the data set has; when given, they must be all that the rewards need.
            where: What has these columns, for the error.

        Raises:
            UserError: A plugin or reward cannot be loaded, or a column is missing.
        """
        if not self._computed:
            return
        with self._lock:
            self._pool.wait_ready()
            if columns is not None:
                self._refuse_missing(set(columns), where)

    def faults(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """What makes each prompt's row useless to a reward, by the rewards' own ``check``; None where nothing does.

        Raises:
            UserError: A worker cannot be started, or a row holds more than JSON values.
        """
        assert not self._closed, "the scorer was closed"
        found: list[list[str]] = [[] for _ in prompts]

        def deliver(call: Call, answer: Sequence[Verdict]) -> None:
            for row, (_, status, detail, _) in zip(call.rows, answer, strict=True):
                if status in FAILED:
                    found[row].append(f"reward {self._computed[call.reward].column!r}: {detail}")

        checks = [number for number, spec in enumerate(self._computed) if spec.checks_rows]
        if checks and prompts:
            with self._lock:
                self._pool.wait_ready()
                self._pool.run(list(_row_checks(prompts, checks)), deliver)
        return ["; ".join(faults) or None for faults in found]

    def score(self, groups: Sequence[Group], *, step: int = 0, max_steps: int = 0) -> list[Group]:
        """The groups with every rollout's ``scores`` and ``reward`` filled in; may be called from any thread.

        Scores that the environment gave are kept if the recipe lists them (with weight 0 to look at them only). A score
        that a rollout already has under the name of a computed column is replaced.

        Args:
            groups: Their prompts' rows hold ``prompt`` and the columns that the rewards read.
            step: Reaches reward functions as ``trainer_state.global_step``.
            max_steps: Reaches them as ``trainer_state.max_steps``.

        Raises:
            UserError: A worker cannot be started, or a row lacks a column or holds more than JSON values.
        """
        assert not self._closed, "the scorer was closed"
        found: list[list[dict[str, Score]]] = [[{} for _ in g.rollouts] for g in groups]

        def deliver(call: Call, answer: Sequence[Verdict]) -> None:
            column = self._computed[call.reward].column
            for row, verdict in zip(call.rows, answer, strict=True):
                found[call.group][row][column] = Score(*verdict)  # pyright: ignore[reportArgumentType]

        if self._computed and any(g.rollouts for g in groups):
            with self._lock:
                self._pool.wait_ready()
                for names, group in {tuple(g.prompt.row): g for g in groups}.items():
                    self._refuse_missing({*names}, f"the row of prompt {group.prompt.id!r}")
                self._pool.run(list(self._calls(groups, step, max_steps)), deliver)
        return [
            replace(g, rollouts=tuple(self._merge(r, f) for r, f in zip(g.rollouts, scores, strict=True)))
            for g, scores in zip(groups, found, strict=True)
        ]

    def _calls(self, groups: Sequence[Group], step: int, max_steps: int) -> Iterable[Call]:
        for number, group in enumerate(groups):
            if not group.rollouts:
                continue
            sample = Sample(
                row=_encode(group.prompt),
                texts=[r.text for r in group.rollouts],
                token_ids=[pack(r.token_ids) for r in group.rollouts],
                length_tokens=[r.loss_mask.count(True) for r in group.rollouts],
                finish_reason=[r.finish_reason for r in group.rollouts],
                step=step,
                max_steps=max_steps,
            )
            rows = tuple(range(len(group.rollouts)))
            for reward, spec in enumerate(self._computed):
                yield Call(reward, sample, number, rows, spec.whole_group)

    def _refuse_missing(self, columns: set[str], where: str) -> None:
        taken = sorted(columns & set(PROVIDED))
        if taken:
            raise UserError(
                f"{where} has a column {taken[0]!r}, which rewards get from the rollouts; rename the column"
            )
        needs = [("prompt", "scoring"), *((n, f"reward {s.column!r}") for n, s in self._needs())]
        for name, by in needs:
            if name not in columns:
                has = ", ".join(sorted(columns)) or "none"
                raise UserError(f"{by} needs the column {name!r}, which {where} lacks; it has {has}")

    def _needs(self) -> list[tuple[str, RewardSpec]]:
        return [(n, s) for s, names in zip(self._computed, self._pool.needs, strict=True) for n in names]

    def _merge(self, rollout: Rollout, found: Mapping[str, Score]) -> Rollout:
        scores: dict[str, Score] = {}
        reward, failed = None, False
        for spec in self.specs:
            score = found[spec.column] if spec.function else rollout.scores.get(spec.column, ABSENT)
            scores[spec.column] = score
            failed = failed or score.status in FAILED
            if score.value is not None:
                reward = (reward or 0.0) + spec.weight * score.value
        return replace(rollout, scores=scores, reward=None if failed else reward)


def _row_checks(prompts: Sequence[Prompt], rewards: Sequence[int]) -> Iterable[Call]:
    for start in range(0, len(prompts), ROWS_PER_CHECK):
        rows = range(start, min(start + ROWS_PER_CHECK, len(prompts)))
        sample = Sample("", [_encode(prompts[i]) for i in rows], (), (), (), 0, 0)
        for reward in rewards:
            yield Call(reward, sample, start, tuple(rows), whole=False, check=True)


def _encode(prompt: Prompt) -> str:
    try:
        return json.dumps(dict(prompt.row))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the row of prompt {prompt.id!r} cannot be sent to the scoring workers, which take JSON values only: "
            f"{error}; convert or drop that column"
        ) from error


def failed_share(groups: Iterable[Group]) -> float:
    """Share of rollouts with a score that failed (``error`` or ``timeout``), 0 to 1; 0 where there are none."""
    rollouts = [r for g in groups for r in g.rollouts]
    failed = sum(any(s.status in FAILED for s in r.scores.values()) for r in rollouts)
    return failed / len(rollouts) if rollouts else 0.0


def refuse_failures(groups: Sequence[Group], max_failed_share: float) -> None:
    """Stops a run whose rewards mostly fail, since what is left would be a biased sample.

    Args:
        groups: Scored.
        max_failed_share: Of the rollouts, 0 to 1.

    Raises:
        ScoringFailed: More than that failed.
    """
    share = failed_share(groups)
    if share <= max_failed_share:
        return
    failures = [
        (r, name, score)
        for g in groups
        for r in g.rollouts
        for name, score in r.scores.items()
        if score.status in FAILED
    ]
    counts = Counter((name, score.status) for _, name, score in failures)
    by = ", ".join(f"{name}: {count} {status}" for (name, status), count in sorted(counts.items()))
    rollout, name, score = failures[0]
    total = sum(len(g.rollouts) for g in groups)
    raise ScoringFailed(
        f"{round(share * total)} of {total} rollouts ({share:.0%}) could not be scored, more than the "
        f"{max_failed_share:.0%} that scoring.max_failed_share allows ({by}). The first: reward {name!r} of rollout "
        f"{rollout.id!r} (prompt {rollout.prompt_id!r}): {score.detail or score.status}"
    )
