"""`align study`: a tiny study through the command, stopped by Ctrl-C and gone on with; what it refuses."""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from alignment.checkpoint import Checkpoints
from alignment.cli import app
from alignment.ledger import Verdicts
from alignment.runs import Run
from alignment.studies import running
from alignment.studies.cells import Cells
from alignment.studies.claim import read_claim
from alignment.studies.cost import costs
from alignment.studies.curve import read_lines
from alignment.studies.design import Study
from alignment.studies.judge import results_of
from alignment.studies.report import markdown
from alignment.studies.work import digest_of
from alignment.trainer import train
from tests.studies.small import write_claim

RUNS = 12  # 3 warm-ups, 2 arms at 2 rates on a tuning seed, 2 arms on 2 report seeds, a control


class CtrlC:
    """Presses Ctrl-C in the first step of a run."""

    def start(self, run: Any) -> None: ...
    def rollouts(self, step: int, stage: str, groups: Any) -> None: ...
    def finish(self, result: Any) -> None: ...
    def close(self) -> None: ...
    def log(self, record: Any) -> None:
        if record.kind == "train" and record.step == 1:
            signal.raise_signal(signal.SIGINT)


def invoke(*arguments: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["study", *map(str, arguments)], env={"COLUMNS": "250"})
    assert done.exit_code == code, f"{done.output}\n{done.exception}"
    return done.output


