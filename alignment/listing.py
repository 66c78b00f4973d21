"""What ``align list`` says of components."""

import importlib
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.errors import UserError
from alignment.recipe_values import plain_values
from alignment.registry import REGISTRIES, Entry

_COMPARISON = re.compile(r"(?:Gt|Ge|Lt|Le)\((gt|ge|lt|le)=(.*)\)")
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe_components(kind: str | None, name: str | None, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """All kinds, the components of ``kind``, or its component ``name``, as JSON values.

    Raises:
        UserError: There is no such kind or component, or a plugin cannot be imported.
    """
    for module in ("alignment.recipe", "rewards", *plugins):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"cannot import '{module}': {error}") from error
    if kind is None:
        kinds = [{"kind": r.kind, "doc": r.doc, "components": r.names()} for r in REGISTRIES.values()]
        return {"kinds": sorted(kinds, key=lambda k: str(k["kind"]))}
    if kind not in REGISTRIES:
        raise _unknown("kind of component", kind, sorted(REGISTRIES))
    registry = REGISTRIES[kind]
    if name is None:
        return {"kind": kind, "doc": registry.doc, "components": [_described(entry) for entry in registry]}
    if name not in registry.names():
        raise _unknown(f"component of {kind}", name, registry.names())
    return {"kind": kind, **_described(registry[name])}


def show_components(found: Mapping[str, Any], console: Console) -> None:
    """Shows what :func:`describe_components` found."""
    if "kinds" in found:
        table = Table("kind", "what it is", "components", box=None, header_style="bold")
        for k in found["kinds"]:
            table.add_row(f"[bold]{k['kind']}[/bold]", escape(k["doc"]), ", ".join(k["components"]))
        console.print(table)
        console.print("\n[dim]align list KIND shows the components of a kind, align list KIND NAME one of them.[/dim]")
    elif "components" in found:
        console.print(f"[bold]{found['kind']}[/bold]: {escape(found['doc'])}\n")
        for entry in found["components"]:
            _show_entry(entry, console)
    else:
        _show_entry(found, console)


def _described(entry: Entry[Any]) -> dict[str, Any]:
    options = [{**option, "default": plain_values(option["default"])} for option in entry.options()]
    about = {"name": entry.name, "summary": entry.summary, "source": entry.source, "evidence": entry.evidence}
    return {**about, "options": options}


def _show_entry(entry: Mapping[str, Any], console: Console) -> None:
    console.print(f"[bold cyan]{entry['name']}[/bold cyan]  {escape(entry['summary'])}")
    console.print(f"  [dim]source:[/dim] {escape(entry['source'])}   [dim]evidence:[/dim] {entry['evidence']}")
    if entry["options"]:
        table = Table("option", "default", "type", "unit", "what it does", box=None, header_style="dim", padding=(0, 2))
        for option in entry["options"]:
            limits = f" ({', '.join(map(_limit, option['constraints']))})" if option["constraints"] else ""
            cells = (option["name"], _default(option), option["type"], option["unit"] or "")
            table.add_row(*map(escape, cells), escape(option["description"] + limits))
        console.print(table)
    console.print()


def _limit(constraint: str) -> str:
    """``Ge(ge=0)`` as ``>= 0``."""
    found = _COMPARISON.fullmatch(constraint)
    return f"{_SIGNS[found[1]]} {found[2]}" if found else constraint


def _default(option: Mapping[str, Any]) -> str:
    value = option["default"]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(what: str, given: str, allowed: Sequence[str]) -> UserError:
    close = get_close_matches(given, allowed, 1, 0.5)
    meant = f"; did you mean '{close[0]}'?" if close else ""
    return UserError(f"there is no {what} '{given}'{meant} (available: {', '.join(allowed)})")
