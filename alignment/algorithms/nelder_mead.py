"""A search without gradients, for what a whole run is needed to judge, such as the thresholds of a Lagrangian."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import pstdev

Point = list[float]
Cache = list[tuple[Point, float]]
"""Points that were judged and what they were worth: JSON values."""


@dataclass(frozen=True)
class Found:
    """Where a search ended."""

    point: Point
    value: float
    iterations: int
    evaluations: int
    """Calls of the function; the cache served the others."""


def nelder_mead(
    function: Callable[[Point], float],
    simplex: Sequence[Sequence[float]],
    *,
    iterations: int,
    tolerance: float = 0.01,
    cache: Cache | None = None,
    near: float = 5e-3,
) -> Found:
    """Minimises ``function`` over N numbers from N + 1 points (Nelder and Mead, 1965).

    Reflection 1, expansion 2, contraction .5 (inside), shrinkage .5, as in "Confronting Reward Model Overoptimization
    with Constrained RLHF" (arXiv 2310.04373), which searches thresholds so: ``function`` trains with them and returns
    minus the score on held-out data. There the policy is trained on from one call to the next, so that a value depends
    on when it was asked for; whether it is, is up to ``function``. Their code scores on the test split: do not.

    A search that was cut off goes on exactly when it is started again with the same simplex and the cache that it left:
    what was judged is not judged again.

    Args:
        function: What to minimise.
        simplex: N + 1 points that do not lie in one plane.
        iterations: At most; the first simplex is judged before them.
        tolerance: Stops when the population's deviation of the values over the simplex is below it.
        cache: Points with known values, which this call adds to.
        near: A point counts as known if no coordinate is this far from one in the cache; 0 asks for the very same.
    """
    size = len(simplex) - 1
    assert size > 0 and all(len(p) == size for p in simplex), "N + 1 points of N numbers"
    known: Cache = [] if cache is None else cache
    calls = 0

    def judge(point: Point) -> tuple[float, Point]:
        nonlocal calls
        for other, value in known:
            if all(a == b or abs(a - b) < near for a, b in zip(point, other, strict=True)):
                return value, point
        calls += 1
        known.append((point, function(point)))
        return known[-1][1], point

    def along(start: Point, end: Point, share: float) -> tuple[float, Point]:
        return judge([a + share * (b - a) for a, b in zip(start, end, strict=True)])

    corners, done = sorted(judge(list(map(float, p))) for p in simplex), 0
    while done < iterations and pstdev(value for value, _ in corners) >= tolerance:
        done += 1
        best, others, (worst_value, worst) = corners[0], corners[:-1], corners[-1]
        centre = [sum(p[i] for _, p in others) / size for i in range(size)]
        reflected = along(worst, centre, 2.0)
        if reflected[0] < best[0]:
            new: tuple[float, Point] | None = min(reflected, along(worst, centre, 3.0))
        elif reflected[0] < others[-1][0]:
            new = reflected
        else:
            inside = along(worst, centre, 0.5)
            new = inside if inside[0] < worst_value else None
        corners = [*others, new] if new else [best, *(along(best[1], p, 0.5) for _, p in corners[1:])]
        corners.sort()
    value, point = corners[0]
    return Found(point, value, done, calls)
