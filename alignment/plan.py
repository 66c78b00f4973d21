"""What a recipe will do, worked out without a model: the dry run of ``align check``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignment.algorithms.objective import Objective
from alignment.algorithms.state import fresh
from alignment.architectures import Shape
from alignment.cluster_plan import Hardware, Load, StageOnCluster
from alignment.cluster_remedies import planned
from alignment.critics import ModelCritic
from alignment.data.files import DatasetSource
from alignment.data.load import SECTIONS, Section, accepted, longest_prompt, read_section
from alignment.data.sides import PAIRED, columns_of
from alignment.errors import UserError
from alignment.model_size import max_positions, memory_bytes
from alignment.models import load_tokenizer
from alignment.positions import demands, too_long
from alignment.recipe import ModelConfig, PreferenceStage, Recipe, RewardModelStage, RolloutStage, SftStage, Stage
from alignment.recipe_folders import missing_folders
from alignment.recipe_tree import Problem, RecipeError, dotted
from alignment.registry import REGISTRIES
from alignment.scoring_size import scoring_bytes
from alignment.stage_checks import unfit_prompts
from alignment.supervision import judgements_of, numbers
from alignment.types import Prompt


@dataclass(frozen=True)
class StagePlan:
    """One step of a stage in numbers. None: not known before the model is loaded."""

    name: str
    stage: str
    steps: int
    sampled: bool
    """Whether its rows are sampled."""
    prompts: int
    """Prompts of a step; demonstrations or pairs, where they are given."""
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
    """Of a mini-batch on one learner rank, at most."""
    passes: tuple[str, ...]
    components: Mapping[str, str]
    memory_bytes: Mapping[str, int] | None
    """Estimated, of each process that learns, by what it is for; see :func:`alignment.model_size.memory_bytes`."""


@dataclass(frozen=True)
class Plan:
    """A recipe's data, model and stages in numbers."""

    model: str
    """Where it comes from."""
    parameters: int | None
    trainable: int | None
    data: Mapping[str, Mapping[str, Any]]
    """:meth:`alignment.data.load.Section.report` of each section, as far as it is known without the model; of what is
    on the hub, its origin alone."""
    stages: tuple[StagePlan, ...]
    hardware: Hardware | None = None
    """The machines that were asked about."""
    cluster: tuple[StageOnCluster, ...] = ()
    """How the stages lie on them."""

    @property
    def fits(self) -> bool:
        """Whether every stage can run on the machines that were asked about."""
        return all(stage.fits for stage in self.cluster)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"cluster": [stage.to_json() for stage in self.cluster], "fits": self.fits}


def make_plan(recipe: Recipe, hardware: Hardware | None = None) -> Plan:
    """Loads the recipe's data, unless it is on the hub, and works out what each stage does, and how it would lie on
    ``hardware``, if that is given.

    Raises:
        RecipeError: Data cannot be read, a prompt does not suit the recipe, there is no such folder of a model, or
            completions do not fit its positions; each at the line that names it.
        UserError: The model is of a kind whose size is not known without it, so nothing can be said about hardware.
    """
    model = recipe.located_model()
    data, problems = _data(recipe)
    problems += missing_folders(recipe) + _unjudged(recipe, data)
    problems += unfit_prompts(recipe, data["train"].prompts) if "train" in data else []
    problems = problems or _lengths(recipe, model, data)
    if problems:
        raise RecipeError(problems)
    shape = Shape.of(model)
    stages = tuple(_stage_plan(recipe, stage, shape, data) for stage in recipe.stages)
    return Plan(
        model=_origin(model),
        parameters=shape.parameters if shape else None,
        trainable=shape.trainable(recipe.model.lora) if shape else None,
        data={name: section.report() for name, section in data.items()} | _on_the_hub(recipe),
        stages=stages,
        hardware=hardware,
        cluster=_on_cluster(recipe, shape, stages, hardware) if hardware else (),
    )


def _on_cluster(
    recipe: Recipe, shape: Shape | None, plans: Sequence[StagePlan], hardware: Hardware
) -> tuple[StageOnCluster, ...]:
    if shape is None:
        raise UserError(
            f"model.path: the size of {recipe.model.path} is not known here, so nothing can be said about memory: give "
            "a folder with its config.json (of a model like Llama, Qwen2 or Qwen3)"
        )
    found: list[StageOnCluster] = []
    for index, (stage, plan) in enumerate(zip(recipe.stages, plans, strict=True)):
        longest = plan.row_tokens or recipe.data.max_prompt_tokens + recipe.evaluation.sampling.max_tokens
        scoring = scoring_bytes(recipe, index, shape)
        load = Load(recipe.model, shape, plan.rollouts, plan.minibatch_rows, longest, scoring)
        found.append(planned(stage.name, stage, load, hardware))
    return tuple(found)


