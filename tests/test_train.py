"""Whole runs of the tiny recipe: what they write, how they stop, and that a resumed run is the uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import alignment
import alignment.job as job_module
from alignment.algorithms.advantages import advantages
from alignment.algorithms.aggregations import aggregations
from alignment.algorithms.corrections import corrections
from alignment.algorithms.entropy_controls import entropy_controls
from alignment.algorithms.kl_penalties import kl_penalties
from alignment.algorithms.policy_losses import policy_losses
from alignment.algorithms.weightings import weightings
from alignment.checkpoint import Checkpoints
from alignment.engines.torch_learner import TorchLearner
from alignment.errors import UserError
from alignment.metrics import Record
from tests.tiny import tiny, write

STATEFUL = {
    "stages": {
        1: {
            "curricula": [
                "uniform",
                {"name": "difficulty_filter", "low": 0, "high": 1, "on_exhausted": "short", "max_refills": 1},
            ],
            "algorithm": {
                "kl": {"name": "k1", "coefficient": 0.1, "apply_to": "reward", "target": 0.01},
                "entropy_controls": [{"name": "adaptive_bonus", "target": 2.0, "delta": 0.01}, "steer"],
                "epochs": 2,
                "minibatches": 2,
            },
        }
    },
    # a reward that an untrained model sometimes earns, so that groups differ
    "rewards": [{"name": "format", "pattern": "[0-4].*"}],
}


class Recorder:
    """A sink that keeps everything and may send this process a signal after a step."""

    def __init__(self, stop_after: int | None = None, number: int = signal.SIGINT) -> None:
        self.stop_after, self.number = stop_after, number
        self.records: list[Record] = []
        self.run: Mapping[str, Any] = {}
        self.result: Mapping[str, Any] = {}
        self.groups: list[Any] = []

    def start(self, run):
        self.run = run

    def log(self, record):
        self.records.append(record)
        if record.kind == "train" and record.step == self.stop_after:
            os.kill(os.getpid(), self.number)

    def rollouts(self, step, stage, groups):
        self.groups += groups

    def finish(self, result):
        self.result = result

    def close(self):
        pass


def contents(run: str) -> dict[str, bytes | dict[str, Any]]:
    """The files of the newest checkpoint; the manifest holds times and is left out."""
    newest = Path(run) / "checkpoints" / (Path(run) / "checkpoints" / "LATEST").read_text().strip()
    files = (p for p in newest.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(p.relative_to(newest)): p.read_bytes() for p in files}


def lines(run: str) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what a clock said."""
    found = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "tokens_per_s", "rollouts_per_s")
    return [{k: v for k, v in line.items() if not k.startswith("time/") and k not in timed} for line in found]


def test_a_run_writes_what_it_promises(tmp_path):
    sink = Recorder()
    result = alignment.train(tiny(tmp_path), sinks=[sink])
    run = Path(result["folder"])
    assert result == json.loads((run / "result.json").read_text()) == sink.result
    assert result["status"] == "complete" and result["exit_code"] == 0
    assert [(s["name"], s["steps"]) for s in result["stages"]] == [("warmup", 3), ("rl", 4)]
    assert result["stages"][0]["labels"] == {"demonstrations": 22}
    assert result["stages"][1]["labels"] == {"verdicts on its own rollouts": 4 * 4 * 4}
    assert result["eval"]["before"] == result["stages"][1]["eval"]["before"] == result["stages"][0]["eval"]["after"]
    assert result["eval"]["after"]["n"] == 6 and len(result["eval"]["after"]["interval"]) == 2
    trained = [line for line in lines(str(run)) if line["kind"] == "train"]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6, 7]
    change = trained[-1]["entropy"] - trained[-2]["entropy"]
    assert trained[-1]["entropy_change"] == pytest.approx(change) and "entropy_change" not in trained[0]
    assert trained[-1]["entropy_change_predicted"] == trained[-2]["entropy_predicted"]
    assert {"reward", "accuracy", "entropy", "length", "mismatch_kl", "grad_norm", "lr"} <= trained[-1].keys()
    assert abs(trained[-1]["mismatch_kl"]) < 1e-6, "sampler and learner agree on log-probabilities"
    phases = {k for k in sink.records[-1].metrics if k.startswith("time/")}
    assert {"time/sample", "time/score", "time/annotate", "time/update", "time/publish"} <= phases
    assert len(sink.groups) == 16 and all(r.scored for g in sink.groups for r in g.rollouts)
    assert (run / "rollouts.jsonl").read_text().count("\n") > 0
    assert all(run.joinpath(name).exists() for name in result["files"])


