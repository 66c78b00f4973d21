"""`align eval` from the command line, with real engines and scoring processes: results, files, resuming, mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest

import alignment
from alignment.evaluation.model import fingerprint, open_checkpoint
from alignment.evaluation.view import Progress
from alignment.runs import Run
from tests.evaluation.evaluated import align, bpe_model, character_model, records, results
from tests.tiny import tiny

TASKS = ("--tasks", "gcd,counting", "--max-tokens", 6, "--samples", 4, "--temperature", 1.0, "--limit", 12)
PATIENT = '''
"""A benchmark whose reward takes its time, so that a test can interrupt it."""

import time
from dataclasses import dataclass

from alignment.evaluation.benchmarks import benchmarks
from alignment.data.procedural import Procedural
from alignment.reward_registry import reward_functions
from alignment.tasks.task import tasks
from rewards import ExactMatch


@reward_functions.register("patient_match", source="a test")
@dataclass(frozen=True)
class PatientMatch:
    """Exact match, slowly."""

    columns = ("answer",)

    def __call__(self, prompts, completions, **columns):
        time.sleep(0.02)
        return ExactMatch()(prompts, completions, **columns)


@benchmarks.register("patient", source="a test")
@dataclass(frozen=True)
class Patient:
    """Greatest common divisors."""

    samples: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4
    chat: bool = False

    @property
    def data(self):
        return Procedural(tasks.build("gcd"), split="eval", size=40)

    @property
    def reward(self):
        return PatientMatch()
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return character_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def evaluated(model, tmp_path_factory):
    """An evaluation of two tasks: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("evaluations") / "first"
    shown = align("eval", model, *TASKS, "--output", folder)
    assert shown.exit_code == 0, shown.output
    return folder, shown


def test_an_evaluation_prints_a_table_and_writes_what_it_stands_on(evaluated, model):
    folder, shown = evaluated
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "config.json", "counting", "gcd", "results.json"]
    found = results(folder)
    known = {"address": str(model), "fingerprint": fingerprint(open_checkpoint(str(model))), "dtype": "float32"}
    assert found["checkpoint"] == known
    assert list(found["tasks"]) == ["gcd", "counting"]
    for name, task in found["tasks"].items():
        lines = records(folder, name)
        assert len(lines) == task["problems"] == 12 and all(len(line["samples"]) == 4 for line in lines)
        verdicts = [fmean(s["correct"] for s in line["samples"]) for line in lines]
        assert task["scores"]["avg@4"]["value"] == pytest.approx(fmean(verdicts))
        assert task["scores"]["pass@4"]["value"] == pytest.approx(fmean(v > 0 for v in verdicts))
        assert list(task["scores"]) == ["avg@4", "pass@1", "pass@2", "pass@4", "maj@1", "maj@2", "maj@4"]
        low, high = task["scores"]["avg@4"]["interval"]
        assert low <= fmean(verdicts) <= high and high - low > 0.05
        for line in lines:
            for sample in line["samples"]:
                assert sample["correct"] == (sample["completion"].strip() == line["reference"])
                assert sample["tokens"] <= 6 and sample["finish_reason"] in ("stop", "length")
        cut_off = fmean(s["finish_reason"] == "length" for line in lines for s in line["samples"])
        assert task["truncated"] == pytest.approx(cut_off)
        assert task["unscored"] == 0 and 0 < task["data"]["floor"] < 1 and task["data"]["problems"] == 12
        assert f"{100 * task['scores']['avg@4']['value']:.1f} [" in shown.stdout
    assert "12 x 4" in shown.stdout and "pass@4" in shown.stdout and "wrote" in shown.stderr


