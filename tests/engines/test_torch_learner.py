"""The embedded learner: what it computes, what leaves it unchanged, and that it continues exactly."""

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.objective import Objective
from alignment.algorithms.policy_losses import Clip
from alignment.engines.learner_config import TorchLearnerConfig, learners
from alignment.engines.optimizer import Slot, lr_at
from alignment.engines.roles import handles as handles_of
from alignment.engines.torch_learner import TorchLearner
from alignment.types import Batch, Prompt
from tests.engines.helpers import Reinforce, learner_of, make_batch, tiny, widen


def lora(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    module = tiny(seed=seed)
    torch.manual_seed(seed + 1)
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(module, config)  # pyright: ignore[reportArgumentType]


def weights(learner: TorchLearner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.module.named_parameters()}


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], rtol: float = 1e-5) -> None:
    """Relative to the largest number of each tensor."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=rtol * max(1e-2, float(b[name].abs().max())))


def gradients(learner: TorchLearner, batch: Batch, objective: Any) -> tuple[float, dict[str, Tensor]]:
    """What the learner accumulates before the optimizer uses it."""
    seen: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        seen.update({n: p.grad.clone() for n, p in learner.trained.items() if p.grad is not None})

    handle = learner.slot("rl").adamw.register_step_pre_hook(keep)
    loss = learner.update(batch, objective)["loss"]
    handle.remove()
    return loss, seen


# Invariance


def grpo(**options: Any) -> Objective:
    return Objective.of(Algorithm(**options), {})


def annotated(batch: Batch) -> Batch:
    """With old log-probabilities that differ from the policy's, so that ratios and corrections matter."""
    old_logp_BT = learner_of(tiny()).annotate(batch, {"old_logp"}).old_logp_BT
    assert old_logp_BT is not None
    noise_BT = 0.3 * torch.randn(old_logp_BT.shape, generator=torch.Generator().manual_seed(0))
    return replace(batch, old_logp_BT=old_logp_BT + noise_BT)


OBJECTIVES = {"reinforce": Reinforce(), "entropy bonus": Reinforce(entropy_bonus=0.1), "grpo": grpo()}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_split_padding_and_order_of_rows_change_nothing(objective: Any) -> None:
    batch = annotated(make_batch(rows=12))
    variants = [
        (batch, {"micro_batch_tokens": 11}),
        (batch, {"micro_batch_tokens": 40, "logits_chunk_tokens": 2}),
        (widen_annotated(batch), {}),
        (batch.rows(torch.randperm(12, generator=torch.Generator().manual_seed(1))), {"micro_batch_tokens": 30}),
        (batch, {"gradient_checkpointing": True}),
    ]
    plain: dict[str, Any] = {"micro_batch_tokens": 10_000, "logits_chunk_tokens": 10_000}
    loss, gradient = gradients(learner_of(tiny(), **plain), batch, objective)
    reference = learner_of(tiny(), **plain)
    want = [reference.update(batch, objective) for _ in range(3)]
    assert loss == want[0]["loss"]
    for changed, options in variants:
        learner = learner_of(tiny(), **(plain | options))
        other_loss, other_gradient = gradients(learner, changed, objective)
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert_close(other_gradient, gradient)
        for metrics in want[1:]:
            got = learner.update(changed, objective)
            assert got == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        assert_close(weights(learner), weights(reference), rtol=1e-4)


def widen_annotated(batch: Batch) -> Batch:
    assert batch.old_logp_BT is not None
    junk = torch.full((len(batch), 5), float("nan"))
    return replace(widen(batch, 5), old_logp_BT=torch.cat([batch.old_logp_BT, junk], 1))


def test_the_gradient_is_that_of_the_models_own_logits() -> None:
    batch, module = make_batch(), tiny()
    _, gradient = gradients(learner_of(tiny(), micro_batch_tokens=22, logits_chunk_tokens=3), batch, Reinforce())
    logits = module(input_ids=batch.ids_BT, attention_mask=(batch.ids_BT > 0).long()).logits
    logp = (logits / batch.temperature_B[:, None, None]).log_softmax(-1)[:, :-1]
    logp_BT = logp.gather(-1, batch.ids_BT[:, 1:, None])[..., 0]
    mask_BT = batch.loss_mask_BT[:, 1:]
    assert batch.adv_BT is not None
    (-(batch.adv_BT[:, 1:] * logp_BT * mask_BT).sum() / mask_BT.sum()).backward()
    assert_close(gradient, {n: p.grad for n, p in module.named_parameters() if p.grad is not None})


