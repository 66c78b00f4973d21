"""Diagnosis: what goes wrong in online training, with the evidence and the key of the recipe to change.

An alarm looks at the means of a stage's last ``run.alarm_window`` steps. It is said once, when it begins;
``result.json`` holds it with the steps between which it was on. It changes nothing in the training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

ENTROPY_SHARE = 0.2
"""Of the entropy at the beginning of the stage, below which it has collapsed."""
SOLVED = 0.9
"""Accuracy from which a policy may be certain."""
DEAD_SHARE = 0.7
NEARLY_SOLVED = 0.8
"""Accuracy from which groups without a difference are what success looks like."""
TRUNCATED_SHARE = 0.2
MISMATCH_NATS = 0.02
"""Of KL per token; bfloat16 against float32 gives some 0.001."""
LENGTH_CORRELATION = 0.5
CLIPPED_SHARE = 0.2
SIGNAL = 1e-6
"""Mean absolute advantage below which there is nothing to learn."""
WATCHED = (
    "entropy",
    "accuracy",
    "zero_variance",
    "truncated",
    "mismatch_kl",
    "reward_length_correlation",
    "staleness",
    "clipped_low",
    "clipped_high",
    "advantage_abs",
    "imitated",
)
"""The metrics that alarms look at."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that needs attention."""

    name: str
    stage: str
    step: int
    """Of the run: when it was raised."""
    last_step: int
    """The last at which it was still on."""
    evidence: str
    """With its numbers when it was raised."""
    remedy: str
    """What to change, by the recipe's keys."""

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}. {self.remedy}"


class Window:
    """Means over the first and the last steps of a stage; NaN where a metric is missing."""

    def __init__(self, first: Sequence[Mapping[str, float]], last: Sequence[Mapping[str, float]]) -> None:
        self.first, self.last = first, last

    def __getitem__(self, name: str) -> float:
        return _mean(self.last, name)

    def at_first(self, name: str) -> float:
        """The mean over the stage's first steps."""
        return _mean(self.first, name)

    def highest(self, name: str) -> float:
        """The maximum over the last steps."""
        return max((m.get(name, math.nan) for m in self.last), default=math.nan)


def _mean(steps: Sequence[Mapping[str, float]], name: str) -> float:
    values = [m[name] for m in steps if not math.isnan(m.get(name, math.nan))]
    return math.fsum(values) / len(values) if values else math.nan


def _entropy_collapse(w: Window) -> str | None:
    before, now = w.at_first("entropy"), w["entropy"]
    if not now < ENTROPY_SHARE * before or w["accuracy"] >= SOLVED:
        return None
    attained = "" if math.isnan(w["accuracy"]) else f" at an accuracy of {w['accuracy']:.0%}"
    return f"entropy fell from {before:.3f} to {now:.3f} nats a token{attained}"


def _dead_groups(w: Window) -> str | None:
    dead = w["zero_variance"]
    if not dead > DEAD_SHARE or w["accuracy"] >= NEARLY_SOLVED or w.highest("advantage_abs") < SIGNAL:
        return None
    equal = f"in {dead:.0%} of the groups all rewards are equal"
    if math.isnan(w["accuracy"]):
        return equal
    why = "mostly solved" if w["accuracy"] > 0.5 else "mostly failed"
    return f"{equal} ({why}: accuracy {w['accuracy']:.0%})"


def _truncation(w: Window) -> str | None:
    share = w["truncated"]
    return f"{share:.0%} of the rollouts end at the length limit" if share > TRUNCATED_SHARE else None


def _mismatch(w: Window) -> str | None:
    kl = w["mismatch_kl"]
    if not kl > MISMATCH_NATS or w["staleness"] > 0:
        return None
    return f"sampler and learner disagree on log-probabilities of the same weights: KL {kl:.3f} nats a token"


def _reward_length(w: Window) -> str | None:
    r = w["reward_length_correlation"]
    return f"within groups reward and length correlate at {r:.2f}" if r > LENGTH_CORRELATION else None


def _stale_data(w: Window) -> str | None:
    lag, clipped = w["staleness"], w["clipped_low"] + w["clipped_high"]
    if not (lag > 0 and (clipped > CLIPPED_SHARE or w["mismatch_kl"] > MISMATCH_NATS)):
        return None
    kl = w["mismatch_kl"]
    return f"batches are {lag:.1f} policy versions old, KL {kl:.3f} nats a token from the policy, {clipped:.0%} clipped"


