"""What runs log so that their cost can be added up."""

import json
from dataclasses import replace

import pytest
import torch

import alignment
from alignment.engines.policy_learner import PolicyLearner
from alignment.engines.roles import handles, passed
from alignment.engines.value_roles import prompt_batch
from alignment.ledger import Verdicts
from alignment.metrics import read_again, read_tokens
from alignment.studies.cost import Sizes, flops
from alignment.studies.curve import read_lines
from alignment.types import Prompt
from tests.tiny import tiny


def test_passes_are_read_off_what_the_learner_filled_in():
    batch, zeros_BT = prompt_batch([(1, 2), (1,)]), torch.zeros(2, 2)
    assert read_tokens(batch) == {}
    assert read_tokens(replace(batch, old_logp_BT=zeros_BT, entropy_BT=zeros_BT)) == {"read_tokens/policy": 3}
    assert read_tokens(replace(batch, ref_logp_BT=zeros_BT)) == {"read_tokens/reference": 3}
    valued = replace(batch, values_BT=zeros_BT)
    assert read_tokens(valued) == {"read_tokens/values": 3}
    assert read_tokens(valued, shares_policy=True) == {"read_tokens/policy": 3}  # one pass gives both


def test_what_components_ask_of_prompts_is_counted_once():
    class Learner:
        of_prompts = ("prompt_value",)

        def predict(self, name, prompts):
            return torch.zeros(len(prompts))

        def fit(self, name, prompts, targets):
            return {"fitted_tokens": 2.0 * sum(map(len, prompts))}

    asked = handles(Learner(), lambda prompt: (1,) * int(prompt.id))
    asked["prompt_value"].values([Prompt("3", {}), Prompt("2", {})])
    asked["prompt_value"].fit([Prompt("3", {})], torch.zeros(1))
    assert passed(asked) == {"prompt_value/read_tokens": 5, "prompt_value/fitted_tokens": 6}
    assert passed(asked) == {}


def test_a_run_with_a_critic_and_a_reference_logs_every_pass(tmp_path):
    kl = {"name": "k3", "coefficient": 0.01}
    algorithm = {"advantage": "gae", "kl": kl, "epochs": 2, "minibatches": 2}
    stage = {"critic": {"name": "model", "epochs": 3}, "algorithm": algorithm, "steps": 1}
    alignment.train(tiny(tmp_path, {"stages": {0: {"steps": 1}, 1: stage}}))
    lines = read_lines(tmp_path / "runs" / "tiny")
    [step] = [line for line in lines if line["kind"] == "train" and line["stage"] == "rl"]
    rows = step["prompt_tokens"] + step["completion_tokens"]
    read = {name: value for name, value in step.items() if name.startswith("read_tokens/")}
    assert read == {"read_tokens/policy": rows, "read_tokens/reference": rows, "read_tokens/values": rows}
    assert (step["fitted_tokens"], step["critic/fitted_tokens"]) == (2 * rows, 3 * rows)
    [first, *_] = [line for line in lines if line["kind"] == "eval"]
    verdicts = Verdicts(tmp_path / "runs" / "tiny" / "evaluations.jsonl")
    assert first["prompt_tokens"] == 4 * 6 and len(verdicts.read()[0]) == 6
    found = verdicts.read()[0].values()
    assert first["accuracy"] == sum(tally.correct / tally.judged for tally in found) / 6
    assert first["reward/exact_match"] == sum(tally.total for tally in found) / sum(tally.judged for tally in found)
    saved = json.loads(next((tmp_path / "runs" / "tiny" / "checkpoints").rglob("manifest.json")).read_text())
    assert all(not found["verdicts"] for found in saved["meta"]["evaluations"].values())
    verdicts.rewind(-1)
    assert verdicts.read() == {}


def test_what_an_update_reads_again_is_read_by_the_policy():
    read = {"read_tokens/policy": 8.0, "read_tokens/reference": 8.0}
    assert read_again(read, {"loss": 1.0}) == {"loss": 1.0, **read}
    assert read_again(read, {"read_tokens": 6.0}) == {**read, "read_tokens/policy": 14.0}
    assert read_again({}, {"read_tokens": 6.0}) == {"read_tokens/policy": 6.0}


def test_mini_batches_that_steer_reads_again_are_logged(tmp_path, monkeypatch):
    logged, update = [], PolicyLearner.update

    def spied(*arguments, **options):
        logged.append(update(*arguments, **options))
        return logged[-1]

    monkeypatch.setattr(PolicyLearner, "update", spied)
    stage = {"steps": 1, "algorithm": {"minibatches": 4, "entropy_controls": ["steer"]}, "curricula": ["uniform"]}
    alignment.train(tiny(tmp_path, {"stages": {0: {"steps": 1}, 1: stage}}))
    [step] = [s for s in read_lines(tmp_path / "runs" / "tiny") if s["kind"] == "train" and s["stage"] == "rl"]
    rows, again = step["prompt_tokens"] + step["completion_tokens"], logged[-1]["read_tokens"]
    assert step["read_tokens/policy"] == rows + again and "read_tokens" not in step
    assert again == pytest.approx(0.75 * rows, rel=0.15)  # all mini-batches, of four rows each, but the first


def test_the_gradients_of_reward_components_are_counted(tmp_path):
    rewards = [{"name": "format", "pattern": "[0-4].*"}, {"name": "format", "pattern": "[0-9]", "as": "short"}]
    stage = {"algorithm": {"weighting": "gradient"}, "steps": 1, "curricula": ["uniform"]}
    alignment.train(tiny(tmp_path, {"rewards": rewards, "stages": {0: {"steps": 1}, 1: stage}}))
    [step] = [s for s in read_lines(tmp_path / "runs" / "tiny") if s["kind"] == "train" and s["stage"] == "rl"]
    rows = step["prompt_tokens"] + step["completion_tokens"]
    assert (step["fitted_tokens"], step["gram/fitted_tokens"]) == (rows, 2 * rows)
    sizes = Sizes(policy=10)
    assert flops(step, sizes) - flops({**step, "gram/fitted_tokens": 0.0}, sizes) == 6 * 10 * 2 * rows