def test_bfloat16_autocast_is_close() -> None:
    batch = make_batch()
    loss, exact = gradients(learner_of(tiny()), batch, Reinforce())
    rough_loss, rough = gradients(learner_of(tiny(), autocast="bfloat16"), batch, Reinforce())
    assert 0 < abs(rough_loss - loss) < 0.02
    assert_close(rough, exact, rtol=0.1)
    assert all(g.dtype == torch.float32 for g in rough.values())


# Annotation


def test_annotation_without_gradients_in_any_split() -> None:
    batch = make_batch()
    whole = learner_of(tiny(), reference=True).annotate(batch, {"old_logp", "entropy", "reference"})
    split = learner_of(tiny(), reference=True, micro_batch_tokens=11).annotate(
        widen(batch, 3), {"old_logp", "entropy", "reference"}
    )
    for name in ("old_logp_BT", "entropy_BT", "ref_logp_BT"):
        one, other = getattr(whole, name), getattr(split, name)
        assert one.any() and not one.requires_grad and not one[~batch.loss_mask_BT].any()
        torch.testing.assert_close(other[:, :11], one, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.old_logp_BT, whole.ref_logp_BT)  # pyright: ignore[reportArgumentType]
    only = learner_of(tiny()).annotate(batch, {"entropy"})
    assert only.old_logp_BT is None and only.entropy_BT is not None


def test_dropout_is_off_in_annotation_and_on_in_updates() -> None:
    batch = make_batch()
    learner = learner_of(tiny("GPT2", resid_pdrop=0.5))
    first, second = (learner.annotate(batch, {"old_logp"}).old_logp_BT for _ in range(2))
    assert first is not None and second is not None and torch.equal(first, second)
    same = learner_of(tiny("GPT2", resid_pdrop=0.5)), learner_of(tiny("GPT2", resid_pdrop=0.5), seed=1)
    losses = [x.update(batch, Reinforce())["loss"] for x in (learner, *same)]
    assert losses[0] == losses[1] != losses[2]
    assert not learner.module.training


def test_a_need_that_nobody_provides_is_named() -> None:
    with pytest.raises(ValueError, match=r"nothing provides \['values'\]; .* \['entropy', 'old_logp', 'reference'\]"):
        learner_of(tiny()).annotate(make_batch(), {"values", "old_logp"})


def test_a_batch_with_nothing_to_train_on_is_annotated_with_zeros() -> None:
    batch = make_batch()
    batch = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    got = learner_of(tiny()).annotate(batch, {"old_logp"}).old_logp_BT
    assert got is not None and got.shape == batch.ids_BT.shape and not got.any()


# Reference


def test_the_reference_stays_where_it_was_until_it_is_refreshed() -> None:
    batch, learner = make_batch(), learner_of(tiny(), reference=True)
    start = learner.annotate(batch, {"reference"}).ref_logp_BT
    learner.update(batch, Reinforce())
    now = learner.annotate(batch, {"reference", "old_logp"})
    assert start is not None and now.ref_logp_BT is not None and now.old_logp_BT is not None
    assert torch.equal(start, now.ref_logp_BT)
    assert (now.old_logp_BT - start).abs().max() > 1e-3
    learner.refresh_reference("copy")
    refreshed = learner.annotate(batch, {"reference"}).ref_logp_BT
    assert refreshed is not None and torch.equal(refreshed, now.old_logp_BT)
    with pytest.raises(ValueError, match="by 'copy', not by 'average'"):
        learner.refresh_reference("average")


def test_a_reference_is_not_made_up_after_training() -> None:
    batch, learner = make_batch(), learner_of(tiny())
    learner.update(batch, Reinforce())
    with pytest.raises(ValueError, match="no reference was kept"):
        learner.annotate(batch, {"reference"})


