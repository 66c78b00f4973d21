"""Models beside the policy: critics of their own, a critic on the policy's hidden states, a prompt value model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignment.algorithms.value_losses import HlGauss, Scalar, TwoHot, ValueObjective
from alignment.algorithms.values import state_mask
from alignment.engines.gradients import accumulate
from alignment.engines.policy_goal import PolicyGoal
from alignment.engines.roles import handles
from alignment.engines.torch_learner import TorchLearner
from alignment.engines.value_model import ValueModel, ValueShape
from alignment.engines.value_roles import HeadRole, HeadRoleSpec, nothing_of, prompt_batch
from alignment.partition import Share
from alignment.types import Batch, Prompt
from tests.engines.helpers import (
    Made,
    Reinforce,
    assert_close,
    critic,
    learner_of,
    make_batch,
    tiny,
    widen,
    with_returns,
)

SHARED = HeadRoleSpec(ValueShape(Scalar()), coefficient=0.5, lr_ratio=2.0)


def with_critic(spec: Any = None, **options: Any) -> TorchLearner:
    return learner_of(tiny(), roles={"critic": critic() if spec is None else spec}, **options)


def module_of(learner: TorchLearner, name: str = "critic") -> nn.Module:
    backend = learner.roles[name].backend
    return backend.head if backend.head is not None else backend.module


def weights_of(learner: TorchLearner, name: str = "critic") -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module_of(learner, name).named_parameters()}


@pytest.mark.parametrize("loss", [Scalar(), Scalar(clip=0.2), HlGauss(bins=8), TwoHot(bins=8)], ids=repr)
def test_a_critic_is_trained_in_its_own_epochs_whatever_the_split(loss: Any) -> None:
    batch = with_returns(make_batch(rows=12))
    spec = critic(loss, options={"lr": 1e-2, "eps": 1e-3})  # or Adam makes much of rounding where gradients are small
    whole, split = with_critic(spec), with_critic(spec, micro_batch_tokens=24)
    start, metrics = weights_of(whole), []
    for _ in range(2):
        values = [learner.annotate(batch, {"values"}).values_BT for learner in (whole, split)]
        torch.testing.assert_close(
            *values, rtol=1e-3, atol=1e-3
        )  # Adam makes much of rounding where gradients are small
        metrics = [learner.update(batch, Reinforce()) for learner in (whole, split)]
    assert metrics[0]["critic/optimizer_steps"] == 4 and metrics[0]["optimizer_steps"] == 1
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)
    assert_close(weights_of(split), weights_of(whole), rtol=1e-4)
    alone = learner_of(tiny())
    for _ in range(2):
        alone.update(batch, Reinforce())
    assert alone.fingerprint() == whole.fingerprint()  # the critic leaves the policy alone
    assert any(not torch.equal(w, start[n]) for n, w in weights_of(whole).items())
    before = weights_of(whole)
    whole.update(batch, Reinforce(), slot="sft")
    assert all(torch.equal(w, before[n]) for n, w in weights_of(whole).items())
    losses = [whole.update(batch, None)["critic/value_loss"] for _ in range(30)]
    assert losses[-1] < losses[0]


def test_without_an_objective_the_policy_rests_and_the_critic_learns_returns() -> None:
    batch, learner = with_returns(make_batch(rows=12)), with_critic()
    before = learner.fingerprint()
    errors = [learner.update(batch, None)["critic/value_loss"] for _ in range(40)]
    assert errors[-1] < 0.3 * errors[0] and learner.fingerprint() == before
    assert "loss" not in learner.update(batch, None) and learner.slots["rl"].counts.updates == 0
    values_BT = learner.annotate(batch, {"values"}).values_BT
    assert values_BT is not None and batch.returns_BT is not None
    assert not values_BT[~state_mask(batch.loss_mask_BT)].any(), "states of no sampled token have no value"


def test_values_are_those_after_each_token_and_padding_changes_nothing() -> None:
    learner, batch = with_critic(), make_batch()
    learner.update(with_returns(batch), None)
    model = learner.roles["critic"].backend.module
    assert isinstance(model, ValueModel)
    values_BT = learner.annotate(batch, {"values"}).values_BT
    assert values_BT is not None
    torch.testing.assert_close(learner.annotate(widen(batch, 3), {"values"}).values_BT[:, :-3], values_BT)  # pyright: ignore[reportOptionalSubscript]
    with torch.no_grad():
        alone = model(batch.ids_BT[:1, :6])[0, 5, 0]  # the state after token 5 knows nothing of what follows
    assert batch.loss_mask_BT[0, 5] or batch.loss_mask_BT[0, 6]
    torch.testing.assert_close(values_BT[0, 5], alone)


def test_streams_have_values_of_their_own() -> None:
    batch = with_returns(make_batch(rows=12), streams=2)
    learner = with_critic(critic(HlGauss(high=2.0, bins=16), streams=2))
    for _ in range(60):
        metrics = learner.update(batch, None)
    values = learner.annotate(replace(batch, values_BT=None), {"values"}).values_BT
    assert values is not None and values.shape == (*batch.ids_BT.shape, 2) and metrics["critic/outside_support"] == 0
    mask_BT = state_mask(batch.loss_mask_BT)
    assert values[mask_BT][:, 1].mean() > 1.5 * values[mask_BT][:, 0].mean()


def test_a_vocabulary_wide_head_has_the_value_of_each_token_before_it_is_taken() -> None:
    batch, learner = with_returns(make_batch(rows=12)), with_critic(critic(kind="vocabulary"))
    assert batch.returns_BT is not None
    batch = replace(batch, returns_BT=torch.where(batch.loss_mask_BT, batch.returns_BT, torch.nan))
    for _ in range(60):
        error = learner.update(batch, None)["critic/value_loss"]
    assert error < 1e-2
    model = learner.roles["critic"].backend.module
    assert isinstance(model, ValueModel)
    with torch.no_grad():
        hidden_BTH = model.body(input_ids=batch.ids_BT).last_hidden_state
        every_BTV = model.head.everything(hidden_BTH)
        taken = model.values(batch.ids_BT)
    torch.testing.assert_close(taken[2, 5], every_BTV[2, 4, batch.ids_BT[2, 5]])


# A critic on the policy's hidden states


def test_a_shared_critic_adds_its_loss_to_the_policys_whatever_the_split() -> None:
    batch = with_returns(make_batch(rows=12))
    whole, split = with_critic(SHARED, max_grad_norm=None), with_critic(SHARED, micro_batch_tokens=24)
    for _ in range(3):
        metrics = [learner.update(batch, Reinforce(minibatches=2)) for learner in (whole, split)]
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)
    assert_close(weights_of(split), weights_of(whole))
    assert metrics[0]["optimizer_steps"] == 2 and metrics[0]["critic/states"] > 0
    alone = learner_of(tiny(), max_grad_norm=None)
    for _ in range(3):
        alone.update(batch, Reinforce(minibatches=2))
    assert alone.fingerprint() != whole.fingerprint(), "its gradient reaches the body"
    annotated = whole.annotate(replace(batch, values_BT=None), {"values", "old_logp"})
    assert annotated.values_BT is not None and annotated.values_BT.any() and annotated.entropy_BT is None
    torch.testing.assert_close(annotated.old_logp_BT, whole.annotate(batch, {"old_logp"}).old_logp_BT)


def test_the_gradient_of_a_shared_critic_is_that_of_both_losses() -> None:
    batch, learner = with_returns(make_batch()), with_critic(SHARED, lr=1e-3, max_grad_norm=None)
    goal, head = Reinforce(), learner.roles["critic"].backend.head
    assert head is not None
    values = ValueObjective(Scalar())
    prepared = values.prepare(batch)
    logp_BT, entropy_BT, output = learner.backend.forward(batch, "value", True)
    loss = goal.loss(logp_BT, entropy_BT, goal.prepare(batch))[0] + 0.5 * values.loss(output, prepared)[0]
    wanted = torch.autograd.grad(loss, list(learner.backend.trained.values()))
    norm = torch.stack([g.square().sum() for g in wanted]).sum().sqrt()
    start = weights_of(learner)["linear.bias"]
    metrics = learner.update(batch, goal)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    moved = (weights_of(learner)["linear.bias"] - start).abs()
    assert float(moved) == pytest.approx(2e-3, rel=1e-3), "the first step of Adam is its rate, here twice the policy's"


def test_a_shared_critic_is_no_part_of_the_policy(tmp_path: Path) -> None:
    learner = with_critic(SHARED)
    learner.update(with_returns(make_batch()), Reinforce())
    sent = {name for bucket in learner.weights(1 << 20) for name in bucket}
    assert sent == {name for name in learner.module.state_dict() if name != "lm_head.weight"} or sent == set(
        learner.module.state_dict()
    )
    learner.save(tmp_path)
    from alignment.tensorfile import read_tensors

    assert not [name for name in read_tensors(tmp_path / "policy.safetensors") if "head" in name and "lm_" not in name]
    assert {"value_head.linear.weight", "value_head.linear.bias"} == set(
        read_tensors(tmp_path / "role-critic.safetensors")
    )


@pytest.mark.parametrize("spec", [critic(HlGauss(bins=8)), SHARED], ids=["model", "head"])
def test_a_critic_goes_on_exactly(tmp_path: Path, spec: Any) -> None:
    batch = with_returns(make_batch())
    learner = with_critic(spec, reference=True, schedule="cosine", warmup_steps=2)
    learner.update(batch, Reinforce())
    learner.save(tmp_path)
    metrics = learner.update(batch, Reinforce())
    again = with_critic(spec, reference=True, schedule="cosine", warmup_steps=2)
    again.restore(tmp_path)
    assert again.update(batch, Reinforce()) == metrics
    after, want = weights_of(again), weights_of(learner)
    assert again.fingerprint() == learner.fingerprint() and all(torch.equal(after[n], want[n]) for n in want)
    annotated = again.annotate(batch, {"reference", "old_logp"})
    assert annotated.ref_logp_BT is not None and not torch.equal(annotated.ref_logp_BT, annotated.old_logp_BT)  # pyright: ignore[reportArgumentType]


def gradients_of(spec: Any, batch: Batch, share: Share) -> dict[str, Tensor]:
    """What one rank's part of a mini-batch adds to the gradients of a critic."""
    learner = with_critic(spec)
    role = learner.roles["critic"]
    role.backend.share = share
    with torch.no_grad():
        for p in module_of(learner).parameters():
            p.add_(0.1)  # a fresh head lets no gradient through to its body
    goal: Any = role
    if isinstance(role, HeadRole):
        goal = PolicyGoal(role.backend, Reinforce(), learner.annotate, learner.slots["rl"].counts, role)
    minibatch = goal.prepare(batch.to(learner.device))
    accumulate(role.backend, goal.loss, minibatch, learner.config.micro_batch_tokens)
    return {n: p.grad.clone() for n, p in role.backend.trained.items() if p.grad is not None}


