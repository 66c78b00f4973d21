"""The runs that a claim asks for, and the recipe of each."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from alignment.data.load import read_section
from alignment.errors import UserError
from alignment.recipe import Recipe, RewardModelStage, Stage, load
from alignment.recipe_sections import JsonlSink
from alignment.recipe_tree import Mark, Place, Problem, RecipeError
from alignment.reward_registry import RewardSpec
from alignment.studies.claim import Claim, ReadClaim
from alignment.studies.cost import Sizes, sizes_of
from alignment.studies.sources import data_of, sources

Kind = Literal["warm-up", "tune", "report", "control"]
QUICK_STEPS = 2
FIRST_REWARD = "the first reward"


@dataclass(frozen=True)
class Task:
    """One run of a study."""

    kind: Kind
    arm: str
    """Empty for a warm-up."""
    point: int
    """Of the grid."""
    seed: int

    @property
    def cell(self) -> str:
        """The name of what it computes, seed apart."""
        return f"{self.kind}/{self.arm}/{self.point}"

    @property
    def run(self) -> str:
        """The name of its run."""
        return f"warm-up.{self.seed}" if self.kind == "warm-up" else f"{self.arm}.{self.point}.{self.seed}"


@dataclass(frozen=True)
class Study:
    """A claim, and where its runs lie.

    ``--quick`` makes it one seed, the first point of the grid, and two steps of each stage unless the claim says more.
    """

    read: ReadClaim
    folder: Path
    quick: bool = False

    @property
    def claim(self) -> Claim:
        """What was written down."""
        return self.read.claim

    @property
    def runs(self) -> Path:
        """Folder of all runs."""
        return self.folder.resolve() / "runs"

    @property
    def report_seeds(self) -> tuple[int, ...]:
        """Those that the verdict is about."""
        return self.claim.report_seeds[:1] if self.quick else self.claim.report_seeds

    @property
    def budget(self) -> float | None:
        """In the claim's unit; None: as far as the runs go."""
        return None if self.quick else getattr(self.claim.budget, self.claim.unit)

    @cached_property
    def grid(self) -> list[dict[str, Any]]:
        """Its points, in the order of the file; one without settings where nothing is tuned."""
        axes = self.claim.tune.grid if self.claim.tune else {}
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        return points[:1] if self.quick else points

    @cached_property
    def sources(self) -> dict[str, str]:
        """SHA-256 of the recipe and of what the arms bring of their own, by path from there."""
        self.described()  # loads what is to be hashed
        return sources(self.read.recipe)

    @cached_property
    def data(self) -> dict[str, list[str]]:
        """SHA-256 of the rows of each section of ``data``."""
        return data_of(self._loaded(arm, point) for arm in self.claim.arms for point in range(len(self.grid)))

    def warm_ups(self) -> list[Task]:
        """One for each seed, if there is a warm-up."""
        seeds = [*dict.fromkeys([task.seed for task in self.tuning()] + [*self.report_seeds])]
        return [Task("warm-up", "", 0, seed) for seed in seeds] if self.claim.warm_up else []

    def tuning(self) -> list[Task]:
        """Every arm at every point on every tuning seed; none where there is nothing to choose.

        Arms with a gate come first: whether there is its metric is seen in their first run.
        """
        if self.claim.tune is None or len(self.grid) < 2:
            return []
        gated = {gate.arm for gate in self.claim.gate}
        return [
            Task("tune", arm, point, seed)
            for seed in self.claim.tune.seeds
            for arm in sorted(self.claim.compared, key=lambda name: name not in gated)
            for point in range(len(self.grid))
        ]

    def reports(self, chosen: Mapping[str, int]) -> list[Task]:
        """Every arm at its point on every report seed, and the controls on the first."""
        found = [Task("report", arm, chosen[arm], seed) for seed in self.report_seeds for arm in self.claim.compared]
        first = self.report_seeds[0]
        controls = {c.arm: Task("control", c.arm, chosen[c.equals], first) for c in self.claim.controls if c.equals}
        return [*found, *controls.values()]

    def recipe(self, task: Task) -> Recipe:
        """The recipe of a run.

        Raises:
            RecipeError: A setting is wrong, with the line of the claim; or an arm changes what all arms share.
        """
        recipe = self._loaded(task.arm, task.point)
        first = self.claim.warm_up.stages if self.claim.warm_up else 0
        stages = recipe.stages[:first] if task.kind == "warm-up" else recipe.stages[first:]
        if self.quick:
            offset = 0 if task.kind == "warm-up" else first
            stages = tuple(self._short(stage, offset + i) for i, stage in enumerate(stages))
        own = {"name": task.run, "output": str(self.runs), "seed": task.seed, "sinks": (JsonlSink(),)}
        run = recipe.run.model_copy(update=own | {"flight_steps": 0, "rollouts_every": 0, "keep_last": 1})
        changes: dict[str, Any] = {"run": run, "stages": stages, "rewards": self._rewards(recipe, task)}
        if task.kind == "warm-up":  # nothing is made of its evaluations
            changes["evaluation"] = recipe.evaluation.model_copy(update={"every": 0})
        return recipe.model_copy(update=changes)

    def _rewards(self, recipe: Recipe, task: Task) -> tuple[RewardSpec, ...]:
        """Arms find the reward models that their warm-up trains in its run; in the warm-up itself they are left out,
        unless it samples."""
        first = self.claim.warm_up.stages if self.claim.warm_up else 0
        warm_up = recipe.stages[:first]
        trained = {stage.name for stage in warm_up if isinstance(stage, RewardModelStage)}
        own = [spec for spec in recipe.reward_specs if _stage_of(spec) in trained]
        if task.kind == "warm-up":
            asked = any(stage.samples for stage in warm_up)
            return tuple(spec for spec in recipe.reward_specs if asked or spec not in own)
        run = self.runs / replace(task, kind="warm-up").run
        return tuple(spec.located(recipe.folder, run) if spec in own else spec for spec in recipe.reward_specs)

    def start(self, task: Task) -> str | None:
        """The run whose policy a run begins from."""
        if task.kind == "warm-up" or self.claim.warm_up is None:
            return None
        return str(self.runs / replace(task, kind="warm-up").run)

    def sizes(self, task: Task) -> dict[str, Sizes] | None:
        """Of the models of each stage; None where one is not known and the budget is in another unit than FLOPs.

        Raises:
            RecipeError: One is not known, and the budget is in FLOPs.
        """
        recipe = self.recipe(task)
        try:
            return {stage.name: sizes_of(recipe, stage) for stage in recipe.stages}
        except UserError as error:
            if self.claim.unit != "flops":
                return None
            raise self.problem(("budget", "flops"), str(error)) from error

    def problem(self, place: Place, message: str) -> RecipeError:
        """An error about a place of the claim."""
        return RecipeError([Problem(self.read.mark(place), place, message)])

    def check(self) -> None:
        """Loads the recipe of every arm at every point, and compares them with the claim and with each other.

        Raises:
            RecipeError: Every mistake at once.
        """
        problems: list[Problem] = []
        base = self._loaded("", 0)
        if base.data.eval is None:
            raise self.problem(("recipe",), "the recipe has no data.eval, and a study is judged by it")
        first = self.claim.warm_up.stages if self.claim.warm_up else 0
        if first >= len(base.stages):
            raise self.problem(("warm_up", "stages"), f"leaves nothing to study: the recipe has {len(base.stages)}")
        shared = _shared(base, first)
        for arm, point in itertools.product(self.claim.arms, range(len(self.grid))):
            try:
                recipe = self._loaded(arm, point)
                found = _shared(recipe, first)
                if changed := [name for name in shared if found[name] != shared[name]]:
                    message = f"changes {', '.join(changed)}, which all arms share"
                    raise self.problem(self._changed_at(arm, changed), message)
                self._check_steps(arm, sum(stage.steps for stage in recipe.stages[first:]))
                self.sizes(Task("report", arm, point, 0))
            except RecipeError as error:
                problems += error.problems
        problems += self._unmeasurable(base)
        if problems:
            raise RecipeError(problems)

    def _changed_at(self, arm: str, names: Sequence[str]) -> Place:
        """Where what is called so is changed: by the arm itself, or by the grid."""
        paths = ["rewards" if name == FIRST_REWARD else name for name in names]
        own = [
            key for key in self.claim.arms[arm].set for path in paths if key.startswith(path) or path.startswith(key)
        ]
        return ("arms", arm, "set") if own else ("tune", "grid")

    def _check_steps(self, arm: str, steps: int) -> None:
        if self.claim.unit == "steps" and self.budget is not None and self.budget > steps:
            message = f"is more than the {steps} steps that arm '{arm}' trains; give the arm more steps, or lower it"
            raise self.problem(("budget", "steps"), message)

    def _unmeasurable(self, base: Recipe) -> list[Problem]:
        """What the claim measures and evaluations cannot give."""
        measure, samples, found = self.claim.measure, base.evaluation.samples, list[tuple[Place, str]]()
        if measure.pass_at > samples:
            found.append((("measure", "pass_at"), f"pass@{measure.pass_at} takes as many samples of each problem, and "
                          f"evaluation.samples is {samples}: raise that, or lower it"))  # fmt: skip
        section = None if measure.problems == "*" else read_section(base, "eval")
        ids = [] if section is None else [prompt.id for prompt in section.prompts]
        if ids and not any(fnmatchcase(id_, measure.problems) for id_ in ids):
            found.append((("measure", "problems"), f"no problem of data.eval matches '{measure.problems}' (ids: "
                          f"{', '.join(ids[:3])}, ...)"))  # fmt: skip
        return [Problem(self.read.mark(place), place, message) for place, message in found]

    def described(self) -> dict[str, Any]:
        """What all runs follow from, as JSON values: the recipes, resolved."""
        arms = {arm: [self._loaded(arm, p).resolved() for p in range(len(self.grid))] for arm in self.claim.arms}
        return {"arms": arms, "quick": self.quick}

    def _short(self, stage: Stage, index: int) -> Stage:
        """A stage of a quick run: two steps, unless the claim says how many."""
        said = f"stages.{index}.steps" in self.claim.quick.set
        return stage if said else stage.model_copy(update={"steps": min(stage.steps, QUICK_STEPS)})

    def _loaded(self, arm: str, point: int) -> Recipe:
        said: list[tuple[Place, str, Any]] = []
        if self.quick:
            said += [(("quick", "set", key), key, value) for key, value in self.claim.quick.set.items()]
        if arm:
            said += [(("arms", arm, "set", key), key, value) for key, value in self.claim.arms[arm].set.items()]
            said += [(("tune", "grid", key), key, value) for key, value in self.grid[point].items()]
        texts = [f"{key}={json.dumps(value)}" for _, key, value in said]
        marks = {f"--set {t}": self.read.mark(place) for t, (place, _, _) in zip(texts, said, strict=True)}
        try:
            return load([self.read.recipe], texts)
        except RecipeError as error:
            raise RecipeError(_remarked(error.problems, marks)) from None


def _stage_of(spec: RewardSpec) -> str | None:
    """The stage of its own run that trains what a reward asks."""
    own = getattr(spec.function, "path", None) is None
    return getattr(spec.function, "stage", None) if own else None


def _remarked(problems: Sequence[Problem], marks: Mapping[str, Mark]) -> list[Problem]:
    """The problems with the lines of the claim in place of the overrides that were made of them."""
    return [replace(p, mark=marks.get(p.mark.source, p.mark)) for p in problems]


def _shared(recipe: Recipe, stages: int) -> dict[str, Any]:
    """What must not differ between arms: how a run begins, which prompts it draws, and how it is measured."""
    whole = recipe.resolved()
    found = {"model": whole["model"], "evaluation": whole["evaluation"], FIRST_REWARD: whole["rewards"][0]}
    found |= {f"data.{name}": whole["data"][name] for name in ("train", "eval")}
    warm = {f"stages.{i}": stage for i, stage in enumerate(whole["stages"][:stages])}
    learned = {f"data.{name}": whole["data"][name] for name in ("demonstrations", "preferences")}
    return found | ({**learned, **warm} if stages else {})
