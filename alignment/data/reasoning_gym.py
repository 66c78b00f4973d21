"""Prompts from reasoning-gym, a package of procedural tasks."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from alignment.data.reasoning_gym_tasks import make, quietly, refusal
from alignment.data.sources import Dataset, sources
from alignment.errors import UserError
from alignment.registry import option
from alignment.tasks.task import Split, split_name
from alignment.types import Prompt, prompt_key

BLOCK = 1_000_000
"""Item ``i`` of seed ``s`` is reasoning-gym's item of seed ``s * BLOCK + i``. With seeds next to each other, as that
package counts them, all but one of the items would be the same."""
DRAWS_PER_PROMPT, SPARE_DRAWS = 50, 2_000
SECONDS_PER_PROMPT, SPARE_SECONDS = 1.0, 120.0
"""How long a load may take: the tasks that can be named make more than ten problems a second as they come."""


@sources.register("reasoning_gym", source="reasoning-gym (arXiv 2505.24760)")
@dataclass(frozen=True)
class ReasoningGym:
    """Problems of a reasoning-gym task, for the reward ``reasoning_gym``; the splits never share a question.

    Needs the extra ``reasoning-gym``. Only tasks whose problems are the same in every process and whose scorer is safe
    can be named; the error for another says why not.
    """

    task: Annotated[str, option("a task of reasoning-gym, such as chain_sum", min_length=1)]
    split: Annotated[Split, option("train (60 % of all problems), demonstrations (20 %) or eval (20 %)")]
    size: Annotated[int, option("how many problems", unit="prompts", ge=1, le=BLOCK // (2 * DRAWS_PER_PROMPT))] = 500
    config: Annotated[dict[str, Any], option("options of the task, as reasoning-gym calls them")] = field(
        default_factory=dict
    )
    seed: Annotated[int, option("which problems are taken, and their order", ge=0, le=4_000)] = 0

    def __post_init__(self) -> None:
        reason = refusal(self.task)
        if reason is not None:
            raise UserError(reason)

    def load(self, base: Path) -> Dataset:
        """Rows with ``prompt``, ``answer``, ``completion``, ``task`` and ``entry``, which the reward reads.

        Raises:
            UserError: reasoning-gym is missing or refuses ``config``, has fewer problems than ``size``, or is too slow.
        """
        rows: dict[str, Mapping[str, Any]] = {}
        draws = DRAWS_PER_PROMPT * self.size + SPARE_DRAWS
        allowed = SPARE_SECONDS + SECONDS_PER_PROMPT * self.size
        end = time.monotonic() + allowed
        for item in self._items(draws):
            if time.monotonic() > end:
                raise UserError(
                    f"reasoning-gym's {self.task} gave {len(rows)} of {self.size} problems for split {self.split!r} in "
                    f"{allowed:.0f} s; lower size, or make problems easier to draw in config"
                )
            question = item["question"]
            if split_name("reasoning_gym", self.task, question) == self.split:
                rows.setdefault(question, self._row(item))
            if len(rows) == self.size:
                origin = f"reasoning_gym/{self.task}"
                return Dataset([Prompt(f"{origin}/{prompt_key(q)}", row) for q, row in rows.items()], origin)
        raise UserError(
            f"reasoning-gym's {self.task} gave {len(rows)} different problems for split {self.split!r} in {draws:,} "
            f"draws, fewer than the {self.size} asked for; lower size or widen config"
        )

    def _items(self, draws: int) -> Iterator[Mapping[str, Any]]:
        made = make(self.task, self.config, self.seed * BLOCK, BLOCK)
        for i in range(draws):
            with quietly():
                item = made[i]
            yield item

    def _row(self, item: Mapping[str, Any]) -> dict[str, Any]:
        # As JSON at once: what the scorer reads is then what was tested here, lists where there were tuples included.
        entry = json.loads(json.dumps({name: item[name] for name in ("question", "answer", "metadata")}))
        entry["config"] = self.config
        texts = {"prompt": item["question"], "answer": item["answer"], "completion": item["answer"]}
        return {**texts, "task": self.task, "entry": entry}