def test_options_of_a_benchmark_are_set_and_recorded(model, tmp_path):
    arguments = ("--tasks", "gcd", "--set", "gcd.levels=[1]", "--set", "gcd.size=5", "--set", "gcd.top_p=0.9")
    shown = align("eval", model, *arguments, "--set", "gcd.max_tokens=3", "--output", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    task = results(tmp_path / "out")["tasks"]["gcd"]
    assert (task["source"]["levels"], task["source"]["size"], task["problems"]) == ([1], 5, 5)
    assert (task["sampling"]["top_p"], task["sampling"]["max_tokens"]) == (0.9, 3)


def test_the_same_command_again_changes_nothing_and_prints_json(evaluated, model):
    folder, _ = evaluated
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    again = align("eval", model, *TASKS, "--output", folder, "--json")
    assert again.exit_code == 0 and json.loads(again.stdout) == results(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before
    assert "gcd: 12 of 12 problems are done already" in again.stderr


def test_samples_depend_on_the_problem_alone(evaluated, model, tmp_path):
    """Not on the batch, the other tasks or how many problems there are."""
    changed = ("--tasks", "counting", "--limit", 5, "--batch-rows", 3, *TASKS[2:8])
    assert align("eval", model, *changed, "--output", tmp_path / "few").exit_code == 0
    few, all_of_them = ({r["problem"]: r for r in records(f, "counting")} for f in (tmp_path / "few", evaluated[0]))
    assert len(few) == 5 and few.items() <= all_of_them.items()
    other = align("eval", model, *changed, "--seed", 1, "--output", tmp_path / "other")
    assert other.exit_code == 0 and records(tmp_path / "other", "counting") != records(tmp_path / "few", "counting")


def test_tasks_can_be_added_to_a_folder_and_nothing_else(evaluated, model, tmp_path):
    folder = tmp_path / "grows"
    first = ("eval", model, "--max-tokens", 4, "--limit", 4, "--output", folder)
    assert align(*first, "--tasks", "gcd").exit_code == 0
    gcd = results(folder)["tasks"]["gcd"]
    assert align(*first, "--tasks", "reversal").exit_code == 0
    assert list(results(folder)["tasks"]) == ["gcd", "reversal"] and results(folder)["tasks"]["gcd"] == gcd
    refused = align("eval", model, "--tasks", "gcd", "--max-tokens", 5, "--limit", 4, "--output", folder)
    assert refused.exit_code == 2 and "tasks.gcd.sampling.max_tokens: 4 there, 5 now" in refused.stderr
    assert "choose another --output" in refused.stderr
    refused = align("eval", model, "--tasks", "gcd", "--max-tokens", 4, "--limit", 3, "--output", folder)
    assert refused.exit_code == 2 and "tasks.gcd.data: " in refused.stderr
    other = character_model(tmp_path / "other", seed=1)
    refused = align(*("eval", other), *first[2:], "--tasks", "gcd")
    assert refused.exit_code == 2 and "  checkpoint: " in refused.stderr and f"of {model} that" in refused.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused = align("eval", model, *TASKS, "--output", tmp_path / "mine")
    assert refused.exit_code == 2 and "is not empty and holds no evaluation" in refused.stderr


def test_another_dtype_is_another_evaluation(evaluated, model, tmp_path):
    folder = tmp_path / "half"
    arguments = ("eval", model, *TASKS[:4], "--limit", 2, "--dtype", "bfloat16", "--output")
    assert align(*arguments, folder).exit_code == 0
    assert results(folder)["checkpoint"]["dtype"] == "bfloat16"
    refused = align(*arguments, evaluated[0])
    assert refused.exit_code == 2 and "dtype: 'float32' there, 'bfloat16' now" in refused.stderr
    compared = align("eval", "--compare", evaluated[0], folder)
    assert compared.exit_code == 0 and "float32 in A, bfloat16 in B" in " ".join(compared.stdout.split())


def test_an_output_that_cannot_be_a_folder_and_a_checkpoint_without_a_name(model, tmp_path):
    (tmp_path / "mk.py").write_text("")
    for output in (tmp_path / "mk.py", tmp_path / "mk.py" / "x", "/proc/x"):
        refused = align("eval", model, *TASKS, "--output", output)
        assert refused.exit_code == 2 and f"cannot make the folder {output}: " in refused.stderr
        assert "choose another --output" in refused.stderr
    refused = align("eval", "", "--tasks", "gcd")
    assert refused.exit_code == 2 and "the checkpoint is an empty text; give a model folder" in refused.stderr


@pytest.mark.parametrize(
    ("place", "lost"),
    [(("checkpoint", "fingerprint"), "'checkpoint.fingerprint'"), (("tasks", "gcd", "data"), "'tasks.gcd.data'")],
)
def test_a_file_without_a_key_is_named(evaluated, model, tmp_path, place, lost):
    folder = tmp_path / "edited"
    shutil.copytree(evaluated[0], folder)
    for name in ("config.json", "results.json"):
        values = json.loads((folder / name).read_text())
        inner = values
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
        (folder / name).write_text(json.dumps(values))
    for arguments, name in (
        ((model, *TASKS, "--output", folder), "config"),
        (("--compare", folder, folder), "results"),
    ):
        refused = align("eval", *arguments)
        assert refused.exit_code == 2 and f"{folder / name}.json was changed and lacks {lost}; put" in refused.stderr


@pytest.fixture(scope="module")
def patient(model, tmp_path_factory):
    """The command that measures the slow benchmark, which a plugin beside the working directory registers, and the
    folder of an evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("patient")
    (folder / "patient_benchmark.py").write_text(PATIENT)
    arguments = ("eval", model, "--tasks", "patient", "--plugin", "patient_benchmark", "--batch-rows", 4, "--output")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert align(*arguments, folder / "whole").exit_code == 0
        yield arguments, folder / "whole"


def same_bytes(one, other):
    for name in ("config.json", "results.json", "patient/samples.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert results(one)["tasks"]["patient"]["problems"] == 40


def test_a_killed_evaluation_goes_on_to_the_same_bytes(patient, tmp_path):
    (arguments, whole), broken = patient, tmp_path / "broken"
    samples = broken / "patient" / "samples.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(alignment.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "alignment", *map(str, arguments), str(broken)], env=environment, stderr=subprocess.PIPE
    )
    while process.poll() is None and not (samples.exists() and samples.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    lines = samples.read_bytes().splitlines(keepends=True)
    assert 4 <= len(lines) < 40 and not results(broken)["tasks"], "nothing is complete"
    # What a kill in the middle of a write leaves: part of a chunk, and part of a line.
    samples.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert align(*arguments, broken).exit_code == 0
    same_bytes(broken, whole)


def test_a_stop_keeps_what_is_finished_and_the_same_command_goes_on(patient, tmp_path, monkeypatch):
    (arguments, whole), broken = patient, tmp_path / "broken"
    with monkeypatch.context() as patch:
        ctrl_c = lambda self, problems: problems >= 6 and signal.raise_signal(signal.SIGINT)  # noqa: E731
        patch.setattr(Progress, "finished", ctrl_c)
        stopped = align(*arguments, broken)
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.stderr and stopped.stdout == ""
    assert len(records(broken, "patient")) == 6 and not results(broken)["tasks"]
    assert "6 of 40 problems are done already" in align(*arguments, broken).stderr
    same_bytes(broken, whole)


def test_one_process_at_a_time_writes_an_evaluation(model, tmp_path):
    (tmp_path / "out").mkdir()
    with Run(tmp_path / "out").locked():
        refused = align("eval", model, *TASKS, "--output", tmp_path / "out")
    assert refused.exit_code == 2 and f"{tmp_path / 'out'} is already open in this process" in refused.stderr


def test_a_file_that_was_changed_is_named_and_not_gone_on_with(evaluated, model, tmp_path):
    folder = tmp_path / "changed"
    arguments = ("eval", model, "--tasks", "gcd", "--max-tokens", 4, "--limit", 4, "--output", folder)
    assert align(*arguments).exit_code == 0
    path = folder / "gcd" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert "holds other problems than gcd has" in align(*arguments).stderr
    path.write_text("".join([lines[0], "{}\n", *lines[2:]]))
    assert f"{path}:2: not what an evaluation writes" in align(*arguments).stderr
    path.write_text("".join(lines))
    (folder / "config.json").write_text("{")
    assert "config.json was changed and is no JSON any more" in align(*arguments).stderr


def test_a_run_of_this_project_is_measured_at_any_of_its_checkpoints(tmp_path, monkeypatch):
    recipe = tiny(tmp_path)
    alignment.train(recipe)
    monkeypatch.chdir(tmp_path)
    for which in ("tiny@2", "tiny@best", "runs/tiny"):
        arguments = ("--tasks", "arithmetic", "--limit", 8, "--max-tokens", 4)
        shown = align("eval", which, *arguments)
        assert shown.exit_code == 0, shown.output
    folders = {p.name: results(p)["checkpoint"]["fingerprint"] for p in (tmp_path / "evaluations").iterdir()}
    assert set(folders) == {"tiny@2", "tiny@best", "tiny"} and folders["tiny@2"] != folders["tiny"]
    missing = align("eval", "tiny@999", "--tasks", "gcd")
    assert missing.exit_code == 2 and "tiny@999: step 999 has no checkpoint; its steps" in missing.stderr


@pytest.fixture(scope="module")
def chat_model(real_data, tmp_path_factory):
    texts = [json.loads(line)["question"] for line in (real_data / "gsm8k" / "test.jsonl").open(encoding="utf-8")]
    return bpe_model(tmp_path_factory.mktemp("models") / "chat", texts[:300])


def test_gsm8k_from_a_file_through_the_chat_template(chat_model, real_data, tmp_path):
    file = real_data / "gsm8k" / "test.jsonl"
    arguments = ("eval", chat_model, "--tasks", "gsm8k", "--data", f"gsm8k={file}", "--limit", 5, "--max-tokens", 8)
    shown = align(*arguments, "--output", tmp_path / "chat")
    assert shown.exit_code == 0, shown.output
    task = results(tmp_path / "chat")["tasks"]["gsm8k"]
    assert task["chat"] is True and task["data"]["origin"] == str(file)
    assert task["source"]["prompt"].endswith("Please reason step by step, and put your final answer within \\boxed{}.")
    for line in records(tmp_path / "chat", "gsm8k"):
        (message,) = line["prompt"]
        assert message["role"] == "user" and message["content"].endswith("final answer within \\boxed{}.")
        assert "####" in line["reference"]
    assert list(task["scores"]) == ["avg@1", "pass@1", "maj@1"] and sum(task["statuses"].values()) == 5
    text = align(*arguments, "--output", tmp_path / "text", "--chat", "no")
    assert text.exit_code == 0 and results(tmp_path / "text")["tasks"]["gsm8k"]["chat"] is False
    assert all(isinstance(line["prompt"], str) for line in records(tmp_path / "text", "gsm8k"))
    refused = align("eval", "--compare", tmp_path / "chat", tmp_path / "text")
    assert refused.exit_code == 2 and "chat: True in A, False in B" in refused.stderr


def test_prompts_that_do_not_fit_into_the_model_are_told_in_numbers(real_data, tmp_path):
    texts = [json.loads(line)["question"] for line in (real_data / "gsm8k" / "test.jsonl").open(encoding="utf-8")]
    small = bpe_model(tmp_path / "small", texts[:300], max_positions=160)
    arguments = ("eval", small, "--tasks", "gsm8k", "--data", f"gsm8k={real_data / 'gsm8k' / 'test.jsonl'}")
    too_long = align(*arguments, "--max-tokens", 40, "--limit", 50, "--output", tmp_path / "out")
    assert too_long.exit_code == 2 and "exceed the model's 160 positions" in too_long.stderr
    assert "--max-prompt-tokens 120, which leaves " in too_long.stderr
    fits = align(
        *arguments,
        "--max-tokens",
        40,
        "--limit",
        50,
        "--max-prompt-tokens",
        120,
        "--output",
        tmp_path / "out",
        "--json",
    )
    assert fits.exit_code == 0, fits.output
    data = json.loads(fits.stdout)["tasks"]["gsm8k"]["data"]
    over = data["left_out"]["over_long"]
    assert over > 0 and data["problems"] == 50 - over
    assert f"gsm8k: {over} of 50 prompts, of more than 120 tokens, are left out" in fits.stderr
    default = align(*arguments, "--limit", 5, "--output", tmp_path / "default")
    assert "5 of 5 prompts and max_tokens 1024 together exceed" in default.stderr


def test_mistakes_are_told_with_their_remedy(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def wrong(*arguments):
        found = align("eval", *arguments)
        assert found.exit_code == 2 and found.stdout == "", found.output
        return found.stderr

    unknown = wrong(model, "--tasks", "gsm8")
    assert "did you mean 'gsm8k'? (benchmarks: " in unknown and "math500, olympiadbench" in unknown
    assert "did you mean 'gcd'?" in wrong(model, "--tasks", "gdc")
    assert "--tasks names 'gcd' twice" in wrong(model, "--tasks", "gcd,gcd")
    assert "say what to measure: --tasks" in wrong(model)
    assert "give a checkpoint" in wrong("--tasks", "gcd")
    assert "'gcf' is not among --tasks gcd; did you mean" in wrong(model, "--tasks", "gcd", "--set", "gcf.size=3")
    assert "has no option 'sice'; did you mean 'size'?" in wrong(model, "--tasks", "gcd", "--set", "gcd.sice=3")
    assert "--set gcd.size: " in wrong(model, "--tasks", "gcd", "--set", "gcd.size=many")
    assert "write NAME.OPTION=VALUE" in wrong(model, "--tasks", "gcd", "--set", "gcd=3")
    assert "expected KEY=VALUE" in wrong(model, "--tasks", "gcd", "--set", "gcd")
    assert "has no option 'task'" in wrong(model, "--tasks", "gcd", "--set", "gcd.task=counting")
    assert "--data none: write NAME=FILE" in wrong(model, "--tasks", "gcd", "--data", "none")
    assert "'math500' is not among --tasks gcd" in wrong(model, "--tasks", "gcd", "--data", "math500=x")
    assert "made by rule; it reads no file" in wrong(model, "--tasks", "gcd", "--data", "gcd=x.jsonl")
    assert "there is no such file" in wrong(model, "--tasks", "gsm8k", "--data", "gsm8k=none.jsonl")
    offline = wrong(model, "--tasks", "gsm8k")
    assert "the hub cannot be reached" in offline and "Give a local copy with --data gsm8k=FILE" in offline
    assert "all the same; set --temperature" in wrong(model, "--tasks", "gcd", "--samples", 4)
    assert "--chat maybe: give one of auto, yes, no" in wrong(model, "--tasks", "gcd", "--chat", "maybe")
    assert "no chat template; use --chat no" in wrong(model, "--tasks", "gcd", "--chat", "yes", "--max-tokens", 4)
    assert "--dtype half: give one of" in wrong(model, "--tasks", "gcd", "--dtype", "half")
    assert "positions; give --max-tokens" in wrong(model, "--tasks", "gcd")
    assert "no model folder ./none, and there is no run ./none" in wrong("./none", "--tasks", "gcd")
    assert "there is no run none; there are no runs" in wrong("none@best", "--tasks", "gcd")
    assert "It is no run of this project either" in wrong("none", "--tasks", "gcd")
    assert "cannot import 'not_there'" in wrong(model, "--tasks", "gcd", "--plugin", "not_there")
    assert not list(tmp_path.iterdir()), "nothing was written"
    narrow = character_model(tmp_path / "narrow", alphabet="0123456789=")
    assert "gcd: the model does not know 'g', 'c', 'd'" in wrong(narrow, "--tasks", "gcd", "--max-tokens", 4)


def test_rows_that_cannot_be_judged_are_counted_or_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}+1=", "answer": f"{i} and 1\n#### {i // 10}"} for i in range(200)]
    rows[7]["answer"] = "####"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wide = bpe_model(tmp_path / "wide", [row["question"] for row in rows], chat_template=None)
    arguments = ("--tasks", "gsm8k", "--data", "gsm8k=rows.jsonl", "--max-tokens", 4, "--limit", 10)
    found = align("eval", wide, *arguments, "--output", "out")
    assert found.exit_code == 0, found.output
    data = results("out")["tasks"]["gsm8k"]["data"]
    assert data["left_out"] == {"bad_rows": 1, "over_long": 0} and data["floor"] == 0.2
    assert "1 of 200 rows are left out" in found.stderr and "rows.jsonl:8: " in found.stderr
    assert "note: gsm8k: 1 problems are left out, which cannot be judged" in found.stdout
    for row in rows[:20]:
        row["answer"] = "####"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = align("eval", wide, *arguments, "--output", "other")
    assert refused.exit_code == 2 and "20 of 200 rows of" in refused.stderr and "rows.jsonl:1: " in refused.stderr


def test_scoring_that_fails_stops_the_evaluation(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failing = PATIENT.replace("time.sleep(0.02)", 'raise RuntimeError("no judge today")')
    failing = failing.replace("patient", "failing").replace("Patient", "Failing")
    (tmp_path / "failing_benchmark.py").write_text(failing)
    found = align("eval", model, "--tasks", "failing", "--plugin", "failing_benchmark", "--output", "out")
    assert found.exit_code == 2 and "could not be scored, more than 10% of all 80" in found.stderr
    assert "no judge today" in found.stderr and not results("out")["tasks"]
