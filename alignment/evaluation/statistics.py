"""Scores of an evaluation with several samples per problem, their intervals, and the comparison of two evaluations.

Pure functions of plain numbers. Problems are what is drawn from a population; samples of one problem are not
independent of each other, so every interval and every test here is over problems.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb, log, prod, sqrt
from statistics import NormalDist, fmean

import numpy as np

EXACT_FLIPS = 14
"""Up to so many differing problems, all sign flips are tried."""
DRAWN_FLIPS = 20_000
"""Beyond that, so many random ones."""


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Probable Inference, Wilson 1927); ``(0, 1)`` where ``n`` is 0."""
    if n == 0:
        return 0.0, 1.0
    z = _z(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # not 1e-18
    return low, 1.0 if successes == n else min(1.0, centre + half)


def interval(scores: Sequence[float], samples: int = 1, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of per-problem scores in [0, 1]: samples of one problem are not independent problems.

    Wilson's interval for the number of independent outcomes that would vary as the mean does,
    ``p (1 - p) / Var(mean)``: at least one per problem, at most ``samples`` per problem. Unlike a normal interval it
    stays inside [0, 1] and does not shrink to a point where every problem has the same score. For ``p`` and ``Var``
    alone, half a problem that is always solved and half a one that never is are added: few problems may happen to be
    alike where the population is not.

    Args:
        scores: One per problem.
        samples: Independent outcomes that a problem's score is made of: its samples for ``avg@n``, ``n // k`` for
            ``pass@k`` and ``maj@k``, which see k samples at a time.
        confidence: How often such intervals hold the true mean.
    """
    n = len(scores)
    if n == 0:
        return 0.0, 1.0
    mean = min(1.0, max(0.0, fmean(scores)))
    p = (n * mean + 0.5) / (n + 1)
    variance = (sum((a - p) ** 2 for a in scores) + 0.5 * p**2 + 0.5 * (1 - p) ** 2) / n / (n + 1)
    independent = min(max(p * (1 - p) / variance, n), n * samples)
    return wilson(mean * independent, independent, confidence)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of ``k`` samples, drawn without replacement from ``n``, is correct.

    ``1 - C(n - c, k) / C(n, k)``, the unbiased estimator of "Evaluating Large Language Models Trained on Code"
    (arXiv 2107.03374), in its product form ``1 - prod_{i=n-c+1..n} (1 - k / i)``, which does not overflow.

    Raises:
        ValueError: Not ``1 <= k <= n`` or not ``0 <= correct <= n``.
    """
    _check(n, correct, k)
    if n - correct < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def best_of_n(proxy: Sequence[float], score: Sequence[float], n: int) -> float:
    """Expected score of the sample that a proxy likes best among ``n``, drawn without replacement from all N of them.

    ``sum_{i=n..N} C(i-1, n-1) / C(N, n) score_(i)``, with (i) the i-th in ascending order of the proxy: the unbiased
    estimator of "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv 2310.02743; its authors say that they
    use one, the formula is from memory). Among samples that the proxy likes equally, each is as likely to be taken.

    Raises:
        ValueError: Not ``1 <= n <= N``, or not as many scores of both kinds.
    """
    _check(len(proxy), 0, n)
    _, place_N, count_U = np.unique(np.asarray(proxy, dtype=np.float64), return_inverse=True, return_counts=True)
    even_U = np.bincount(place_N, np.asarray(score, dtype=np.float64)) / count_U
    upper_U, total = np.cumsum(count_U), len(proxy)
    # All n lie among the lowest m with probability C(m, n) / C(N, n) = prod_{j=m+1..N} (j - n) / j.
    steps_N = np.arange(total, 0, -1, dtype=np.float64)
    below_N = np.concatenate([np.cumprod(np.maximum(steps_N - n, 0) / steps_N)[::-1], [1.0]])
    return float(np.diff(below_N[np.concatenate([[0], upper_U])]) @ even_U)


def best_of_n_kl(n: int) -> float:
    """``log n - (n - 1) / n`` nats, how far the best of ``n`` samples is from one (arXiv 2310.02743, from memory); an
    upper bound where samples may be alike (Theoretical guarantees on the best-of-n alignment policy, arXiv
    2401.01879, from memory)."""
    return log(n) - (n - 1) / n


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Expected accuracy of the most frequent answer among ``k`` samples, drawn without replacement from all of them.

    The mean over all subsets of size k, computed exactly, of "Self-Consistency Improves Chain of Thought Reasoning in
    Language Models" (arXiv 2203.11171). Equal texts are one answer. Answers with equally many votes share the verdict
    evenly; samples without an answer (None) do not vote, and a subset in which nobody votes counts as wrong. The
    reference answer has no part in the vote: where samples with the same text were judged differently, that answer is
    worth the share of them that was judged correct.

    Args:
        answers: Canonical text of each sample's answer.
        correct: The verdict on each sample.
        k: Voters.

    Raises:
        ValueError: Not ``1 <= k <= len(answers)``.
    """
    _check(len(answers), 0, k)
    votes = Counter(a for a in answers if a is not None)
    right = Counter(a for a, ok in zip(answers, correct, strict=True) if a is not None and ok)
    silent = len(answers) - votes.total()
    won = Fraction(0)
    for answer, count in right.items():
        others = [n for other, n in votes.items() if other != answer]
        won += Fraction(count, votes[answer]) * _ways_to_win(votes[answer], others, silent, k)
    return float(won / comb(len(answers), k))


def _ways_to_win(own: int, others: Sequence[int], silent: int, k: int) -> Fraction:
    """Subsets of size k in which an answer with ``own`` votes leads; one where r others tie with it counts 1/(1+r)."""
    ways = Fraction(0)
    for lead in range(1, min(own, k) + 1):
        table = {(lead, 0): comb(own, lead)}  # (voters so far, answers that tie) -> subsets
        for votes in others:
            step: Counter[tuple[int, int]] = Counter()
            for (used, ties), count in table.items():
                for taken in range(min(votes, lead, k - used) + 1):
                    step[used + taken, ties + (taken == lead)] += count * comb(votes, taken)
            table = step
        ways += sum((Fraction(n * comb(silent, k - used), 1 + ties) for (used, ties), n in table.items()), Fraction(0))
    return ways


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to ``n``, and ``n`` itself."""
    return sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})