def test_under_lora_the_reference_is_the_base_and_only_the_adapter_moves() -> None:
    batch, learner = make_batch(), learner_of(lora(), reference=True)
    base = learner_of(tiny()).annotate(batch, {"old_logp"}).old_logp_BT
    before = weights(learner)
    assert learner.reference is None
    for _ in range(2):
        learner.update(batch, Reinforce())
        got = learner.annotate(batch, {"reference", "old_logp"})
        assert got.ref_logp_BT is not None and base is not None and torch.equal(got.ref_logp_BT, base)
        assert got.old_logp_BT is not None and (got.old_logp_BT - base).abs().max() > 1e-2
    moved = {n for n, w in weights(learner).items() if not torch.equal(w, before[n])}
    assert moved == {n for n in before if "lora_" in n}


# Steps


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.6 + 0.4 * math.cos(math.pi / 4), 0.6, 0.6 - 0.4 * math.cos(math.pi / 4), 0.2]),
    ],
)
def test_learning_rates(schedule: Any, want: list[float]) -> None:
    config = TorchLearnerConfig(lr=1.0, schedule=schedule, warmup_steps=2, min_lr_ratio=0.2)
    assert [lr_at(step, config, 6) for step in range(7)] == pytest.approx(want)
    assert lr_at(100, config, 6) == pytest.approx(want[-1])


def test_the_steps_are_adamws_with_clipping_and_decay_on_matrices_only() -> None:
    batch, module = make_batch(), tiny()
    learner = learner_of(tiny(), total=4, schedule="linear", max_grad_norm=0.5, betas=(0.8, 0.9), eps=1e-4)
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    others = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-4)
    twin = learner_of(module)
    for step in range(3):
        metrics = learner.update(batch, Reinforce())
        minibatch = Reinforce().prepare(batch)
        loss = Reinforce().loss(*twin.logprobs(minibatch, "value"), minibatch)[0]
        adamw.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), 0.5))
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * (1 - step / 4)
        adamw.step()
        assert norm > 0.5
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics["lr"] == pytest.approx(1e-2 * (1 - step / 4))
        assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
        assert metrics["tokens"] == float(batch.loss_mask_BT.sum())
    assert_close(weights(learner), dict(module.named_parameters()), rtol=1e-4)


def test_a_step_per_mini_batch_and_epoch_over_whole_groups() -> None:
    batch = make_batch(rows=12, group_size=3)
    learner = learner_of(tiny(), max_grad_norm=None)
    groups: list[set[int]] = []

    @dataclass(frozen=True)
    class Watching(Reinforce):
        def prepare(self, minibatch: Batch) -> Batch:
            groups.append(set(minibatch.group_B.tolist()))
            return super().prepare(minibatch)

    metrics = learner.update(batch, Watching(epochs=3, minibatches=2))
    counts = learner.slots["rl"].counts
    assert metrics["optimizer_steps"] == counts.steps == 6 and counts.updates == 1
    assert [len(g) for g in groups] == [2] * 6
    assert all(groups[i] | groups[i + 1] == {0, 1, 2, 3} for i in (0, 2, 4))
    assert len({frozenset(g) for g in groups}) > 2  # epochs differ
    assert metrics["tokens"] == 3 * float(batch.loss_mask_BT.sum())


def test_a_mini_batch_with_nothing_to_train_on_takes_no_step() -> None:
    batch = make_batch(rows=4)
    masked = replace(batch, loss_mask_BT=batch.loss_mask_BT & (batch.group_B == 0)[:, None])
    learner = learner_of(tiny())
    metrics = learner.update(masked, Reinforce(minibatches=2))
    assert (metrics["optimizer_steps"], metrics["empty_minibatches"]) == (1, 1)
    assert all(math.isfinite(value) for value in metrics.values())
    before = weights(learner)
    nothing = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    for objective in (Reinforce(), grpo()):
        metrics = learner.update(nothing, objective)
        assert (metrics["optimizer_steps"], metrics["empty_minibatches"], metrics["tokens"]) == (0, 1, 0)
    assert all(torch.equal(w, before[n]) for n, w in weights(learner).items())
    assert learner.slots["rl"].counts.steps == 1


