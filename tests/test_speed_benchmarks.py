"""The speed benchmarks run, write what the runner collects, and the report shows it. Their numbers prove nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import alignment.recipe  # noqa: F401 - it registers all entropy controls
from alignment.algorithms.entropy_controls import entropy_controls
from alignment.curricula import curricula

ROOT = Path(__file__).parents[1]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True)


def test_the_runner_keeps_what_a_benchmark_measured_and_the_report_shows_it(tmp_path):
    out = tmp_path / "results.json"
    done = run("benchmarks/run.py", "--quick", "--only", "controller", "--threads", 1, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (name, found), *others = json.loads(out.read_text())["benchmarks"].items()
    assert (name, others, found["exit_code"]) == ("controller", [], 0)
    per_rollout = [value for table in found["tables"] for row in table["rows"] for value in row.values()]
    assert any(isinstance(value, float) and value > 0 for value in per_rollout)
    page = run("benchmarks/report.py", out).stdout
    assert found["title"] in page and "these numbers show that the benchmarks work, nothing else" in page


def test_a_step_of_ppo_is_measured_beside_one_of_grpo(tmp_path):
    done = run("benchmarks/ppo_step.py", "--quick", "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = json.loads((tmp_path / "result.json").read_text())["tables"]
    assert [row["step"] for row in table["rows"]] == ["grpo", "ppo, head", "ppo, quarter", "ppo, equal"]
    assert all(row["CPU seconds"] > 0 for row in table["rows"])


def test_choosing_prompts_is_measured_for_every_selector(tmp_path):
    done = run("benchmarks/curricula.py", "--sizes", 300, 600, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    ours = [entry for entry in curricula if "alignment." in str(entry.cls)]
    selectors = [entry.name for entry in ours if hasattr(entry.cls, "select") or hasattr(entry.cls, "admits")]
    assert [row["selector"] for row in found["tables"][0]["rows"]] == selectors * 2 and len(selectors) == 6
    assert len(found["goals"]) == 6


def test_choosing_by_a_model_is_measured_beside_rollouts(tmp_path):
    out = tmp_path / "result.json"
    done = run("benchmarks/prompt_curriculum.py", "--quick", "--engines", "transformers", "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = json.loads(out.read_text())["tables"]
    assert [(row["sampler"], row["length"]) for row in table["rows"]] == [("transformers", 2), ("transformers", 4)]
    for row in table["rows"]:
        assert row["choosing / rollouts"] == pytest.approx(row["choosing, s"] / row["rollouts, s"])  # of one round
        assert row["fitting, s"] > 0


def test_a_step_with_each_entropy_control_is_measured_beside_one_without(tmp_path):
    done = run("benchmarks/entropy.py", "--quick", "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = json.loads((tmp_path / "result.json").read_text())["tables"]
    measured = {row["control"].partition(",")[0]: row for row in table["rows"]}
    ours = {e.name for e in entropy_controls if e.cls.__module__.startswith("alignment.")} - {"shuffled"}
    assert measured.keys() == ours and len(table["rows"]) == len(ours) + 2
    assert measured["bonus"]["asks for"] == "nothing" and "drift" in measured["steer"]["asks for"]
    assert all(row["from"] <= row["times the step with its passes"] <= row["to"] for row in table["rows"])


@pytest.mark.parametrize("kind", ["dpo", pytest.param("sft", marks=pytest.mark.full)])
def test_a_step_is_measured_beside_trls(kind, tmp_path):
    """It compares weights, rows and the loss of every step itself."""
    quick = ["--quick", "--kinds", kind, "--precision", "float32", "--lengths", "mixed"]
    done = run("benchmarks/dpo_vs_trl.py", *quick, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stdout + done.stderr
    speeds, costs = json.loads((tmp_path / "result.json").read_text())["tables"]
    assert [row["step"] for row in speeds["rows"]] == [f"{kind}, mixed lengths, float32"]
    assert all(row["ratio"] > 0 and row["filled up"] > 1 for row in speeds["rows"])
    assert all(row[f"{side}, MiB"] > 0 for row in costs["rows"] for side in ("ours", "trl"))


@pytest.mark.full
@pytest.mark.parametrize("name", ["prompt_curriculum", "vllm_throughput", "decoding", "transport", "quickstart"])
def test_the_benchmarks_of_the_real_engines_run(name, tmp_path):
    out = tmp_path / "results.json"
    done = run("benchmarks/run.py", "--quick", "--only", name, "--threads", 1, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text())["benchmarks"][name]["tables"]
