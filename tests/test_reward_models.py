"""Reward models: golden numbers, invariances, whole runs that train and use them, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import alignment
from alignment import reward_modelling
from alignment.algorithms.reward_losses import BradleyTerry, RewardObjective, judged
from alignment.algorithms.value_losses import HlGauss, Scalar
from alignment.control import KEY
from alignment.data.load import LoadedData
from alignment.engines.gradients import accumulate
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.value_model import ValueModel, ValueShape, load_value_model, save_value_model
from alignment.errors import UserError
from alignment.export_values import export_value_model
from alignment.model_saving import save_model
from alignment.models import load_model
from alignment.pair_checks import check_pairs
from alignment.partition import Share
from alignment.recipe import load
from alignment.recipe_sections import ModelConfig
from alignment.reward_scoring import RewardScorer
from rewards.reward_model import RewardModel
from tests.algorithms.test_preferences import Fake, batch
from tests.test_preference import FORMAT, PAIRS, TRAIN, recipe
from tests.test_train import Recorder, contents, lines

D = torch.float64


def one(loss: BradleyTerry, chosen: float, rejected: float, gap: float = math.nan) -> float:
    return float(loss(*(torch.tensor([x], dtype=D) for x in (chosen, rejected, gap))))


def test_golden_numbers():
    assert one(BradleyTerry(), 2.0, 0.5) == pytest.approx(0.2014133, abs=1e-6)
    assert one(BradleyTerry(centring=0.01), 2.0, 0.5) == pytest.approx(0.2639133, abs=1e-6)
    assert one(BradleyTerry(margin="scores"), 2.0, 0.5, 1.5) == pytest.approx(math.log(2), abs=1e-9)
    assert one(BradleyTerry(tie=0.5), 2.0, 0.5, 0.0) == pytest.approx(0.5 * 1.5**2, abs=1e-9)
    assert one(BradleyTerry(tie=0.5), 2.0, 0.5, 1.0) == pytest.approx(0.2014133, abs=1e-6)


def test_a_tie_pulls_both_rewards_together():
    chosen, rejected = torch.tensor([2.0], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    BradleyTerry(tie=1.0)(chosen, rejected, torch.tensor([0.0])).sum().backward()
    assert chosen.grad > 0 > rejected.grad


def test_what_rewards_of_held_out_pairs_are_worth():
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    length = torch.tensor([[4, 2], [5, 4], [1, 2], [6, 3]])
    found = judged(torch.stack([chosen, rejected], 1), length)
    assert found["accuracy"] == 0.75 and found["length_correlation"] == pytest.approx(1.0)
    sure = torch.tensor([2.0, 1.0, 1.0, 3.0]).sigmoid()
    apart = abs(float(sure[0]) - 1), abs(float(sure[1]) - 0.5), abs(float(sure[3]) - 1)  # three bins
    assert found["calibration"] == pytest.approx(0.25 * apart[0] + 0.5 * apart[1] + 0.25 * apart[2], abs=1e-6)


class Heads(Fake):
    """A backend whose head puts out a parameter: numbers for each row's key and token."""

    def __init__(self, outputs: int) -> None:
        generator = torch.Generator().manual_seed(1)
        whole = batch()
        self.logp = torch.randn(*whole.ids_BT.shape, outputs, dtype=D, generator=generator).requires_grad_()
        self.share, self.device = Share(), torch.device("cpu")


@pytest.mark.parametrize("head", [Scalar(), HlGauss(low=-3, high=3, bins=9)], ids=["scalar", "hl_gauss"])
@pytest.mark.parametrize("loss", [BradleyTerry(), BradleyTerry(margin="scores", centring=0.1)], ids=["plain", "margin"])
def test_loss_and_gradient_do_not_depend_on_micro_batches_or_order(head, loss):
    def computed(given, budget):
        backend, objective = Heads(head.outputs), RewardObjective(loss, head)
        prepared = objective.prepare(given)

        def loss_of(micro):
            return objective.loss(backend.logp[micro.key_B][:, : micro.ids_BT.shape[1]], micro)

        total, sums = accumulate(backend, loss_of, prepared, budget)
        return float(total), backend.logp.grad, objective.finish(sums)

    whole = batch().rows(range(8))
    value, grad, metrics = computed(whole, 1000)
    assert grad.abs().sum() > 0 and metrics["pairs"] == 4
    for given, budget in ((whole, 24), (whole.rows([7, 3, 0, 5, 2, 6, 1, 4]), 24)):
        again, grad_again, metrics_again = computed(given, budget)
        assert again == pytest.approx(value, rel=1e-6) and torch.allclose(grad, grad_again, rtol=1e-6)
        assert metrics_again == pytest.approx(metrics, rel=1e-6, nan_ok=True)


STAGE = {"stage": "reward_model", "name": "rm", "steps": 24, "batch_size": 8}


def written(folder: Path, **stage) -> Path:
    return recipe(folder, {**STAGE, **stage})


