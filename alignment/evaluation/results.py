"""What an evaluation keeps of each problem, and the scores that it amounts to. Pure functions of JSON values."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import nan
from statistics import fmean
from typing import Any

from alignment.evaluation.statistics import interval, maj_at_k, pass_at_k, powers_of_two
from alignment.types import Group, Rollout

Record = Mapping[str, Any]
"""One line of ``samples.jsonl``: a problem with all its samples."""


def record(group: Group) -> dict[str, Any]:
    """What is kept of a scored group."""
    prompt = group.prompt
    return {
        "problem": prompt.id,
        "origin": prompt.origin,
        "prompt": prompt.row["prompt"],
        "reference": prompt.row.get("answer"),
        "samples": [_sample(rollout) for rollout in group.rollouts],
    }


def _sample(rollout: Rollout) -> dict[str, Any]:
    score = next(iter(rollout.scores.values()))
    return {
        "completion": rollout.text,
        "answer": score.answer,
        "status": score.status,
        "detail": score.detail,
        "correct": rollout.correct if rollout.scored else None,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.token_ids),
    }


def accuracies(records: Sequence[Record]) -> dict[str, float]:
    """Share of correct samples of each problem, by its name; problems without a verdict are left out."""
    judged = {r["problem"]: _verdicts(r) for r in records}
    return {problem: fmean(verdicts) for problem, verdicts in judged.items() if verdicts}


def summarise(records: Sequence[Record], samples: int) -> dict[str, Any]:
    """The scores of a benchmark.

    Args:
        records: One for each problem.
        samples: That each problem has.

    Returns:
        ``scores``: ``avg@n``, ``pass@k`` and ``maj@k`` for powers of two, each with ``value``, its 95 % ``interval``
        over problems, and ``problems``, how many have that many verdicts. ``maj@k`` is left out where the reward does
        not say which answer it read. ``truncated``, ``unparseable`` (shares) and ``length`` (mean, in tokens) are of
        samples with a verdict; ``unscored`` counts those without one, and ``statuses`` all.
    """
    drawn = [s for r in records for s in r["samples"]]
    scored = [s for s in drawn if s["correct"] is not None]
    return {
        "problems": len(records),
        "samples": samples,
        "scores": _scores(records, samples),
        "truncated": _mean([s["finish_reason"] == "length" for s in scored]),
        "unparseable": _mean([s["status"] == "unparseable" for s in scored]),
        "length": _mean([s["tokens"] for s in scored]),
        "unscored": len(drawn) - len(scored),
        "statuses": dict(sorted(Counter(s["status"] for s in drawn).items())),
    }


def _scores(records: Sequence[Record], samples: int) -> dict[str, dict[str, Any]]:
    ks = powers_of_two(samples)
    scores = {f"avg@{samples}": _score(records, 1, samples, lambda r: fmean(_verdicts(r)))}
    for k in ks:
        scores[f"pass@{k}"] = _score(
            records, k, samples, lambda r, k=k: pass_at_k(len(_verdicts(r)), sum(_verdicts(r)), k)
        )
    if all(s["answer"] is not None for r in records for s in r["samples"] if s["correct"]):
        for k in ks:
            scores[f"maj@{k}"] = _score(records, k, samples, lambda r, k=k: maj_at_k(_answers(r), _verdicts(r), k))
    return scores


def _score(records: Sequence[Record], k: int, samples: int, score: Callable[[Record], float]) -> dict[str, Any]:
    values = [score(r) for r in records if len(_verdicts(r)) >= k]
    return {"value": _mean(values), "interval": list(interval(values, samples // k)), "problems": len(values)}


def _verdicts(record: Record) -> list[bool]:
    return [s["correct"] for s in record["samples"] if s["correct"] is not None]


def _answers(record: Record) -> list[str | None]:
    return [s["answer"] for s in record["samples"] if s["correct"] is not None]


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else nan
