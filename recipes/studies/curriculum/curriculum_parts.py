"""What the study of curricula brings: its pool of sums, an oracle, and dropping at random."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from alignment.curricula import Uniform, curricula
from alignment.curricula.orders import OfPrompts
from alignment.data.procedural import Procedural
from alignment.data.sources import Dataset, sources
from alignment.registry import component, option
from alignment.tasks.arithmetic import Arithmetic
from alignment.tasks.task import Task, tasks
from alignment.types import Context, Group, Prompt, keyed_seed


@sources.register("mixed_pool", source="this project")
@dataclass(frozen=True)
class MixedPool:
    """Sums of three kinds that look alike: 40 % that were demonstrated, 20 % that were not, 40 % with a wrong answer.

    After a warm-up on the demonstrations the first are mostly solved, the second sometimes, the third almost never.
    """

    task: Annotated[Task, component(tasks), option("sums")] = field(default_factory=lambda: Arithmetic(sizes=(69,)))
    demonstrations: Annotated[int, option("how many sums the warm-up shows, as the recipe says there", ge=1)] = 800
    size: Annotated[int, option("problems in all", unit="prompts", ge=10)] = 2000

    def load(self, base: Path) -> Dataset:
        """The pool, in an order that mixes the kinds."""
        shown = Procedural(self.task, "demonstrations", size=self.demonstrations).load(base).prompts
        fresh = Procedural(self.task, "train", size=3 * self.size // 5).load(base).prompts
        kinds = [("shown", shown[: 2 * self.size // 5]), ("fresh", fresh[: self.size // 5]),
                 ("wrong", fresh[self.size // 5 :])]  # fmt: skip
        rows = [_row(kind, prompt) for kind, prompts in kinds for prompt in prompts]
        return Dataset(sorted(rows, key=lambda prompt: keyed_seed("mixed_pool", prompt.id)), "mixed_pool")


def _row(kind: str, prompt: Prompt) -> Prompt:
    row: dict[str, Any] = {**prompt.row, "kind": kind}
    if kind == "wrong":
        right = int(row["answer"])
        row["answer"] = str(_wrong(right, keyed_seed("wrong", prompt.id)))
    return Prompt(f"{kind}/{prompt.id}", row)


def _wrong(right: int, key: int) -> int:
    """A number of as many digits that is not the answer."""
    low, high = (10 ** (len(str(right)) - 1) if right > 9 else 0), 10 ** len(str(right))
    return next(n for n in _numbers(low, high, key) if n != right)


def _numbers(low: int, high: int, key: int) -> Iterator[int]:
    while True:
        yield low + key % (high - low)
        key = keyed_seed(key)


@curricula.register("only", source="this project")
@dataclass(frozen=True)
class Only(Uniform):
    """An oracle: takes problems of one kind, which no method is told."""

    kind: Annotated[str, option("the kind")] = "fresh"

    def select(
        self, state: Any, prompts: Sequence[Prompt], n: int, context: Context
    ) -> tuple[list[Prompt], dict[str, int]]:
        """Those of the kind, every one once per epoch."""
        return super().select(state, of_kind(prompts, self.kind), n, context)


of_kind = OfPrompts(lambda prompts, kind: [prompt for prompt in prompts if prompt.row["kind"] == kind])


@curricula.register("random_drop", source="this project")
@dataclass(frozen=True)
class RandomDrop:
    """Drops groups at random, whatever came of them: what a filter does to the amount of data, and nothing else."""

    rate: Annotated[float, option("share of the groups that is dropped", ge=0, lt=1)] = 0.5
    max_refills: Annotated[
        int, option("how many batches may be sampled beyond the first to fill one", unit="batches", ge=0)
    ] = 10
    on_exhausted: Annotated[str, option("'short': train on the groups there are; or 'error'")] = "short"

    def keep(self, state: Any, group: Group) -> bool:
        """By the group's prompt and number."""
        return keyed_seed("random_drop", group.prompt.id, group.uid) / 2**63 >= self.rate  # keyed_seed has 63 bits
