"""The command ``align study``: runs a claim to its verdict, or goes on where it stopped."""

import importlib.util
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from alignment.durable import replace_file
from alignment.errors import UserError
from alignment.runs import Run
from alignment.signals import EXIT_CODES
from alignment.studies import report
from alignment.studies.cells import Cells
from alignment.studies.claim import read_claim
from alignment.studies.design import Study
from alignment.studies.judge import ROWS, results_of
from alignment.studies.pages import write_json
from alignment.studies.running import Interrupted
from alignment.studies.work import digest_of, execute


def study(claim: Path, out: Path | None, docs: Path, quick: bool, dry_run: bool, workers: int) -> int:
    """Runs what is missing and writes results, table and plot; the exit code.

    Args:
        claim: The file.
        out: Folder of runs, cells and results; None: ``runs/studies/NAME``.
        docs: Where a whole study's page and plot go.
        quick: One seed, small: shows that it works, and no verdict.
        dry_run: List the runs, and which are done; check every recipe; run nothing.
        workers: Runs at a time.

    Raises:
        UserError: The claim or a recipe is wrong, or the claim is not the one that was begun with.
    """
    read = read_claim(claim)
    _refuse_files({"--docs": docs} | ({} if out is None else {"--out": out}))
    folder = out or Path("runs") / "studies" / (read.name + "-quick" * quick)
    plan = Study(read, folder, quick)
    plan.check()
    console = Console(soft_wrap=True, highlight=False)
    if dry_run:
        _refuse_another_claim(plan)
        _list(plan, Cells(folder / "cells.jsonl", digest_of(plan)) if folder.exists() else None, console)
        return 0
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("a study is plotted with matplotlib, which is missing: pip install 'alignment-rl[studies]'")
    page = None if quick else docs / f"{read.name}.md"
    before = page.read_text(encoding="utf-8") if page is not None and page.is_file() else None
    if before is not None:
        report.check_page(before, str(page))
    folder.mkdir(parents=True, exist_ok=True)
    with Run(folder).locked("give this study another --out"):
        _refuse_another_claim(plan)
        replace_file(folder / "claim.json", json.dumps(_identity(plan)).encode())
        return _run(plan, page, before, workers, console)


def _run(plan: Study, page: Path | None, before: str | None, workers: int, console: Console) -> int:
    cells, begun = Cells(plan.folder / "cells.jsonl", digest_of(plan)), time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - begun:6.0f} s  {line}", markup=False)

    try:
        with _sigterm_interrupts():
            chosen = execute(plan, cells, workers, say)
    except (Interrupted, KeyboardInterrupt) as stop:
        console.print(f"stopped; what is finished is in {plan.folder}, and the same command goes on", markup=False)
        return getattr(stop, "exit_code", 130)
    results = results_of(plan, cells, chosen)
    name = plan.read.name
    write_json(results, plan.folder / "results.json", ROWS)
    (plan.folder / f"{name}.md").write_text(report.page(results, None), encoding="utf-8")
    report.plot(results, plan.folder / f"{name}.png")
    written = [plan.folder / "results.json", plan.folder / f"{name}.md", plan.folder / f"{name}.png"]
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(report.page(results, before), encoding="utf-8")
        report.plot(results, page.with_suffix(".png"))
        written += [page, page.with_suffix(".png")]
    console.print(f"\n{report.markdown(results)}", markup=False)
    console.print(f"written: {', '.join(map(str, written))}", markup=False)
    console.print(results["verdict"] if plan.quick else f"verdict: {results['verdict']}", markup=False)
    return 0


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """The first SIGTERM raises :class:`Interrupted` inside, where the program stands; later ones have no effect.

    A run that is under way in this process has a handler of its own, which saves first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted(EXIT_CODES["SIGTERM"])

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_files(folders: Mapping[str, Path]) -> None:
    for option, folder in folders.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"{option} {folder}: {there} is a file, and this is to be a folder; name another")


def _identity(plan: Study) -> dict[str, Any]:
    return {"claim_sha256": plan.read.sha256, "digest": digest_of(plan), "data": plan.data}


def _refuse_another_claim(plan: Study) -> None:
    """What was measured belongs to the claim that was written before."""
    path = plan.folder / "claim.json"
    if not path.is_file():
        return
    known, own = json.loads(path.read_text(encoding="utf-8")), _identity(plan)
    remedy = f"put it back as it was, or begin a study of the new one with another --out (this one is {plan.folder})"
    if known["claim_sha256"] != own["claim_sha256"]:
        raise UserError(
            f"{plan.read.path} is not the claim that {plan.folder} was begun with (SHA-256 "
            f"{own['claim_sha256'][:12]} now, {known['claim_sha256'][:12]} then): a claim does not change once it is "
            f"measured; {remedy}"
        )
    if known["digest"] != own["digest"]:
        sections = sorted({*known.get("data", ()), *plan.data})
        changed = [f"data.{name}" for name in sections if known.get("data", {}).get(name) != plan.data.get(name)]
        what = " and ".join(changed) if changed else f"the recipe {plan.read.recipe}, or a module beside it,"
        raise UserError(f"{what} is not what {plan.folder} was begun with; {remedy}")


def _list(plan: Study, cells: Cells | None, console: Console) -> None:
    """Every run, and whether it is done."""
    tasks = [*plan.warm_ups(), *plan.tuning(), *plan.reports(dict.fromkeys(plan.claim.compared, 0))]
    done = 0
    for task in tasks:
        there = cells is not None and cells.rows(task.cell, task.seed) is not None
        done += there
        tuned = task.kind in ("report", "control") and plan.tuning()
        settings = "at its best point" if tuned else " ".join(f"{k}={v}" for k, v in plan.grid[task.point].items())
        what = "" if task.kind == "warm-up" else f"{task.arm} {settings}"
        state = "done" if there else "to do"
        console.print(f"{state:5}  {task.kind:7}  seed {task.seed:<4} {what}".rstrip(), markup=False)
    mean = None if cells is None or not cells.found else sum(c["seconds"] for c in cells.found.values())
    took = "" if mean is None or cells is None else f"; about {mean / len(cells.found):.0f} s each so far"
    console.print(f"{len(tasks)} runs, {done} done{took}; claim {plan.read.sha256[:12]}", markup=False)
