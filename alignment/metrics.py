"""What a run says of itself: records, the sinks that receive them, the summary of a batch, and phase timers.

A sink is any object with the five methods of :class:`Sink`; ``alignment.train(recipe, sinks=[...])`` adds
the user's own.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

from alignment.types import Batch, Group, Rollout

NOT_TRAINING = ("evaluate", "save")
"""Phases that do not count in tokens per second."""


@dataclass(frozen=True, slots=True)
class Record:
    """The metrics of one step, or of one evaluation."""

    step: int
    """Optimizer batches so far over the whole run."""
    stage: str
    stage_step: int
    stage_steps: int
    metrics: Mapping[str, float]
    """By name. NaN and infinities are allowed; strict JSON writes them as null."""
    kind: Literal["train", "eval"] = "train"


@runtime_checkable
class Sink(Protocol):
    """Receives what a run reports. All calls come from one thread, in the order of this class."""

    def start(self, run: Mapping[str, Any]) -> None:
        """Before the first step.

        Args:
            run: ``name``, ``folder``, ``recipe`` (resolved, JSON values), ``stages`` (a list of ``{name, stage,
                steps}``), ``data`` (what each section holds) and ``resumed_from`` (a checkpoint's step, or None).
        """
        ...

    def log(self, record: Record) -> None:
        """After each step and each evaluation. Raising :class:`alignment.signals.Stopped` after a step ends the run
        as a stop would: the step is saved."""
        ...

    def rollouts(self, step: int, stage: str, groups: Sequence[Group]) -> None:
        """Every ``run.rollouts_every`` online steps: all groups that were sampled for it, scored."""
        ...

    def finish(self, result: Mapping[str, Any]) -> None:
        """Once, with what :func:`build_result` made, when the run is complete or stops early."""
        ...

    def close(self) -> None:
        """Always, also after an error; may be called twice."""
        ...


class Sinks:
    """Forwards to several sinks. A context manager that closes them all, even if one of them fails to close."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.members = tuple(sinks)
        for sink in self.members:
            if not isinstance(sink, Sink):
                raise TypeError(f"{type(sink).__name__} is no sink: it needs start, log, rollouts, finish and close")

    def start(self, run: Mapping[str, Any]) -> None:
        for sink in self.members:
            sink.start(run)

    def log(self, record: Record) -> None:
        for sink in self.members:
            sink.log(record)

    def rollouts(self, step: int, stage: str, groups: Sequence[Group]) -> None:
        for sink in self.members:
            sink.rollouts(step, stage, groups)

    def finish(self, result: Mapping[str, Any]) -> None:
        for sink in self.members:
            sink.finish(result)

    def close(self) -> None:
        with ExitStack() as stack:  # closes every one, then raises what the first to fail raised
            for sink in self.members:
                stack.callback(sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _deviation(values: Sequence[float], mean: float) -> float:
    """The population's standard deviation; the exact fractions of :mod:`statistics` would take half of a summary."""
    return math.sqrt(_mean([(value - mean) ** 2 for value in values])) if values else math.nan


def _reward_length_correlation(groups: Sequence[Group]) -> float:
    """Over scored rollouts of the policy, within groups; NaN where rewards or lengths do not vary there."""
    xx = yy = xy = 0.0
    for group in groups:
        pairs = [
            (r.reward, len(r.token_ids)) for r in group.rollouts if r.reward is not None and r.source != "demonstration"
        ]
        x_mean, y_mean = _mean([x for x, _ in pairs]), _mean([y for _, y in pairs])
        for x, y in pairs:
            xx, yy, xy = xx + (x - x_mean) ** 2, yy + (y - y_mean) ** 2, xy + (x - x_mean) * (y - y_mean)
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan


def summarise(groups: Sequence[Group], dropped: Mapping[str, int] | None = None) -> dict[str, float]:
    """The metrics of the rollouts that were sampled for one step; a mean over nothing is NaN.

    Args:
        groups: All of them, before any filter. Demonstrations among the rollouts are left out.
        dropped: How many of the groups were left out of the update, by the component that dropped them.

    Returns:
        ``reward`` and ``reward_std`` over scored rollouts; ``accuracy`` by the first component, where it gave a
        value (NaN if it gave one above 1: then it is no verdict, but a scale); ``reward/<component>``, the mean where
        it applies; ``status/<status>``, the scores with that status; ``unscored`` and ``truncated``, shares of the
        rollouts; ``length`` and ``length_max`` in tokens; ``zero_variance``, the share of groups whose scored rewards
        are all equal, so that nothing is learned from them; ``reward_length_correlation``, Pearson's, of what is left
        of both when each group's mean is taken away; ``dropped/<component>`` and ``dropped_groups``; the counts
        ``groups``, ``rollouts``, ``prompt_tokens`` (a prompt counts for each of its rollouts) and
        ``completion_tokens`` (observations included).
    """
    dropped = dropped or {}
    rollouts = [r for g in groups for r in g.rollouts if r.source != "demonstration"]
    rewards = [r.reward for r in rollouts if r.reward is not None]
    lengths = [len(r.token_ids) for r in rollouts]
    correct = [verdict for r in rollouts if (verdict := r.correct) is not None]
    reward = _mean(rewards)
    metrics: dict[str, float] = {
        "reward": reward,
        "reward_std": _deviation(rewards, reward),
        "accuracy": math.nan if any(_on_a_scale(r) for r in rollouts) else _mean(correct),
        "unscored": _mean([not r.scored for r in rollouts]),
        "truncated": _mean([r.finish_reason == "length" for r in rollouts]),
        "length": _mean(lengths),
        "length_max": max(lengths, default=0),
        "reward_length_correlation": _reward_length_correlation(groups),
        "zero_variance": _mean([len(set(g.rewards)) <= 1 for g in groups]),
        "dropped_groups": sum(dropped.values()),
        "groups": len(groups),
        "rollouts": len(rollouts),
        "prompt_tokens": sum(len(r.prompt_ids) for r in rollouts),
        "completion_tokens": sum(lengths),
    }
    metrics |= {f"dropped/{name}": count for name, count in dropped.items()}
    scores = [named for r in rollouts for named in r.scores.items()]
    values: dict[str, list[float]] = {name: [] for name, _ in scores}
    for name, score in scores:
        if score.value is not None:
            values[name].append(score.value)
    metrics |= {f"status/{status}": count for status, count in Counter([s.status for _, s in scores]).items()}
    return metrics | {f"reward/{name}": _mean(of) for name, of in values.items()}


def _on_a_scale(rollout: Rollout) -> bool:
    """Whether its first score is above 1, as a reward model's may be."""
    first = next(iter(rollout.scores.values()), None)
    return first is not None and first.value is not None and first.value > 1.0


def read_tokens(batch: Batch, shares_policy: bool = False) -> dict[str, float]:
    """How many tokens of an annotated batch each model has read without learning from them: ``read_tokens/policy``
    (old log-probabilities, entropies), ``read_tokens/reference`` and ``read_tokens/values``, where it did.

    Args:
        batch: From ``learner.annotate``, before anything else fills it in.
        shares_policy: The critic is a head on the policy: its values come with the policy's own pass.
    """
    values = batch.values_BT is not None
    policy = batch.old_logp_BT is not None or batch.entropy_BT is not None or (values and shares_policy)
    done = {"policy": policy, "reference": batch.ref_logp_BT is not None, "values": values and not shares_policy}
    tokens = float(batch.length_B.sum())
    return {f"read_tokens/{name}": tokens for name, passed in done.items() if passed}


def read_again(read: Mapping[str, float], update: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a learner's ``update`` with ``read`` of :func:`read_tokens`, to which are added the tokens that the
    policy read between the update's steps."""
    found = {**update, **read}
    if again := found.pop("read_tokens", 0.0):
        found["read_tokens/policy"] = read.get("read_tokens/policy", 0.0) + again
    return found


@dataclass
class Phases:
    """Adds up the seconds of each phase of a step: ``with phases("sample"): ...``."""

    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.clock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start

    def flush(self, **counts: int) -> dict[str, float]:
        """``time/<phase>`` since the last call and ``time/total``; ``<name>_per_s``, without evaluation and saving, of
        what was counted meanwhile, such as ``tokens``."""
        now = self.clock()
        total, self.since = now - self.since, now
        phases, self.seconds = self.seconds, {}
        metrics = {f"time/{name}": s for name, s in phases.items()} | {"time/total": total}
        working = total - sum(phases.get(name, 0.0) for name in NOT_TRAINING)
        return metrics | {f"{name}_per_s": n / working for name, n in counts.items() if n and working > 0}


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage as ``result.json`` and the final table show it.

    ``before`` and ``after`` are evaluations: ``{accuracy, interval: [low, high], n}``, or None where none was made.
    ``labels`` counts what the stage learned from, such as ``{"demonstrations": 400}``.
    """

    name: str
    stage: str
    steps: int
    seconds: float
    labels: Mapping[str, int]
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What else was measured at both ends, such as ``{"ranking": {"before": 0.5, "after": 0.7}}``."""


def build_result(
    *,
    status: Literal["complete", "interrupted"],
    stages: Sequence[StageResult],
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    best: Mapping[str, Any] | None,
    folder: Path,
    files: Mapping[str, str],
    alarms: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What ``result.json`` holds: JSON values only.

    Args:
        status: How the run ended.
        stages: Those that were started, in order.
        before: The evaluation that the run is measured against.
        after: The last one.
        best: Step and accuracy of the best checkpoint.
        folder: The run's folder.
        files: What was written: path inside the folder, and what it is.
        alarms: Those that were raised, as :meth:`alignment.alarms.Alarms.report` describes them.
    """
    return {
        "status": status,
        "stages": [
            {
                "name": s.name,
                "stage": s.stage,
                "steps": s.steps,
                "seconds": round(s.seconds, 3),
                "labels": dict(s.labels),
                "eval": {"before": s.before and dict(s.before), "after": s.after and dict(s.after)},
                **({"measured": {name: dict(ends) for name, ends in s.measured.items()}} if s.measured else {}),
            }
            for s in stages
        ],
        "eval": {"before": before and dict(before), "after": after and dict(after)},
        "best": best and dict(best),
        "alarms": [dict(alarm) for alarm in alarms],
        "folder": str(folder),
        "files": dict(files),
    }


def entropy_change(
    before: Mapping[str, float], stage: str, metrics: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """What an update did to the entropy, as far as the next batch shows it, beside what was predicted of it.

    Args:
        before: The state's counters.
        stage: Its name.
        metrics: Of this step's update.

    Returns:
        ``entropy_change``, the mean entropy of this update's tokens less that of the stage's update before, which was
        of other prompts; ``entropy_change_predicted``, the ``entropy_predicted`` of that update (nats per unit of a
        step in the logits: of use for its sign and its course, not its size). Empty at first. And the next counters.
    """
    names = {"entropy": f"entropy/{stage}", "entropy_predicted": f"entropy_predicted/{stage}"}
    if not names.keys() <= metrics.keys():
        return {}, dict(before)
    found: dict[str, float] = {}
    if names["entropy"] in before:
        found["entropy_change"] = metrics["entropy"] - before[names["entropy"]]
        found["entropy_change_predicted"] = before[names["entropy_predicted"]]
    return found, {**before, **{place: metrics[name] for name, place in names.items()}}
