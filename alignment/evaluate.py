"""Accuracy on held-out problems, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from statistics import NormalDist, fmean

from alignment.rollouts import Player, play
from alignment.scoring import Scorer, refuse_failures
from alignment.types import Group, Prompt, SamplingParams


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. Unscored rollouts are left out of every mean and counted."""

    accuracy: float
    """Mean over problems of the share of samples that the first reward calls correct; NaN where none was judged."""
    interval: tuple[float, float]
    """95 % interval of ``accuracy`` over problems."""
    problems: int
    unscored: int
    metrics: Mapping[str, float]
    """Mean of each reward component, completion length in tokens and the truncated share."""

    def flat(self) -> dict[str, float]:
        """As metrics by name."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "accuracy_low": low, "accuracy_high": high, **self.metrics}


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Probable Inference, Wilson 1927); ``(0, 1)`` where ``n`` is 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(accuracies: Sequence[float], samples: int = 1, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of per-problem accuracies: samples of one problem are not independent problems.

    Wilson's interval for the number of independent samples that would vary as the mean does,
    ``p (1 - p) / Var(mean)``: at least one per problem, at most all that were drawn.
    """
    n = len(accuracies)
    if n == 0:
        return 0.0, 1.0
    mean = fmean(accuracies)
    variance = sum((a - mean) ** 2 for a in accuracies) / max(1, n - 1) / n
    independent = mean * (1 - mean) / variance if variance > 0 else n * samples
    independent = min(max(independent, n), n * samples)
    return wilson(mean * independent, independent, confidence)


def evaluate(
    player: Player,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    samples: int,
    seed: int,
    max_failed_share: float,
) -> Evaluation:
    """Samples ``samples`` completions of each prompt and scores them; the same seed gives the same evaluation.

    Raises:
        ScoringFailed: More than ``max_failed_share`` of the rewards failed.
    """
    groups = scorer.score(play(player, prompts, range(len(prompts)), samples, params, seed))
    refuse_failures(groups, max_failed_share)
    return summarise_evaluation(groups)


def summarise_evaluation(groups: Sequence[Group]) -> Evaluation:
    """The evaluation that scored groups amount to."""
    judged = [[r.correct for r in g.rollouts if r.scored and r.correct is not None] for g in groups]
    accuracies = [fmean(verdicts) for verdicts in judged if verdicts]
    rollouts = [r for g in groups for r in g.rollouts]
    metrics = {
        "length": fmean(len(r.token_ids) for r in rollouts) if rollouts else 0.0,
        "truncated": fmean(r.finish_reason == "length" for r in rollouts) if rollouts else 0.0,
    }
    for name in {name for r in rollouts for name in r.scores}:
        values = [s.value for r in rollouts if (s := r.scores.get(name)) and s.value is not None]
        if values:
            metrics[f"reward/{name}"] = fmean(values)
    return Evaluation(
        accuracy=fmean(accuracies) if accuracies else nan,
        interval=interval(accuracies, max(map(len, judged), default=1)),
        problems=len(accuracies),
        unscored=sum(not r.scored for r in rollouts),
        metrics=dict(sorted(metrics.items())),
    )