def test_the_same_recipe_twice_gives_the_same_run(tmp_path):
    runs = [alignment.train(tiny(tmp_path, {"run": {"name": name}}))["folder"] for name in ("a", "b")]
    assert lines(runs[0]) == lines(runs[1])
    assert contents(runs[0]) == contents(runs[1])
    other = alignment.train(tiny(tmp_path, {"run": {"name": "c", "seed": 4}}))["folder"]
    assert contents(other)["learner/policy.safetensors"] != contents(runs[0])["learner/policy.safetensors"]


@pytest.mark.parametrize("change", [{}, STATEFUL], ids=["plain", "stateful"])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, change, stop_after):
    whole = alignment.train(tiny(tmp_path, {**change, "run": {"name": "whole"}}))
    parts = tiny(tmp_path, {**change, "run": {"name": "parts"}})
    first = alignment.train(parts, sinks=[Recorder(stop_after)])
    assert (first["status"], first["exit_code"]) == ("interrupted", 130)
    assert Checkpoints(Path(first["folder"]) / "checkpoints").steps()[-1] == stop_after
    sink = Recorder()
    second = alignment.train(parts, sinks=[sink])
    assert sink.run["resumed_from"] == stop_after and second["status"] == "complete"
    assert contents(second["folder"]) == contents(whole["folder"])
    assert lines(second["folder"]) == lines(whole["folder"])
    assert second["eval"] == whole["eval"] and second["best"] == whole["best"]


@pytest.mark.parametrize("moment", ["update", "evaluate"])
@pytest.mark.parametrize("step", [2, 6])
def test_a_stop_while_the_learner_is_ahead_completes_the_step_first(tmp_path, monkeypatch, moment, step):
    """Step 2 is of the warm-up, step 6 of the online stage; both are evaluated."""
    whole = alignment.train(tiny(tmp_path, {"run": {"name": "whole"}}))
    owner, name = (TorchLearner, "update") if moment == "update" else (job_module, "evaluate")
    plain, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == (step if moment == "update" else {2: 2, 6: 5}[step]):
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    parts = tiny(tmp_path, {"run": {"name": "parts"}})
    assert alignment.train(parts)["exit_code"] == 130
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "runs/parts/checkpoints").steps()[-1] == step
    second = alignment.train(parts)
    assert contents(second["folder"]) == contents(whole["folder"])
    assert lines(second["folder"]) == lines(whole["folder"])


def test_a_reward_that_fails_in_an_evaluation_saves_no_half_step(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise UserError("no judge")

    evaluate, calls = job_module.evaluate, []
    monkeypatch.setattr(
        job_module, "evaluate", lambda *a, **k: broken() if calls else calls.append(1) or evaluate(*a, **k)
    )
    with pytest.raises(UserError, match="no judge"):
        alignment.train(tiny(tmp_path))
    assert Checkpoints(tmp_path / "runs/tiny/checkpoints").steps() == [], "step 2 was never completed, 1 never due"


def test_sigterm_saves_and_exits_75(tmp_path):
    assert alignment.train(tiny(tmp_path), sinks=[Recorder(2, signal.SIGTERM)])["exit_code"] == 75


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog):
    recipe = tiny(tmp_path)
    whole = alignment.train(tiny(tmp_path, {"run": {"name": "whole"}}))
    stopped = alignment.train(recipe, sinks=[Recorder(5)])
    victim = Path(stopped["folder"]) / "checkpoints/step_00000005/learner/policy.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    sink = Recorder()
    result = alignment.train(recipe, sinks=[sink])
    assert sink.run["resumed_from"] == 4
    assert "step_00000005" in caplog.text and "policy.safetensors" in caplog.text
    assert contents(result["folder"]) == contents(whole["folder"])


