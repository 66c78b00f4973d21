"""The sections of a recipe, as typed, frozen records. ``alignment.recipe`` puts them together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, to_json

from alignment.data import files, procedural, reasoning_gym  # noqa: F401 - they register sources
from alignment.data.sources import Source, sources
from alignment.errors import UserError
from alignment.registry import component
from alignment.reward_registry import RewardFunction, RewardSpec, reward_functions
from alignment.types import SamplingParams

Count = Annotated[int, Field(ge=1)]
Cadence = Annotated[int, Field(ge=0)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
PATH_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"
Label = Annotated[str, Field(pattern=NAME_PATTERN, max_length=100)]
"""A name that is also a safe file name: it starts with a letter or digit, so it cannot be ``..`` or hold a slash."""


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are mistakes, and values do not change once they are read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True, validate_default=True
    )


@dataclass(frozen=True)
class Choice:
    """Validator of a mapping whose ``key`` says which section it is; ``later`` names what is not there yet."""

    key: str
    kind: str
    sections: Mapping[str, type[Section]]
    later: tuple[str, ...] = ()

    def __call__(self, value: Any) -> Any:
        """The section that ``value`` describes."""
        if type(value) in self.sections.values():
            return value
        if isinstance(value, str) and self.key == "name":
            value = {"name": value}
        section = self.type_of(value)
        if section is None:
            given = value.get(self.key) if isinstance(value, Mapping) else None
            raise choice_error(self.kind, self.key, given, [*self.sections], self.later)
        return section.model_validate_json(to_json(value, inf_nan_mode="constants"), strict=True)

    def type_of(self, value: Any) -> type[Section] | None:
        """The class of the section that ``value`` describes, if it does."""
        name = value.get(self.key) if isinstance(value, Mapping) else None
        return self.sections.get(name) if isinstance(name, str) else None


def choice_error(kind: str, key: str, given: Any, allowed: list[str], later: tuple[str, ...] = ()) -> Exception:
    """The error of a mapping that does not say, or says wrongly, what it is."""
    context = {"kind": kind, "key": key, "given": given, "allowed": allowed, "later": later}
    return PydanticCustomError("component_name", "no such choice", context)


class ConsoleSink(Section):
    """Live progress in a terminal, a plain log elsewhere."""

    name: Literal["console"] = "console"


class JsonlSink(Section):
    """``metrics.jsonl`` and ``rollouts.jsonl`` in the run's folder."""

    name: Literal["jsonl"] = "jsonl"


class TensorboardSink(Section):
    """TensorBoard event files in the run's folder; needs the extra ``tensorboard``."""

    name: Literal["tensorboard"] = "tensorboard"


class WandbSink(Section):
    """Weights & Biases; needs the extra ``wandb`` and a key in the environment, never in a recipe."""

    name: Literal["wandb"] = "wandb"
    project: str = "alignment"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
    """None follows ``WANDB_MODE``."""


Sink = ConsoleSink | JsonlSink | TensorboardSink | WandbSink
SINKS = Choice(
    "name",
    "sinks",
    {"console": ConsoleSink, "jsonl": JsonlSink, "tensorboard": TensorboardSink, "wandb": WandbSink},
)


class Run(Section):
    """What the run is called, where it is written and how often. Cadences count steps; 0 is never."""

    name: Label
    seed: Annotated[int, Field(ge=0)] = 0
    output: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of runs, relative to the working directory; this one goes to ``output/name``."""
    keep_last: Count = 2
    """Checkpoints kept, beside the best."""
    save_every: Cadence = 50
    rollouts_every: Cadence = 10
    """How often rollouts are written in full."""
    flight_steps: Cadence = 4
    """Steps that the flight recorder keeps for ``align replay``."""
    alarm_window: Cadence = 20
    """Steps over which alarms (entropy collapse, truncation, ...) take their means; 0 turns them off."""
    sinks: tuple[Annotated[Sink, BeforeValidator(SINKS)], ...] = (ConsoleSink(), JsonlSink())

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.output) / self.name


class Build(Section):
    """A small character-level model with fresh weights."""

    architecture: Literal["qwen3", "llama"] = "qwen3"
    alphabet: Annotated[str, Field(min_length=1)]
    """Every character the model can read and write."""
    hidden_size: Count = 128
    layers: Count = 3
    heads: Count = 4
    kv_heads: Count = 4
    intermediate_size: Count = 384
    max_positions: Count = 1024
    """Longest sequence, in tokens."""


class Lora(Section):
    """Trains low-rank adapters (LoRA, arXiv 2106.09685) in place of the weights; the reference is the adapter off."""

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class Control(Section):
    """Tokens for conditional training: prompts are played with ``aligned`` behind them, and neither is ever sampled."""

    aligned: Annotated[str, Field(min_length=2)] = "<|aligned|>"
    misaligned: Annotated[str, Field(min_length=2)] = "<|misaligned|>"


def beside_or_here(path: str, beside: Path) -> Path | None:
    """``path`` in full: in ``beside``, the recipe's folder, or else in the working directory; None if in neither."""
    places = [folder / Path(path).expanduser() for folder in (beside, Path.cwd())]
    return next((place.resolve() for place in places if place.exists()), None)


def folder_beside(path: str, beside: Path) -> Path:
    """A folder that is there, in full: :func:`beside_or_here`.

    Raises:
        UserError: It is in neither place.
    """
    if (place := beside_or_here(path, beside)) is None or not place.is_dir():
        raise UserError(f"there is no folder {path}, neither beside the recipe in {beside} nor in {Path.cwd()}")
    return place