def test_a_step_without_finite_numbers_is_skipped_and_holds_the_schedule() -> None:
    batch, learner = make_batch(), learner_of(tiny(), total=10, schedule="linear")
    assert batch.adv_BT is not None
    broken = replace(batch, adv_BT=batch.adv_BT * float("inf"))
    learner.update(batch, Reinforce())
    before, fingerprint = weights(learner), learner.fingerprint()
    for _ in range(2):
        metrics = learner.update(broken, Reinforce())
        assert (metrics["skipped_steps"], metrics["optimizer_steps"], metrics["lr"]) == (1, 0, pytest.approx(9e-3))
        assert all(torch.equal(w, before[n]) for n, w in weights(learner).items())
    assert learner.fingerprint() == fingerprint
    good, twin = learner.update(batch, Reinforce()), learner_of(tiny(), total=10, schedule="linear")
    twin.update(batch, Reinforce())
    assert good == pytest.approx(twin.update(batch, Reinforce()))
    assert learner.fingerprint() == twin.fingerprint()  # nothing was left in the accumulators


def test_too_many_skipped_steps_in_a_row_name_what_was_not_finite() -> None:
    batch, learner = make_batch(), learner_of(tiny(), max_skipped_steps=2)
    assert batch.adv_BT is not None
    broken = replace(batch, adv_BT=batch.adv_BT * float("nan"))
    for sample in (broken, batch, broken):
        learner.update(sample, Reinforce())
    with pytest.raises(FloatingPointError, match=r"2 optimizer steps in a row .* loss is nan.*gradient of model\."):
        learner.update(broken, Reinforce())


def test_slots_keep_their_own_moments_and_schedule() -> None:
    batch, learner = make_batch(), learner_of(tiny())
    learner.update(batch, Reinforce())
    moments = {
        n: {k: v.clone() for k, v in learner.slots["rl"].adamw.state[p].items()} for n, p in learner.trained.items()
    }
    before = weights(learner)
    learner.update(make_batch(seed=4), Reinforce(), slot="sft")
    assert any(not torch.equal(w, before[n]) for n, w in weights(learner).items())
    for name, p in learner.trained.items():
        for key, value in learner.slots["rl"].adamw.state[p].items():
            assert torch.equal(value, moments[name][key])
    assert {n: s.counts.steps for n, s in learner.slots.items()} == {"rl": 1, "sft": 1}
    step = learner.slots["sft"].adamw.state[next(iter(learner.trained.values()))]["step"]
    assert float(step) == 1


def test_nothing_to_train_is_an_error() -> None:
    module = tiny()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        learner_of(module)


# Roles


