"""A recipe's values as a tree in which each remembers who said it, and the mistakes found in it.

Trees merge: mappings key by key, while scalars, lists and empty mappings replace; a component whose ``name`` changes
is replaced, so that options of one method never leak into another.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import UserError

Place = tuple[str | int, ...]
"""Where a value sits in a recipe: ``("stages", 1, "steps")``."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Who said a value: a file and line, or ``--set a.b=c``."""

    source: str
    line: int | None = None
    folder: Path = Path()
    """What a relative path said here is relative to."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Node:
    """A value and who said it. ``value`` is a scalar, ``dict[str, Node]`` or ``list[Node]``."""

    value: Any
    mark: Mark


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a recipe."""

    mark: Mark
    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.mark}: {dotted(self.place)}{': ' if self.place else ''}{self.message}"


@dataclass(frozen=True)
class Conflict:
    """Values that do not go together, told at ``place``. ``because`` are the places whose values it hangs on."""

    place: Place
    message: str
    because: tuple[Place, ...] = ()


class RecipeError(UserError):
    """Everything that is wrong with a recipe, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def dotted(place: Place) -> str:
    """``stages.1.steps``."""
    return ".".join(str(part) for part in place)


def merge(base: Node, over: Node, place: Place = ()) -> Node:
    """``over`` laid on ``base``; a mapping laid on a list changes the items that its keys number.

    An empty mapping replaces what was there, as ``field_map={}`` means; only an empty file changes nothing.

    Raises:
        RecipeError: A key is not the number of an item of the list.
    """
    if not isinstance(over.value, dict) or not over.value:
        return base if over.value == {} and not place else over
    if isinstance(base.value, str) and "name" not in over.value:
        base = Node({"name": base}, base.mark)
    if isinstance(base.value, list):
        items = list(base.value)
        numbers = {str(index): index for index in range(len(items))}
        if odd := [
            Problem(child.mark, place, _no_item(key, items)) for key, child in over.value.items() if key not in numbers
        ]:
            raise RecipeError(odd)
        for key, child in over.value.items():
            items[numbers[key]] = merge(items[numbers[key]], child, (*place, numbers[key]))
        return Node(items, base.mark)
    if not isinstance(base.value, dict) or _renamed(base.value, over.value, place):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child, (*place, key)) if key in merged else child
    return Node(merged, base.mark)


def plain(node: Node) -> Any:
    """The values without their marks."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def descend(node: Node, place: Place) -> Iterator[Node]:
    """The nodes from the root to ``place``, as far as they exist."""
    yield node
    for part in place:
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[part]
        elif isinstance(node.value, list) and isinstance(part, int) and 0 <= part < len(node.value):
            node = node.value[part]
        else:
            return
        yield node


def mark_of(root: Node, place: Place) -> Mark:
    """Who said the value at ``place``, or the nearest mapping or list around it that was said."""
    return list(descend(root, place))[-1].mark


def walk(node: Node, place: Place = ()) -> Iterator[tuple[Place, Node]]:
    """Every value with its place."""
    yield place, node
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from walk(child, (*place, key))
    if isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from walk(child, (*place, index))


def kind(value: Any) -> str:
    """How an error speaks of a value: its type, and the value itself if it is short."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text '{value}'" if len(value) <= 60 else f"the text '{value[:57]}...'"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return type(value).__name__


def _no_item(key: str, items: Sequence[Node]) -> str:
    """What to say of a key that is not the number of an item."""
    if not items:
        return f"there is no item {key}: the list is empty"
    there = ", ".join(f"{index} {_called(item)}".rstrip() for index, item in enumerate(items))
    return f"there is no item {key}: items are numbered from 0 ({there})"


def _called(item: Node) -> str:
    """What an item of a list is called, as far as it says so."""
    if not isinstance(item.value, dict):
        return str(item.value) if isinstance(item.value, (str, int, float)) else ""
    keys = ("name", "function", "environment", "stage")
    return next((str(item.value[key].value) for key in keys if key in item.value), "")


def _renamed(base: dict[str, Node], over: dict[str, Node], place: Place) -> bool:
    """Whether ``over`` names another component. A run and a stage have names too, but these are only labels."""
    is_component = place not in ((), ("run",)) and not (len(place) == 2 and place[0] == "stages")
    if not is_component or "function" in base or "name" not in base or "name" not in over:
        return False
    return base["name"].value != over["name"].value