@pytest.mark.parametrize("spec", [critic(), SHARED], ids=["model", "head"])
def test_a_rank_without_a_row_adds_nothing_to_the_gradients(spec: Any) -> None:
    batch = with_returns(make_batch(rows=1))
    whole = gradients_of(spec, batch, Share())
    parts = [gradients_of(spec, batch, Share(rank, 2)) for rank in range(2)]
    assert all(part.keys() == whole.keys() for part in parts), "all ranks go backward through the same weights"
    assert max(float(g.abs().max()) for g in whole.values()) > 0.1
    assert_close({name: parts[0][name] + parts[1][name] for name in whole}, whole)


def test_nothing_of_an_output_is_0_whatever_it_holds() -> None:
    output = torch.tensor([1.0, torch.inf, torch.nan], requires_grad=True)
    nothing_of(output).backward()
    assert nothing_of(output) == 0 and output.grad is not None and output.grad.tolist() == [0.0, 0.0, 0.0]


def test_dropout_differs_from_update_to_update_while_the_policy_rests(tmp_path: Path) -> None:
    spec = critic(epochs=1, minibatches=1, options={"lr": 1e-30})  # its weights stay: only dropout tells updates apart
    spec = replace(spec, origin=Made(architecture="GPT2"))

    def made() -> TorchLearner:
        learner = with_critic(spec)
        with torch.no_grad():
            for p in module_of(learner).parameters():
                p.add_(0.1)
        for module in module_of(learner).modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        return learner

    learner, batch = made(), with_returns(make_batch())
    first = learner.update(batch, None)["critic/value_loss"]
    learner.save(tmp_path)
    second = learner.update(batch, None)["critic/value_loss"]
    assert first != pytest.approx(second, rel=1e-3)
    again = made()
    again.restore(tmp_path)
    assert again.update(batch, None)["critic/value_loss"] == second
    beside = made()
    assert beside.update(batch, Reinforce())["critic/value_loss"] == first, "whatever the policy does before it"


