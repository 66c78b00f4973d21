"""A whole job that takes a second: a two-layer model that adds one-digit numbers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from alignment.algorithms.state import fresh
from alignment.checkpoint import Checkpoints
from alignment.data.load import load_data
from alignment.engines.assembly import open_engines
from alignment.job import Job
from alignment.metrics import Sinks
from alignment.origin import Origin
from alignment.recipe import OnlineStage, Recipe, load
from alignment.runs import open_run
from alignment.scoring import Scorer
from alignment.signals import GracefulStop

SUMS: dict[str, Any] = {"name": "procedural", "task": {"name": "arithmetic", "sizes": [9]}}
RECIPE: dict[str, Any] = {
    "run": {
        "name": "tiny",
        "seed": 3,
        "save_every": 2,
        "keep_last": 10,
        "sinks": ["jsonl"],
        "flight_steps": 2,
        "rollouts_every": 1,
    },
    "model": {
        "build": {
            "alphabet": "0123456789+=",
            "hidden_size": 16,
            "layers": 2,
            "heads": 2,
            "kv_heads": 2,
            "intermediate_size": 32,
            "max_positions": 64,
        }
    },
    "data": {
        "train": SUMS | {"split": "train"},
        "demonstrations": SUMS | {"split": "demonstrations"},
        "eval": SUMS | {"split": "eval", "size": 6},
        "max_prompt_tokens": 8,
    },
    "rewards": ["exact_match"],
    "evaluation": {"every": 2},
    "stages": [
        {"stage": "sft", "name": "warmup", "steps": 3, "batch_size": 8, "learner": {"name": "torch", "lr": 1e-2}},
        {
            "stage": "online",
            "name": "rl",
            "steps": 4,
            "prompts_per_step": 4,
            "group_size": 4,
            "sampling": {"max_tokens": 4},
            "learner": {"name": "torch", "lr": 1e-3},
        },
    ],
}


def merged(base: Any, change: Any) -> Any:
    """``base`` with the keys of ``change``; a mapping of indices changes entries of a list."""
    if isinstance(base, list) and isinstance(change, Mapping):
        return [merged(value, change[i]) if i in change else value for i, value in enumerate(base)]
    if isinstance(base, Mapping) and isinstance(change, Mapping):
        return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}
    return change


def write(folder: Path, change: Mapping[str, Any] | None = None) -> Path:
    """The recipe, with ``change`` merged in, as a file."""
    path = folder / "tiny.yaml"
    values = merged(RECIPE, {"run": {"output": str(folder / "runs")}})
    with path.open("w") as file:
        YAML().dump(merged(values, change or {}), file)
    return path


def tiny(folder: Path, change: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe, with ``change`` merged in."""
    return load([write(folder, change)])


def laid_over(text: str, folder: Path, change: Mapping[str, Any], files: Iterable[tuple[str, str]]) -> Path:
    """A page's recipe of one online stage, laid over the tiny one and ``change``, beside the page's ``files``."""
    given: Any = YAML(typ="safe").load(text)
    (online,) = given.pop("stages")
    values = merged(RECIPE, {"run": {"output": str(folder / "runs")}, **change} | given)
    values["stages"] = [merged(RECIPE["stages"][1], online)]
    for name, source in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
    with (folder / "recipe.yaml").open("w") as file:
        YAML().dump(values, file)
    return folder / "recipe.yaml"


@contextmanager
def online_job(recipe: Recipe, stage: OnlineStage) -> Iterator[Job]:
    """A job that stands at the beginning of ``stage``, so that a test may add roles to its learner."""
    with ExitStack() as stack:
        run = stack.enter_context(open_run(recipe.run.output, recipe.run.name))
        scorer = stack.enter_context(Scorer.from_recipe(recipe))
        model = Origin(recipe.model, recipe.run.seed).make()
        recipe = recipe.model_copy(update={"stages": (stage,)})
        data = load_data(recipe, model, scorer)
        job = Job(recipe, run, model, scorer, Checkpoints(run.checkpoints, 3), Sinks([]), GracefulStop(), data)
        job.engines = stack.enter_context(open_engines(stage, job.site, 0))
        job.state = replace(job.state, components=fresh(stage.components()))
        yield job