class TinyCritic(nn.Module):
    """A value per token from the token itself and its place."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.out = nn.Embedding(19, 8), nn.Linear(8, 1)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.out(torch.tanh(self.token(ids_BT).cumsum(1)))[..., 0]


class CriticRole:
    """Regression of values on returns, in its own epochs and mini-batches."""

    provides = ("values",)

    def __init__(self, epochs: int = 2, minibatches: int = 2) -> None:
        torch.manual_seed(5)
        self.module: nn.Module = TinyCritic()
        self.slot: Slot | None = Slot(dict(self.module.named_parameters()), TorchLearnerConfig(lr=1e-2), 50)
        self.epochs, self.minibatches = epochs, minibatches

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        return {"values_BT": self.module(micro.ids_BT) * micro.loss_mask_BT}

    def prepare(self, minibatch: Batch) -> Batch:
        mask = minibatch.loss_mask_BT.float()
        return replace(minibatch, scale_BT=mask / mask.sum())

    def loss(self, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert micro.returns_BT is not None and micro.scale_BT is not None
        error_BT = torch.where(micro.loss_mask_BT, self.module(micro.ids_BT) - micro.returns_BT, 0) ** 2
        sums = {"tokens": micro.loss_mask_BT.sum(), "squared_error": error_BT.detach().sum()}
        return (micro.scale_BT * error_BT).sum(), sums

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"squared_error": float(sums["squared_error"] / sums["tokens"])}


def with_critic(**options: Any) -> TorchLearner:
    learner = learner_of(tiny(), **options)
    learner.add_role("critic", CriticRole())
    return learner


def with_returns(batch: Batch) -> Batch:
    return replace(batch, returns_BT=batch.ids_BT.float() / 19)


def critic_weights(learner: TorchLearner) -> dict[str, Tensor]:
    return dict(learner.roles["critic"].module.state_dict())


def test_a_critic_is_trained_in_its_own_epochs_whatever_the_split() -> None:
    batch = with_returns(make_batch(rows=12))
    whole, split = with_critic(), with_critic(micro_batch_tokens=24)
    start = {n: w.clone() for n, w in critic_weights(whole).items()}
    for _ in range(2):
        values = [learner.annotate(batch, {"values"}).values_BT for learner in (whole, split)]
        torch.testing.assert_close(*values)
        metrics = [learner.update(batch, Reinforce()) for learner in (whole, split)]
    assert metrics[0]["critic/optimizer_steps"] == 4 and metrics[0]["optimizer_steps"] == 1
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)
    assert_close(critic_weights(split), critic_weights(whole))
    alone = learner_of(tiny())
    for _ in range(2):
        alone.update(batch, Reinforce())
    assert alone.fingerprint() == whole.fingerprint()  # the critic leaves the policy alone
    assert all(not torch.equal(w, start[n]) for n, w in critic_weights(whole).items())
    before = {n: w.clone() for n, w in critic_weights(whole).items()}
    whole.update(batch, Reinforce(), slot="sft")
    assert all(torch.equal(w, before[n]) for n, w in critic_weights(whole).items())
    errors = [whole.update(batch, Reinforce())["critic/squared_error"] for _ in range(20)]
    assert errors[-1] < 0.5 * errors[0]


class PromptValue:
    """A value per prompt, fitted by whoever named it in ``needs``."""

    provides = ()

    def __init__(self) -> None:
        torch.manual_seed(6)
        self.module: nn.Module = nn.Linear(2, 1)
        self.slot: Slot | None = Slot(dict(self.module.named_parameters()), TorchLearnerConfig(lr=0.1), 50)

    @property
    def version(self) -> int:
        assert self.slot is not None
        return self.slot.counts.updates

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        return {}

    def values(self, prompts: Any) -> Tensor:
        with torch.no_grad():
            return self._predict(prompts)

    def fit(self, prompts: Any, targets: Tensor) -> Mapping[str, float]:
        assert self.slot is not None
        self.slot.begin()
        loss = ((self._predict(prompts) - targets) ** 2).mean()
        loss.backward()
        return {"loss": self.slot.step(loss)[0]}

    def _predict(self, prompts: Any) -> Tensor:
        return self.module(torch.tensor([[1.0, float(p.row["difficulty"])] for p in prompts]))[:, 0]


def test_a_role_may_be_fitted_by_a_component_through_its_handle() -> None:
    learner = with_critic()
    learner.add_role("difficulty", PromptValue())
    handles = handles_of(learner.roles)
    assert list(handles) == ["difficulty"]
    learner.annotate(make_batch(), {"role:difficulty"})
    prompts = [Prompt(str(i), {"difficulty": i / 4}) for i in range(4)]
    targets = torch.tensor([1.0, 0.7, 0.4, 0.1])
    losses = [handles["difficulty"].fit(prompts, targets)["loss"] for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]
    assert handles["difficulty"].version == 40
    metrics = learner.update(with_returns(make_batch()), Reinforce())
    assert not [name for name in metrics if name.startswith("difficulty")]
    with pytest.raises(ValueError, match="a role 'difficulty' already"):
        learner.add_role("difficulty", PromptValue())


# Save and restore


def build(kind: str) -> TorchLearner:
    options: dict[str, Any] = {"total": 6, "schedule": "cosine", "warmup_steps": 2}
    if kind == "lora":
        return learner_of(lora(dropout=0.3), **options)
    learner = learner_of(tiny("GPT2", resid_pdrop=0.3), reference=True, **options)
    learner.add_role("critic", CriticRole())
    learner.add_role("difficulty", PromptValue())
    return learner


def advance(learner: TorchLearner, step: int) -> dict[str, float]:
    batch = with_returns(replace(make_batch(seed=step), step=step))
    batch = learner.annotate(batch, {"old_logp", "reference"})
    metrics = learner.update(batch, grpo(epochs=2, minibatches=2, policy_loss=Clip()))
    for handle in handles_of(learner.roles).values():
        handle.fit([Prompt("a", {"difficulty": step})], torch.tensor([1.0]))
    return metrics | learner.update(batch, Objective.supervised(), slot="sft")


def digests(learner: TorchLearner, folder: Path) -> dict[str, bytes]:
    learner.save(folder)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


CONTINUE = """
import sys
from pathlib import Path
import torch
from tests.engines.test_torch_learner import advance, build
torch.set_num_threads(int(sys.argv[2]))
for kind in ("full", "lora"):
    folder = Path(sys.argv[1], kind)
    learner = build(kind)
    learner.restore(folder / "saved")
    for step in (1, 2):
        advance(learner, step)
    learner.save(folder / "got")