def test_tokens_of_a_padded_output_are_read_as_the_last_token_that_the_value_model_has() -> None:
    learner = learner_of(tiny(vocab_size=26), roles={"critic": critic(kind="vocabulary"), "other": critic()})
    batch = with_returns(make_batch())  # the value models have 19 rows
    learner.update(batch, Reinforce())
    ids_BT = torch.where(batch.ids_BT == 18, 25, batch.ids_BT)
    assert (ids_BT == 25).any()
    for role in learner.roles.values():
        with torch.no_grad():
            assert torch.equal(role.backend.module(ids_BT), role.backend.module(batch.ids_BT))


# Prompts


def test_a_prompt_value_model_is_fitted_and_asked_by_prompts() -> None:
    spec = critic(of_prompts=True, epochs=1, minibatches=1)
    learner = learner_of(tiny(), roles={"prompt_value": spec, "critic": critic()})
    found = handles(learner, lambda prompt: prompt.row["ids"])
    assert list(found) == ["prompt_value"]
    handle = found["prompt_value"]
    prompts = [Prompt(str(i), {"ids": [3, i, *[5] * i]}) for i in range(1, 5)]
    targets = torch.tensor([1.0, 0.7, 0.4, 0.1])
    assert handle.version == 0 and handle.values(prompts).tolist() == [0.0] * 4
    losses = [handle.fit(prompts, targets)["value_loss"] for _ in range(60)]
    assert losses[-1] < 0.05 * losses[0] and handle.version == 60
    torch.testing.assert_close(handle.values(prompts), targets, atol=0.15, rtol=0)
    alone = torch.cat([handle.values([prompt]) for prompt in prompts])
    torch.testing.assert_close(handle.values(prompts), alone)  # whatever stands beside it
    before = learner.fingerprint()
    metrics = learner.update(with_returns(make_batch()), Reinforce())
    assert not [name for name in metrics if name.startswith("prompt_value")] and learner.fingerprint() != before
    assert handle.version == 60, "batches leave it alone"
    assert not learner.annotate(make_batch(), {"role:prompt_value"}).values_BT