def _no_learning_signal(w: Window) -> str | None:
    if not w.highest("advantage_abs") < SIGNAL or w["imitated"] > 0:
        return None
    return f"no advantage in {len(w.last)} steps: within every group all rewards were equal"


@dataclass(frozen=True)
class Rule:
    """When an alarm is on, and what to do about it; ``{at}`` stands for the stage's place in the recipe."""

    name: str
    evidence: Callable[[Window], str | None]
    remedy: str
    of_groups: bool = False
    """Whether it holds only where advantages come from comparing a group's rollouts."""


RULES = (
    Rule(
        "entropy_collapse",
        _entropy_collapse,
        "Add one of {at}.algorithm.entropy_controls, raise {at}.algorithm.policy_loss.clip_high, or lower "
        "{at}.learner.lr",
    ),
    Rule(
        "dead_groups",
        _dead_groups,
        "Choose prompts by difficulty in {at}.curricula, raise {at}.group_size, or change data.train",
        of_groups=True,
    ),
    Rule(
        "truncation",
        _truncation,
        "Raise {at}.sampling.max_tokens, or say in {at}.algorithm.weighting.truncated what such rollouts are worth",
    ),
    Rule(
        "mismatch",
        _mismatch,
        "Give {at}.sampler and {at}.learner the same number format, and keep {at}.algorithm.correction on",
    ),
    Rule(
        "reward_length_correlation",
        _reward_length,
        "Look at rollouts.jsonl for padding; divide by a constant in {at}.algorithm.aggregation, or price length in "
        "rewards",
    ),
    Rule("stale_data", _stale_data, "Lower {at}.max_staleness, or lower {at}.learner.lr"),
    Rule(
        "no_learning_signal",
        _no_learning_signal,
        "See in rollouts.jsonl whether rewards can find an answer; then easier data.train, or demonstrations first",
        of_groups=True,
    ),
)


class Alarms:
    """What alarms remember of a run.

    Args:
        window: Steps that they look at; 0 turns them off.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.raised: list[Alarm] = []
        self._stage = ""
        self._first: list[dict[str, float]] = []
        self._last: list[dict[str, float]] = []
        self._on: dict[str, int] = {}
        """Alarms that are on, by name: where they stand in ``raised``."""

    def after(
        self, step: int, stage: str, at: str, metrics: Mapping[str, float], *, of_groups: bool = True
    ) -> list[Alarm]:
        """Takes a step's metrics in; the alarms that begin with it.

        Args:
            step: Of the run.
            stage: Name of the stage.
            at: Its place in the recipe, such as ``stages.1``.
            metrics: Of the step.
            of_groups: Whether advantages come from comparing a group's rollouts, and from no critic.
        """
        if not self.window:
            return []
        if stage != self._stage:
            self._stage, self._first, self._last, self._on = stage, [], [], {}
        seen = {name: float(metrics[name]) for name in WATCHED if name in metrics}
        if len(self._first) < self.window:
            self._first.append(seen)
        self._last = [*self._last, seen][-self.window :]
        if len(self._last) < self.window:
            return []
        begun, window = [], Window(self._first, self._last)
        for rule in RULES:
            evidence = rule.evidence(window) if of_groups or not rule.of_groups else None
            if evidence is None:
                self._on.pop(rule.name, None)
            elif rule.name in self._on:
                place = self._on[rule.name]
                self.raised[place] = replace(self.raised[place], last_step=step)
            else:
                self._on[rule.name] = len(self.raised)
                self.raised.append(Alarm(rule.name, stage, step, step, evidence, rule.remedy.format(at=at)))
                begun.append(self.raised[-1])
        return begun

    def report(self) -> list[dict[str, Any]]:
        """All that were raised, in order: JSON values for ``result.json``."""
        return [asdict(alarm) for alarm in self.raised]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "stage": self._stage,
            "first": self._first,
            "last": self._last,
            "on": self._on,
            "raised": self.report(),
        }

    @classmethod
    def from_json(cls, window: int, saved: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` described, looked at through ``window`` steps from now on."""
        alarms = cls(window)
        alarms._stage, alarms._on = saved["stage"], dict(saved["on"])
        alarms._first = [_numbers(m) for m in saved["first"]][:window]
        alarms._last = [_numbers(m) for m in saved["last"]][-window:] if window else []
        alarms.raised = [Alarm(**alarm) for alarm in saved["raised"]]
        return alarms


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """JSON writes what is not a number as null."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}
