"""Benchmarks of ``align eval``: problems, the prompt around them, what reads the answer, and how it is sampled.

A benchmark is made of the components that recipes are made of, so what is measured after training can be what was
trained on: the same source, the same template, the same reward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

import alignment.tasks  # noqa: F401 - registers them
from alignment.data.files import DatasetSource
from alignment.data.procedural import Procedural
from alignment.data.sources import Dataset, Source
from alignment.errors import UserError
from alignment.recipe_errors import did_you_mean
from alignment.recipe_sections import EvaluationSampling
from alignment.recipe_values import plain_values
from alignment.registry import Registry, component, option
from alignment.reward_registry import RewardFunction, RewardSpec, reward_functions
from alignment.tasks.levels import problems
from alignment.tasks.task import Task, tasks
from alignment.types import Prompt
from rewards import Math

STEP_BY_STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The instruction that Qwen's models are evaluated with, after the question."""

Hub = Annotated[str, option("hub id of the data set", min_length=1)]
Revision = Annotated[str | None, option("branch, tag or commit; null: the newest, which results.json names")]
Chat = Annotated[bool, option("as a chat message, where the tokenizer has a chat template")]
Samples = Annotated[int, option("completions of each problem", unit="completions", ge=1)]
Temperature = Annotated[float, option("0 is greedy", ge=0)]
TopP = Annotated[float, option("share of the probability that is sampled from", gt=0, le=1)]
MaxTokens = Annotated[int, option("longest completion", unit="tokens", ge=1)]


@runtime_checkable
class Benchmark(Protocol):
    """Problems and how they are put to a model. Each of these may be an option, a property or a constant."""

    @property
    def data(self) -> Source:
        """Where the problems are; the source holds the template of the prompt."""
        ...

    @property
    def reward(self) -> RewardFunction:
        """Judges completions, and says which answer it read."""
        ...

    @property
    def chat(self) -> bool:
        """Whether prompts become chat messages for a tokenizer with a chat template."""
        ...

    @property
    def samples(self) -> int:
        """Completions of each problem."""
        ...

    @property
    def temperature(self) -> float:
        """How they are drawn; 0 is greedy."""
        ...

    @property
    def top_p(self) -> float:
        """How they are drawn; 1 is off."""
        ...

    @property
    def max_tokens(self) -> int:
        """Longest completion."""
        ...


benchmarks: Registry[Benchmark] = Registry("benchmarks", Benchmark, "What `align eval` measures")


@benchmarks.register("gsm8k", source="Training Verifiers to Solve Math Word Problems (arXiv 2110.14168)")
@dataclass(frozen=True)
class Gsm8k:
    """1,319 grade-school word problems, one greedy answer each; the last box counts, without one what is read last."""

    path: Hub = "openai/gsm8k"
    revision: Revision = None
    chat: Chat = True
    samples: Samples = 1
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    max_tokens: MaxTokens = 1024

    @property
    def data(self) -> Source:
        """The test split."""
        template = "{question}" + STEP_BY_STEP
        return DatasetSource(self.path, config="main", split="test", revision=self.revision, prompt=template)

    @property
    def reward(self) -> RewardFunction:
        """All answers are numbers, so no expressions need to be compared."""
        return Math(answer_in="box_or_number", symbolic=False)


@benchmarks.register("math500", source="Let's Verify Step by Step (arXiv 2305.20050)")
@dataclass(frozen=True)
class Math500:
    """500 competition problems of the MATH test set, four sampled answers each; the last box counts."""

    path: Hub = "HuggingFaceH4/MATH-500"
    revision: Revision = None
    chat: Chat = True
    samples: Samples = 4
    temperature: Temperature = 0.6
    top_p: TopP = 0.95
    max_tokens: MaxTokens = 4096

    @property
    def data(self) -> Source:
        """The test split."""
        return DatasetSource(self.path, split="test", revision=self.revision, prompt="{problem}" + STEP_BY_STEP)

    @property
    def reward(self) -> RewardFunction:
        """Compares expressions; the extra ``math`` is needed when it is made."""
        return Math()