def test_a_complete_run_says_so_and_more_steps_continue_it(tmp_path, caplog):
    recipe = tiny(tmp_path)
    first = alignment.train(recipe)
    sink = Recorder()
    again = alignment.train(recipe, sinks=[sink])
    assert again == first and not sink.records and "is complete at step 7" in caplog.text
    longer = alignment.train(tiny(tmp_path, {"stages": {1: {"steps": 5}}}), sinks=[sink])
    assert sink.run["resumed_from"] == 7 and longer["stages"][1]["steps"] == 5


def test_an_edited_recipe_is_refused_with_both_values(tmp_path):
    alignment.train(tiny(tmp_path), sinks=[Recorder(2)])
    with pytest.raises(UserError) as refused:
        alignment.train(tiny(tmp_path, {"stages": {1: {"learner": {"lr": 0.5}}}}))
    assert "stages.1.learner.lr" in str(refused.value) and "0.001" in str(refused.value) and "0.5" in str(refused.value)
    allowed = tiny(tmp_path, {"run": {"save_every": 3, "sinks": ["jsonl", "tensorboard"]}, "evaluation": {"every": 3}})
    assert alignment.train(allowed)["status"] == "complete"


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    rows = [json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) for i in range(10)]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(rows))
    recipe = write(tmp_path)
    overrides = ["data.train={name: dataset, path: train.jsonl}"]
    assert alignment.train(recipe, overrides=overrides, sinks=[Recorder(5)])["status"] == "interrupted"
    file.write_text("\n".join(rows[::-1]))
    with pytest.raises(UserError, match=r"trained on other rows of data.train; .*--fresh"):
        alignment.train(recipe, overrides=overrides)
    file.write_text("\n".join(rows))
    assert alignment.train(recipe, overrides=overrides)["status"] == "complete"


def test_a_finished_stage_keeps_its_length(tmp_path):
    alignment.train(tiny(tmp_path), sinks=[Recorder(5)])
    with pytest.raises(UserError, match=r"stages.0.steps: 3 in the run, 9 now"):
        alignment.train(tiny(tmp_path, {"stages": {0: {"steps": 9}}}))


def test_a_stop_at_the_very_end_is_a_complete_run(tmp_path):
    assert alignment.train(tiny(tmp_path), sinks=[Recorder(7)])["status"] == "complete"


def test_the_same_command_with_init_from_continues(tmp_path):
    parent = alignment.train(tiny(tmp_path))["folder"]
    child = tiny(tmp_path, {"run": {"name": "child"}})
    alignment.train(child, init_from=parent, sinks=[Recorder(2)])
    sink = Recorder()
    assert alignment.train(child, init_from=parent, sinks=[sink])["status"] == "complete"
    assert sink.run["resumed_from"] == 2
    other = alignment.train(tiny(tmp_path, {"run": {"name": "other"}}), sinks=[Recorder(2)])
    with pytest.raises(UserError, match="was not started from"):
        alignment.train(tiny(tmp_path, {"run": {"name": "other"}}), init_from=parent)
    with pytest.raises(UserError, match="no run nope"):
        alignment.train(tiny(tmp_path, {"run": {"name": "fifth"}}), init_from="nope")
    assert other["status"] == "interrupted" and not (tmp_path / "runs/fifth").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"max_prompt_tokens": 3}}, "more than data.max_prompt_tokens"),
        ({"model": {"build": {"alphabet": "0123456789="}}}, "does not know"),
        ({"rewards": [{"name": "exact_match", "column": "solution"}]}, "solution"),
    ],
)
def test_data_that_does_not_fit_is_told_before_the_first_step(tmp_path, change, said):
    sink = Recorder()
    with pytest.raises(UserError, match=said):
        alignment.train(tiny(tmp_path, change), sinks=[sink])
    assert not sink.records