@dataclass(frozen=True)
class Paired:
    """Evaluation B against evaluation A on the same problems."""

    problems: int
    a: float
    b: float
    """Mean scores."""
    difference: float
    """``b - a``."""
    interval: tuple[float, float]
    """95 % interval of ``difference`` over problems."""
    p: float
    """Two-sided p of no difference."""
    wins: int
    """Problems on which B scores higher."""
    ties: int
    losses: int


def compare(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Paired:
    """Compares two evaluations problem by problem, so that what makes problems hard for both cancels out.

    The interval is ``m +- z sqrt((q - m^2) / N)`` with ``N = n + 2``, ``m = sum d / N`` and ``q = (sum d^2 + 1) / N``
    for the n differences d: the one of "Simple Improved Confidence Intervals for Comparing Matched Proportions"
    (Agresti and Min, 2005), which adds half a problem to each of the four cells right/wrong by right/wrong. So it does
    not shrink to a point where the two never differ.

    p is that of the sign-flip permutation test: how often a sum of the differences with random signs is at least as
    far from 0. All flips are tried for up to 14 differing problems (with right-or-wrong scores this is McNemar's exact
    test), else 20,000 random ones with a fixed seed.

    Args:
        a: One score in [0, 1] per problem.
        b: The scores of the same problems, in the same order.
        confidence: Of the interval.

    Raises:
        ValueError: There is no problem, or not equally many.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"two evaluations of the same problems are compared, not {len(a)} and {len(b)} scores")
    d = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    n, weight = len(d), len(d) + 2
    centre = float(d.sum()) / weight
    spread = max(0.0, (float((d * d).sum()) + 1) / weight - centre**2)
    half = _z(confidence) * sqrt(spread / weight)
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    bounds = (max(-1.0, centre - half), min(1.0, centre + half))
    return Paired(n, fmean(a), fmean(b), float(d.mean()), bounds, sign_flip_p(d), wins, n - wins - losses, losses)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the sign-flip permutation test; see :func:`compare`."""
    d = np.abs(np.asarray(differences, dtype=np.float64))
    d, observed = d[d > 0], abs(float(np.sum(differences)))
    if not len(d):
        return 1.0
    near = observed - 1e-9 * float(d.sum())  # sums of the same numbers in another order differ by rounding
    if len(d) <= EXACT_FLIPS:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= near).mean())
    generator = np.random.Generator(np.random.Philox(key=0))
    drawn = [_flipped_sums(d, generator) for _ in range(DRAWN_FLIPS // 1000)]
    extreme = sum(int((np.abs(sums) >= near).sum()) for sums in drawn)
    return (1 + extreme) / (1 + DRAWN_FLIPS)


def _flipped_sums(d: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A thousand sums with random signs."""
    return (2.0 * generator.integers(0, 2, (1000, len(d)), dtype=np.int8) - 1.0) @ d


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _check(n: int, correct: int, k: int) -> None:
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"of {n} samples, {correct} correct, at k = {k}: k must be 1 to n and correct 0 to n")