@benchmarks.register("olympiadbench", source="OlympiadBench (arXiv 2402.14008)")
@dataclass(frozen=True)
class OlympiadBench:
    """Olympiad problems of mathematics in English, text only, four sampled answers each; the last box counts."""

    path: Hub = "Hothan/OlympiadBench"
    revision: Revision = None
    chat: Chat = True
    samples: Samples = 4
    temperature: Temperature = 0.6
    top_p: TopP = 0.95
    max_tokens: MaxTokens = 4096

    @property
    def data(self) -> Source:
        """The open-ended, text-only competition problems, which the hub keeps under ``train``."""
        return DatasetSource(
            self.path,
            config="OE_TO_maths_en_COMP",
            split="train",
            revision=self.revision,
            field_map={"answer": "final_answer"},
            prompt="{question}" + STEP_BY_STEP,
        )

    @property
    def reward(self) -> RewardFunction:
        """Compares expressions; the extra ``math`` is needed when it is made."""
        return Math()


@dataclass(frozen=True)
class HeldOut:
    """The evaluation split of a task: from each level ``size`` problems, or all where a level has fewer."""

    task: Task
    levels: tuple[int, ...]
    size: int

    def load(self, base: Path) -> Dataset:
        """Rows as the source ``procedural`` gives them. A prompt that several levels have stands in the first."""
        found: dict[str, Prompt] = {}
        for level in self.levels:
            there = sum(1 for _ in islice(problems(self.task, level, "eval", 0), self.size))
            if there:
                for prompt in Procedural(self.task, "eval", (level,), there).load(base).prompts:
                    found.setdefault(prompt.row["prompt"], prompt)
        return Dataset(list(found.values()), f"{tasks.name_of(self.task)}, levels {', '.join(map(str, self.levels))}")


@benchmarks.register("task", source="this project")
@dataclass(frozen=True)
class TaskBenchmark:
    """A procedural task, asked for by its own name (`align list tasks`): problems that no training split holds."""

    task: Annotated[Task, component(tasks), option("which one")]
    levels: Annotated[tuple[int, ...], option("levels that problems come from; empty: all of the task")] = ()
    size: Annotated[int, option("problems of each level, at most", unit="prompts", ge=1)] = 100
    chat: Chat = False
    samples: Samples = 1
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    max_tokens: MaxTokens = 128

    @property
    def data(self) -> Source:
        """The task's evaluation split."""
        return HeldOut(self.task, self.levels or tuple(range(1, len(self.task.sizes) + 1)), self.size)

    @property
    def reward(self) -> RewardFunction:
        """The one that the task names."""
        return reward_functions.build(self.task.reward)


@dataclass(frozen=True)
class Chosen:
    """A benchmark as it is run: the definition with what the command line changed."""

    name: str
    data: Source
    reward: RewardSpec
    chat: bool
    samples: int
    sampling: EvaluationSampling

    def load(self) -> Dataset:
        """Its problems; relative paths start at the working directory.

        Raises:
            UserError: They cannot be read; the message says how to give a local copy.
        """
        try:
            return self.data.load(Path.cwd())
        except UserError as error:
            remedy = f"\nGive a local copy with --data {self.name}=FILE" if isinstance(self.data, DatasetSource) else ""
            raise UserError(f"{self.name}: {error}{remedy}") from error

    def resolved(self) -> dict[str, Any]:
        """Its definition as JSON values."""
        parts = {"source": self.data, "reward": self.reward, "samples": self.samples, "sampling": self.sampling}
        return {name: plain_values(value) for name, value in parts.items()}


