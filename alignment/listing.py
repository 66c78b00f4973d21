"""What ``align list`` says of components."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.errors import UserError
from alignment.recipe_errors import did_you_mean
from alignment.recipe_values import plain_values
from alignment.registry import REGISTRIES, Entry, Registry
from alignment.tasks.levels import level_table
from alignment.tasks.task import tasks

COMPONENTS = ("alignment.recipe", "alignment.algorithms.decodings", "alignment.evaluation.benchmarks", "rewards")
"""Modules that register ours."""
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe_components(kind: str | None, name: str | None, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """All kinds, the kind ``kind``, or its component ``name``, as JSON values; always down to the options.

    Of one task there are also its default levels, see :func:`alignment.tasks.levels.level_table`.

    Raises:
        UserError: There is no such kind or component, or a plugin cannot be imported.
    """
    for module in (*COMPONENTS, *plugins):
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever a user's module may do when it is imported
            raise UserError(f"cannot import '{module}': {type(error).__name__}: {error}") from error
    if kind is None:
        return {"kinds": [describe_components(kind, None) for kind in sorted(REGISTRIES)]}
    if kind not in REGISTRIES:
        raise _unknown("kind of component", kind, sorted(REGISTRIES))
    registry = REGISTRIES[kind]
    if name is None:
        return {"kind": kind, "doc": registry.doc, "components": [_described(entry) for entry in registry]}
    if name not in registry.names():
        raise _unknown(f"component of {kind}", name, registry.names())
    found = {"kind": kind, **_described(registry[name])}
    if kind == tasks.kind and all(o["default"] != "required" for o in found["options"]):
        found["levels"] = level_table(tasks.build(name))
    return found


def show_components(found: Mapping[str, Any], console: Console) -> None:
    """Shows what :func:`describe_components` found."""
    if "kinds" in found:
        table = Table("kind", "what it is", "components", box=None, header_style="bold")
        for k in found["kinds"]:
            table.add_row(f"[bold]{k['kind']}[/bold]", escape(k["doc"]), ", ".join(c["name"] for c in k["components"]))
        console.print(table)
        console.print("\n[dim]align list KIND shows the components of a kind, align list KIND NAME one of them.[/dim]")
    elif "components" in found:
        console.print(f"[bold]{found['kind']}[/bold]: {escape(found['doc'])}\n")
        for entry in found["components"]:
            _show_entry(entry, console)
    else:
        _show_entry(found, console)
        if "levels" in found:
            _show_levels(found["levels"], console)


def _described(entry: Entry[Any]) -> dict[str, Any]:
    hints = get_type_hints(entry.cls, include_extras=True)
    options = [
        {
            **option,
            "type": _type(hints[option["name"]]),
            "default": plain_values(option["default"]),
            "constraints": _constraints(hints[option["name"]]),
        }
        for option in entry.options()
    ]
    about = {"name": entry.name, "summary": entry.summary, "source": entry.source, "evidence": entry.evidence}
    return {**about, "options": options}


def _show_entry(entry: Mapping[str, Any], console: Console) -> None:
    console.print(f"[bold cyan]{entry['name']}[/bold cyan]  {escape(entry['summary'])}")
    console.print(f"  [dim]source:[/dim] {escape(entry['source'])}   [dim]evidence:[/dim] {entry['evidence']}")
    if entry["options"]:
        table = Table("option", "default", "type", "unit", "what it does", box=None, header_style="dim", padding=(0, 2))
        for option in entry["options"]:
            limits = (
                f" ({', '.join(_limit(*c) for c in option['constraints'].items())})" if option["constraints"] else ""
            )
            cells = (option["name"], _default(option), option["type"], option["unit"] or "")
            table.add_row(*map(escape, cells), escape(option["description"] + limits))
        console.print(table)
    console.print()


def _show_levels(levels: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A row for each level of a task."""
    columns = ("level", "size", "problems", "constant answer", "example")
    table = Table(*columns, box=None, header_style="dim", padding=(0, 2))
    for row in levels:
        problems = f"{row['problems']:,}" if row["problems_exact"] else f"at least {row['problems']:,}"
        example = f"{row['example']['prompt']}{row['example']['completion']}"
        floor = f"{'' if row['floor_exact'] else 'about '}{row['floor']:.3f}"
        table.add_row(str(row["level"]), str(row["size"]), problems, floor, escape(example))
    console.print(table)
    console.print(
        "\n[dim]problems: different prompts. constant answer: the share of problems that the best constant answer "
        "solves.[/dim]"
    )


def _type(hint: Any) -> str:
    """A type as a recipe's author would say it: ``int | null``, ``'loss' | 'reward'``, ``list of text``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        registry = next((r for meta in args[1:] if (r := _registry(meta)) is not None), None)
        return f"one of {registry.kind}" if registry is not None else _type(args[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_type, args))
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin in (tuple, list):
        items = dict.fromkeys(_type(arg) for arg in args if arg is not Ellipsis)
        length = "" if origin is list or Ellipsis in args else f"{len(args)} "
        return f"list of {length}{' and '.join(f'({item})' if '|' in item else item for item in items)}"
    names = {str: "text", type(None): "null", dict: "mapping"}
    return names.get(origin or hint) or getattr(hint, "__name__", str(hint))


def _registry(meta: Any) -> Registry[Any] | None:
    """The registry of :func:`alignment.registry.component`, if ``meta`` is one."""
    owner = getattr(meta.func, "__self__", None) if isinstance(meta, BeforeValidator) else None
    return owner if isinstance(owner, Registry) else None


def _constraints(hint: Any) -> dict[str, Any]:
    """What :func:`alignment.registry.option` demands of a value, such as ``{"ge": 0}``."""
    demands = [m for info in getattr(hint, "__metadata__", ()) for m in getattr(info, "metadata", ())]
    parts = [dataclasses.asdict(m) if dataclasses.is_dataclass(m) else vars(m) for m in demands]  # pyright: ignore[reportArgumentType]
    return {name: value for part in parts for name, value in part.items()}


def _limit(name: str, value: Any) -> str:
    """``ge`` and 0 as ``>= 0``."""
    return f"{_SIGNS[name]} {value}" if name in _SIGNS else f"{name}: {value}".replace("_", " ")


def _default(option: Mapping[str, Any]) -> str:
    value = option["default"]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(what: str, given: str, allowed: Sequence[str]) -> UserError:
    return UserError(f"there is no {what} '{given}'{did_you_mean(given, allowed)} (available: {', '.join(allowed)})")
