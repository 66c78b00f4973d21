"""Finished parts of a study, one JSON line each: an interrupted study goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any


class Cells:
    """What has been computed, by name and seed, of one set of settings.

    A cell is appended as one line once it is finished, and reaches the disk before the next begins. A line that was
    cut off does not count, nor do cells of other settings.

    Args:
        path: The file; it and its folder are made.
        digest: Of the settings.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        self.found: dict[tuple[str, int], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self._cut = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                continue
            if cell["digest"] == digest:
                self.found[cell["name"], cell["seed"]] = cell

    def rows(self, name: str, seed: int) -> list[dict[str, Any]] | None:
        """What a cell holds, or None if it is yet to be computed."""
        cell = self.found.get((name, seed))
        return None if cell is None else cell["rows"]

    def add(self, name: str, seed: int, rows: list[dict[str, Any]], seconds: float) -> None:
        """Keeps a finished cell."""
        cell = {"name": name, "seed": seed, "digest": self.digest, "seconds": round(seconds, 2), "rows": rows}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._cut else "") + json.dumps(cell) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._cut = False
        self.found[name, seed] = cell

    def seconds(self, kind: str, otherwise: float) -> float:
        """Mean duration of cells whose name begins with ``kind``; ``otherwise`` where there is none."""
        taken = [cell["seconds"] for (name, _), cell in self.found.items() if name.partition("/")[0] == kind]
        return sum(taken) / len(taken) if taken else otherwise
