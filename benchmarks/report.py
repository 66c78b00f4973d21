"""Prints what `run.py` collected as Markdown: `python benchmarks/report.py FILE > benchmarks/README.md`."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

PREAMBLE = """\
# Benchmarks

`make bench` runs them all (`make bench QUICK=1` quickly, to see that they work; also `ONLY="controller logprobs"`,
`THREADS=1` and `OUT=file.json`) and prints the command that makes this page from the file it writes. Numbers are of one
machine, and only comparisons made on the same one mean anything."""


def report(results: Mapping[str, Any]) -> str:
    """All of them, one section each."""
    lines = [PREAMBLE]
    if results["quick"]:
        lines.append("**Made with `--quick`: these numbers show that the benchmarks work, nothing else.**")
    for name, found in results["benchmarks"].items():
        lines += section(name, found)
    return "\n\n".join(lines) + "\n"


def section(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """One benchmark: where it ran, what it measured, what was equal and what was not."""
    yield f"## {found.get('title', name)}"
    if found["exit_code"]:
        yield f"`benchmarks/{name}.py` failed with exit code {found['exit_code']}; nothing was measured."
        return
    if found.get("skipped"):
        yield f"`benchmarks/{name}.py` was skipped: it {found['skipped']}."
        return
    yield f"`benchmarks/{name}.py`, {found['seconds']:.0f} s. {_machine(found['machine'])}"
    if found.get("settings"):
        settings = [f"{key} {harness.shown(value)}" for key, value in found["settings"].items()]
        yield f"Settings: {'; '.join(settings)}."
    for table in found["tables"]:
        yield f"{table['title']}:\n\n{markdown(table['rows'])}"
    for title, key in (("Equal", "equal"), ("Not equal", "not_equal")):
        if found.get(key):
            yield f"{title}:\n\n" + "\n".join(f"- {text}" for text in found[key])
    if found.get("goals"):
        yield "Goals:\n\n" + "\n".join(f"- {harness.goal_line(goal)}" for goal in found["goals"])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; the first row names the columns. Numbers stand on the right."""
    names = list(rows[0])
    ruler = ["---" if isinstance(rows[0][name], str) else "---:" for name in names]
    cells = [[harness.shown(row.get(name)).replace("|", "\\|") for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, ruler, *cells))


def _machine(of: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    device = "" if of["device"] == "cpu" else f", {of['device']}"
    return f"{of['cpu']}, {of['cores']} cores, {of['threads']} threads{device}; Python {of['python']}, {versions}."


def main() -> None:
    """Prints the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="what run.py wrote")
    sys.stdout.write(report(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
