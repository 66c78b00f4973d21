"""A search for numbers of a recipe, such as the thresholds of a Lagrangian, in which each candidate is a whole run.

"Confronting Reward Model Overoptimization with Constrained RLHF" (arXiv 2310.04373) searches thresholds so. Deviations:
there, one policy is trained on from candidate to candidate, so that what one is worth depends on when it was asked for,
and its score is that of the test split; here each begins anew, and ``data.eval`` should be a split of its own. Ours: a
candidate outside the bounds is judged at the nearest point inside.
"""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from alignment.algorithms.nelder_mead import nelder_mead
from alignment.errors import UserError
from alignment.metrics import Sink
from alignment.recipe import Recipe, load
from alignment.recipe_sections import JsonlSink
from alignment.runs import Run
from alignment.signals import EXIT_CODES, Stopped
from alignment.studies.curve import read_lines
from alignment.trainer import train
from alignment.types import keyed_seed

Bounds = Mapping[str, tuple[float, float]]
"""The least and the largest value of each number, by its dotted key in the recipe."""


@dataclass(frozen=True)
class Candidate:
    """A run of a search, and what it was worth."""

    settings: Mapping[str, float]
    """By dotted key."""
    value: float
    """The metric of the last evaluation."""
    folder: Path
    """Of the run."""


def search(
    recipe: str | Path | Sequence[str | Path],
    bounds: Bounds,
    *,
    metric: str = "accuracy",
    iterations: int = 10,
    start: Sequence[Sequence[float]] | None = None,
    tolerance: float = 0.01,
    near: float = 5e-3,
    overrides: Sequence[str] = (),
    init_from: str | None = None,
    sinks: Sequence[Sink] = (),
) -> list[Candidate]:
    """Looks for the numbers with which a run ends best on held-out problems, by :func:`nelder_mead`.

    Every candidate is a run of its own, ``NAME.candidate-0`` and so on beside where the recipe's run would be, and one
    that is near an earlier one is that one. So the folders are the memory of the search: called again after it was
    stopped, it reads those that are finished, goes on with the one that was not, and ends where it would have.

    Args:
        recipe: The path or paths of its YAML files. All candidates have its seed.
        bounds: Where to look, by dotted key, such as ``stages.0.algorithm.weighting.thresholds.format``.
        metric: Of the evaluation that the last stage ends with, as ``metrics.jsonl`` names it; larger is better.
        iterations: Of the search, at most; each takes one or two runs, one that shrinks takes N more.
        start: N + 1 points, each of N numbers in the order of ``bounds``; None: drawn uniformly within them.
        tolerance: The search ends when the deviation of the values over the N + 1 best points is below it.
        near: Points are one candidate if no number of them is this far apart, as a share of the width of its bounds.
        overrides: ``a.b=c`` texts, for instance fewer steps than the recipe has.
        init_from: ``RUN[@step|@best]`` whose policy every candidate starts from.
        sinks: More places for the metrics of all runs.

    Returns:
        The candidates that the search asked for, the best first.

    Raises:
        RecipeError: The recipe is wrong with some candidate.
        UserError: Nothing is held out, evaluations lack the metric, bounds or points are wrong, or a candidate's folder
            is of another recipe.
        Stopped: By Ctrl-C or SIGTERM; the run under way was saved.
    """
    _check_bounds(bounds)
    paths = [recipe] if isinstance(recipe, str | Path) else list(recipe)
    trials = _Trials(paths, overrides, bounds, metric, near, init_from, sinks)
    first = _drawn(bounds, trials.lowest.run.seed) if start is None else start
    if [len(point) for point in first] != [len(bounds)] * (len(bounds) + 1):
        raise UserError(f"start needs {len(bounds) + 1} points of {len(bounds)} numbers, in the order of bounds")
    if outside := [p for p in first if any(not a <= x <= b for x, (a, b) in zip(p, bounds.values(), strict=True))]:
        raise UserError(f"start: {tuple(outside[0])} lies outside the bounds; give points inside, or wider bounds")
    nelder_mead(lambda p: -trials.value(p), first, iterations=iterations, tolerance=tolerance, near=0.0)
    return sorted(trials.judged.values(), key=lambda candidate: -candidate.value)