@pytest.mark.parametrize(
    "stage",
    [{}, {"head": {"name": "hl_gauss", "low": -4, "high": 4}}, {"loss": {"name": "bradley_terry", "centring": 0.01}}],
    ids=["scalar", "hl_gauss", "centred"],
)
def test_a_reward_model_learns_what_is_preferred(tmp_path, stage):
    result = alignment.train(written(tmp_path, **stage))
    records = lines(result["folder"])
    assert records[-1]["reward_model/accuracy"] > 0.7 > records[0]["reward_model/accuracy"] - 0.3
    assert records[-1]["held_out/accuracy"] > 0.7 and 0 <= records[-1]["held_out/calibration"] <= 0.5
    place = Path(result["folder"]) / "reward_models" / "rm" / "member_0"
    scorer = RewardScorer(place)
    right = [row["chosen"] for row in PAIRS], [row["rejected"] for row in PAIRS]
    prompts = [row["prompt"] for row in PAIRS]
    chosen, rejected = (scorer(prompts, side, [True] * len(prompts), 32) for side in right)
    share = sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(prompts)
    assert share == pytest.approx(records[-1]["held_out/accuracy"])
    assert result["stages"][0]["labels"] == {"pairs": 16}


@pytest.mark.parametrize("body", ["plain", "control", "another"])
def test_rewards_are_those_that_the_stage_gave_the_same_pairs(tmp_path, monkeypatch, body):
    """Also where a control token stands behind prompts, and where the body is of a model that knows of none."""
    gave, judge = [], reward_modelling.held_out

    def recorded(job, stage):
        gave.append(reward_modelling.rewards_of(job, "reward_model_0", job.data.held_out_preferences))
        return judge(job, stage)

    monkeypatch.setattr(reward_modelling, "held_out", recorded)
    path = written(tmp_path, steps=6)
    whole = yaml.safe_load(path.read_text())
    if body != "plain":
        whole["model"]["control"] = {}
    if body == "another":
        made = load_model(ModelConfig.model_validate(whole["model"]), 0)
        save_model(made, tmp_path / "base")
        delattr(made.module.config, KEY)
        save_model(made, tmp_path / "body")
        whole["model"] = {"path": str(tmp_path / "base"), "control": {}}
        whole["stages"][0]["model"] = {"path": str(tmp_path / "body")}
    path.write_text(yaml.safe_dump(whole))
    result = alignment.train(path)
    scorer = RewardScorer(Path(result["folder"]) / "reward_models/rm/member_0")
    rows = [(row["prompt"], row[side]) for row in PAIRS for side in ("chosen", "rejected")]
    found = scorer([prompt for prompt, _ in rows], [said for _, said in rows], [True] * len(rows))
    assert bool(scorer.cue) == (body != "plain") and len(set(found)) > 8
    assert found == pytest.approx(gave[-1].flatten().tolist(), abs=1e-5)


def test_members_differ_and_the_policy_stays(tmp_path):
    path = written(tmp_path, members=2, steps=3)
    result = alignment.train(path)
    folder = Path(result["folder"]) / "reward_models" / "rm"
    one_, other = (load_value_model(folder / f"member_{i}").state_dict() for i in (0, 1))
    assert any(not torch.equal(one_[name], other[name]) for name in one_)
    record = lines(result["folder"])[-1]
    assert record["reward_model_0/loss"] != record["reward_model_1/loss"]
    assert {"held_out/reward_model_0/accuracy", "held_out/reward_model_1/accuracy"} <= record.keys()
    again = export_value_model(f"{result['folder']}@3", tmp_path / "again", "reward_model_1")
    same = load_value_model(again).state_dict()
    assert all(torch.equal(same[name], other[name]) for name in other)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    found = []
    for name, stop in (("whole", None), ("resumed", 2)):
        (tmp_path / name).mkdir()
        path = written(tmp_path / name, members=2, steps=4)
        if stop:
            assert alignment.train(path, sinks=[Recorder(stop_after=stop)])["status"] == "interrupted"
        result = alignment.train(path)
        found.append((contents(result["folder"]), lines(result["folder"])))
        assert (Path(result["folder"]) / "reward_models/rm/member_1/value_model.json").is_file()
    (ours, told), (theirs, told_again) = found
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert told == told_again


def test_a_stop_in_the_last_step_leaves_the_models(tmp_path):
    result = alignment.train(written(tmp_path, steps=2), sinks=[Recorder(stop_after=2)])
    assert result["status"] == "complete" and "reward_models" in result["files"]
    assert (Path(result["folder"]) / "reward_models/rm/member_0/value_model.json").is_file()


