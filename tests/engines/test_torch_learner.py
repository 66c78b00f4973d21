"""What the learner computes, and what leaves it unchanged: split, padding, order, dropout."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.algorithms.covariance import ClipCov, KlCov
from alignment.algorithms.steer import Steer
from alignment.batching import split_minibatches
from alignment.engines.learner_config import TorchLearnerConfig, learners
from alignment.engines.torch_learner import TorchLearner
from alignment.types import Batch, keyed_seed
from tests.engines.helpers import (
    Reinforce,
    assert_close,
    chunk_mb,
    grpo,
    learner_of,
    lora,
    make_batch,
    tiny,
    weights,
    widen,
)


def gradients(learner: TorchLearner, batch: Batch, objective: Any) -> tuple[float, dict[str, Tensor]]:
    """What the learner accumulates before the optimizer uses it."""
    seen: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        seen.update({n: p.grad.clone() for n, p in learner.trained.items() if p.grad is not None})

    handle = learner.slot("rl").adamw.register_step_pre_hook(keep)
    loss = learner.update(batch, objective)["loss"]
    handle.remove()
    return loss, seen


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
        (batch, {"micro_batch_tokens": 40, "logits_chunk_mb": chunk_mb(2)}),
        (widen_annotated(batch), {}),
        (batch.rows(torch.randperm(12, generator=torch.Generator().manual_seed(1))), {"micro_batch_tokens": 30}),
        (batch, {"gradient_checkpointing": True}),
    ]
    # eps: AdamW divides each gradient by its own size, and so turns the rounding of those near 0 into whole steps.
    plain: dict[str, Any] = {"micro_batch_tokens": 10_000, "logits_chunk_mb": 100, "eps": 1e-5}
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


@pytest.mark.parametrize("tokens", [11, 10_000])
@pytest.mark.parametrize("reads", [Steer(), ClipCov(), KlCov()])
def test_mini_batches_that_are_read_again_are_counted_once_however_they_are_split(reads: Any, tokens: int) -> None:
    batch = learner_of(tiny()).annotate(make_batch(rows=16), {"old_logp", "entropy", "entropy_drift"})
    key = keyed_seed("minibatches", batch.seed, batch.step, 0)
    later = [int(batch.length_B[rows].sum()) for rows in split_minibatches(batch, 4, key)[1:]]
    learner = learner_of(tiny(), micro_batch_tokens=tokens)
    assert learner.update(batch, grpo(minibatches=4, entropy_controls=(reads,)))["read_tokens"] == sum(later)
    assert "read_tokens" not in learner.update(batch, grpo(minibatches=1, entropy_controls=(reads,)))
    assert "read_tokens" not in learner.update(batch, grpo(minibatches=4))


def widen_annotated(batch: Batch) -> Batch:
    assert batch.old_logp_BT is not None
    junk = torch.full((len(batch), 5), float("nan"))
    return replace(widen(batch, 5), old_logp_BT=torch.cat([batch.old_logp_BT, junk], 1))


def test_the_gradient_is_that_of_the_models_own_logits() -> None:
    batch, module = make_batch(), tiny()
    _, gradient = gradients(learner_of(tiny(), micro_batch_tokens=22, logits_chunk_mb=chunk_mb(3)), batch, Reinforce())
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


@dataclass(frozen=True)
class Current(Reinforce):
    """Remembers what every mini-batch says of the policy before its step."""

    wants: bool = True
    seen: list[Batch] = field(default_factory=list)

    @property
    def wants_logp(self) -> bool:
        return self.wants

    def prepare(self, minibatch: Batch) -> Batch:
        self.seen.append(minibatch)
        return super().prepare(minibatch)


@pytest.mark.parametrize("architecture", ["Qwen3", "GPT2"])
def test_a_mini_batch_knows_the_policy_before_its_step_if_the_objective_asks(architecture: str) -> None:
    """From the second step on; before the first it is old_logp, and there is no pass. Without dropout, whose numbers
    stay as they are."""
    options = {"resid_pdrop": 0.3} if architecture == "GPT2" else {}
    learner, other = (learner_of(tiny(architecture, **options)) for _ in range(2))
    batch = learner.annotate(make_batch(), {"old_logp"})
    passes: list[int] = []
    annotate = learner.annotate
    learner.annotate = lambda *args: (passes.append(1), annotate(*args))[1]  # pyright: ignore[reportAttributeAccessIssue]
    asked, silent = Current(epochs=2), Current(epochs=2, wants=False)
    found, plain = learner.update(batch, asked), other.update(batch, silent)
    assert found.pop("read_tokens") == batch.length_B.sum() and found == plain and len(passes) == 1
    assert [m.logp_BT is None for m in (*asked.seen, *silent.seen)] == [True, False, True, True]
    reference = learner_of(tiny(architecture, **options))
    reference.update(batch, Current(wants=False))
    now = reference.annotate(batch, {"old_logp"}).old_logp_BT
    second = asked.seen[1].logp_BT
    assert second is not None and now is not None and batch.old_logp_BT is not None
    torch.testing.assert_close(second, now, rtol=0, atol=1e-6)
    assert (second - batch.old_logp_BT).abs().max() > 1e-2


def test_a_need_that_nobody_provides_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"nothing provides \['values'\]; .* \['entropy', 'entropy_drift', 'logp', 'old_logp'"
    ):
        learner_of(tiny()).annotate(make_batch(), {"values", "old_logp"})


def test_a_batch_with_nothing_to_train_on_is_annotated_with_zeros() -> None:
    batch = make_batch()
    batch = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    got = learner_of(tiny()).annotate(batch, {"old_logp"}).old_logp_BT
    assert got is not None and got.shape == batch.ids_BT.shape and not got.any()


def test_the_reference_stays_where_it_was_until_it_is_refreshed() -> None:
    batch, learner = make_batch(), learner_of(tiny(), reference=True)
    start = learner.annotate(batch, {"reference"}).ref_logp_BT
    learner.update(batch, Reinforce())
    now = learner.annotate(batch, {"reference", "old_logp"})
    assert start is not None and now.ref_logp_BT is not None and now.old_logp_BT is not None
    assert torch.equal(start, now.ref_logp_BT)
    assert (now.old_logp_BT - start).abs().max() > 1e-3
    learner.refresh_reference()
    refreshed = learner.annotate(batch, {"reference"}).ref_logp_BT
    assert refreshed is not None and torch.equal(refreshed, now.old_logp_BT)
    with pytest.raises(ValueError, match="above 0 and at most 1, not 1.5"):
        learner.refresh_reference(1.5)


def test_a_reference_is_not_made_up_after_training() -> None:
    batch, learner = make_batch(), learner_of(tiny())
    learner.update(batch, Reinforce())
    with pytest.raises(ValueError, match="no reference was kept"):
        learner.annotate(batch, {"reference"})


def test_under_lora_the_reference_is_the_base_and_only_the_adapter_moves() -> None:
    fresh = lora()
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            if "lora_B" in name:
                p.zero_()
    batch, learner = make_batch(), learner_of(fresh, reference=True)
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


def test_an_adapter_that_was_trained_before_is_part_of_the_reference() -> None:
    batch, learner = make_batch(), learner_of(lora(), reference=True)
    start = learner.annotate(batch, {"old_logp"}).old_logp_BT
    learner.update(batch, Reinforce())
    got = learner.annotate(batch, {"reference", "old_logp"})
    assert start is not None and got.ref_logp_BT is not None and torch.equal(got.ref_logp_BT, start)
    assert not torch.equal(got.ref_logp_BT, got.old_logp_BT)  # pyright: ignore[reportArgumentType]


def test_dropout_asks_for_the_policys_own_log_probabilities() -> None:
    module = tiny()
    assert learner_of(module).needs == frozenset()
    module.config.attention_dropout = 0.1
    assert learner_of(module).needs == {"old_logp"}


def test_the_recipe_names_it() -> None:
    config = learners.build({"name": "torch", "lr": 0.1, "betas": [0.5, 0.9]})
    assert isinstance(config, TorchLearnerConfig) and config.betas == (0.5, 0.9)
    site: Any = SimpleNamespace(model=SimpleNamespace(module=tiny()))
    assert isinstance(config.build(site, total_updates=3, seed=0), TorchLearner)
