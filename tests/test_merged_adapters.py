"""Iterative preference learning with LoRA: between rounds an adapter becomes part of the model, and another begins."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from alignment.adapters import is_fresh, merge_adapter, merged_names, merged_weights
from alignment.algorithms.preference_objective import PreferenceObjective
from alignment.algorithms.preferences import Dpo
from alignment.engines.gradients import accumulate
from alignment.engines.outgoing import outgoing
from alignment.engines.policy_goal import PolicyGoal
from alignment.engines.torch_learner import TorchLearner
from alignment.errors import UserError
from alignment.export import export
from alignment.export_values import export_value_model
from alignment.recipe import load
from alignment.types import Batch
from tests.engines.helpers import learner_of, lora, make_batch, tiny
from tests.test_preference import FORMAT, SAMPLED, TRAIN, given, recipe, sampled, trained
from tests.test_train import Recorder, contents, lines

DPO = PreferenceObjective([(Dpo(), None)])
LORA = {"lora": {"rank": 2, "alpha": 4}}
DEMONSTRATIONS = {"demonstrations": {"name": "dataset", "path": "pairs.jsonl"}}
SUPERVISED = {"stage": "sft", "steps": 2, "batch_size": 4, "learner": {"name": "torch", "lr": 1e-2}}
ROUNDS = {"name": "refreshed", "every": 2, "merge": True}


def pairs(learner: TorchLearner) -> Batch:
    batch = make_batch()
    batch = replace(batch, loss_mask_BT=batch.loss_mask_BT | (batch.ids_BT > 0), side_B=torch.tensor([1, -1] * 4))
    return learner.annotate(batch, DPO.needs | {"old_logp"})


def gradients(learner: TorchLearner) -> tuple[float, dict[str, Tensor]]:
    goal = PolicyGoal(learner.backend, DPO, learner.annotate, learner.slots["rl"].counts)
    loss, _ = accumulate(learner.backend, goal.loss, goal.prepare(pairs(learner)), 64)
    found = {name: p.grad.clone() for name, p in learner.trained.items() if p.grad is not None}
    learner.backend.forget_gradients()
    return float(loss), found


def test_merging_adds_the_update_and_begins_an_adapter_that_does_nothing():
    module = lora()
    before, old = merged_weights(module), module.state_dict()
    old = {name: tensor.clone() for name, tensor in old.items()}
    state = torch.get_rng_state()
    assert not is_fresh(module) and merge_adapter(module, 7)
    assert torch.equal(torch.get_rng_state(), state)
    after = merged_weights(module)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert is_fresh(module) and merged_names(module) == {n for n in old if n.endswith("base_layer.weight")}
    # q_proj by hand: W + alpha / rank B A with alpha 8 and rank 2
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = old[f"{name}.lora_A.default.weight"], old[f"{name}.lora_B.default.weight"]
    torch.testing.assert_close(
        module.state_dict()[f"{name}.base_layer.weight"], old[f"{name}.base_layer.weight"] + 4 * b @ a
    )
    fresh = module.state_dict()[f"{name}.lora_A.default.weight"].clone()
    assert not torch.equal(fresh, a)
    assert not merge_adapter(module, 8), "there is nothing to merge"
    assert torch.equal(module.state_dict()[f"{name}.lora_A.default.weight"], fresh)
    other = lora()
    merge_adapter(other, 7)
    assert torch.equal(other.state_dict()[f"{name}.lora_A.default.weight"], fresh), "the seed says which"


def test_a_round_begins_with_the_loss_of_a_coin_and_the_last_rounds_policy_as_reference():
    learner = learner_of(lora(), reference=True, lr=5e-2)
    assert learner.reference is not None
    learner.update(pairs(learner), DPO)
    last = pairs(learner)
    assert learner.slots["rl"].adamw.state
    counts = replace(learner.slots["rl"].counts)
    assert learner.merge_adapter(2) and learner.reference is None
    assert learner.slots["rl"].counts == replace(counts, steps_before_moments=1)
    assert not learner.slots["rl"].adamw.state
    batch = pairs(learner)
    assert batch.ref_logp_BT is not None and batch.old_logp_BT is not None and last.old_logp_BT is not None
    torch.testing.assert_close(batch.ref_logp_BT, last.old_logp_BT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.ref_logp_BT, batch.old_logp_BT, rtol=0, atol=0)
    loss, found = gradients(learner)
    assert loss == pytest.approx(0.6931472, abs=1e-6)
    assert all(not g.any() for name, g in found.items() if "lora_A" in name)
    assert all(g.any() for name, g in found.items() if "lora_B" in name)


def test_a_learner_is_restored_from_between_two_rounds(tmp_path):
    learners = [learner_of(lora(seed), lr=5e-2) for seed in (0, 0, 1)]
    saved, restored, other = learners
    saved.update(pairs(saved), DPO)
    saved.merge_adapter(1)
    saved.save(tmp_path)
    restored.restore(tmp_path)
    for learner in (saved, restored):
        learner.update(pairs(learner), DPO)
    assert saved.fingerprint() == restored.fingerprint() and merged_names(restored.module)
    with pytest.raises(ValueError, match="belongs to another base model"):
        other.restore(tmp_path)


def test_a_weight_of_two_layers_is_refused():
    from peft import LoraConfig, get_peft_model

    module = get_peft_model(tiny(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"lm_head has one weight with another layer \(.*embed_tokens"):
        merge_adapter(module, 0)


def test_an_adapter_alone_is_no_longer_the_policy():
    module = lora()
    merge_adapter(module, 0)
    with pytest.raises(UserError, match="set transport.form and sampler.lora to 'merged'"):
        list(outgoing(module, "adapter"))


def test_rounds(tmp_path):
    """Each begins at the reference, from the first, which takes over the adapter of a supervised stage."""
    path = recipe(tmp_path, given(reference=ROUNDS, steps=5), model=LORA, data=DEMONSTRATIONS)
    whole = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**whole, "stages": [SUPERVISED, *whole["stages"]]}))
    records = [line for line in lines(trained(path)["folder"]) if line["stage"] == "preference"]
    coin = pytest.approx(0.6931472, abs=1e-6)
    assert [line["loss"] == coin for line in records] == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("stop", "sampling"),
    [(2, True), (3, False), (4, False), (5, False)],
    ids=["boundary", "within", "end", "after"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop, sampling):
    """Also where it stops between two rounds, after the last, and in a supervised stage after them."""
    found = {}
    for name in ("whole", "resumed"):
        folder = tmp_path / name
        folder.mkdir()
        stage = {**(SAMPLED if sampling else given()), "reference": ROUNDS, "steps": 4}
        path = sampled(folder, **stage) if sampling else recipe(folder, stage, model=LORA)
        whole = yaml.safe_load(path.read_text())
        whole["model"] |= LORA
        whole["data"] |= DEMONSTRATIONS
        whole["stages"].append(SUPERVISED)
        path.write_text(yaml.safe_dump(whole))
        if name == "resumed":
            assert trained(path, Recorder(stop_after=stop))["status"] == "interrupted"
        result = trained(path)
        found[name] = contents(result["folder"]), lines(result["folder"])
    ours, theirs = found["whole"], found["resumed"]
    assert ours[0].keys() == theirs[0].keys()
    for name, data in ours[0].items():
        assert data == theirs[0][name], name
    assert ours[1] == theirs[1]


FITTED = {"stage": "reward_model", "name": "rm", "steps": 3, "batch_size": 8, "learner": {"name": "torch", "lr": 1e-2}}
CRITIC = {
    "stage": "online",
    "steps": 3,
    "prompts_per_step": 4,
    "group_size": 2,
    "sampling": {"max_tokens": 3},
    "algorithm": {"advantage": "gae"},
    "critic": {"name": "model"},
    "learner": {"name": "torch", "lr": 1e-2},
}


def test_models_whose_body_had_adapters_merged_are_resumed_and_exported_with_it(tmp_path):
    """They begin where the policy is, and only their own adapter is trained."""
    found = {}
    for name, stops in (("whole", ()), ("resumed", (5, 8))):
        folder = tmp_path / name
        folder.mkdir()
        path = recipe(folder, given(reference=ROUNDS, steps=3, learner=SUPERVISED["learner"]), model=LORA, data=TRAIN)
        whole = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**whole, "rewards": FORMAT, "stages": [*whole["stages"], FITTED, CRITIC]}))
        for stop in stops:
            assert trained(path, Recorder(stop_after=stop))["status"] == "interrupted"
        result = trained(path)
        found[name] = contents(result["folder"]), lines(result["folder"])
    ours, theirs = found["whole"], found["resumed"]
    assert ours[0].keys() == theirs[0].keys() and ours[1] == theirs[1]
    for name, data in ours[0].items():
        assert data == theirs[0][name], name
    fitted = [load_file(tmp_path / name / "runs/tiny/reward_models/rm/member_0/model.safetensors") for name in found]
    assert all(torch.equal(fitted[0][name], fitted[1][name]) for name in fitted[0])
    saved = load_file(max(Path(result["folder"]).glob("checkpoints/*/learner/role-critic.safetensors")))
    exported = load_file(export_value_model(result["folder"], tmp_path / "critic") / "model.safetensors")
    layer, parts = "layers.0.self_attn.q_proj", ("base_layer", "lora_A.default", "lora_B.default")
    below, a, b = (saved[f"body.{layer}.{part}.weight"] for part in parts)
    torch.testing.assert_close(exported[f"{layer}.weight"], below + 2 * b @ a)


def test_it_is_exported_whole(tmp_path):
    folders = [tmp_path / "base", tmp_path / "rounds"]
    for folder in folders:
        folder.mkdir()
    base = export(trained(recipe(folders[0], given(steps=1)))["folder"], tmp_path / "model")
    path = recipe(folders[1], given(reference=ROUNDS, steps=3), model=LORA)
    whole = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**whole, "model": {"path": str(base), **LORA}}))
    run = trained(path)["folder"]
    found = load_file(export(run, tmp_path / "found") / "model.safetensors")
    saved = load_file(next(folders[1].rglob("policy.safetensors")))
    layer = "model.layers.0.self_attn.q_proj"
    parts = ("base_layer", "lora_A.default", "lora_B.default")
    below, a, b = (saved[f"base_model.model.{layer}.{part}.weight"] for part in parts)
    torch.testing.assert_close(found[f"{layer}.weight"], below + 2 * b @ a)
    assert not torch.equal(below, load_file(base / "model.safetensors")[f"{layer}.weight"])
    with pytest.raises(UserError, match="earlier adapters were merged into the adapter's base"):
        export(run, tmp_path / "adapter", "adapter")


@pytest.mark.parametrize(
    ("model", "stage", "message"),
    [
        ({}, {}, r"stages.0.reference: merge adds a LoRA adapter to the model: give model.lora"),
        (
            LORA,
            {"sampler": {"name": "vllm", "lora": "adapter"}},
            "stages.0.sampler.lora: 'adapter' leaves the model",
        ),
        (LORA, {"losses": ["bco"]}, "stages.0.reference: 'bco' compares rewards with earlier ones"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, model, stage, message):
    with pytest.raises(UserError, match=message):
        load([recipe(tmp_path, given(reference=ROUNDS, **stage), model=model)])