def test_rewards_that_never_apply_stop_the_run(tmp_path):
    (tmp_path / "shy_rewards.py").write_text("def none(completions, **_):\n    return [None] * len(completions)\n")
    recipe = tiny(tmp_path, {"rewards": [{"function": "shy_rewards.none"}], "stages": {0: {"steps": 1}}})
    with pytest.raises(UserError, match="every component returned None"):
        alignment.train(recipe)


def test_fresh_keeps_the_old_run_and_init_from_starts_from_its_policy(tmp_path):
    old = alignment.train(tiny(tmp_path))
    sink = Recorder()
    new = alignment.train(tiny(tmp_path), fresh_start=True, sinks=[sink])
    assert sink.run["resumed_from"] is None and contents(new["folder"]) == contents(old["folder"])
    kept = Path(f"{old['folder']}.1")
    assert contents(str(kept)) == contents(old["folder"])
    child = alignment.train(tiny(tmp_path, {"run": {"name": "child"}}), init_from=f"{kept}@best", sinks=[sink])
    assert child["stages"][0]["eval"]["before"]["accuracy"] == old["best"]["accuracy"]


def start(recipe: Path) -> subprocess.Popen[str]:
    """``align train`` in a process of its own, which has trained at least one step when this returns."""
    command = [sys.executable, "-m", "alignment", "train", str(recipe)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    metrics = recipe.parent / "runs/tiny/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"train"' in metrics.read_text()):
        time.sleep(0.02)
    return process


LONG = {"stages": {0: {"steps": 5000}}, "run": {"save_every": 3}}


def test_ctrl_c_in_a_shell_exits_130_and_a_killed_run_goes_on(tmp_path):
    recipe = write(tmp_path, LONG)
    process = start(recipe)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    checkpoints = Checkpoints(tmp_path / "runs/tiny/checkpoints")
    reached = checkpoints.steps()[-1]
    last = [line for line in lines(str(tmp_path / "runs/tiny")) if line["kind"] == "train"][-1]
    assert last["step"] == reached, "the last completed step was saved"
    process = start(recipe)
    while not [s for s in checkpoints.steps() if s > reached + 3]:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    newest = checkpoints.latest(lambda problem: None)
    assert newest is not None and newest.step > reached
    recipe = write(tmp_path, {**LONG, "stages": {0: {"steps": newest.step + 2}, 1: {"steps": 1}}})
    assert alignment.train(recipe)["status"] == "complete"


MATRIX: list[dict[str, Any]] = [
    *({"advantage": a} for a in ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "opo")),
    {"advantage": "gae"},
    *({"policy_loss": p, "epochs": 2} for p in ("reinforce", "clip", "gspo", "cispo", "grpo_guard")),
    {"aggregation": "sequence_mean"},
    {"aggregation": "sequence_sum"},
    {"aggregation": {"name": "constant", "length": 4}},
    *({"kl": {"name": k, "coefficient": 0.1}} for k in ("k1", "k2", "k3", "k3_straight_through")),
    *({"correction": c} for c in (None, "icepop", "sequence_tis", "sequence_mask", "geometric_mask")),
    {"weighting": "normalised"},
    *({"weighting": w} for w in ("hypervolume", "gradient", "recap", "normalise_then_sum")),
    {"weighting": {"name": "lagrangian", "thresholds": {"exact_match": 0.5}}},
    {"weighting": {"name": "ensemble", "members": ["format", "exact_match"]}},
    {"entropy_controls": ["bonus", "adaptive_bonus"]},
    {"entropy_controls": [{"name": "steer", "omega": "exact"}, "high_entropy"], "epochs": 2},
    {"entropy_controls": ["clip_cov", "kl_cov"], "policy_loss": "reinforce", "epochs": 2},
    {"entropy_controls": [{"name": "shuffled", "of": "steer"}], "epochs": 2},
]


