"""Runs the benchmarks one after another, each in a process of its own, and keeps what they measured in one file.

    python benchmarks/run.py                     # all of them; minutes each
    python benchmarks/run.py --quick             # to see that they work
    python benchmarks/run.py --only controller logprobs --threads 1

A benchmark that fails does not lose the results of the others; the exit code is then 1. `report.py` turns the file into
the tables of `benchmarks/README.md`.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).resolve().parent
NAMES = (
    "quickstart",
    "grpo_vs_trl",
    "dpo_vs_trl",
    "logprobs",
    "long_tailed",
    "controller",
    "curricula",
    "prompt_curriculum",
    "entropy",
    "vllm_throughput",
    "decoding",
    "ppo_step",
    "transport",
    "asynchronous",
    "simulate",
    "gpu",
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def run(name: str, threads: int, quick: bool) -> dict[str, Any]:
    """The result of one benchmark, with its exit code and how long it took; its output goes to the terminal."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(path), *(["--quick"] if quick else [])]
        start = time.monotonic()
        code = subprocess.run(command, env=environment, check=False).returncode
        done = {"exit_code": code, "seconds": round(time.monotonic() - start, 1), "threads": threads}
        measured = json.loads(path.read_text(encoding="utf-8")) if code == 0 and path.exists() else {}
    if code == 0 and not measured:
        done["exit_code"] = 1  # it said that all is well and wrote nothing
    return {**measured, **done}


def default_file(quick: bool) -> Path:
    """`results/DATE-CPU.json`, out of the way of git."""
    cpu = re.sub(r"[^a-z0-9]+", "-", harness.cpu_name().lower()).strip("-")
    return HERE / "results" / f"{datetime.date.today().isoformat()}-{cpu}{'-quick' if quick else ''}.json"


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Replaces the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    staged.replace(path)


def main() -> int:
    """Runs what was asked for; 1 if any of it failed."""
    cores = harness.cores()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds each, to see that they work")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--threads", type=int, default=cores, help="threads of each process (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: benchmarks/results/...)")
    args = parser.parse_args()
    path = args.out or default_file(args.quick)
    results: dict[str, Any] = {"date": datetime.date.today().isoformat(), "quick": args.quick, "benchmarks": {}}
    for number, name in enumerate(args.only, 1):
        harness.console.rule(f"{number}/{len(args.only)} {name}")
        found = results["benchmarks"][name] = run(name, args.threads, args.quick)
        write(path, results)  # after each one, so that Ctrl-C loses only the one under way
        outcome = f"skipped: {found['skipped']}" if found.get("skipped") else "done"
        outcome = outcome if found["exit_code"] == 0 else f"FAILED with exit code {found['exit_code']}"
        harness.console.print(f"{name}: {outcome} after {found['seconds']} s")
    failed = [name for name, found in results["benchmarks"].items() if found["exit_code"]]
    harness.console.print(f"\nresults: {path}\ntables:  python benchmarks/report.py {path}", soft_wrap=True)
    if failed:
        harness.console.print(f"failed:  {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
