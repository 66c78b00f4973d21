"""What a value model is worth beside a frozen policy: steering, re-ranking, PPO; and how values are best regressed.

Examples:
  python -m studies.values --quick          one seed, small, some seconds: shows that it works
  python -m studies.values                  everything, about half an hour on one core; run again to go on
  python -m studies.values --report         tables and plot of what is computed already
  python -m studies.values --publish        as --report, and writes them into recipes/ and docs/
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CLAIM = ROOT / "recipes" / "studies" / "values" / "claim.toml"
RESULTS, PAGE = CLAIM.with_name("results.json"), ROOT / "docs" / "studies" / "values.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {options.out}, and the same command goes on from there")
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(
        "python -m studies.values", description=description, epilog=examples, formatter_class=raw
    )
    made.add_argument("--quick", action="store_true", help="one seed and small sizes; its numbers mean nothing")
    made.add_argument("--out", type=Path, default=None, help="folder of cells, results, table and plot")
    made.add_argument("--claim", type=Path, default=CLAIM, help="the claim that is judged (%(default)s)")
    made.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    made.add_argument(
        "--sensitivity", action="store_true", help="also tune heads for each share of noise, beside the claim"
    )
    made.add_argument("--report", action="store_true", help="compute nothing")
    made.add_argument("--publish", action="store_true", help="compute nothing; write into recipes/ and docs/")
    return made


def _run(options: argparse.Namespace) -> int:
    import torch

    from alignment.studies.cells import Cells
    from studies.values import arms, report, work
    from studies.values.settings import QUICK, Settings
    from studies.values.verdict import read_claim

    settings = QUICK if options.quick else Settings()
    options.out = options.out or Path("runs") / "studies" / ("values-quick" if options.quick else "values")
    if options.publish and options.quick:
        raise ValueError("--publish writes what the whole study found; leave --quick out")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, not {options.threads}")
    torch.set_num_threads(options.threads)
    claim = read_claim(options.claim)
    cells = Cells(options.out / "cells.jsonl", _digest(settings))
    begun = time.monotonic()
    if options.report or options.publish:
        rates = _finished(cells, settings)
    else:

        def say(line: str) -> None:
            print(f"{time.monotonic() - begun:6.0f} s  {line}", flush=True)

        rates = work.run(cells, settings, say)
        if options.sensitivity:
            work.sensitivity(cells, settings, say)
    seconds = sum(cell["seconds"] for cell in cells.found.values())
    about: dict[str, Any] = {"seconds": round(seconds), "torch": torch.__version__}
    about["training_flop"] = arms.training(settings)
    results = report.summarise(
        claim, settings, rates, work.results(cells, settings, rates), work.tuned_apart(cells, settings), about
    )
    _write(results, options)
    return 0


def _write(results: dict[str, Any], options: argparse.Namespace) -> None:
    from alignment.studies.pages import insert, write_json
    from studies.values import report

    text = report.markdown(results)
    write_json(results, options.out / "results.json", report.ROWS)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    report.plot(results, options.out / "values.png")
    print(f"\n{text}\nwritten: {options.out}/results.json, table.md, values.png")
    for outcome in results["outcomes"]:
        print(f"{outcome['name']}: {outcome['verdict']}")
    if options.publish:
        write_json(results, RESULTS, report.ROWS)
        PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
        report.plot(results, PAGE.with_suffix(".png"))
        print(f"published: {RESULTS}, {PAGE}, {PAGE.with_suffix('.png')}")


def _finished(cells: Any, settings: Any) -> dict[str, float]:
    from studies.values import work

    try:
        rates = work.chosen(cells, settings)
        work.results(cells, settings, rates)
    except KeyError as error:
        raise ValueError(f"{cells.path} lacks {error}: run the study to its end first, without --report") from error
    return rates


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings.to_json(), sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
