"""What the benchmarks share: their arguments, what they say of the machine, and the file that they write.

A benchmark is a script `benchmarks/NAME.py` with `--quick` (seconds instead of minutes; numbers that only show that it
works) and `--json FILE`. The file holds

    {"title": ..., "settings": {...}, "machine": {...}, "tables": [{"title": ..., "rows": [{column: value}]}],
     "equal": [...], "not_equal": [...], "goals": [{"what": ..., "goal": ..., "measured": ..., "met": bool}]}

`settings` and everything after `tables` may be left out. `run.py` collects the files, `report.py` makes them readable.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("alignment-rl", "torch", "transformers", "trl", "numpy")
console = Console(highlight=False)


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=description.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    return made


def cpu_name() -> str:
    """As the operating system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def rich_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """``rows`` for the terminal; the first row names the columns."""
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(shown(row.get(name)) for name in rows[0]))
    return table


def shown(value: Any) -> str:
    """A cell: three significant digits, thousands apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def finish(result: Mapping[str, Any], path: Path | None) -> None:
    """Shows the result and, if a file was asked for, writes it, with the machine that it was measured on."""
    for table in result["tables"]:
        console.print(rich_table(table["title"], table["rows"]))
    for goal in result.get("goals", ()):
        console.print(goal_line(goal), soft_wrap=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n", encoding="utf-8")


def goal_line(goal: Mapping[str, Any]) -> str:
    """Such as ``met: CPU per rollout under 50 us; measured 31.2 us``."""
    return f"{'met' if goal['met'] else 'missed'}: {goal['what']}, goal {goal['goal']}, measured {goal['measured']}"
