"""Accuracy on held-out problems, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, nan
from statistics import fmean

from alignment.evaluation.statistics import interval
from alignment.rollouts import Player, play
from alignment.score import Tally
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
    """Mean of each reward component, completion length in tokens and the truncated share; and the sums
    ``prompt_tokens`` and ``completion_tokens`` over all rollouts."""
    verdicts: Mapping[str, Tally] = field(default_factory=dict, repr=False)
    """By problem. A resumed run has none of those that were made before: they are in ``evaluations.jsonl``."""

    def flat(self) -> dict[str, float]:
        """As metrics by name."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "accuracy_low": low, "accuracy_high": high, **self.metrics}


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
    groups = scorer.score(play(player, prompts, range(len(prompts)), samples, params, seed, "eval/"))
    refuse_failures(groups, max_failed_share)
    return summarise_evaluation(groups)


def summarise_evaluation(groups: Sequence[Group]) -> Evaluation:
    """The evaluation that scored groups amount to."""
    judged = [[r.correct for r in g.rollouts if r.scored and r.correct is not None] for g in groups]
    accuracies = [fmean(verdicts) for verdicts in judged if verdicts]
    rollouts = [r for g in groups for r in g.rollouts]
    scored = [r for r in rollouts if r.scored]
    metrics = {
        "length": fmean(len(r.token_ids) for r in scored) if scored else nan,
        "truncated": fmean(r.finish_reason == "length" for r in scored) if scored else nan,
        "prompt_tokens": sum(len(r.prompt_ids) for r in rollouts),
        "completion_tokens": sum(len(r.token_ids) for r in rollouts),
    }
    for name in {name for r in scored for name in r.scores}:
        values = [s.value for r in scored if (s := r.scores.get(name)) and s.value is not None]
        if values:
            metrics[f"reward/{name}"] = fmean(values)
    return Evaluation(
        accuracy=fmean(accuracies) if accuracies else nan,
        interval=interval(accuracies, max(map(len, judged), default=1)),
        problems=len(accuracies),
        unscored=len(rollouts) - len(scored),
        metrics=dict(sorted(metrics.items())),
        verdicts={g.prompt.id: _tally(g) for g in groups},
    )


def _tally(group: Group) -> Tally:
    judged = [r for r in group.rollouts if r.scored and r.correct is not None]
    values = [next(iter(r.scores.values())).value or 0.0 for r in judged]
    return Tally(sum(bool(r.correct) for r in judged), len(judged), fsum(values))