@pytest.mark.parametrize("algorithm", MATRIX, ids=str)
def test_every_component_runs_end_to_end(tmp_path, algorithm):
    rewards = [{"name": "format", "pattern": "[0-4].*"}, {"name": "exact_match", "weight": 0.5}]
    critic = {"critic": "model"} if algorithm.get("advantage") == "gae" else {}
    change = {"rewards": rewards, "stages": {0: {"steps": 1}, 1: {"steps": 2, "algorithm": algorithm, **critic}}}
    sink = Recorder()
    alignment.train(tiny(tmp_path, change), sinks=[sink])
    update = sink.records[-1].metrics
    assert update["optimizer_steps"] == algorithm.get("epochs", 1) and update["grad_norm"] > 0


def test_what_says_end_to_end_is_in_the_matrix():
    kinds = {"advantage": advantages, "policy_loss": policy_losses, "aggregation": aggregations, "kl": kl_penalties}
    kinds |= {"correction": corrections, "weighting": weightings, "entropy_controls": entropy_controls}
    defaults = {"clip", "token_mean", "tis", "fixed"}
    for key, registry in kinds.items():
        parts = [part for algorithm in MATRIX for part in [algorithm.get(key)] if part is not None]
        names = {
            p if isinstance(p, str) else p["name"]
            for part in parts
            for p in (part if isinstance(part, list) else [part])
        }
        claimed = {entry.name for entry in registry if entry.evidence == "end to end"}
        assert claimed - defaults <= names


def test_calculator_turns_are_masked_and_trained_around(tmp_path):
    change = {
        "model": {"build": {"alphabet": "0123456789+=[]e\n"}},
        "data": {"max_prompt_tokens": 10},
        "rewards": [{"name": "format", "pattern": "[0-4].*"}],
        "stages": {
            0: {"steps": 1},
            1: {
                "steps": 2,
                "prompts_per_step": 8,
                "sampling": {"max_tokens": 24},
                "environment": {"name": "calculator", "call": "([0-9])", "error": "e"},
            },
        },
    }
    sink = Recorder()
    alignment.train(tiny(tmp_path, change), sinks=[sink])
    played = [r for g in sink.groups for r in g.rollouts if len(r.turns) == 3]
    assert played, "some rollout called the calculator"
    for rollout in played:
        (_, a, b), (role, c, d), (_, e, f) = rollout.turns
        assert (role, a, b, d, f) == ("observation", 0, c, e, len(rollout.token_ids))
        assert not any(rollout.loss_mask[c:d]) and all(rollout.loss_mask[a:b]) and all(rollout.loss_mask[e:f])
        assert all(logp == 0 for logp in rollout.behaviour_logp[c:d])
    assert abs(sink.records[-1].metrics["mismatch_kl"]) < 1e-6, "log-probabilities after an observation agree too"


def test_lora_trains_the_adapter_and_its_reference_is_the_start_of_the_stage(tmp_path):
    change = {
        "model": {"lora": {"rank": 4, "alpha": 8}},
        "rewards": [{"name": "format", "pattern": "[0-4].*"}],
        "stages": {1: {"steps": 2, "algorithm": {"kl": {"name": "k3", "coefficient": 0.1}}}},
    }
    sink = Recorder()
    alignment.train(tiny(tmp_path, change), sinks=[sink])
    first, last = (r.metrics["kl"] for r in sink.records if r.kind == "train" and r.stage == "rl")
    assert abs(first) < 1e-7 < last, "the reference is the policy that the stage began with"


def test_a_failing_reward_stops_the_run_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def half(completions, **_):\n    raise RuntimeError('no judge')\n")
    recipe = tiny(tmp_path, {"rewards": [{"function": "broken_rewards.half"}], "evaluation": {"every": 0}})
    with pytest.raises(Exception, match="no judge"):
        alignment.train(recipe)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over two threads may be rounded in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
