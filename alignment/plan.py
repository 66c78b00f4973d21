"""What a recipe will do, worked out without a model: the dry run of ``align check``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from alignment.algorithms.objective import Objective
from alignment.algorithms.state import fresh
from alignment.errors import UserError
from alignment.model_size import Shape, memory_bytes
from alignment.models import names_folder
from alignment.recipe import ModelConfig, OnlineStage, Recipe, SftStage, Stage
from alignment.recipe_tree import Problem, RecipeError
from alignment.registry import REGISTRIES
from alignment.sources import describe
from alignment.types import Prompt

SHOWN_FAULTS = 5


@dataclass(frozen=True)
class StagePlan:
    """One step of a stage in numbers. None: not known before the model is loaded."""

    name: str
    stage: str
    steps: int
    prompts: int
    """Prompts of a step; for supervised stages, demonstrations."""
    group_size: int
    rollouts: int
    """Rows of a step."""
    row_tokens: int | None
    """Of the longest row, prompt included."""
    step_tokens: int | None
    """Of a step in which every row is as long as allowed."""
    minibatches: int
    minibatch_rows: int
    updates: int
    """Optimizer steps of a step."""
    micro_batches: int | None
    """Of a mini-batch, at most."""
    passes: tuple[str, ...]
    components: Mapping[str, str]
    memory_bytes: Mapping[str, int] | None
    """Estimated, by what it is for; see :func:`alignment.model_size.memory_bytes`."""


@dataclass(frozen=True)
class Plan:
    """A recipe's data, model and stages in numbers."""

    model: str
    """Where it comes from."""
    parameters: int | None
    trainable: int | None
    data: Mapping[str, Mapping[str, float]]
    stages: tuple[StagePlan, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def make_plan(recipe: Recipe) -> Plan:
    """Loads the recipe's data and works out what each stage does.

    Raises:
        RecipeError: Data cannot be read, a prompt does not suit the recipe, or there is no such folder of a model;
            each at the line that names it.
    """
    model = recipe.located_model()
    data, problems = _data(recipe)
    if model.path is not None and names_folder(model.path) and not Path(model.path).is_dir():
        message = f"there is no folder {model.path}, neither beside the recipe in {recipe.folder} nor in {Path.cwd()}"
        problems += recipe.error(("model", "path"), message).problems
    if problems:
        raise RecipeError(problems)
    shape = Shape.of(model)
    return Plan(
        model=_origin(model),
        parameters=shape.parameters if shape else None,
        trainable=shape.trainable(recipe.model.lora) if shape else None,
        data={name: describe(prompts) for name, prompts in data.items()},
        stages=tuple(_stage_plan(recipe, stage, shape, data) for stage in recipe.stages),
    )


def _origin(model: ModelConfig) -> str:
    if model.path is None:
        return "built by the recipe"
    if Path(model.path).is_dir():
        return f"folder {model.path}"
    return f"{model.path} from the hub (there is no such folder), fetched when training starts"


def _data(recipe: Recipe) -> tuple[dict[str, Sequence[Prompt]], list[Problem]]:
    """The prompts of each source, and what is wrong with any of them."""
    data: dict[str, Sequence[Prompt]] = {}
    problems: list[Problem] = []
    for name in ("train", "demonstrations", "eval"):
        source = getattr(recipe.data, name)
        if source is None:
            continue
        try:
            data[name] = source.load(recipe.folder).prompts
            messages = list(islice(_unsuited(recipe, data[name]), SHOWN_FAULTS))
        except UserError as error:
            messages = [str(error)]
        for message in messages:
            problems += recipe.error(("data", name), message).problems
    return data, problems


def _unsuited(recipe: Recipe, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Rows that a model built from an alphabet could not read or write; there, a character is a token."""
    if recipe.model.build is None:
        return
    alphabet, limit = set(recipe.model.build.alphabet), recipe.data.max_prompt_tokens
    for prompt in prompts:
        for column in ("prompt", "completion"):
            text = prompt.row.get(column)
            unknown = sorted(set(text) - alphabet) if isinstance(text, str) else []
            if unknown:
                shown = " ".join(repr(character) for character in unknown)
                yield f"{column} {text!r} has characters that model.build.alphabet lacks: {shown}; add them there"
        text = prompt.row["prompt"]
        if isinstance(text, str) and len(text) > limit:
            yield f"prompt {text!r} has {len(text)} tokens, more than data.max_prompt_tokens ({limit})"


def _stage_plan(recipe: Recipe, stage: Stage, shape: Shape | None, data: Mapping[str, Sequence[Prompt]]) -> StagePlan:
    if isinstance(stage, SftStage):
        rows = prompts = stage.batch_size
        group_size, minibatches, row_tokens = 1, 1, _longest(recipe, data.get("demonstrations", ()))
    else:
        prompts, group_size, minibatches = stage.prompts_per_step, stage.group_size, stage.algorithm.minibatches
        rows, row_tokens = prompts * group_size, recipe.data.max_prompt_tokens + stage.sampling.max_tokens
    budget = getattr(stage.learner, "micro_batch_tokens", None)
    minibatch_rows = rows // minibatches
    micro_batches = None
    if row_tokens is not None and budget is not None:
        micro_batches = -(-minibatch_rows // max(1, budget // row_tokens))
    return StagePlan(
        name=stage.name,
        stage=stage.stage,
        steps=stage.steps,
        prompts=prompts,
        group_size=group_size,
        rollouts=rows,
        row_tokens=row_tokens,
        step_tokens=rows * row_tokens if row_tokens is not None else None,
        minibatches=minibatches,
        minibatch_rows=minibatch_rows,
        updates=stage.updates_per_step,
        micro_batches=micro_batches,
        passes=tuple(_passes(stage)),
        components=dict(_components(stage)),
        memory_bytes=memory_bytes(shape, recipe.model, stage, rows, row_tokens) if shape and row_tokens else None,
    )


def _longest(recipe: Recipe, demonstrations: Sequence[Prompt]) -> int | None:
    """Tokens of the longest demonstration and its end, where a character is a token."""
    texts = [(p.row["prompt"], p.row.get("completion", "")) for p in demonstrations]
    if recipe.model.build is None or not all(isinstance(prompt, str) for prompt, _ in texts):
        return None
    return max((len(prompt) + len(str(completion)) + 1 for prompt, completion in texts), default=None)


def _passes(stage: Stage) -> Iterator[str]:
    """Passes of a model over the rows of a step, in their order."""
    if isinstance(stage, OnlineStage):
        algorithm = stage.algorithm
        objective = Objective.of(algorithm, fresh(stage.components()))
        needs = objective.needs(staleness=stage.max_staleness) | algorithm.needs
        yield "sample"
        if needs & {"old_logp", "entropy"}:
            named = {"old_logp": "old log-probabilities", "entropy": "entropies"}
            yield " and ".join(text for need, text in named.items() if need in needs)
        if "reference" in needs:
            yield "reference log-probabilities"
    updates = stage.updates_per_step
    yield "update" if updates == 1 else f"update ({updates} optimizer steps)"


def _components(stage: Stage) -> Iterator[tuple[str, str]]:
    """Every component by its place, with its options that are not the default."""
    engines = {name: getattr(stage, name) for name in ("sampler", "learner", "cluster")}
    if isinstance(stage, SftStage):
        parts = {"aggregation": stage.aggregation, **engines}
    else:
        parts = {"environment": stage.environment, **stage.components(), **engines}
    for place, part in parts.items():
        registry = next(r for r in REGISTRIES.values() if type(part) in {entry.cls for entry in r})
        name = registry.name_of(part)
        defaults = {o["name"]: o["default"] for o in registry[name].options()}
        said = [f"{k}: {json.dumps(v)}" for k, v in registry.dump(part).items() if _differs(part, k, defaults)]
        yield place, f"{name} {{{', '.join(said)}}}" if said else name


def _differs(part: object, option: str, defaults: Mapping[str, Any]) -> bool:
    return option in defaults and getattr(part, option) != defaults[option]
