"""The quickstarts from a cold start, as a user waits for them.

One process each, from the command line to the last number; the real engines' second.

    python benchmarks/quickstart.py
    python benchmarks/quickstart.py --quick
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"quickstart": (5, 25), "quickstart_cluster": (10, 15)}
"""Minutes it may take, and points that it must gain."""


def measure(recipe: str, quick: bool) -> dict[str, Any]:
    """One run, as a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.output={folder}", f"run.name={recipe}"]
        if quick:
            settings += ["stages.0.steps=80", "stages.1.steps=2", "stages.1.prompts_per_step=8"]
        command = [sys.executable, "-m", "alignment", "train", str(ROOT / f"recipes/{recipe}.yaml")]
        started = time.monotonic()
        words = [word for setting in settings for word in ("--set", setting)]
        subprocess.run(command + words, check=True, env=dict(os.environ), cwd=ROOT)
        seconds = time.monotonic() - started
        result = json.loads((Path(folder) / recipe / "result.json").read_text(encoding="utf-8"))
    before, after = (100 * result["eval"][when]["accuracy"] for when in ("before", "after"))
    return {"recipe": recipe, "minutes": seconds / 60, "before, %": before, "after, %": after, "gain": after - before}


def goal(row: dict[str, Any]) -> dict[str, Any]:
    """Whether it was quick enough and learned enough."""
    minutes, points = RECIPES[row["recipe"]]
    return {
        "what": f"{row['recipe']} from a cold start",
        "goal": f"at least {points} points within {minutes} minutes",
        "measured": f"{row['gain']:.1f} points in {row['minutes']:.1f} minutes",
        "met": row["minutes"] <= minutes and row["gain"] >= points,
    }


def main() -> None:
    """The benchmark."""
    args = harness.parser(__doc__ or "").parse_args()
    rows = [measure(recipe, args.quick) for recipe in RECIPES]
    result = {
        "title": "The quickstarts from a cold start",
        "tables": [{"title": "One run each", "rows": rows}],
        "not_equal": ["The two differ in steps and in how many completions they learn from."],
        "goals": [] if args.quick else [goal(row) for row in rows],
    }
    harness.finish(result, args.json)


if __name__ == "__main__":
    main()