@dataclass
class _Trials:
    """The runs of a search."""

    paths: Sequence[str | Path]
    overrides: Sequence[str]
    bounds: Bounds
    metric: str
    near: float
    init_from: str | None
    sinks: Sequence[Sink]
    known: list[list[float]] = field(default_factory=list[list[float]])
    """Points of the candidates that were begun, by number."""
    judged: dict[int, Candidate] = field(default_factory=dict[int, Candidate])
    """Those that the search asked for."""

    @cached_property
    def lowest(self) -> Recipe:
        """The recipe at the lower bounds."""
        recipe = load(self.paths, [*self.overrides, *_set(self.bounds, [low for low, _ in self.bounds.values()])])
        if recipe.data.eval is None:
            raise UserError("a search is judged by held-out problems, and the recipe has no data.eval")
        return recipe

    def value(self, point: Sequence[float]) -> float:
        """What the candidate of a point is worth, which is trained if it was not yet."""
        inside = [min(max(x, low), high) for x, (low, high) in zip(point, self.bounds.values(), strict=True)]
        number, numbers = self._found(inside)
        if number not in self.judged:
            result = train(self._recipe(number, numbers), init_from=self.init_from, sinks=self.sinks)
            if result["status"] != "complete":
                raise Stopped(next(name for name, code in EXIT_CODES.items() if code == result["exit_code"]))
            folder = Path(result["folder"])
            value = _last_evaluation(folder, self.metric)
            self.judged[number] = Candidate(dict(zip(self.bounds, numbers, strict=True)), value, folder)
        return self.judged[number].value

    def _found(self, point: list[float]) -> tuple[int, list[float]]:
        """The number of the first candidate near a point, and that one's own point; or else of a new one."""
        own = self.lowest.run
        while (run := Run(Path(own.output) / _name(own.name, len(self.known)))).recipe.exists():
            self.known.append(self._point(run))
        widths = [high - low for low, high in self.bounds.values()]
        pairs = [list(zip(point, other, widths, strict=True)) for other in self.known]
        near = (i for i, pair in enumerate(pairs) if all(a == b or abs(a - b) < self.near * w for a, b, w in pair))
        number = next(near, len(self.known))
        return number, [*self.known, point][number]

    def _point(self, run: Run) -> list[float]:
        """The numbers that a candidate was begun with."""
        resolved = run.read_recipe()
        try:
            return [float(_at(resolved, key)) for key in self.bounds]
        except (LookupError, TypeError, ValueError):
            named = ", ".join(self.bounds)
            raise UserError(f"{run.folder} is no candidate for {named}; give this search another run.name") from None

    def _recipe(self, number: int, point: Sequence[float]) -> Recipe:
        """That of a candidate."""
        recipe = load(self.paths, [*self.overrides, *_set(self.bounds, point)])
        sinks = recipe.run.sinks if recipe.wants("jsonl") else (*recipe.run.sinks, JsonlSink())
        own = {"name": _name(recipe.run.name, number), "sinks": sinks}
        return recipe.model_copy(update={"run": recipe.run.model_copy(update=own)})


def _check_bounds(bounds: Any) -> None:
    """Raises:
    UserError: They are not pairs of finite numbers.
    """
    fine = isinstance(bounds, Mapping) and bool(bounds)
    for pair in bounds.values() if fine else ():
        numbers = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(x, int | float) for x in pair)
        fine = fine and numbers and -math.inf < pair[0] < pair[1] < math.inf
    if not fine:
        raise UserError(f"bounds are pairs (low, high) of finite numbers with low < high, by key; not {bounds}")


def _drawn(bounds: Bounds, seed: int) -> list[list[float]]:
    """N + 1 points, uniform within the bounds."""
    drawn = random.Random(keyed_seed(seed, "search"))
    return [[drawn.uniform(*ends) for ends in bounds.values()] for _ in range(len(bounds) + 1)]


def _name(run: str, number: int) -> str:
    return f"{run}.candidate-{number}"


def _set(keys: Iterable[str], point: Sequence[float]) -> list[str]:
    """A point as overrides."""
    return [f"{key}={json.dumps(value)}" for key, value in zip(keys, point, strict=True)]


def _at(tree: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        tree = tree[int(part) if isinstance(tree, list) else part]
    return tree


def _last_evaluation(run: Path, metric: str) -> float:
    """The metric of a run's last evaluation."""
    found = [line for line in read_lines(run) if line["kind"] == "eval"]
    numbers = {key: value for key, value in found[-1].items() if isinstance(value, int | float)} if found else {}
    if metric not in numbers:
        there = f"it has {', '.join(numbers)}" if numbers else "there is none"
        raise UserError(f"the last evaluation of {run} has no number '{metric}'; {there}")
    return float(numbers[metric])
