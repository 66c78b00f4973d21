"""Reward components: what a recipe's ``rewards`` list may name, and how one is described to a scoring worker.

This module imports neither torch nor transformers: scoring workers, which are started anew whenever one had to be
killed, import it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from alignment.errors import UserError
from alignment.registry import Registry
from alignment.score import Score


@runtime_checkable
class RewardFunction(Protocol):
    """Judges completions, called as TRL calls a reward function: every argument by keyword, one entry per completion.

    ``prompts`` and ``completions`` are texts, or lists of chat messages for a chat prompt (:func:`texts` reads both).
    ``columns`` holds ``completion_ids`` (token ids), ``length_tokens`` (sampled tokens), ``finish_reason`` and every
    other column of the data set.

    Optional on the class:

    - ``group_level: ClassVar[bool]``, True when it must see the whole group of a prompt at once;
    - ``columns`` (an attribute or property), names of the data columns it reads;
    - ``prepare() -> None``, called once in each scoring worker before the first call, for imports that take time;
    - ``located(beside: Path, run: Path)`` and ``missing(beside: Path, members)``, if it names a folder: itself with
      that in full, and why there will be none;
    - ``check(rows: Sequence[Mapping[str, Any]]) -> Sequence[str | None]``, what makes each row of the data set useless
      to this reward, or None. It runs in the scoring workers when data is loaded, on some or all rows at a time.
    """

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Sequence[float | None | Score]:
        """One value per completion; None where the reward does not apply, a :class:`Score` to give a status."""
        ...


reward_functions: Registry[RewardFunction] = Registry(
    "rewards", RewardFunction, "What a completion is worth: one column each, summed by weight"
)


def texts(completions: Sequence[Any]) -> list[str]:
    """The text of each completion: the string itself, or the content of its last chat message."""
    return [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]


@dataclass(frozen=True)
class RewardSpec:
    """One reward column of a recipe.

    Raises:
        UserError: No column, a weight that is no number, or a ``function`` that is no dotted path.
    """

    column: str
    weight: float = 1.0
    function: RewardFunction | str | None = None
    """A component, the dotted path of any TRL-style function, or None: the environment gives this score."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of a dotted path: of the function, or of the factory or class that makes it."""
    group_level: bool = False
    """The function compares completions of a prompt: it always sees the whole group, and fails for all of it."""

    def __post_init__(self) -> None:
        if not self.column:
            raise UserError("a reward needs a name for its column")
        if not math.isfinite(self.weight):
            raise UserError(f"reward {self.column!r}: weight {self.weight} is not a finite number")
        if isinstance(self.function, str):
            parts = self.function.split(".")
            if len(parts) < 2 or not all(part.isidentifier() for part in parts):
                raise UserError(
                    f"reward {self.column!r}: {self.function!r} is not the dotted path of a function in a module, "
                    f"such as my_lab.rewards.short"
                )
        if self.options and not isinstance(self.function, str):
            raise UserError(f"reward {self.column!r}: options go with the dotted path of a function")

    @property
    def whole_group(self) -> bool:
        """Whether it must see all completions of a prompt in one call."""
        return self.group_level or bool(getattr(self.function, "group_level", False))

    def located(self, beside: Path, run: Path) -> "RewardSpec":
        """The same with its function's folders in full: ``located(beside, run)`` of those that name any, with the
        recipe's folder and the run's."""
        find = getattr(self.function, "located", None)
        return self if find is None else replace(self, function=find(beside, run))

    @property
    def checks_rows(self) -> bool:
        """Whether it can tell rows that it cannot use."""
        return callable(getattr(self.function, "check", None))

    def wire(self) -> dict[str, Any] | None:
        """What another process rebuilds it from: names and options, no code. None when there is no function.

        Raises:
            UserError: The component's class lives in a script, which other processes cannot import, or an option is
                not a JSON value.
        """
        if self.function is None:
            return None
        if isinstance(self.function, str):
            wire = {"column": self.column, "path": self.function, "options": dict(self.options)}
            try:
                json.dumps(wire)
            except TypeError as error:
                raise UserError(f"reward {self.column!r}: options must be plain YAML values: {error}") from error
            return wire
        module = type(self.function).__module__
        if module == "__main__":
            name = type(self.function).__name__
            raise UserError(f"reward {self.column!r}: move {name} from the script into a module of its own")
        return {"column": self.column, "module": module, "component": reward_functions.dump(self.function)}