def _remote(recipe: Recipe, name: str) -> bool:
    """Whether the section would have to be fetched."""
    source = getattr(recipe.data, name)
    return isinstance(source, DatasetSource) and source.is_on_hub(recipe.folder)


def _on_the_hub(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What can be said of sections that a check does not fetch."""
    unknown = dict.fromkeys(("sha256", "rows", "used", "bad", "over_long", "distinct", "floor")) | {"bad_rows": []}
    names = [name for name in SECTIONS if _remote(recipe, name)]
    return {name: {"origin": getattr(recipe.data, name).hub_name, **unknown} for name in names}


def _origin(model: ModelConfig) -> str:
    if model.path is None:
        return "built by the recipe"
    if Path(model.path).is_dir():
        return f"folder {model.path}"
    return f"{model.path} from the hub (there is no such folder), fetched when training starts"


def _data(recipe: Recipe) -> tuple[dict[str, Section], list[Problem]]:
    """Each section as it can be known without the model, and what is wrong with any of them."""
    data: dict[str, Section] = {}
    problems: list[Problem] = []
    for name in (name for name in SECTIONS if not _remote(recipe, name)):
        try:
            section = read_section(recipe, name)
            if section is not None:
                data[name] = _as_characters(accepted(_readable(section, recipe), recipe.data.on_bad_row), recipe)
        except UserError as error:
            problems += recipe.error(("data", name), str(error).removeprefix(f"data.{name}: ")).problems
    return data, problems


def _unjudged(recipe: Recipe, data: Mapping[str, Section]) -> list[Problem]:
    """Demonstrations without the number that a stage of supervised fine-tuning reads."""
    problems: list[Problem] = []
    for place, column in judgements_of(recipe) if "demonstrations" in data else ():
        try:
            numbers(data["demonstrations"].prompts, column, dotted(place))
        except UserError as error:
            problems += recipe.error(place, str(error).removeprefix(f"{dotted(place)} ")).problems
    return problems


def _lengths(recipe: Recipe, model: ModelConfig, data: Mapping[str, Section]) -> list[Problem]:
    """What does not fit the model's positions. The tokenizer is loaded only where it is in doubt, and from a folder."""
    positions = max_positions(model)
    if not Path(model.path or "").is_dir():  # its prompts cannot be counted; each has a token at least
        return too_long(recipe, positions, dict.fromkeys(demands(recipe), 1)) if model.path else []
    bound = {name: recipe.data.max_prompt_tokens for name in data}
    if not too_long(recipe, positions, bound):
        return []
    try:
        tokenizer = load_tokenizer(model)
        found = {name: longest_prompt(data[name], recipe, tokenizer) for name in demands(recipe) if name in data}
    except UserError as error:
        place = ("data",) if str(error).startswith("data.") else ("model", "path")
        return recipe.error(place, str(error)).problems
    return too_long(recipe, positions, {name: length for name, length in found.items() if length is not None})


def _readable(section: Section, recipe: Recipe) -> Section:
    """The section without rows that a model built from an alphabet could not read or write."""
    if recipe.model.build is None:
        return section
    alphabet = set(recipe.model.build.alphabet)
    return section.set_aside([_unknown(prompt, alphabet) for prompt in section.prompts])


def _unknown(prompt: Prompt, alphabet: set[str]) -> str | None:
    for column in ("prompt", "completion", *PAIRED):
        text = prompt.row.get(column)
        unknown = sorted(set(text) - alphabet) if isinstance(text, str) else []
        if unknown:
            characters = " ".join(repr(character) for character in unknown)
            return f"{column} {text!r} has characters that model.build.alphabet lacks: {characters}; add them there"
    return None


def _as_characters(section: Section, recipe: Recipe) -> Section:
    """The section less its over-long prompts, where a character is a token; otherwise as it is."""
    texts = [prompt.row["prompt"] for prompt in section.prompts]
    if recipe.model.build is None or not all(isinstance(text, str) for text in texts):
        return section
    return section.fitting([len(text) for text in texts], recipe.data.max_prompt_tokens)


def _stage_plan(recipe: Recipe, stage: Stage, shape: Shape | None, data: Mapping[str, Section]) -> StagePlan:
    if isinstance(stage, SftStage):
        rows = prompts = stage.batch_size
        section = data.get("demonstrations")
        group_size, minibatches, row_tokens = 1, 1, _longest(recipe, section) if section else None
    elif isinstance(stage, RewardModelStage) or not stage.samples:
        prompts = (
            stage.batch_size
            if isinstance(stage, RewardModelStage)
            else getattr(getattr(stage, "pairs", None), "batch_size", 1)
        )
        section = data.get("preferences")
        sides = {len(columns_of(section.name, p.row)) for p in section.prompts} if section else set[int]()
        group_size, minibatches, row_tokens = max(sides, default=2), 1, _longest(recipe, section) if section else None
        rows = group_size * prompts
    else:
        prompts, group_size, minibatches = stage.prompts_per_step, stage.group_size, stage.credited.minibatches
        rows, row_tokens = prompts * group_size, recipe.data.max_prompt_tokens + stage.sampling.max_tokens
    budget = getattr(stage.learner, "micro_batch_tokens", None)
    minibatch_rows = rows // minibatches
    micro_batches = None
    if row_tokens is not None and budget is not None:
        rank_rows = -(-minibatch_rows // getattr(stage.learner, "ranks", 1))
        micro_batches = -(-rank_rows // max(1, budget // row_tokens))
    return StagePlan(
        name=stage.name,
        stage=stage.stage,
        steps=stage.steps,
        sampled=stage.samples,
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


def _longest(recipe: Recipe, section: Section) -> int | None:
    """Tokens of the longest row and its end, where a character is a token."""
    rows = [(prompt.row, columns_of(section.name, prompt.row)) for prompt in section.prompts]
    texts = [(row["prompt"], row.get(column, "")) for row, columns in rows for column in columns]
    if recipe.model.build is None or not all(isinstance(prompt, str) for prompt, _ in texts):
        return None
    return max((len(prompt) + len(str(completion)) + 1 for prompt, completion in texts), default=None)


def _passes(stage: Stage) -> Iterator[str]:
    """Passes of a model over the rows of a step, in their order."""
    trained = stage.updates_per_step
    if isinstance(stage, RewardModelStage):
        yield "update" if stage.members == 1 else f"update of {stage.members} reward models"
    if isinstance(stage, PreferenceStage):
        if stage.samples:
            every = getattr(stage.pairs, "every", 1)
            yield "sample" if every == 1 else f"sample (every {every} steps, for all of them)"
        if stage.compares:
            yield "reference log-probabilities" + ("" if stage.reference.kept else " (once, for all pairs)")
    elif isinstance(stage, RolloutStage):
        algorithm = stage.credited
        objective = Objective.of(algorithm, fresh(stage.components()))
        needs = algorithm.needs | (objective.needs(staleness=stage.max_staleness) if trained else frozenset())
        yield "sample"
        named = {"old_logp": "old log-probabilities", "entropy": "entropies", "entropy_drift": "what moves these"}
        if needs & named.keys():
            yield " and ".join(text for need, text in named.items() if need in needs)
        if "reference" in needs:
            yield "reference log-probabilities"
        if "values" in needs and isinstance(stage.values, ModelCritic):
            yield "values"
        if trained and "gram" in needs:
            yield "gradients of each reward"
        if objective.wants_logp and trained > 1:
            yield "log-probabilities before each optimizer step but the first"
    if trained:
        yield "update" if trained == 1 else f"update ({trained} optimizer steps)"
    if isinstance(stage, RolloutStage) and isinstance(critic := stage.values, ModelCritic):
        steps = (critic.epochs or stage.credited.epochs) * (critic.minibatches or stage.credited.minibatches)
        yield "update of values" if steps == 1 else f"update of values ({steps} optimizer steps)"


def _components(stage: Stage) -> Iterator[tuple[str, str]]:
    """Every component by its place, with its options that are not the default."""
    engines = {name: getattr(stage, name) for name in ("sampler", "learner", "cluster", "transport")}
    engines = {name: part for name, part in engines.items() if part is not None}
    if isinstance(stage, SftStage):
        parts = {"objective": stage.objective, "aggregation": stage.aggregation, **engines}
        if (by := stage.conditional) is not None:
            yield "conditional", f"aligned where {by.score} <= {by.threshold:g}, no control token for {by.drop:.0%}"
    elif isinstance(stage, RewardModelStage):
        parts = {"loss": stage.loss, "head": stage.head, **engines}
    elif isinstance(stage, PreferenceStage):
        losses = {f"losses.{i}": loss for i, loss in enumerate(stage.losses)}
        parts = {
            **(stage.components() if stage.samples else losses),
            "pairs": stage.pairs,
            "reference": stage.reference,
        }
        parts |= engines
    else:
        critics = {name: getattr(stage, name, None) for name in ("critic", "value_model", "prompt_value")}
        critics = {name: part for name, part in critics.items() if part is not None}
        parts = {"environment": stage.environment, **stage.components(), **critics, **engines}
    for place, part in parts.items():
        registry = next(r for r in REGISTRIES.values() if type(part) in {entry.cls for entry in r})
        name = registry.name_of(part)
        defaults = {o["name"]: o["default"] for o in registry[name].options()}
        said = [f"{k}: {json.dumps(v)}" for k, v in registry.dump(part).items() if _differs(part, k, defaults)]
        yield place, f"{name} {{{', '.join(said)}}}" if said else name


def _differs(part: object, option: str, defaults: Mapping[str, Any]) -> bool:
    return option in defaults and getattr(part, option) != defaults[option]
