"""A search without gradients, for what a whole run is needed to judge, such as the thresholds of a Lagrangian."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

Point = list[float]
Cache = list[tuple[Point, float]]
"""Points that were judged and what they were worth: JSON values."""


Corner = tuple[float, Point]


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
    minus the score on held-out data. (scipy's search is another one: it contracts outside as well, and stops by the
    largest difference of values.) There the policy is trained on from one call to the next, so that a value depends on
    when it was asked for; whether it is, is up to ``function``. Their code scores on the test split: do not.
    :func:`alignment.search.search` is this search over whole runs.

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
    judge = _Judge(function, [] if cache is None else cache, near)
    corners, done = sorted(judge(list(map(float, p))) for p in simplex), 0
    while done < iterations and pstdev(value for value, _ in corners) >= tolerance:
        corners, done = _moved(corners, judge), done + 1
    value, point = corners[0]
    return Found(point, value, done, judge.calls)


@dataclass
class _Judge:
    """Values of points, from the cache where it knows them."""

    function: Callable[[Point], float]
    known: Cache
    near: float
    calls: int = 0

    def __call__(self, point: Point) -> Corner:
        for other, value in self.known:
            if all(a == b or abs(a - b) < self.near for a, b in zip(point, other, strict=True)):
                return value, point
        value = self.function(point)
        self.calls += 1
        self.known.append((point, value))
        return value, point

    def along(self, start: Point, end: Point, share: float) -> Corner:
        """The point that is ``share`` of the way from one to the other."""
        return self([a + share * (b - a) for a, b in zip(start, end, strict=True)])


def _moved(corners: list[Corner], judge: _Judge) -> list[Corner]:
    """One iteration on corners in order, the best first."""
    best, others, (worst_value, worst) = corners[0], corners[:-1], corners[-1]
    centre = [fmean(p[i] for _, p in others) for i in range(len(worst))]
    reflected = judge.along(worst, centre, 2.0)
    if reflected[0] < best[0]:
        return sorted([*others, min(reflected, judge.along(worst, centre, 3.0))])
    if reflected[0] < others[-1][0]:
        return sorted([*others, reflected])
    inside = judge.along(worst, centre, 0.5)
    if inside[0] < worst_value:
        return sorted([*others, inside])
    return sorted([best, *(judge.along(best[1], p, 0.5) for _, p in corners[1:])])