def choose(
    names: Sequence[str],
    data: Mapping[str, str] | None = None,
    samples: int | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Chosen]:
    """The benchmarks and tasks of these names, in their order.

    Args:
        names: Of registered benchmarks, or of registered tasks.
        data: Local files, by name of the benchmark: they hold its rows in place of the hub.
        samples: Completions of each problem; None leaves each benchmark its own number. So do the next two.
        temperature: 0 is greedy.
        max_tokens: Longest completion.
        settings: Options of the benchmarks, by name of the benchmark; the three numbers above come after them.

    Raises:
        UserError: There is no such benchmark or option, an option has a bad value, a name comes twice, a file is for
            none of them or for one that is made by rule, or several samples are asked for at temperature 0, where they
            are all the same.
    """
    data, settings = data or {}, settings or {}
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"--tasks names {repeated!r} twice")
    for name in data:
        if name not in names:
            raise UserError(f"--data {name}=...: {name!r} is not among --tasks {','.join(names)}")
    for name in settings:
        if name not in names:
            meant = did_you_mean(name, names)
            raise UserError(f"--set {name}...: {name!r} is not among --tasks {','.join(names)}{meant}")
    changes = {"temperature": temperature, "max_tokens": max_tokens}
    changes = {k: v for k, v in changes.items() if v is not None}
    return [_chosen(_benchmark(name, settings.get(name, {})), name, data.get(name), samples, changes) for name in names]


def _chosen(
    benchmark: Benchmark, name: str, file: str | None, samples: int | None, changes: Mapping[str, Any]
) -> Chosen:
    source = benchmark.data
    if file is not None:
        if not isinstance(source, DatasetSource):
            raise UserError(f"--data {name}={file}: the problems of {name!r} are made by rule; it reads no file")
        if not (Path.cwd() / Path(file).expanduser()).exists():
            raise UserError(f"--data {name}={file}: there is no such file or folder")
        source = replace(source, path=file, config=None, split=None, revision=None)
    own = {"temperature": benchmark.temperature, "top_p": benchmark.top_p, "max_tokens": benchmark.max_tokens}
    sampling = EvaluationSampling(**{**own, **changes})
    samples = samples or benchmark.samples
    if samples > 1 and sampling.temperature == 0:
        raise UserError(
            f"{name}: {samples} samples at temperature 0 are all the same; set --temperature above 0, or --samples 1"
        )
    spec = RewardSpec(reward_functions.name_of(benchmark.reward), 1.0, benchmark.reward)
    return Chosen(name, source, spec, benchmark.chat, samples, sampling)


def _benchmark(name: str, options: Mapping[str, Any]) -> Benchmark:
    own = [known for known in benchmarks.names() if known != "task"]
    if name in own:
        return _built(name, {"name": name}, options)
    if name in tasks.names():
        return _built(name, {"name": "task", "task": name}, options)
    known = [*own, *tasks.names()]
    raise UserError(
        f"there is no benchmark or task '{name}'{did_you_mean(name, known)} (benchmarks: {', '.join(own)}; tasks: "
        f"{', '.join(tasks.names())})"
    )


def _built(name: str, fixed: Mapping[str, Any], options: Mapping[str, Any]) -> Benchmark:
    """The benchmark with these options; what names it (``fixed``) is no option."""
    known = [o["name"] for o in benchmarks[fixed["name"]].options() if o["name"] not in fixed]
    for key in options:
        if key not in known:
            raise UserError(
                f"--set {name}.{key}: {name!r} has no option {key!r}{did_you_mean(key, known)} (options: "
                f"{', '.join(known)})"
            )
    try:
        return benchmarks.build({**fixed, **options})
    except ValidationError as error:
        told = [
            f"--set {'.'.join(map(str, (name, *e['loc'])))}: {e['msg']}, not {e['input']!r}" for e in error.errors()
        ]
        raise UserError("\n".join(told)) from error
    except PydanticCustomError as error:
        raise UserError(f"--set {name}: {error.message()}") from error
