"""Whole runs on vLLM, DeepSpeed and Ray: what they promise, how they stop, and what they survive."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import alignment
from alignment.checkpoint import Checkpoints, verify
from alignment.ledger import Ledger
from tests.recorded_rollouts import record
from tests.test_train import Recorder, contents, lines
from tests.tiny import SUMS, merged, tiny, write

ROOT = Path(__file__).parents[1]
MODEL = {"build": {"hidden_size": 64, "heads": 2, "kv_heads": 2}}
REWARD = [{"name": "format", "pattern": "[0-4].*"}]  # one that an untrained model sometimes earns
IN_TURNS = {"name": "vllm", "sleep": True}
ONE_PROCESS: dict[str, Any] = {"model": MODEL, "rewards": REWARD, "stages": {1: {"sampler": IN_TURNS}}}
CLUSTER: dict[str, Any] = {
    "model": MODEL,
    "rewards": REWARD,
    "evaluation": {"every": 0},
    "stages": {
        1: {
            "sampler": "vllm",
            "learner": {"name": "deepspeed", "ranks": 2, "zero_stage": 2, "lr": 1e-3},
            "cluster": "ray",
            "max_staleness": 1,
            "algorithm": {"minibatches": 2},
        }
    },
}


def online(run: str) -> list[dict[str, Any]]:
    return [line for line in lines(run) if line["kind"] == "train" and line["stage"] == "rl"]


def test_vllm_beside_the_torch_learner_in_one_process(tmp_path):
    result = alignment.train(tiny(tmp_path, ONE_PROCESS))
    steps = online(result["folder"])
    assert len(steps) == 4 and all(abs(step["mismatch_kl"]) < 1e-6 for step in steps)
    assert max(step["mismatch_abs_max"] for step in steps) < 1e-4
    assert any(step["grad_norm"] > 0 for step in steps) and all(step["publish_bytes"] > 0 for step in steps)
    assert {step["publish_changed"] for step in steps} == {1.0}
    assert set(Ledger(Path(result["folder"]) / "ledger.jsonl").fates().values()) == {"trained"}


def test_batches_too_old_for_their_policy_raise_an_alarm(tmp_path):
    change = {
        "run": {"alarm_window": 3, "save_every": 0},
        "evaluation": {"every": 0},
        "stages": {1: {"steps": 8, "max_staleness": 1, "learner": {"name": "torch", "lr": 0.05}}},
    }
    result = alignment.train(tiny(tmp_path, merged(ONE_PROCESS, change)))
    assert "stale_data" in {alarm["name"] for alarm in result["alarms"]}, online(result["folder"])


@pytest.fixture(scope="module")
def recorded(live_ray, tmp_path_factory):
    """A run on the real engines, its groups, and a file of its rollouts."""
    folder, sink = tmp_path_factory.mktemp("real"), Recorder()
    result = alignment.train(tiny(folder, CLUSTER | {"run": {"name": "real"}}), sinks=[sink])
    record(folder / "rollouts.jsonl", sink.groups)
    return result, sink, folder / "rollouts.jsonl"


def test_a_cluster_trains_within_its_staleness(recorded):
    result, sink, _ = recorded
    steps = online(result["folder"])
    assert result["status"] == "complete" and len(steps) == 4
    assert [step["staleness"] for step in steps] == [0, 1, 1, 1], "one batch is in flight while one is learned from"
    assert all(abs(step["mismatch_kl"]) < 1e-6 for step in steps[:1])
    assert any(step["grad_norm"] > 0 for step in steps) and {step["publish_changed"] for step in steps} == {1.0}
    assert Ledger(Path(result["folder"]) / "ledger.jsonl").fates() == dict.fromkeys(range(16), "trained")
    assert [g.uid for g in sink.groups] == list(range(16))
    assert {r.sampler for g in sink.groups for r in g.rollouts} == {"vllm"}


def test_a_run_resumed_on_the_same_rollouts_is_the_uninterrupted_one_bit_for_bit(recorded, tmp_path):
    """Which token comes out of vLLM may hang on what was batched with it; on equal rollouts all the rest is exact."""
    whole, _, rollouts = recorded
    change = merged(
        CLUSTER,
        {
            "plugins": ["tests.recorded_rollouts"],
            "run": {"name": "parts"},
            "stages": {1: {"sampler": {"name": "recorded", "path": str(rollouts)}, "transport": "nowhere"}},
            "data": {"eval": None},
        },
    )
    parts = tiny(tmp_path, change)
    first = alignment.train(parts, sinks=[Recorder(stop_after=5)])
    assert first["status"] == "interrupted"
    state = json.loads((newest(first["folder"]) / "state.json").read_text())
    assert [uid for uid, _ in state["in_flight"]] == [8, 9, 10, 11], "what is launched again"
    second = alignment.train(parts)
    assert second["status"] == "complete"
    ours, theirs = contents(second["folder"]), contents(whole["folder"])
    assert ours.keys() == theirs.keys()
    learned = [name for name in ours if name.startswith("learner/")]
    assert len(learned) > 3 and all(ours[name] == theirs[name] for name in learned)
    assert Ledger(Path(second["folder"]) / "ledger.jsonl").fates() == dict.fromkeys(range(16), "trained")


RANKS = {"name": "deepspeed", "ranks": 2, "zero_stage": 2, "lr": 1e-3}
PAIRS = {"name": "procedural", "task": SUMS["task"], "split": "train", "pairs": True}
ONLINE_DPO: dict[str, Any] = {
    "model": MODEL,
    "rewards": [*REWARD, {"name": "reward_model", "stage": "rm", "weight": 0.1}],
    "evaluation": {"every": 0},
    "data": {"preferences": PAIRS},
    "stages": [
        {"stage": "reward_model", "name": "rm", "steps": 3, "batch_size": 5, "learner": {"name": "torch", "lr": 1e-3}},
        {
            "stage": "preference",
            "name": "dpo",
            "steps": 4,
            "losses": [{"name": "dpo", "beta": 0.5}],
            "reference": {"name": "refreshed", "every": 2},
            "pairs": "best_worst",
            "prompts_per_step": 4,
            "group_size": 4,
            "sampling": {"max_tokens": 4},
            "sampler": "vllm",
            "learner": RANKS,
            "cluster": "ray",
        },
    ],
}


MERGING = {
    "model": {"lora": {"rank": 4, "alpha": 8}},
    "stages": {1: {"reference": {"merge": True}, "learner": {"zero_stage": 3, "lr": 1e-2}}},
}


@pytest.mark.parametrize("change", [{}, MERGING], ids=["whole", "adapters"])
def test_a_reward_model_judges_pairs_that_vllm_samples_and_two_ranks_learn_from(live_ray, tmp_path, change):
    """Iterative DPO on a cluster, behind a reward model that was fitted in this process."""
    result = alignment.train(tiny(tmp_path, merged(ONLINE_DPO, change)))
    assert result["status"] == "complete"
    steps = [line for line in lines(result["folder"]) if line["kind"] == "train"]
    fitted, preferred = ([line for line in steps if line["stage"] == name] for name in ("rm", "dpo"))
    assert len(fitted) == 3 and all(line["reward_model/grad_norm"] > 0 for line in fitted)
    assert [line["step"] for line in preferred] == [4, 5, 6, 7]
    assert all(line["pairs"] > 0 and line["grad_norm"] > 0 for line in preferred)
    assert len({line["reward/reward_model"] for line in preferred}) == 4
    margins = [abs(line["margin"]) for line in preferred]
    assert max(margins[0], margins[2]) < 1e-4 < min(margins[1], margins[3]), "the reference is renewed after two steps"
    assert set(Ledger(Path(result["folder"]) / "ledger.jsonl").fates().values()) <= {"trained", "filtered"}


def newest(run: str) -> Path:
    checkpoints = Path(run) / "checkpoints"
    return checkpoints / (checkpoints / "LATEST").read_text().strip()


@contextmanager
def started(live_ray, folder: Path, change: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """``align train`` as a process of its own, on the cluster that is up."""
    recipe = write(folder, merged(change, {"stages": {1: {"cluster": {"name": "ray", "address": live_ray.address}}}}))
    env = {**live_ray.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "alignment", "train", str(recipe)]
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and any(json.loads(line)["step"] >= step for line in metrics.read_text().splitlines()):
            return
        time.sleep(0.1)
    raise AssertionError(process.communicate()[0])


def actors_of(live_ray, kind: str) -> set[int]:
    """Processes of this cluster that serve an actor of this class."""
    listed = subprocess.run(["ps", "-ewwo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    processes = [(int(pid), int(parent), args) for pid, parent, args in (line.split(None, 2) for line in listed)]
    folder = str(live_ray.session.folder)
    ours = {pid for pid, _, args in processes if "raylet/raylet" in args and folder in args}
    while more := {pid for pid, parent, _ in processes if parent in ours} - ours:
        ours |= more
    return {pid for pid, _, args in processes if pid in ours and args.startswith(f"ray::{kind}")}


LONG = merged(CLUSTER, {"run": {"name": "faults", "save_every": 1}, "stages": {1: {"steps": 400}}})
"""A run that a test ends long before it is done."""


def test_sigterm_saves_the_last_completed_step_and_leaves_no_process(live_ray, tmp_path):
    run = tmp_path / "runs/faults"
    with started(live_ray, tmp_path, LONG) as process:
        wait_for_step(run, 6, process)
        mine = actors_of(live_ray, "RolloutEngine") | actors_of(live_ray, "LearnerRank")
        assert len(mine) == 3, "an engine and two ranks"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    assert verify(newest(str(run))) == []
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert Checkpoints(run / "checkpoints").steps()[-1] == max(steps)
    wait_until(lambda: not mine & (actors_of(live_ray, "RolloutEngine") | actors_of(live_ray, "LearnerRank")))


def test_a_dead_rank_ends_the_run_by_name_and_the_same_command_goes_on(live_ray, tmp_path):
    run = tmp_path / "runs/faults"
    with started(live_ray, tmp_path, LONG) as process:
        wait_for_step(run, 6, process)
        os.kill(max(actors_of(live_ray, "LearnerRank")), signal.SIGKILL)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 2, out
    assert "learner rank" in out and "Traceback" not in out
    saved = Checkpoints(run / "checkpoints").latest(print)
    assert saved is not None and saved.step >= 5, "each step was saved"
    with started(live_ray, tmp_path, merged(LONG, {"stages": {1: {"steps": saved.step + 1 - 3}}})) as again:
        out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert set(Ledger(run / "ledger.jsonl").fates().values()) == {"trained"}


def test_a_rollout_engine_that_is_killed_costs_nothing_but_time(live_ray, tmp_path):
    """Here engine and learner work in turns, so it may be asleep when it is killed."""
    run = tmp_path / "runs/faults"
    turns = {"sampler": IN_TURNS, "cluster": {"name": "ray", "placement": "colocated"}}
    change = {"stages": {1: {"steps": 30, "max_staleness": 0, **turns}}, "run": {"save_every": 0}}
    with started(live_ray, tmp_path, merged(LONG, change)) as process:
        wait_for_step(run, 6, process)
        os.kill(max(actors_of(live_ray, "RolloutEngine")), signal.SIGKILL)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "another one takes its place" in out
    assert Ledger(run / "ledger.jsonl").fates() == dict.fromkeys(range(30 * 4), "trained")


def wait_until(true: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.2)