"""


def test_three_steps_equal_one_and_two_in_a_new_process_bit_for_bit(tmp_path: Path) -> None:
    saved, want = dict[str, dict[str, bytes]](), dict[str, dict[str, bytes]]()
    for kind in ("full", "lora"):
        learner = build(kind)
        advance(learner, 0)
        saved[kind] = digests(learner, tmp_path / kind / "saved")
        advance(learner, 1)
        assert all(math.isfinite(value) for value in advance(learner, 2).values())
        want[kind] = digests(learner, tmp_path / kind / "want")
        assert want[kind]["policy.safetensors"] != saved[kind]["policy.safetensors"]
    arguments = [sys.executable, "-c", CONTINUE, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(arguments, check=True, cwd=Path(__file__).parents[2])
    for kind in want:
        got = {file.name: file.read_bytes() for file in (tmp_path / kind / "got").iterdir()}
        assert got.keys() == want[kind].keys()
        assert [name for name in got if got[name] != want[kind][name]] == []
        assert {Path(name).suffix for name in got} == {".json", ".safetensors"}
    full, lora_files = want["full"], want["lora"]
    assert {"reference.safetensors", "role-critic.safetensors", "role-difficulty-slot.safetensors"} < set(full)
    assert full["reference.safetensors"] == saved["full"]["reference.safetensors"]
    assert "reference.safetensors" not in lora_files
    assert len(lora_files["policy.safetensors"]) < len(full["policy.safetensors"])


def test_restoring_something_else_says_what_differs(tmp_path: Path) -> None:
    learner = learner_of(tiny())
    learner.update(make_batch(), Reinforce())
    learner.save(tmp_path)
    with pytest.raises(ValueError, match=r"policy\.safetensors does not fit: .*weight is float32 \[24, 16\] there"):
        learner_of(tiny(intermediate_size=32)).restore(tmp_path)
    with pytest.raises(ValueError, match=r"k_norm\.weight is not part of this model"):
        learner_of(tiny("Llama")).restore(tmp_path)
    with pytest.raises(ValueError, match=r"has roles \[\] and this learner \['critic'\]"):
        with_critic().restore(tmp_path)
    adapted = learner_of(lora())
    adapted.save(tmp_path / "lora")
    with pytest.raises(ValueError, match="another base model"):
        learner_of(lora(seed=1)).restore(tmp_path / "lora")


def test_restoring_goes_into_the_module_that_a_sampler_shares(tmp_path: Path) -> None:
    learner = learner_of(tiny())
    learner.save(tmp_path)
    want, shared = learner.fingerprint(), learner.module.get_output_embeddings().weight  # pyright: ignore[reportCallIssue]
    learner.update(make_batch(), Reinforce(), slot="sft")
    assert learner.fingerprint() != want
    learner.restore(tmp_path)
    assert learner.fingerprint() == want
    assert learner.module.get_output_embeddings().weight is shared  # pyright: ignore[reportCallIssue]
    assert list(learner.slots) == ["rl"]


def test_the_fingerprint_sees_one_bit() -> None:
    learner = learner_of(tiny())
    before = learner.fingerprint()
    with torch.no_grad():
        weight = learner.trained["model.norm.weight"]
        weight.view(torch.int32)[3] ^= 1
    assert learner.fingerprint() != before


def test_the_recipe_names_it() -> None:
    config = learners.build({"name": "torch", "lr": 0.1, "betas": [0.5, 0.9]})
    assert isinstance(config, TorchLearnerConfig) and config.betas == (0.5, 0.9)
    assert isinstance(config.build(type("M", (), {"module": tiny()}), total_updates=3, seed=0), TorchLearner)