@dataclass(frozen=True)
class Whole:
    """A study that was stopped once and then finished."""

    folder: Path
    stopped: str
    finished: str
    trained: list[str]
    """Runs that were trained by the second call."""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text())

    def options(self) -> list[str]:
        return ["--out", str(self.out), "--docs", str(self.folder / "docs")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    folder, patch = tmp_path_factory.mktemp("study"), pytest.MonkeyPatch()
    claim, trained = write_claim(folder), list[str]()

    def interrupted(recipe: Any, sinks: Any = (), **options: Any) -> dict[str, Any]:
        return train(recipe, sinks=[*sinks, *([CtrlC()] if recipe.run.name == "bonus.0.1" else [])], **options)

    def counted(recipe: Any, **options: Any) -> dict[str, Any]:
        trained.append(recipe.run.name)
        return train(recipe, **options)

    options = ["--out", str(folder / "out"), "--docs", str(folder / "docs")]
    patch.setattr(running, "train", interrupted)
    stopped = invoke(claim, *options, code=130)
    patch.setattr(running, "train", counted)
    finished = invoke(claim, *options)
    patch.undo()
    return Whole(folder, stopped, finished, trained)


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(whole):
    assert "the same command goes on" in whole.stopped and f"8/{RUNS}  report plain" in whole.stopped
    assert whole.trained == ["bonus.0.1", "plain.0.2", "bonus.0.2", "zero.0.1"]
    steps = [line["step"] for line in read_lines(whole.out / "runs" / "bonus.0.1") if line["kind"] == "train"]
    evaluations = (whole.out / "runs" / "bonus.0.1" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [0, 2]
    assert steps == [1, 2]  # not the four of the recipe: the budget is two
    assert f"{RUNS}/{RUNS}  control zero" in whole.finished and "min left" in whole.finished


def test_results_a_page_and_a_plot_are_written(whole):
    results, page = whole.results, (whole.folder / "docs" / "small.md").read_text()
    assert results["verdict"] in ("holds", "does not hold", "inconclusive")
    assert f"verdict: {results['verdict']}" in whole.finished and f"**Verdict: {results['verdict']}.**" in page
    digest = hashlib.sha256((whole.folder / "small.yaml").read_bytes()).hexdigest()
    assert results["claim_sha256"] == digest and digest in page
    assert results["sources_sha256"] == {
        "tiny.yaml": hashlib.sha256((whole.folder / "tiny.yaml").read_bytes()).hexdigest()
    }
    assert results["seeds"] == {"tune": [101], "report": [1, 2]} and len(results["cells"]) == 4
    assert [arm["arm"] for arm in results["arms"]] == ["plain", "bonus"]
    assert all(arm["flops"] > 0 and arm["steps"] == 2 for arm in results["arms"])
    assert "| plain | it is stable | A paper (arXiv 0000.00000) |" in page
    assert (whole.folder / "docs" / "small.png").stat().st_size > 1000


def test_no_bonus_equals_no_control_bit_for_bit_and_a_bonus_does_not(whole):
    assert whole.results["controls"] == [{"arm": "zero", "equals": "plain", "passed": True}]
    lines = [json.loads(line) for line in (whole.out / "cells.jsonl").read_text().splitlines()]
    policy = {cell["name"].split("/")[1]: cell["rows"][0]["policy"] for cell in lines if cell["seed"] == 1
              and not cell["name"].startswith("warm")}  # fmt: skip
    assert policy["zero"] == policy["plain"] != policy["bonus"]


def test_arms_of_a_seed_begin_alike_and_see_the_same_prompts(whole):
    starts = [Verdicts(whole.out / "runs" / f"{arm}.0.1" / "evaluations.jsonl").read()[0] for arm in ("plain", "bonus")]
    first = [read_lines(whole.out / "runs" / f"{arm}.0.1")[0] for arm in ("plain", "bonus")]
    assert starts[0] == starts[1] and len(starts[0]) == 6
    assert [line["prompt_tokens"] for line in first] == [first[0]["prompt_tokens"]] * 2


def test_costs_add_up_over_a_run(whole):
    lines = read_lines(whole.out / "runs" / "plain.0.1")
    trained = [line for line in lines if line["kind"] == "train"]
    assert costs(lines, None)[2].tokens == sum(line["completion_tokens"] for line in trained)
    assert all(line["fitted_tokens"] == line["prompt_tokens"] + line["completion_tokens"] for line in trained)
    [cell] = [c for c in whole.results["cells"] if (c["arm"], c["seed"]) == ("plain", 1)]
    assert [row[0] for row in cell["curve"]] == [0, 2] and cell["curve"][0][1] < cell["curve"][1][1]


def test_a_finished_study_trains_nothing_and_keeps_what_was_written_around_the_results(whole, monkeypatch):
    page = whole.folder / "docs" / "small.md"
    page.write_text(page.read_text() + "\nHow to read it.\n")
    before, results = page.read_text(), whole.results
    monkeypatch.setattr(running, "train", lambda *_, **__: pytest.fail("trained again"))
    invoke(whole.folder / "small.yaml", *whole.options())
    assert page.read_text() == before and whole.results == results


def test_a_claim_that_was_changed_is_refused(whole, tmp_path):
    claim = write_claim(tmp_path / "changed", {"primary": {"minimum_effect": 0.01}})
    told = invoke(claim, *whole.options(), code=2)
    assert "a claim does not change once it is measured" in told and "--out" in told
    claim.write_bytes((whole.folder / "small.yaml").read_bytes())
    recipe = claim.with_name("tiny.yaml")
    recipe.write_text(recipe.read_text().replace("steps: 4", "steps: 5"))
    assert "is not what" in invoke(claim, *whole.options(), code=2)


def test_data_that_was_changed_is_refused(tmp_path):
    """The same claim, recipe and file name, and other answers."""
    claim, held_out = write_claim(tmp_path, {"tune": None}), tmp_path / "eval.jsonl"
    recipe = YAML(typ="safe").load(claim.with_name("tiny.yaml"))
    recipe["data"]["eval"] = {"name": "dataset", "path": held_out.name}
    with claim.with_name("tiny.yaml").open("w") as file:
        YAML().dump(recipe, file)
    held_out.write_text('{"prompt": "1+2=", "answer": "3"}\n')
    begun = Study(read_claim(claim), tmp_path / "out")
    (tmp_path / "out").mkdir()
    known = {"claim_sha256": begun.read.sha256, "digest": digest_of(begun), "data": begun.data}
    (tmp_path / "out" / "claim.json").write_text(json.dumps(known))
    assert "to do" in invoke(claim, "--out", tmp_path / "out", "--dry-run")
    held_out.write_text('{"prompt": "1+2=", "answer": "4"}\n')
    assert "data.eval is not what" in invoke(claim, "--out", tmp_path / "out", "--dry-run", code=2)
    assert digest_of(Study(read_claim(claim), tmp_path / "out")) != known["digest"]


def test_where_the_regime_is_not_reached_or_a_control_failed_no_claim_holds(whole, tmp_path):
    begun = Study(read_claim(whole.folder / "small.yaml"), whole.out)
    cells = Cells(whole.out / "cells.jsonl", digest_of(begun))
    gate = [{"arm": "plain", "metric": "eval/accuracy", "when": "last", "at_most": -1.0}]
    gated = Study(read_claim(write_claim(tmp_path / "a", {"gate": gate})), whole.out)
    assert results_of(gated, cells, {"plain": 0, "bonus": 0})["verdict"] == "regime not reached"
    failed = Study(
        read_claim(write_claim(tmp_path / "b", {"controls": [{"arm": "zero", "equals": "bonus"}]})), whole.out
    )
    results = results_of(failed, cells, {"plain": 0, "bonus": 0})
    assert results["verdict"] == "inconclusive" and not results["controls"][0]["passed"]


def test_a_control_without_a_signal_may_not_beat_its_baseline(whole, tmp_path):
    """Of the cells of the study before: the better arm in the place of one whose signal is shuffled."""
    begun = Study(read_claim(whole.folder / "small.yaml"), whole.out)
    cells, told = _lifted(Cells(whole.out / "cells.jsonl", digest_of(begun))), []
    for arm, other in (("bonus", "plain"), ("plain", "bonus")):
        claim = write_claim(tmp_path / arm, {"controls": [{"arm": arm, "no_better_than": other}]})
        told.append(results_of(Study(read_claim(claim), whole.out), cells, {"plain": 0, "bonus": 0, "zero": 0}))
    assert [results["verdict"] for results in told] == ["inconclusive", "holds"]
    [[better], [worse]] = [results["controls"] for results in told]
    assert (better["passed"], worse["passed"]) == (False, True)
    assert better["mean"] == pytest.approx(0.5) and worse["mean"] == pytest.approx(-0.5)
    assert "| bonus no better than plain: +0.5000 (0.5000 to 0.5000) | **no** |" in markdown(told[0])


def _lifted(cells: Cells) -> Cells:
    """As if the bonus had solved half of each problem more, in both seeds."""
    lifted = copy.copy(cells)
    lifted.found = {**cells.found}
    for (name, seed), cell in cells.found.items():
        if "/plain/" in name:
            lifted.found[name.replace("plain", "zero"), seed] = cell
            better = copy.deepcopy(cell)
            better["rows"][0]["problems"] = {i: value + 0.5 for i, value in cell["rows"][0]["problems"].items()}
            lifted.found[name.replace("plain", "bonus"), seed] = better
    return lifted


def test_a_dry_run_lists_runs_and_starts_none(whole, tmp_path):
    told = invoke(whole.folder / "small.yaml", *whole.options(), "--dry-run")
    assert f"{RUNS} runs, {RUNS} done" in told
    claim = write_claim(tmp_path)
    told = invoke(claim, "--out", tmp_path / "out", "--dry-run")
    assert told.count("to do") == RUNS and "tune     seed 101  bonus stages.1.learner.lr=0.01" in told
    assert not (tmp_path / "out").exists()


def test_quick_gives_no_verdict_and_publishes_nothing_and_a_gate_is_told(tmp_path):
    gate = [{"arm": "plain", "metric": "zero_variance", "at_most": -1.0, "text": "some variance"}]
    measure = {"metric": "matched", "accuracy": 1e-3, "pass_at": 16, "problems": "arithmetic/*"}
    quick = {"set": {"stages.0.steps": 20, "evaluation": {"samples": 16, "sampling": {"temperature": 1.0}}}}
    claim = write_claim(tmp_path, {"gate": gate, "measure": measure, "quick": quick})
    told = invoke(claim, "--quick", "--out", tmp_path / "out", "--docs", tmp_path / "docs")
    assert told.strip().endswith("quick: no verdict") and "| some variance (plain) | at most -1 |" in told
    assert not (tmp_path / "docs").exists() and (tmp_path / "out" / "small.png").is_file()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [gate["met"] for gate in results["gate"]] == [False, True, True] and results["seeds"]["report"] == [1]
    assert "pass@16 of arithmetic/* where accuracy reaches 0.001" in told
    assert all(arm["value"] > 0 for arm in results["arms"])  # both get to that accuracy


def test_what_a_user_can_mend_is_told_without_a_traceback(tmp_path):
    assert "no such file" in invoke(tmp_path / "none.yaml", code=2)
    claim = write_claim(tmp_path, {"budget": {"steps": None, "tokens": 1e6}, "controls": []})
    told = invoke(claim, "--out", tmp_path / "out", code=2)
    assert "small.yaml:" in told and "of 1e+06 tokens" in told
    for option in ("--out", "--docs"):
        assert f"{option} {claim}: {claim} is a file" in invoke(claim, option, claim, "--dry-run", code=2)


def test_a_gate_on_a_metric_that_is_none_is_told_after_the_first_run_that_is_measured(tmp_path):
    gate = [{"arm": "bonus", "metric": "entropi", "at_most": 1.0}]
    claim = write_claim(tmp_path, {"gate": gate, "report_seeds": [1, 2]})
    told = invoke(claim, "--out", tmp_path / "out", code=2)
    assert "small.yaml:" in told and "no run of arm 'bonus' has a metric 'entropi'" in told and "entropy" in told
    assert {path.name.split(".")[0] for path in (tmp_path / "out" / "runs").iterdir()} == {"warm-up", "bonus"}


@pytest.mark.full  # two processes that import torch
def test_several_runs_at_a_time_give_the_same_numbers(whole, tmp_path):
    claim = write_claim(tmp_path, {"tune": None, "report_seeds": [1, 2], "controls": [], "gate": []})
    invoke(claim, "--workers", "2", "--out", tmp_path / "out", "--docs", tmp_path / "docs")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    known = {(cell["arm"], cell["seed"]): cell["curve"] for cell in whole.results["cells"]}
    assert all(known[cell["arm"], cell["seed"]] == cell["curve"] for cell in found if cell["arm"] != "zero")


@pytest.mark.full  # three processes that import torch
def test_sigterm_ends_the_workers_and_keeps_the_state(tmp_path):
    """To the command alone, as a scheduler sends it; a worker that lived on would hold the lock of its run."""
    change = {"tune": None, "controls": [], "gate": []}
    claim, runs = write_claim(tmp_path, change), [Run(tmp_path / "out" / "runs" / f"warm-up.{seed}") for seed in (1, 2)]
    recipe = claim.with_name("tiny.yaml")
    recipe.write_text(recipe.read_text().replace("steps: 3", "steps: 100000"))
    command = [sys.executable, "-m", "alignment", "study", claim.name, "--out", "out", "--workers", "2"]
    with (tmp_path / "told").open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not all(read_lines(run.folder) for run in runs):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "told").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    told = (tmp_path / "told").read_text()
    assert process.returncode == 75 and "the same command goes on" in told and "Traceback" not in told
    for run in runs:
        with run.locked("it is free"):
            assert Checkpoints(run.checkpoints).latest(pytest.fail) is not None


SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "studies").glob("*/claim.yaml"))


@pytest.mark.parametrize("claim", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_studies_run_quickly(claim, tmp_path):
    told = invoke(claim, "--quick", "--out", tmp_path / "out", "--docs", tmp_path / "docs")
    assert told.strip().endswith("quick: no verdict")