class ModelConfig(Section):
    """The model: exactly one of ``path`` (a folder or a hub id) and ``build``."""

    path: Annotated[str, Field(min_length=1)] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """A Jinja file, looked for as ``path`` is, in place of the tokenizer's own; base models have none."""
    build: Build | None = None
    control: Control | None = None
    """Control tokens, which the model is given where it has them not yet."""
    lora: Lora | None = None

    def located(self, beside: Path) -> "ModelConfig":
        """The same with a ``path`` that is a folder in full, and the file of the chat template: both are looked for in
        ``beside``, the recipe's folder, then in the working directory. What is in neither stays as it is, a hub id."""
        names = {"path": self.path, "chat_template": self.chat_template}
        found = {key: beside_or_here(name, beside) for key, name in names.items() if name}
        return self.model_copy(update={key: str(place) for key, place in found.items() if place})


class Data(Section):
    """Where prompts come from. Demonstrations have a ``completion``, preferences ``chosen`` and ``rejected``,
    or a ``completion`` and a ``label``.
    """

    train: Annotated[Source, component(sources)] | None = None
    demonstrations: Annotated[Source, component(sources)] | None = None
    preferences: Annotated[Source, component(sources)] | None = None
    eval: Annotated[Source, component(sources)] | None = None
    eval_preferences: Annotated[Source, component(sources)] | None = None
    """Held-out pairs, on which preference stages are measured."""
    max_prompt_tokens: Count = 512
    """Longer prompts are left out and counted."""
    max_completion_tokens: Count | None = None
    """Longer demonstrations and sides of preferences are bad rows: what is cut off is no longer what was judged."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens when rows cannot be used: the run does not start, or it goes on without them, if they are at most
    1 % of a section's rows."""


class Scoring(Section):
    """How rewards are computed."""

    workers: Count = 1
    """Processes."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """For each rollout."""
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The run stops when more than this share of rewards failed or timed out."""


class NamedReward(Section):
    """A registered reward: its own options beside ``weight`` and ``as``."""

    component: Annotated[RewardFunction, component(reward_functions)]
    weight: float = 1.0
    as_: Annotated[Label | None, Field(alias="as")] = None


class FunctionReward(Section):
    """Any TRL-style function by its dotted path."""

    function: Annotated[str, Field(pattern=PATH_PATTERN)]
    name: Label | None = None
    weight: float = 1.0
    group_level: bool = False
    """It compares the completions of a prompt and must see them together."""
    options: dict[str, Any] = Field(default_factory=dict)


class EnvironmentReward(Section):
    """A score that the environment gives."""

    environment: Label
    weight: float = 1.0


class RewardChoice:
    """Validator of an entry of ``rewards``."""

    def __call__(self, value: Any) -> RewardSpec:
        """The column that ``value`` describes."""
        if isinstance(value, RewardSpec):
            return value
        value = {"name": value} if isinstance(value, str) else value
        section = self.type_of(value)
        if section is None:
            raise PydanticCustomError("reward_type", "expected a name or a mapping with 'name' or 'function'")
        if section is NamedReward:
            own = {key: value[key] for key in ("weight", "as") if key in value}
            value = {**own, "component": {key: value[key] for key in value if key not in own}}
        item = section.model_validate_json(to_json(value, inf_nan_mode="constants"), strict=True)
        match item:
            case NamedReward():
                return RewardSpec(item.as_ or reward_functions.name_of(item.component), item.weight, item.component)
            case FunctionReward():
                column = item.name or item.function.rpartition(".")[2]
                return RewardSpec(column, item.weight, item.function, item.options, item.group_level)
            case EnvironmentReward():
                return RewardSpec(item.environment, item.weight)
        raise AssertionError(section)

    def type_of(self, value: Any) -> type[Section] | None:
        """The class of the section that ``value`` describes, if it is a mapping."""
        if not isinstance(value, Mapping):
            return None
        keys = {"function": FunctionReward, "environment": EnvironmentReward}
        return next((section for key, section in keys.items() if key in value), NamedReward)


def written_reward(spec: RewardSpec) -> dict[str, Any]:
    """The entry of ``rewards`` that describes ``spec``."""
    if spec.function is None:
        return {"environment": spec.column, "weight": spec.weight}
    if not isinstance(spec.function, str):
        return {**reward_functions.dump(spec.function), "weight": spec.weight, "as": spec.column}
    named = {"function": spec.function, "name": spec.column, "weight": spec.weight}
    return {**named, "group_level": spec.group_level, "options": dict(spec.options)}


class Sampling(Section):
    """How completions are drawn."""

    max_tokens: Count = 256
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy, for evaluation only."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: all tokens."""
    allow_truncated_sampling: bool = False
    """Permits top_p and top_k in training although the policy gradient is then biased."""

    def params(self, stop_ids: tuple[int, ...] = (), banned_ids: tuple[int, ...] = ()) -> SamplingParams:
        """The sampler's parameters."""
        return SamplingParams(
            self.max_tokens, self.temperature, self.top_p, self.top_k, stop_ids, banned_ids=banned_ids
        )


class EvaluationSampling(Sampling):
    """How evaluations draw completions: greedily unless they say otherwise."""

    temperature: Annotated[float, Field(ge=0)] = 0.0


class Evaluation(Section):
    """Accuracy on ``data.eval``, by the first reward: at both ends of each stage and every ``every`` steps."""

    every: Cadence = 50
    samples: Count = 1
    """Completions of each problem."""
    sampling: EvaluationSampling = EvaluationSampling()
    """As long as the first online stage's completions, unless ``max_tokens`` is given."""
