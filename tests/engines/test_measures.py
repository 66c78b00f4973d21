"""What learners measure beside training: how far an update moves the weights, and inner products of gradients."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignment.algorithms.kl_penalties import K2
from alignment.algorithms.value_losses import Scalar
from alignment.engines.policy_learner import PolicyLearner
from alignment.engines.torch_learner import TorchLearner
from alignment.engines.value_model import ValueShape
from alignment.engines.value_roles import HeadRoleSpec
from alignment.types import Batch
from tests.engines.helpers import Reinforce, grpo, learner_of, make_batch, tiny, weights
from tests.engines.rank_checks import numbers


def streams(batch: Batch, count: int = 3) -> Tensor:
    """Advantages of as many components, as different as can be."""
    assert batch.adv_BT is not None
    return torch.stack([batch.adv_BT, batch.adv_BT.cos(), -0.5 * batch.adv_BT])[:count]


def moved(learner: TorchLearner, before: dict[str, Tensor]) -> float:
    squares = [(p - before[name]).double().square().sum() for name, p in weights(learner).items()]
    return float(torch.stack(squares).sum().sqrt())


def test_the_update_norm_is_how_far_the_weights_moved_and_is_measured_on_demand():
    learner, batch = learner_of(tiny()), make_batch()
    before = weights(learner)
    metrics = learner.update(batch, Reinforce(epochs=2, minibatches=2, update_norm=True))
    assert metrics["update_norm"] == pytest.approx(moved(learner, before), rel=1e-6) and metrics["update_norm"] > 0.01
    assert "update_norm" not in learner.update(batch, Reinforce())


def test_a_factor_on_the_learning_rate_makes_the_step_larger_and_leaves_the_schedule_alone():
    found = []
    for factors in ((1.0, 1.0, 1.0), (2.0, 0.5, 1.0)):
        learner = learner_of(tiny(), total=4, weight_decay=0.0, schedule="linear")
        found.append([learner.update(make_batch(), Reinforce(lr_factor=f, update_norm=True)) for f in factors])
    plain, steered = found
    assert [m["lr"] for m in plain] == pytest.approx([1e-2, 7.5e-3, 5e-3])
    assert [m["lr"] for m in steered] == pytest.approx([2e-2, 3.75e-3, 5e-3])
    assert steered[0]["update_norm"] == pytest.approx(2 * plain[0]["update_norm"], rel=1e-4)


def test_under_adam_a_factor_on_all_advantages_changes_nothing():
    """Unless it changes: then both moments move, and early on the second does so more, so that the step is smaller."""

    def norms(*factors: float) -> list[float]:
        learner, batch = learner_of(tiny(), lr=1e-4, eps=1e-12, weight_decay=0.0), make_batch()
        assert batch.adv_BT is not None
        scaled = [replace(batch, adv_BT=f * batch.adv_BT) for f in factors]
        return [learner.update(each, Reinforce(update_norm=True))["update_norm"] for each in scaled]

    plain = norms(1.0, 1.0, 1.0)
    assert norms(4.0, 4.0, 4.0) == pytest.approx(plain, rel=1e-3)
    assert norms(1.0, 1.0, 4.0)[2] < 0.9 * plain[2]


def by_hand(learner: PolicyLearner, batch: Batch, adv_KBT: Tensor, objective: Any, layers: str = "") -> np.ndarray:
    """From whole gradients of the whole batch at once."""
    rows = []
    for adv_BT in adv_KBT:
        prepared = objective.prepare(replace(batch, adv_BT=adv_BT))
        logp_BT, entropy_BT = learner.backend.forward(prepared, "value")
        loss, _ = objective.loss(logp_BT, entropy_BT, prepared)
        chosen = [p for name, p in learner.trained.items() if layers in name]
        rows.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, chosen)]))
    gradients_KN = torch.stack(rows)
    return (gradients_KN @ gradients_KN.T).numpy()


@pytest.mark.parametrize("layers", [None, r"layers\.1\."])
def test_the_gram_matrix_of_components_whatever_the_micro_batches(layers):
    learner, batch = learner_of(tiny()), make_batch()
    batch = learner.annotate(batch, {"reference"})
    objective = grpo(kl=K2(coefficient=0.1, apply_to="loss"))
    expected = by_hand(learner, batch, streams(batch), objective, "layers.1." if layers else "")
    for budget in (4096, 22):
        learner.config = replace(learner.config, micro_batch_tokens=budget)
        found = learner.gram(batch, objective, streams(batch), layers)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)
    plain = learner.gram(batch, grpo(), streams(batch)).numpy()
    assert plain[0, 2] == pytest.approx(-0.5 * plain[0, 0], rel=1e-4) and plain.dtype == np.float64


def test_the_gram_matrix_changes_nothing_in_the_learner():
    """Dropout's numbers are those of the update, so they are drawn anew for each component and again for it."""
    batch, ends = make_batch(), []
    for asks in (False, True):
        learner = learner_of(tiny("GPT2", resid_pdrop=0.3))
        learner.update(batch, grpo())
        if asks:
            one, two = (learner.gram(batch, grpo(), streams(batch)) for _ in range(2))
            assert torch.equal(one, two)
        learner.update(batch, grpo(), slot="sft")
        learner.update(batch, grpo())
        ends.append(learner.fingerprint())
    assert ends[0] == ends[1]


def test_a_batch_without_tokens_to_train_on_has_a_gram_matrix_of_zeros():
    learner, batch = learner_of(tiny()), make_batch()
    nothing = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    assert not learner.gram(nothing, grpo(), streams(batch)).any()
    with pytest.raises(ValueError, match=r"names are like model.embed"):
        learner.gram(batch, grpo(), streams(batch), "no such layer")


def test_a_head_on_the_policy_is_no_part_of_the_gram_matrix():
    batch, head = make_batch(), HeadRoleSpec(ValueShape(Scalar()), coefficient=0.5, lr_ratio=2.0)
    plain = learner_of(tiny()).gram(batch, grpo(), streams(batch))
    torch.testing.assert_close(learner_of(tiny(), roles={"critic": head}).gram(batch, grpo(), streams(batch)), plain)


def measured(learner: PolicyLearner) -> Any:
    """The Gram matrix before and after an update, and how far updates moved the weights."""
    batch = make_batch(9)
    first = learner.gram(batch, grpo(), streams(batch))
    norms: list[float] = []
    for factor in (1.0, 2.0):
        done = learner.update(batch, replace(grpo(), update_norm=True, lr_factor=factor))
        norms += [done["update_norm"], done["grad_norm"], done["lr"]]
    return numbers({"first": first, "second": learner.gram(batch, grpo(), streams(batch), "layers")}), norms
