"""Prompts made by rule: procedural tasks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from alignment.errors import UserError
from alignment.registry import option
from alignment.sources import Dataset, sources
from alignment.tasks.arithmetic import Operator, Problem, Split, problems
from alignment.types import Prompt


@sources.register("arithmetic", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Arithmetic:
    """Sums, differences and products of two whole numbers; the three splits never share a problem."""

    split: Annotated[Split, option("train (60 % of all problems), demonstrations (20 %) or eval (20 %)")]
    max_operand: Annotated[int, option("largest operand", ge=1, le=999)] = 49
    operators: Annotated[tuple[Operator, ...], option("which operations occur", min_length=1)] = ("+",)
    size: Annotated[int | None, option("how many problems; all of the split when null", unit="prompts", ge=1)] = None
    seed: Annotated[int, option("which problems are taken, and their order")] = 0

    def load(self, base: Path) -> Dataset:
        """``size`` different problems with ``prompt``, ``answer``, ``completion``, ``operator`` and ``operands``.

        Raises:
            UserError: The split has fewer than ``size`` problems.
        """
        found = problems(self.operators, self.max_operand, self.split, self.seed)
        if len(found) < (self.size or 1):
            raise UserError(
                f"arithmetic has {len(found)} different problems for split {self.split!r} with operands up to "
                f"{self.max_operand} and operators {' '.join(self.operators)}, fewer than the {self.size or 1} asked "
                f"for; lower size or raise max_operand"
            )
        return Dataset([Prompt(f"arithmetic/{p.text}", _row(p)) for p in found[: self.size]], "arithmetic")


def _row(problem: Problem) -> dict[str, Any]:
    return {
        "prompt": problem.text,
        "answer": problem.answer,
        "completion": problem.answer,
        "operator": problem.symbol,
        "operands": [problem.left, problem.right],
    }
