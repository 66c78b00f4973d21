"""Where results stand: in a page between two marks, and in a JSON file with one line for each row."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def insert(page: str, text: str) -> str:
    """``page`` with ``text`` between its two marks.

    Raises:
        ValueError: It lacks them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no place for results: it needs a line {BEGIN!r} and, below it, {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def write_json(results: Mapping[str, Any], path: Path, rows: Collection[str]) -> None:
    """The results as a file; the lists that ``rows`` names have one line for each entry."""
    parts: list[str] = []
    for name, value in results.items():
        if name in rows:
            lines = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f" {json.dumps(name)}: [\n  {lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