def test_a_later_stage_is_rewarded_by_it(tmp_path):
    online = {
        "stage": "online", "name": "rl", "steps": 2, "prompts_per_step": 4, "group_size": 4,
        "sampling": {"max_tokens": 3}, "algorithm": {"weighting": {"name": "ensemble", "members": ["one", "other"]}},
        "learner": {"name": "torch", "lr": 1e-3},
    }  # fmt: skip
    path = recipe(tmp_path, {**STAGE, "members": 2, "steps": 3}, data=TRAIN)
    whole = yaml.safe_load(path.read_text())
    whole["stages"].append(online)
    members = [
        {"name": "reward_model", "stage": "rm", "member": i, "as": column} for i, column in enumerate(("one", "other"))
    ]
    whole["rewards"] = [*FORMAT, *members]
    path.write_text(yaml.safe_dump(whole))
    sink = Recorder()
    result = alignment.train(path, sinks=[sink])
    assert result["status"] == "complete"
    steps = [r.metrics for r in sink.records if r.kind == "train" and r.stage == "rl"]
    assert len(steps) == 2 and all(math.isfinite(step["reward/one"]) and step["grad_norm"] > 0 for step in steps)
    (rollout, *_) = sink.groups[0].rollouts
    scorer = RewardScorer(Path(result["folder"]) / "reward_models/rm/member_0")
    (value,) = scorer([sink.groups[0].prompt.row["prompt"]], [rollout.text], [rollout.finish_reason == "stop"])
    assert rollout.scores["one"].value == pytest.approx(value, abs=1e-5)
    half = RewardModel(stage="rm", path=result["folder"], dtype="bfloat16")
    (rounded,) = half([sink.groups[0].prompt.row["prompt"]], [rollout.text], finish_reason=[rollout.finish_reason])
    assert rounded is not None and rounded.value != value and rounded.value == pytest.approx(value, abs=0.05)


def test_before_its_stage_is_done_it_does_not_apply(tmp_path):
    reward = RewardModel(stage="rm").located(tmp_path, tmp_path / "run")
    assert reward(["1+1="], ["2"], finish_reason=["stop"]) == [None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": [{"name": "reward_model", "stage": "other"}]},
            "no stage 'reward_model' before one that samples is called",
        ),
        ({"rewards": [{"name": "reward_model", "stage": "rm"}]}, "before one that samples is called 'rm' .there: none"),
        ({"rewards": [{"name": "reward_model", "path": "nowhere"}]}, "nowhere holds no reward model"),
        ({"stages": [{**STAGE, "start": "nowhere"}]}, "there is no folder nowhere"),
    ],
)
def test_a_model_that_will_not_be_there_is_named_before_anything_starts(tmp_path, changes, message):
    path = written(tmp_path)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        alignment.train(path)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"start": "x", "members": 2}, "stages.0.members: 2 would all begin with the head of 'start'"),
        ({"members": 0}, "stages.0.members: expected a number >= 1"),
        ({"loss": "btl"}, "'btl' is not one of the reward_losses"),
    ],
)
def test_a_stage_that_cannot_work_is_refused(tmp_path, stage, message):
    with pytest.raises(UserError, match=message):
        load([written(tmp_path, **stage)])


def test_a_margin_needs_scores(tmp_path):
    rows = [{key: value for key, value in PAIRS[0].items() if "score" not in key}]
    path = recipe(tmp_path, {**STAGE, "loss": {"name": "bradley_terry", "margin": "scores"}}, rows=rows)
    with pytest.raises(UserError, match=r"'bradley_terry' needs a score of each side, .* and 'rejected_score'$"):
        alignment.train(path)


@pytest.mark.parametrize("saved", [False, True])
def test_a_body_of_its_own_has_positions_of_its_own(tmp_path, monkeypatch, saved):
    """Found before there is a learner."""
    monkeypatch.setattr(TorchLearnerConfig, "build", lambda *_: pytest.fail("there is a learner"))
    path = written(tmp_path)
    whole = yaml.safe_load(path.read_text())
    build = {**whole["model"]["build"], "max_positions": 5}
    if saved:
        made = load_model(ModelConfig.model_validate({"build": build}), 0)
        save_value_model(ValueModel.of(made.module, ValueShape(Scalar())), made.tokenizer, tmp_path / "short")
        path = written(tmp_path, start="short")
    else:
        path = written(tmp_path, model={"build": build})
    said = r"stage 'rm': the pair .*pairs.jsonl:1 has 6 tokens, prompt included, and the reward model has 5 positions"
    with pytest.raises(UserError, match=said):
        alignment.train(path)


def test_a_body_that_is_gone_is_not_looked_for_once_its_stage_is_done(tmp_path):
    found = load([written(tmp_path, start="gone")])
    check_pairs(found, LoadedData(), None, done=1)
    with pytest.raises(UserError, match="there is no folder gone"):
        check_pairs(found, LoadedData(), None)


def test_a_reward_needs_a_model():
    with pytest.raises(UserError, match="needs 'path'"):
        RewardModel()
    assert json.dumps(replace(RewardModel(stage="a"), member=2).member) == "2"
