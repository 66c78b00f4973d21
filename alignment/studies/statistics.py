"""Intervals over seeds and problems, and the rule that turns an interval into a verdict."""

from collections.abc import Sequence
from math import lgamma, log, pi, sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np

Word = Literal["holds", "does not hold", "inconclusive", "regime not reached"]
RESAMPLES = 10_000


def word(mean: float, interval: tuple[float, float], minimum: float, reached: bool = True) -> Word:
    """One word on a claim that an effect is at least ``minimum``.

    ``holds``: its estimate is, and the interval lies above 0, or, where ``minimum`` is below 0 and so a margin, above
    that. ``does not hold``: the interval lies below ``minimum``. ``inconclusive`` otherwise, and ``regime not
    reached`` where the question could not be asked.
    """
    if not reached:
        return "regime not reached"
    low, high = interval
    if mean >= minimum and low > min(0.0, minimum):
        return "holds"
    return "does not hold" if high < minimum else "inconclusive"


def seed_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of ``values``, one for each seed.

    Right where everything that is random varies between seeds. With one seed nothing is known: the interval is
    everything.
    """
    n = len(values)
    if n < 2:
        return -float("inf"), float("inf")
    half = student(confidence, n - 1) * float(np.std(values, ddof=1)) / sqrt(n)
    mean = float(np.mean(values))
    return mean - half, mean + half


def bootstrap_interval(
    values: Sequence[Sequence[float]], crossed: bool, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Hierarchical bootstrap of the mean over seeds of the mean over a seed's problems.

    Each of 10,000 resamples draws seeds with replacement and then problems of each drawn seed with replacement. Where
    all seeds have the same problems (``crossed``), problems are drawn once for all seeds of a resample: a problem that
    favours a method does so in every seed, so that drawing anew for each would take it for noise that averages out.

    The ends are expanded percentiles (What Teachers Should Know about the Bootstrap, arXiv 1411.5279; from memory):
    those at ``Phi(-sqrt(n / (n - 1)) t)`` with Student's t for n seeds, since plain percentiles of 8 seeds are too
    narrow. With one seed nothing is known of others: the interval is everything.

    Args:
        values: Of each seed, one number for each problem.
        crossed: Whether column j is the same problem in every seed.
        confidence: How often such intervals hold the true mean.
        seed: Of the resamples; the same values and seed give the same interval.
    """
    n = len(values)
    if n < 2:
        return -float("inf"), float("inf")
    random = np.random.default_rng(seed)
    drawn_RS = random.integers(0, n, (RESAMPLES, n))
    if crossed:
        matrix_SP = np.asarray(values, dtype=np.float64)
        problems = matrix_SP.shape[1]
        even, blocks = np.full(problems, 1 / problems), range(0, RESAMPLES, 500)  # weights of all would fill the memory
        mean_RS = np.concatenate([random.multinomial(problems, even, 500) @ matrix_SP.T / problems for _ in blocks])
        mean_R = np.take_along_axis(mean_RS, drawn_RS, 1).mean(1)
    else:
        mean_R = np.zeros(RESAMPLES)
        for place in range(n):
            for s, row in enumerate(values):
                chosen = np.flatnonzero(drawn_RS[:, place] == s)
                row_P = np.asarray(row, dtype=np.float64)
                mean_R[chosen] += row_P[random.integers(0, len(row_P), (len(chosen), len(row_P)))].mean(1) / n
    tail = NormalDist().cdf(-sqrt(n / (n - 1)) * student(confidence, n - 1))
    low, high = np.quantile(mean_R, [tail, 1 - tail])
    return float(low), float(high)


def student(confidence: float, degrees: int) -> float:
    """The quantile ``t`` with ``P(|T| < t) = confidence``, by bisection over the integrated density."""
    log_scale = lgamma((degrees + 1) / 2) - lgamma(degrees / 2) - 0.5 * log(degrees * pi)

    def within(t: float) -> float:
        x = np.linspace(0.0, t, 20_001)
        density = np.exp(log_scale - (degrees + 1) / 2 * np.log1p(x * x / degrees))
        return 2 * float(np.trapezoid(density, x))

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return low
