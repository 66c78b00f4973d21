"""The claim of a study: what a user writes down before anything is measured."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import to_json

from alignment.recipe_errors import did_you_mean, problems_of
from alignment.recipe_sections import Count, Label, Section
from alignment.recipe_tree import Mark, Node, Place, Problem, RecipeError, mark_of, plain
from alignment.recipe_yaml import read_file

Settings = dict[str, Any]
"""Values of a recipe by dotted key, as ``--set`` takes them."""
Seed = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


class Paper(Section):
    """What a source claims."""

    says: Text
    source: Text


class Arm(Section):
    """A method: the recipe with some settings of its own."""

    set: Settings = {}
    papers: tuple[Paper, ...] = ()


class Tune(Section):
    """How much each arm is tuned: every combination of the grid, the same one for all."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    grid: Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)]


class WarmUp(Section):
    """What is done once for each seed, so that all arms begin from its checkpoint."""

    stages: Count
    """So many first stages of the recipe."""


class Measure(Section):
    """What a run is worth: one number for each held-out problem."""

    metric: Literal["area", "final", "matched", "after_peak"] = "area"
    """The mean over the cost from 0 to the budget, what is reached at the budget, what there is at ``accuracy``, or
    what is reached at the budget less what there was at the run's best evaluation."""
    of: Literal["accuracy", "reward"] = "accuracy"
    """Of a problem's samples: how many the first reward calls correct, or the mean of that reward."""
    accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of all held-out problems: where ``matched`` compares runs, the first time that they reach it."""
    problems: Text = "*"
    """Pattern of the ids of the problems that are measured, as ``hard/*``."""
    pass_at: Count = 1
    """1 is accuracy."""


class Contrast(Section):
    """The one comparison that the verdict is about."""

    arm: Label
    against: Label
    minimum_effect: float
    """In the unit of the measure, a share of problems or the first reward's; below 0 it is a margin."""


class Gate(Section):
    """What must be so for the question to make sense here: a mean over report seeds."""

    arm: Label
    metric: Text
    """Of ``metrics.jsonl``; of evaluations as ``eval/NAME``; ``measure``: the score that the measure is taken of. What
    a run logs is known when one has ended: a wrong name is told after the first one of the arm."""
    when: Literal["first", "last", "mean", "highest", "ratio", "fall"] = "mean"
    """``ratio`` is the last over the first, ``fall`` the highest less the last."""
    at_least: float | None = None
    at_most: float | None = None
    text: str = ""


class Control(Section):
    """An arm whose outcome is known beforehand: as another one's, bit for bit, or no better than it."""

    arm: Label
    equals: Label | None = None
    """Compared on the first report seed; the arm is trained on that alone."""
    no_better_than: Label | None = None
    """For an arm whose signal is shuffled: tuned and reported as any other, and its interval over this one must not lie
    above 0."""

    @property
    def other(self) -> str:
        """The arm that it is compared with."""
        return self.equals or self.no_better_than or ""


class Budget(Section):
    """What every run may spend, in one unit."""

    flops: Annotated[float, Field(gt=0)] | None = None
    tokens: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[float, Field(gt=0)] | None = None


class Quick(Section):
    """What ``--quick`` changes of the recipe, to make it small."""

    set: Settings = {}


class Claim(Section):
    """A claim and how it is judged."""

    claim: Text
    recipe: Text
    """Relative to this file."""
    warm_up: WarmUp | None = None
    arms: Annotated[dict[Label, Arm], Field(min_length=2)]
    tune: Tune | None = None
    report_seeds: Annotated[tuple[Seed, ...], Field(min_length=2)]
    measure: Measure = Measure()
    primary: Contrast
    gate: tuple[Gate, ...] = ()
    budget: Budget
    controls: tuple[Control, ...] = ()
    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    papers: tuple[Paper, ...] = ()
    quick: Quick = Quick()

    @property
    def unit(self) -> Literal["flops", "tokens", "steps"]:
        """Of the budget, and of the cost axis."""
        given: list[Literal["flops", "tokens", "steps"]] = ["flops", "tokens", "steps"]
        return next(name for name in given if getattr(self.budget, name) is not None)

    @property
    def compared(self) -> dict[str, Arm]:
        """The arms that are tuned and reported: all but those that must equal another one."""
        controls = {c.arm for c in self.controls if c.equals}
        return {name: arm for name, arm in self.arms.items() if name not in controls}


@dataclass(frozen=True)
class ReadClaim:
    """A claim and the file that it was read from."""

    claim: Claim
    path: Path
    root: Node
    sha256: str

    @property
    def name(self) -> str:
        """Of the study: of the file, or of its folder where the file is called ``claim``."""
        return self.path.resolve().parent.name if self.path.stem == "claim" else self.path.stem

    @property
    def recipe(self) -> Path:
        """The base recipe."""
        return self.path.parent / self.claim.recipe

    def mark(self, place: Place) -> Mark:
        """Where in the file something is said."""
        return mark_of(self.root, place)


def read_claim(path: Path) -> ReadClaim:
    """The claim of a YAML file.

    Raises:
        RecipeError: Every mistake in it, with file and line.
    """
    problems: list[Problem] = []
    root = read_file(path, problems, "a claim is a mapping with at least claim, recipe, arms, report_seeds, primary "
                     "and budget")  # fmt: skip
    data = plain(root)
    try:
        claim = Claim.model_validate_json(to_json(data), strict=True)
    except ValidationError as error:
        raise RecipeError([*problems, *problems_of(error.errors(), root, data, Claim)]) from None
    problems += [Problem(mark_of(root, place), place, message) for place, message in _conflicts(claim)]
    if problems:
        raise RecipeError(problems)
    return ReadClaim(claim, path, root, hashlib.sha256(path.read_bytes()).hexdigest())


def _conflicts(claim: Claim) -> list[tuple[Place, str]]:
    """What parts of a claim have to say of each other."""
    found: list[tuple[Place, str]] = []
    named: list[tuple[Place, str]] = [(("primary", "arm"), claim.primary.arm)]
    named += [(("primary", "against"), claim.primary.against)]
    named += [(("gate", i, "arm"), gate.arm) for i, gate in enumerate(claim.gate)]
    keys = ("arm", "equals", "no_better_than")
    named += [
        (("controls", i, key), name) for i, c in enumerate(claim.controls) for key in keys if (name := getattr(c, key))
    ]
    for place, name in named:
        if name not in claim.arms:
            found.append((place, f"there is no arm '{name}'{did_you_mean(name, [*claim.arms])} "
                          f"(arms: {', '.join(claim.arms)})"))  # fmt: skip
        elif (
            name not in claim.compared and place[-1] != "arm" or (place[0] != "controls" and name not in claim.compared)
        ):
            found.append((place, f"'{name}' is a control that equals another arm, and is not measured"))
    twice = [name for name, count in Counter(c.arm for c in claim.controls).items() if count > 1]
    found += [(("controls",), f"'{name}' is in two of them; give each an arm of its own") for name in twice]
    for i, control in enumerate(claim.controls):
        if (control.equals is None) == (control.no_better_than is None):
            found.append((("controls", i), "takes exactly one of equals and no_better_than"))
        elif control.arm == control.other:
            found.append((("controls", i), "an arm cannot be compared with itself"))
    if claim.primary.arm == claim.primary.against:
        found.append((("primary", "against"), "an arm cannot be compared with itself"))
    if sum(value is not None for value in claim.budget.model_dump().values()) != 1:
        found.append((("budget",), "takes exactly one of flops, tokens and steps"))
    if (claim.measure.metric == "matched") != (claim.measure.accuracy is not None):
        found.append((("measure",), "metric: matched and accuracy go together"))
    if claim.measure.of == "reward" and claim.measure.pass_at > 1:
        found.append((("measure", "pass_at"), "counts correct samples, and of: reward has none: leave it out"))
    if claim.measure.metric == "after_peak" and claim.tune:
        found.append((("tune",), "would choose what loses least after its peak, as what never learns does: leave it "
                      "out, and give all arms what pilots on other seeds found"))  # fmt: skip
    for i, gate in enumerate(claim.gate):
        if gate.at_least is None and gate.at_most is None:
            found.append((("gate", i), "needs at_least, at_most or both"))
        elif gate.at_least is not None and gate.at_most is not None and gate.at_least > gate.at_most:
            found.append((("gate", i, "at_least"), f"is above at_most ({gate.at_most:g}), which no value can meet"))
    found += _seed_conflicts(claim)
    for name in claim.arms if claim.tune else ():
        for key in claim.arms[name].set.keys() & (claim.tune.grid.keys() if claim.tune else set()):
            found.append((("arms", name, "set", key), "is in tune.grid, which is the same for every arm; keep one"))
    return found


def _seed_conflicts(claim: Claim) -> list[tuple[Place, str]]:
    found: list[tuple[Place, str]] = []
    tuning = claim.tune.seeds if claim.tune else ()
    for place, seeds in ((("report_seeds",), claim.report_seeds), (("tune", "seeds"), tuning)):
        if len(set(seeds)) < len(seeds):
            found.append((place, "a seed is given twice"))
    if both := sorted(set(tuning) & set(claim.report_seeds)):
        found.append((("tune", "seeds"), f"seeds {both} are report seeds as well: what is tuned on a seed looks better "
                      "there"))  # fmt: skip
    return found
