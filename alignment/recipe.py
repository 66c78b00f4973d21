"""The recipe: what a user writes, as typed, frozen records. :func:`load` turns YAML files into one.

A recipe is light: it holds components and engine options, no model, no engine and no data. Those are built by
:func:`alignment.train`.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError
from pydantic_core import to_json

from alignment.environments import Environment, environments
from alignment.recipe_advice import advice, refusals
from alignment.recipe_checks import conflicts, model_problems, secrets
from alignment.recipe_errors import problems_of, without
from alignment.recipe_imports import import_problems
from alignment.recipe_preference import PreferenceStage
from alignment.recipe_sections import (
    Build,
    Data,
    Evaluation,
    Lora,
    ModelConfig,
    RewardChoice,
    Run,
    Sampling,
    Scoring,
    Section,
)
from alignment.recipe_stages import STAGES, OnlineStage, RolloutStage, SftStage, Stage, ValueStage
from alignment.recipe_tree import Mark, Node, Place, Problem, RecipeError, mark_of, merge, plain
from alignment.recipe_values import differences, plain_values
from alignment.recipe_weighting import cautions
from alignment.recipe_yaml import parse_override, read_file
from alignment.reward_registry import RewardSpec


class Recipe(Section):
    """Everything that determines a run."""

    plugins: tuple[str, ...] = ()
    """Modules imported first: they register components."""
    run: Run
    model: ModelConfig
    data: Data = Data()
    rewards: tuple[Annotated[Any, BeforeValidator(RewardChoice())], ...] = ()
    """The first one decides whether a rollout is correct."""
    scoring: Scoring = Scoring()
    evaluation: Evaluation = Evaluation()
    stages: Annotated[tuple[Annotated[Stage, BeforeValidator(STAGES)], ...], Field(min_length=1)]

    _root: Node | None = PrivateAttr(default=None)
    _folder: Path = PrivateAttr(default_factory=Path.cwd)
    _plugin_folders: tuple[Path, ...] = PrivateAttr(default=())

    def __eq__(self, other: object) -> bool:
        """Where a recipe was read from does not count."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def folder(self) -> Path:
        """Folder of the first file: relative paths of data files start here, and modules in it can be imported."""
        return self._folder

    def located_model(self) -> ModelConfig:
        """``model`` with its folder in full: beside the recipe, or else in the working directory."""
        return self.model.located(self.folder)

    @property
    def evaluation_environment(self) -> Environment:
        """The environment that evaluations play: the first online stage's."""
        online = next((s for s in self.stages if isinstance(s, RolloutStage) and s.samples), None)
        return online.environment if online else environments.build("single_turn")

    def wants(self, sink: str) -> bool:
        """Whether ``run.sinks`` names ``sink``."""
        return any(s.name == sink for s in self.run.sinks)

    @property
    def plugin_folders(self) -> tuple[Path, ...]:
        """Folders that every process of the run adds to the end of ``sys.path``."""
        return self._plugin_folders

    @property
    def reward_specs(self) -> tuple[RewardSpec, ...]:
        """The reward columns, typed."""
        return self.rewards

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with every default, as JSON values; :func:`load` reads it back to an equal recipe."""
        return plain_values(self)

    @property
    def warnings(self) -> list[Problem]:
        """What it may do and hardly should, each with its file and line."""
        root = self._root or Node({}, Mark("recipe"))
        return [Problem(mark_of(root, found.place), found.place, found.message) for found in advice(self)]

    def error(self, place: Place, message: str) -> RecipeError:
        """An error about the value at ``place``, with its file and line."""
        root = self._root or Node({}, Mark("recipe"))  # one that was made in Python has no file
        return RecipeError([Problem(mark_of(root, place), place, message)])


def load(paths: Sequence[Path | str], overrides: Sequence[str] = (), beside: Path | None = None) -> Recipe:
    """The recipe that files and overrides describe.

    Files merge from left to right and overrides come last: mappings merge key by key, anything else replaces,
    an empty mapping too. The recipe's plugins are imported first, so that they can register components.

    Args:
        paths: YAML files.
        overrides: ``a.b=c`` texts; the value is YAML and ``stages.0.steps`` reaches into a list.
        beside: Where relative paths start and modules are found, if not at the first file: a run folder's copy of a
            recipe has neither its data nor its modules beside it.

    Raises:
        RecipeError: Every mistake, each with the file and line, or the override, that made it.
    """
    root, found = _read([Path(path) for path in paths], overrides)
    folders = tuple(dict.fromkeys(Path(path).resolve().parent for path in paths))
    folders = (beside.resolve(),) if beside is not None else folders
    broken = [problem.place for problem in found]
    found += secrets(root)
    hidden = {problem.place for problem in found}
    found += [problem for problem in model_problems(root) if not any(place[:1] == ("model",) for place in broken)]
    found += import_problems(root, folders)
    recipe, more = _validate(plain(root), root, broken)
    found += [problem for problem in more if problem.place not in hidden]
    if found:
        order = {str(path): index for index, path in enumerate(paths)}
        raise RecipeError(sorted(found, key=lambda p: (order.get(p.mark.source, len(order)), p.mark.line or 0)))
    assert recipe is not None
    for caution in cautions(recipe):
        warnings.warn(caution, stacklevel=2)
    recipe._root, recipe._folder, recipe._plugin_folders = root, folders[0], folders
    return recipe


def _read(paths: Sequence[Path], overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """All files and overrides as one tree, the run named after the first file if nobody names it; and the mistakes
    beside which the rest can be read.

    Raises:
        RecipeError: A file or an override cannot be read at all.
    """
    if not paths:
        raise RecipeError([Problem(Mark("recipe"), (), "give at least one file")])
    layers: list[Node] = []
    problems: list[Problem] = []
    fatal: list[Problem] = []
    for read, items in ((read_file, paths), (parse_override, overrides)):
        for item in items:
            try:
                layers.append(read(item, problems))  # pyright: ignore[reportArgumentType]
            except RecipeError as error:
                fatal += error.problems
    if fatal:
        raise RecipeError([*problems, *fatal])
    root = layers[0]
    for layer in layers[1:]:
        try:
            root = merge(root, layer)
        except RecipeError as error:
            problems += error.problems
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", paths[0].stem).lstrip("._-")[:100] or "run"
    named = Node({"run": Node({"name": Node(stem, root.mark)}, root.mark)}, root.mark)
    run = root.value.get("run")
    if run is not None and not run.value and isinstance(run.value, dict):
        root = Node({key: child for key, child in root.value.items() if key != "run"}, root.mark)
    return (root if run is not None and not isinstance(run.value, dict) else merge(named, root)), problems


def _validate(data: Any, root: Node, broken: Sequence[Place]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or its problems. What is wrong by itself is left out so that the rest is checked all the same;
    of what is at ``broken``, nothing is known."""
    problems: list[Problem] = []
    removed: list[Place] = []
    for _ in range(4):
        try:
            recipe = Recipe.model_validate_json(to_json(data, inf_nan_mode="constants"), strict=True)
        except ValidationError as error:
            fresh = problems_of(error.errors(), root, data, Recipe)
            problems = problems if removed else fresh
            wrong = [problem.place if problem.place not in removed else problem.place[:-1] for problem in fresh]
            if any(len(place) <= 1 or place[:1] == ("stages",) and len(place) == 2 for place in wrong):
                return None, problems
            removed += wrong
            data = without(data, wrong)
            continue
        recipe = _with_evaluation_sampling(recipe)
        touched = [place[:-1] if place and isinstance(place[-1], int) else place for place in (*removed, *broken)]
        for conflict in (*conflicts(recipe), *refusals(recipe)):
            here = [conflict.place[:length] for length in range(len(conflict.place) + 1)]
            doubtful = any(_overlap(place, other) for place in conflict.because for other in touched)
            if not doubtful and not any(place in here for place in touched):
                problems.append(Problem(mark_of(root, conflict.place), conflict.place, conflict.message))
        return (None if problems else recipe), problems
    return None, problems


def _overlap(place: Place, other: Place) -> bool:
    length = min(len(place), len(other))
    return place[:length] == other[:length]


def _with_evaluation_sampling(recipe: Recipe) -> Recipe:
    """Evaluations draw completions as long as the first online stage's, unless the recipe says otherwise."""
    online = next((stage for stage in recipe.stages if isinstance(stage, RolloutStage) and stage.samples), None)
    sampling = recipe.evaluation.sampling
    if online is None or "max_tokens" in sampling.model_fields_set:
        return recipe
    sampling = sampling.model_copy(update={"max_tokens": online.sampling.max_tokens})
    evaluation = recipe.evaluation.model_copy(update={"sampling": sampling})
    return recipe.model_copy(update={"evaluation": evaluation})


__all__ = [
    "Build",
    "Data",
    "Evaluation",
    "Lora",
    "ModelConfig",
    "OnlineStage",
    "PreferenceStage",
    "Recipe",
    "RecipeError",
    "RolloutStage",
    "Run",
    "Sampling",
    "Scoring",
    "SftStage",
    "Stage",
    "ValueStage",
    "differences",
    "load",
]
