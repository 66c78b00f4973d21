"""The benchmarks of engines run at toy sizes and write what they measured. Their numbers prove nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(folder: Path, name: str, *options: str) -> dict[str, Any]:
    out = folder / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", "--json", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["equal"] and result["not_equal"] and result["machine"]["versions"]["trl"]
    return result


def row(result: dict[str, Any], table: int, first: str) -> dict[str, Any]:
    return next(r for r in result["tables"][table]["rows"] if next(iter(r.values())) == first)


def test_a_grpo_step_beside_trls(tmp_path):
    result = run(tmp_path, "grpo_vs_trl", "--precision", "bfloat16", "--steps", "1")
    for phase in ("sample", "update", "whole step"):
        found = row(result, 0, phase)
        assert found["ours"] > 0 and found["trl"] > 0 and found["limit"] > 0
    (speeds,) = result["tables"][1]["rows"]
    assert speeds["ours"] == pytest.approx(2 * 2 * 16 / row(result, 0, "whole step")["ours"])


def test_log_probabilities_by_both_ways_agree(tmp_path):
    result = run(tmp_path, "logprobs")  # it compares them itself
    assert [(r["entropy"], r["way"]) for r in result["tables"][0]["rows"]] == [
        ("value", "plain"),
        ("value", "ours"),
        ("gradient", "plain"),
        ("gradient", "ours"),
    ]


def test_micro_batches_by_tokens_have_less_padding_than_fixed_ones(tmp_path):
    result = run(tmp_path, "long_tailed", "--autocast", "bfloat16")
    ours, fixed = row(result, 0, "by tokens"), row(result, 0, "fixed rows")
    assert 0 <= ours["padding share"] < fixed["padding share"] < 1
    assert ours["peak tokens"] <= result["settings"]["budget"] >= fixed["peak tokens"]