@pytest.mark.parametrize("spec", [critic(), SHARED], ids=["model", "head"])
def test_a_critic_is_read_out_at_the_end_of_a_prompt(spec: Any) -> None:
    learner = learner_of(tiny(), roles={"critic": spec, "prompt_value": "critic"})
    handle = handles(learner, lambda prompt: prompt.row["ids"])["prompt_value"]
    batch = with_returns(make_batch())
    for _ in range(3):
        learner.update(batch, Reinforce())
    assert handle.fit([Prompt("a", {"ids": [1]})], torch.ones(1)) == {} and handle.version == 3
    start = int(batch.loss_mask_BT[0].nonzero()[0])
    ids = batch.ids_BT[0, :start].tolist()
    values_BT = learner.annotate(replace(batch, values_BT=None), {"values"}).values_BT
    assert values_BT is not None
    torch.testing.assert_close(handle.values([Prompt("a", {"ids": ids})])[0], values_BT[0, start - 1])


def test_prompts_become_rows_whose_last_state_has_the_target() -> None:
    batch: Batch = prompt_batch([[4, 5, 6], [7]], torch.tensor([0.5, 1.0]))
    assert batch.ids_BT.tolist() == [[4, 5, 6], [7, 0, 0]] and batch.length_B.tolist() == [3, 1]
    assert batch.returns_BT is not None
    assert batch.returns_BT.nan_to_num(-1).tolist() == [[-1, -1, 0.5], [1.0, -1, -1]]


def test_a_role_has_a_name_of_its_own() -> None:
    learner = with_critic()
    with pytest.raises(ValueError, match="a role 'critic' already"):
        learner.roles.add("critic", learner.roles["critic"])
    with pytest.raises(ValueError, match=r"nothing provides \['role:mask'\]"):
        learner.annotate(make_batch(), {"role:mask"})
