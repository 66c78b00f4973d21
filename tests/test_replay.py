"""A replay without changes is the recorded step, bit for bit; with changes it is what they would have made of it."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from alignment.errors import UserError
from alignment.flight import load_flight
from alignment.recipe import OnlineStage, load
from alignment.replay import recompute, replay
from alignment.runs import Run
from tests.recorded import record_step, sampled_batch

RECIPE = """
run: {name: small}
model: {build: {alphabet: "0123456789+="}}
data: {train: {name: procedural, task: {name: arithmetic, sizes: [9]}, split: train, size: 20}}
rewards:
  - {function: tests.recorded.exact, name: exact, weight: 1.0}
  - {function: tests.recorded.short, name: short, weight: 0.5}
stages:
  - {stage: online, name: rl, steps: 9, prompts_per_step: 4, group_size: 4, algorithm: ALGORITHM}
"""


def algorithm_of(folder, *overrides):
    """The algorithm of the run in ``folder``."""
    stage = load([folder / "recipe.yaml"], overrides).stages[0]
    assert isinstance(stage, OnlineStage)
    return stage.algorithm


@pytest.fixture
def recorded_run(tmp_path):
    """Makes the folder of a run whose step 7 was recorded under the algorithm given as YAML."""

    def make(algorithm="{}", **options):
        folder = tmp_path / "small"
        folder.mkdir(exist_ok=True)
        source = folder / "source.yaml"
        source.write_text(RECIPE.replace("ALGORITHM", algorithm))
        Run(folder).write_recipe(load([source]).resolved(), folder)
        learned = record_step(folder / "flight", algorithm_of(folder), **options)
        return folder, learned

    return make


ALGORITHMS = [
    "{}",
    "{epochs: 2, minibatches: 2, policy_loss: {name: clip, clip_high: 0.28}}",
    "{advantage: rloo, kl: {name: k3, coefficient: 0.05}, entropy_controls: [bonus]}",
    "{epochs: 2, minibatches: 2, policy_loss: grpo_guard, entropy_controls: [{name: steer, omega: exact}, kl_cov]}",
    "{policy_loss: gspo, aggregation: sequence_mean, kl: {name: k1, coefficient: 0.1, apply_to: reward}}",
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_changes_everything_is_the_recorded_bit_for_bit(recorded_run, algorithm):
    folder, learned = recorded_run(algorithm)
    result = replay(folder, 7)
    recorded, again = result.flight.batch, result.batch
    for name in ("reward_B", "adv_BT", "token_reward_BT"):
        was, now = getattr(recorded, name), getattr(again, name)
        assert (was is None) == (now is None), name
        assert was is None or torch.equal(was.nan_to_num(7.0), now.nan_to_num(7.0)), name
    assert result.recomputed == result.recorded
    assert result.identical
    assert result.recorded["loss"] == pytest.approx(learned["loss"], rel=1e-5)
    assert result.recorded["ratio"] == pytest.approx(learned["ratio"], rel=1e-5)


def test_a_changed_advantage_is_computed_from_the_recorded_rewards(recorded_run):
    folder, _ = recorded_run()
    result = replay(folder, 7, ["stages.0.algorithm.advantage=rloo"])
    assert not result.identical
    reward_B = sampled_batch().rewards_BK[:, 0] + 0.5 * sampled_batch().rewards_BK[:, 1]
    group = reward_B[8:12]  # scored and applicable throughout
    expected = group - (group.sum() - group) / 3
    mask_BT = result.batch.loss_mask_BT[8:12]
    assert result.batch.adv_BT is not None
    assert torch.allclose(result.batch.adv_BT[8:12], mask_BT * expected[:, None], atol=1e-6)


def test_changed_reward_weights_reach_the_rewards(recorded_run):
    folder, _ = recorded_run()
    result = replay(folder, 7, ["rewards.1.weight=2.0"])
    rewards_BK = sampled_batch().rewards_BK
    assert result.batch.reward_B is not None
    assert torch.allclose(result.batch.reward_B[8:12], rewards_BK[8:12, 0] + 2 * rewards_BK[8:12, 1])


def test_a_changed_clip_changes_the_loss_and_not_the_advantages(recorded_run):
    folder, _ = recorded_run("{epochs: 4}")
    result = replay(folder, 7, ["stages.0.algorithm.policy_loss={name: clip, clip_low: 0.001, clip_high: 0.001}"])
    was_BT, now_BT = result.flight.batch.adv_BT, result.batch.adv_BT
    assert was_BT is not None
    assert now_BT is not None
    assert torch.equal(was_BT, now_BT)
    assert result.recomputed["loss"] != result.recorded["loss"]
    names = [name for name in result.recorded if "clip" in name]
    assert names, "the clip loss reports how much it clips"
    assert any(result.recomputed[name] > result.recorded[name] for name in names)


def test_the_pull_of_a_token_is_the_derivative_of_the_loss(recorded_run):
    folder, _ = recorded_run("{correction: null, policy_loss: reinforce}")
    result = replay(folder, 7)
    adv_BT, mask_BT = result.batch.adv_BT, result.batch.loss_mask_BT
    assert adv_BT is not None
    assert torch.allclose(result.pull_BT, -adv_BT * mask_BT / mask_BT.sum(), atol=1e-7)


def test_what_was_not_recorded_cannot_be_asked_for(recorded_run):
    folder, _ = recorded_run()
    with pytest.raises(UserError, match=r"without 'reference', which the changed algorithm needs \(recorded: none\)"):
        replay(folder, 7, ["stages.0.algorithm.kl=k3"])


def test_the_policy_before_a_single_update_is_known_from_the_update_itself(recorded_run):
    folder, _ = recorded_run("{kl: {name: k3, coefficient: 0.1}}")
    assert load_flight(folder / "flight", 7).batch.old_logp_BT is None
    result = replay(folder, 7, ["stages.0.algorithm.kl={name: k1, coefficient: 0.1, apply_to: reward}"])
    assert result.batch.token_reward_BT is not None
    assert result.batch.token_reward_BT.shape == result.batch.ids_BT.shape


def test_the_policy_before_each_step_is_known_from_the_updates(recorded_run):
    """STEER tried on a run that did not have it: what it would have been told on the same steps, up to rounding."""
    steer, found = "stages.0.algorithm.entropy_controls=[{name: steer, lambda_min: 0.1}]", []
    for idle, recorded in (("{name: steer, lambda_min: 1.0}", True), ("{name: high_entropy, share: 1.0}", False)):
        folder, _ = recorded_run(f"{{epochs: 2, entropy_controls: [{idle}]}}")
        assert all((u.logp_BT is not None) == recorded for u in load_flight(folder / "flight", 7).updates)
        found.append(replay(folder, 7, [steer]).recomputed)
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)
    assert found[0]["control_weight"] < 0.99
    with pytest.raises(UserError, match="without 'entropy_drift'"):
        replay(folder, 7, ["stages.0.algorithm.entropy_controls=[{name: steer, omega: exact}]"])


def test_a_component_keeps_its_recorded_state_and_one_of_another_kind_starts_afresh(recorded_run):
    kl = "{name: NAME, coefficient: 0.1, target: 0.02}"
    folder, _ = recorded_run(f"{{epochs: 2, kl: {kl.replace('NAME', 'k3')}}}")
    flight = load_flight(folder / "flight", 7)
    assert flight.states == {"kl": {"coefficient": 0.1}}
    later = dataclasses.replace(flight, states={"kl": {"coefficient": 9.0}})
    same = algorithm_of(folder)
    other = algorithm_of(folder, f"stages.0.algorithm.kl={kl.replace('NAME', 'k1')}")
    assert recompute(flight, same, same).identical
    assert recompute(later, same, same).recomputed["loss"] > recompute(flight, same, same).recomputed["loss"] + 0.1
    assert recompute(later, same, other).recomputed == recompute(flight, same, other).recomputed


def test_a_step_or_a_name_that_does_not_exist_is_the_users_error(recorded_run):
    folder, _ = recorded_run()
    with pytest.raises(UserError, match="recorded steps: 7"):
        replay(folder, 3)
    with pytest.raises(UserError, match="advantage"):
        replay(folder, 7, ["stages.0.algorithm.advantage=nonsense"])


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_shows_metrics_groups_and_tokens(recorded_run, width):
    folder, _ = recorded_run("{epochs: 2}")
    out = io.StringIO()
    replay(folder, 7, ["stages.0.algorithm.advantage=rloo"], Console(file=out, width=width))
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "Step 7, 16 rows: differs" in text
    for part in ("Metrics", "advantage_mean", "loss", "4 of 4 groups", "unscored", "d loss / d logp", "'9'"):
        assert part in text, part
    out = io.StringIO()
    replay(folder, 7, console=Console(file=out, width=width))
    assert "equal to the recorded step, bit for bit" in out.getvalue()


def test_replay_needs_no_model(recorded_run, monkeypatch):
    folder, _ = recorded_run()

    def refuse(*_, **__):
        raise AssertionError("replay ran a model")

    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)
    assert replay(folder, 7).identical


def test_a_run_is_found_by_its_name(recorded_run):
    folder, _ = recorded_run()
    assert replay("small", 7, output=folder.parent).identical
    with pytest.raises(UserError, match="there is no run smal; runs in .*: small"):
        replay("smal", 7, output=folder.parent)
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match="give RUN alone and --step"):
        replay("small@best", 7, output=folder.parent)
