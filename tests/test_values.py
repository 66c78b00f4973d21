"""PPO with a critic, and value models, through the real loop: what is logged, saved, gone on with and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import alignment
from alignment.engines.value_model import load_value_model
from alignment.errors import UserError
from alignment.export_values import export_value_model, load_run_values
from alignment.recipe import RecipeError
from tests.tiny import merged, tiny

FIRST_DIGIT = {"rewards": [{"name": "format", "pattern": "[0-4].*"}]}
PPO: dict[str, Any] = {
    "algorithm": {"advantage": "gae", "epochs": 2, "minibatches": 2},
    "critic": {"name": "model", "lr": 1e-2},
}
STREAMS = {"name": "lagrangian", "thresholds": {"format": 0.5}}
VALUE: dict[str, Any] = {
    "stage": "value",
    "name": "value",
    "value_model": {
        "name": "model",
        "lr": 1e-2,
        "model": {
            "build": {"alphabet": "0123456789+=", "hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1},
        },
    },
}


def metrics(folder: str | Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind and row["stage"] != "warmup"]


def changed(stage: dict[str, Any], **more: Any) -> dict[str, Any]:
    return merged(FIRST_DIGIT, {"stages": {1: stage}} | more)


@pytest.mark.parametrize(
    ("critic", "extra"),
    [
        ({"name": "model", "lr": 1e-2}, {}),
        ({"name": "model", "loss": {"name": "hl_gauss", "bins": 11}, "epochs": 3}, {"prompt_value": "read_out"}),
        ({"name": "head", "loss": "two_hot"}, {"prompt_value": "read_out"}),
        ({"name": "model"}, {"prompt_value": "model"}),
    ],
    ids=["model", "hl_gauss", "head", "prompts"],
)
def test_ppo_goes_on_exactly_where_it_was_stopped(tmp_path, critic, extra):
    stage = {**PPO, "critic": critic, **extra}
    whole = alignment.train(tiny(tmp_path, changed(stage, run={"name": "whole"})))
    part = changed({**stage, "steps": 2}, run={"name": "part"})
    alignment.train(tiny(tmp_path, part))
    rest = alignment.train(tiny(tmp_path, changed(stage, run={"name": "part"})))
    assert whole["status"] == rest["status"] == "complete"
    names = ("loss", "reward", "critic/value_loss", "critic/mean", "critic/calibration_error")
    for one, other in zip(metrics(whole["folder"]), metrics(rest["folder"]), strict=True):
        assert [one.get(name) for name in names] == [other.get(name) for name in names]
    one, other = (sorted((Path(r["folder"]) / "checkpoints").glob("*7*"))[-1] for r in (whole, rest))
    files = sorted(f.relative_to(one) for f in one.rglob("learner/*") if f.is_file())
    assert [f for f in files if (one / f).read_bytes() != (other / f).read_bytes()] == []
    assert Path("learner/role-critic.safetensors") in files


def test_the_critic_learns_what_the_policy_gets_and_is_told_how_well(tmp_path):
    stage = {**PPO, "steps": 12, "prompts_per_step": 16, "learner": {"name": "torch", "lr": 1e-5}}
    result = alignment.train(tiny(tmp_path, changed(stage)))
    rows = metrics(result["folder"])
    assert rows[-1]["critic/value_loss"] < 0.7 * rows[0]["critic/value_loss"]
    assert rows[0]["critic/mean"] == 0.0, "measured before it is trained on the batch"
    assert abs(rows[-1]["critic/bias"]) < abs(rows[0]["critic/bias"])
    assert rows[-1]["critic/explained_variance"] > 0.05
    assert rows[-1]["critic/lr"] == 1e-2 and rows[-1]["lr"] == 1e-5


def test_the_policy_rests_while_the_critic_is_trained_ahead(tmp_path):
    learner = {"name": "torch", "lr": 1e-3, "schedule": "linear", "min_lr_ratio": 0.0}
    stage = {**PPO, "steps": 4, "critic": {"name": "model", "pretraining_steps": 2}, "learner": learner}
    result = alignment.train(tiny(tmp_path, changed(stage)))
    ahead, still, then, last = metrics(result["folder"])
    assert [row["lr"] for row in (then, last)] == pytest.approx([1e-3, 0.5e-3]), "its schedule is of its own updates"
    assert last["critic/lr"] == pytest.approx(0.25e-3)
    assert "loss" not in ahead and "critic/loss" in ahead and "loss" not in still and "loss" in then
    assert ahead["optimizer_steps"] == 0 if "optimizer_steps" in ahead else True
    steps = [row["stage_step"] for row in metrics(result["folder"], "eval")]
    assert 1 not in steps and 2 not in steps, "the same policy is not evaluated again"


@pytest.mark.parametrize("head", ["state", "vocabulary"])
def test_a_value_stage_leaves_the_policy_as_it_is_and_its_model_is_exported(tmp_path, head):
    stage = merged(VALUE, {"value_model": {"head": head}, "truncation": "end", "steps": 20, "prompts_per_step": 8})
    result = alignment.train(tiny(tmp_path, changed(stage)))
    rows, run = metrics(result["folder"]), result["folder"]
    assert rows[-1]["critic/value_loss"] < rows[0]["critic/value_loss"] and "loss" not in rows[-1]
    assert metrics(run, "eval") == [], "the same policy is not evaluated again"
    checkpoints = Path(run) / "checkpoints"
    policies = {(f / "learner" / "policy.safetensors").read_bytes() for f in checkpoints.iterdir() if f.is_dir()}
    assert len(policies) <= 2, "one of each stage's start at most"
    folder = export_value_model(run, tmp_path / "values")
    model = load_value_model(folder)
    again, _ = load_run_values(run)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(model.values(ids), again.values(ids))
        assert model.values(ids).abs().sum() > 0
    assert model.shape.kind == head and model.config.hidden_size == 8
    with pytest.raises(UserError, match="is not an empty folder"):
        export_value_model(run, folder)
    with pytest.raises(UserError, match="has no model 'prompt_value' to export; it has critic"):
        export_value_model(run, tmp_path / "other", "prompt_value")


def test_what_was_exported_is_another_stages_critic(tmp_path):
    shared = {**PPO, "critic": {"name": "head", "lr_ratio": 5.0}}
    first = alignment.train(tiny(tmp_path, changed(shared, run={"name": "first"})))
    folder = export_value_model(first["folder"], tmp_path / "values")
    stage = {**PPO, "critic": {"name": "model", "start": str(folder)}}
    second = alignment.train(tiny(tmp_path, changed(stage, run={"name": "second"})))
    means = [row["critic/mean"] for row in metrics(second["folder"])]
    assert means[0] != 0.0, "it does not begin at zero"
    wrong = {**PPO, "critic": {"name": "model", "start": str(folder), "loss": "hl_gauss"}}
    with pytest.raises(UserError, match="is a value model with .*Scalar.*; the recipe asks for .*HlGauss"):
        alignment.train(tiny(tmp_path, changed(wrong, run={"name": "third"})))
    missing = {**PPO, "critic": {"name": "model", "start": "nowhere"}}
    with pytest.raises(RecipeError, match="stages.1.critic.start: there is no folder nowhere"):
        alignment.train(tiny(tmp_path, changed(missing, run={"name": "fourth"})))


def test_a_critic_with_adapters_is_exported_with_whole_weights(tmp_path):
    change = merged(changed(PPO), {"model": {"lora": {"rank": 2}}})
    result = alignment.train(tiny(tmp_path, change))
    model = load_value_model(export_value_model(result["folder"], tmp_path / "values"))
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    ids = torch.tensor([[1, 2, 3, 4]])
    again, _ = load_run_values(result["folder"])
    with torch.no_grad():
        torch.testing.assert_close(model.values(ids), again.values(ids))


def test_a_value_model_needs_the_policys_vocabulary(tmp_path):
    stage = merged(VALUE, {"value_model": {"model": {"build": {"alphabet": "01"}}}})
    with pytest.raises(UserError, match="the value model and the policy .* vocabularies: 4 and 14 tokens"):
        alignment.train(tiny(tmp_path, changed(stage)))
    other = merged(VALUE, {"value_model": {"model": {"build": {"alphabet": "0123456789+X"}}}})
    with pytest.raises(UserError, match="14 and 14 tokens, and '='"):
        alignment.train(tiny(tmp_path, changed(other, run={"name": "other"})))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"algorithm": {"advantage": "gae"}},
            "needs values, which a critic makes: give the stage one, such as critic:",
        ),
        ({"critic": "model"}, "has nothing to learn from, since the advantage makes no returns: .* gae"),
        ({**PPO, "critic": "read_out"}, "is a view of a critic, for prompt_value"),
        ({**PPO, "critic": {"name": "model", "head": "vocabulary"}}, "'vocabulary' has no value of a prompt's end"),
        ({**PPO, "critic": {"name": "model", "model": {"dtype": "bfloat16"}}}, "takes one of 'path'.*neither is given"),
        (
            merged(PPO, {"critic": {"pretraining_steps": 4}, "steps": 4}),
            "pretraining_steps: 4 leaves the policy none of the stage's 4 steps",
        ),
        ({"prompt_value": "read_out"}, "reads the critic, and this stage has none"),
        (
            {**PPO, "prompt_value": "read_out", "algorithm": {"advantage": "gae", "weighting": STREAMS}},
            "'read_out' is one number, and this critic has a value for each reward component",
        ),
        ({"prompt_value": "head"}, "'head' learns with the policy"),
        (merged(VALUE, {"value_model": {"loss": "hl_gauss", "head": "vocabulary"}}), "must be 'scalar'"),
        ({**VALUE, "value_model": "head"}, "learns in the steps of the policy, which rests"),
        ({**PPO, "critic": {"name": "model", "lose": "scalar"}}, "no option 'lose'; did you mean 'loss'"),
        ({**PPO, "critic": {"name": "model", "loss": {"name": "hl_gaus"}}}, "did you mean 'hl_gauss'"),
        ({**VALUE, "algorithm": {"advantage": "gae"}}, "algorithm"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, stage, message):
    with pytest.raises(RecipeError, match=message):
        tiny(tmp_path, changed(stage))
