"""Preferences with masks of tokens: the specification's golden numbers, the loss from whole logits, and invariances."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignment.algorithms.masked_preferences import LearnedMasks, Mapo, SparsePo, activation_mask, rescaled
from alignment.algorithms.preference_objective import PreferenceObjective
from alignment.algorithms.preferences import Dpo, check_losses
from alignment.engines.activations import taken
from alignment.engines.gradients import accumulate
from alignment.engines.masked_goal import MaskedGoal
from alignment.engines.token_masks import MASKS, MaskNetwork, MaskRole, MaskRoleSpec
from alignment.engines.torch_learner import TorchLearner
from alignment.errors import UserError
from alignment.types import Batch
from tests.engines.helpers import assert_close, chunk_mb, learner_of, lora, make_batch, tiny, widen

ROWS = {  # of the chosen completion and the other: log-ratios and divergences of two tokens each
    "ratio": [[0.5, 0.5], [-0.6, -0.4]],
    "divergence": [[0.2, 0.1], [0.05, 0.15]],
}


def toy(masks: Any) -> Batch:
    """One pair with those numbers, and masks ``[row, token, kind]``."""
    batch = make_batch(rows=2, width=5)
    mask_BT = torch.tensor([[False, False, False, True, True]] * 2)
    divergence_BT = torch.full((2, 5), 9.0)  # what is not trained does not count
    divergence_BT[:, 3:] = torch.tensor(ROWS["divergence"])
    masks_BT2 = torch.ones(2, 5, 2)
    masks_BT2[:, 3:] = torch.tensor(masks)
    return replace(
        batch,
        loss_mask_BT=mask_BT,
        side_B=torch.tensor([1, -1]),
        ref_logp_BT=torch.zeros(2, 5),
        divergence_BT=divergence_BT,
        masks_BT2=masks_BT2,
    )


def toy_loss(masks: Any, loss: Any) -> tuple[float, dict[str, float]]:
    objective, batch = PreferenceObjective([(loss, None)]), toy(masks)
    logp_BT = torch.full((2, 5), 7.0)
    logp_BT[:, 3:] = torch.tensor(ROWS["ratio"])
    total, sums = objective.loss(logp_BT, None, objective.prepare(batch))
    return float(total), objective.finish(sums)


ON, OFF = [1.0, 1.0], [0.0, 0.0]


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ([[ON, ON], [ON, ON]], 0.3000585),
        ([[[1.0, 0.0]] * 2, [[1.0, 0.0]] * 2], 0.3132617),
        ([[ON, [0.0, 1.0]], [ON, ON]], 0.3711007),
        ([[OFF, OFF], [OFF, OFF]], math.log(2)),
    ],
    ids=["dense", "no divergence is DPO", "half of the chosen ratios", "nothing"],
)
def test_golden(masks, expected):
    loss, metrics = toy_loss(masks, Mapo(beta=0.5))
    assert loss == pytest.approx(expected, abs=1e-6)
    flat = torch.tensor(masks).flatten(0, 1)
    assert metrics["divergence"] == pytest.approx(0.5 / 4)
    shares = [metrics["sparsity/ratio"], metrics["sparsity/divergence"]]
    assert shares == (flat == 0).float().mean(0).tolist()


def test_a_row_is_rescaled_by_itself_and_equal_values_all_count():
    value_N, row_N = torch.tensor([1.0, 2.0, 4.0, 5.0, 7.0, 7.0]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert rescaled(value_N, row_N).tolist() == pytest.approx([0, 1 / 3, 1, 1, 1, 1])
    standard_N = (value_N[:3] - value_N[:3].mean()) / value_N[:3].std()
    assert rescaled(standard_N, row_N[:3]).tolist() == pytest.approx([0, 1 / 3, 1]), "z-scores before change nothing"
    # two layers of one kind, one of another: the mean over layers first
    mask_N = activation_mask([[value_N[:3], -value_N[:3]], [value_N[:3]]], row_N[:3])
    assert mask_N.tolist() == pytest.approx([0.25, (0.5 + 1 / 3) / 2, 0.75])


def test_masks_have_a_price():
    masks = torch.full((2, 2, 2), 0.5).tolist()
    plain = toy_loss(masks, Mapo(beta=0.5))[0]
    options: dict[str, Any] = {"beta": 0.5, "l1_ratio": 0.1, "l1_divergence": 0.01}
    independent, common = SparsePo(masks="independent", **options), SparsePo(**options)
    assert toy_loss(masks, SparsePo(beta=0.5))[0] == pytest.approx(plain)
    assert toy_loss(masks, independent)[0] == pytest.approx(plain + 0.1 * 2 + 0.01 * 2)
    assert toy_loss(masks, common)[0] == pytest.approx(plain + (0.1 * 2 + 0.01 * 2) / 2)
    found = []
    for loss in (SparsePo(beta=0.5), independent):
        objective, batch = PreferenceObjective([(loss, None)]), toy(masks)
        assert batch.masks_BT2 is not None
        masks_BT2 = batch.masks_BT2.requires_grad_()
        objective.loss(torch.zeros(2, 5), None, objective.prepare(batch))[0].backward()
        found.append(masks_BT2.grad)
    price = torch.tensor([0.1, 0.01]).expand(2, 2, 2)
    torch.testing.assert_close((found[1] - found[0])[:, 3:], price)
    assert not found[1][:, :3].any(), "padding and prompts cost nothing"


def test_a_network_makes_a_mask_that_is_exactly_0_where_nothing_speaks_for_a_token():
    network: Any = MaskNetwork(2, 3, 0.0)
    with torch.no_grad():
        for weight, bias, score in (
            ([1.0, 0.0, -1.0], 0.5, network.score[0]),
            ([0.0, 2.0, 0.0], 0.0, network.score[1]),
        ):
            score.weight.copy_(torch.tensor([weight]))
            score.bias.fill_(bias)
        network.mix.weight.copy_(torch.tensor([[0.5, 3.0]]))
    half = (3 / 2) ** 0.5  # what (-1, 0, 1) is after the norm
    states = [torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, -1.0], [0.0, -1.0, 1.0]])]
    expected = [0.5 * (2 * half + 0.5) + 3 * 2 * half, 0.0]
    assert network(states).tolist() == pytest.approx(expected, abs=1e-4)
    assert all((MaskNetwork(4, 3, 0.0).mix.weight > 0).all() for _ in range(5)), "no mask is 0 for good"


def paired(learner: TorchLearner) -> Batch:
    """Pairs at several temperatures, one token of a row left out of the loss, and a demonstration."""
    batch = make_batch(rows=9)
    mask_BT = (torch.arange(11) >= 3) & (torch.arange(11) < batch.length_B[:, None])
    mask_BT[2, 4] = False
    side_B = torch.tensor([1, -1] * 4 + [2], dtype=torch.int8)
    batch = replace(batch, loss_mask_BT=mask_BT, side_B=side_B, adv_BT=None)
    return learner.annotate(batch, {"reference"})


def moved(module: nn.Module) -> nn.Module:
    """Elsewhere than the reference, which was kept before."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module


def gradients(learner: TorchLearner, batch: Batch, objective: PreferenceObjective, budget: int = 10_000) -> Any:
    counts, role = learner.slots["rl"].counts, learner.roles.get(MASKS)
    assert role is None or isinstance(role, MaskRole)
    goal = MaskedGoal(
        learner.backend, objective, learner.annotate, counts, reference=learner._reference_weights, masks=role
    )
    loss, sums = accumulate(learner.backend, goal.loss, goal.prepare(batch), budget)
    found = {name: p.grad.clone() for name, p in learner.trained.items() if p.grad is not None}
    learner.backend.forget_gradients()
    if role is not None:
        found |= {f"masks.{n}": p.grad.clone() for n, p in role.backend.trained.items() if p.grad is not None}
        role.backend.forget_gradients()
    return float(loss), found, goal.finish(sums)


def by_hand(learner: TorchLearner, batch: Batch, beta: float) -> Tensor:
    """The loss from whole logits and from what parts of the model were called with, for one like Llama."""
    module: Any = learner.module
    with torch.no_grad(), learner._reference_weights():
        seen: dict[str, list[Tensor]] = {"mlp": [], "attention": [], "residual": []}
        inner = module.get_base_model() if hasattr(module, "get_base_model") else module
        hooks = [
            part.register_forward_pre_hook(lambda _m, args, kind=kind: seen[kind].append(args[0]))
            for layer in inner.model.layers
            for kind, part in (("mlp", layer.mlp.down_proj), ("attention", layer.self_attn.o_proj))
        ] + [
            layer.register_forward_hook(lambda _m, _a, output: seen["residual"].append(output))
            for layer in inner.model.layers
        ]
        reference = module(batch.ids_BT).logits
        for hook in hooks:
            hook.remove()
    policy = module(batch.ids_BT).logits
    values: list[Tensor] = []
    for b in range(len(batch)):
        at = batch.loss_mask_BT[b].nonzero()[:, 0]
        if MASKS in learner.roles:
            mask_t2 = learner.roles[MASKS].backend.module([layer[b, at - 1] for layer in seen["residual"]])
        else:
            kinds = [*seen.values(), [reference]]
            means = [torch.stack([_minmax(layer[b, at - 1].mean(-1)) for layer in layers]).mean(0) for layers in kinds]
            mask_t2 = torch.stack(means).mean(0)[:, None].expand(-1, 2)
        logp, ref = ((x[b, at - 1] / batch.temperature_B[b]).log_softmax(-1) for x in (policy, reference))
        token = batch.ids_BT[b, at]
        r_t = (logp - ref).gather(1, token[:, None])[:, 0]
        k_t = (ref.exp() * (ref - logp)).sum(-1)
        values.append((mask_t2 * torch.stack([r_t, k_t], -1)).sum())
    h = torch.stack([values[i] - values[i + 1] for i in range(0, 8, 2)])
    return -torch.nn.functional.logsigmoid(beta * h).mean()


def _minmax(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else torch.ones_like(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3": tiny,
    "lora": lora,
    "gemma2": lambda: tiny("Gemma2", final_logit_softcapping=3.0, query_pre_attn_scalar=8),
}


def learned(module: nn.Module, loss: Any, **options: Any) -> TorchLearner:
    """A learner with what the loss asks for beside the policy."""
    masks = loss.token_masks
    roles: Any = {MASKS: MaskRoleSpec(masks, seed=2)} if isinstance(masks, LearnedMasks) else {}
    return learner_of(module, reference=True, roles=roles, **options)


SPARSE = [SparsePo(beta=0.5, dropout=0.0), SparsePo(beta=0.5, dropout=0.0, masks="independent")]


@pytest.mark.parametrize(
    ("kind", "loss"), [*((kind, Mapo(beta=0.5)) for kind in MODELS), *(("lora", loss) for loss in SPARSE)]
)
def test_loss_and_gradient_are_those_of_whole_logits(kind, loss):
    learner = learned(MODELS[kind](), loss, logits_chunk_mb=chunk_mb(3))
    moved(learner.module)
    batch = paired(learner)
    found_loss, found, metrics = gradients(learner, batch, PreferenceObjective([(loss, None)]))
    expected = by_hand(learner, batch, 0.5)
    expected.backward()
    assert found_loss == pytest.approx(float(expected.detach()), rel=1e-4) and abs(found_loss - math.log(2)) > 1e-3
    trained = dict(learner.trained)
    if MASKS in learner.roles:
        trained |= {f"masks.{name}": p for name, p in learner.roles[MASKS].backend.trained.items()}
        assert any("masks." in name and p.grad is not None and p.grad.any() for name, p in trained.items())
        assert metrics["sparsity/ratio"] > 0
        assert (metrics["sparsity/ratio"] == metrics["sparsity/divergence"]) == (loss.masks == "common")
    assert_close(found, {n: p.grad for n, p in trained.items() if p.grad is not None}, rtol=1e-3)
    assert metrics["divergence"] > 0.01


def test_of_other_architectures_activations_are_taken():
    module: Any = tiny("GPT2")
    place_N = (torch.tensor([0, 0]), torch.tensor([1, 2]))
    with torch.no_grad(), taken(module.transformer, place_N, ("mlp", "attention", "residual"), lambda x: x) as found:
        module(torch.tensor([[3, 4, 5, 6]]))
    assert {kind: [tuple(t.shape) for t in layers] for kind, layers in found.items()} == {
        "mlp": [(2, 64)] * 2,
        "attention": [(2, 16)] * 2,
        "residual": [(2, 16)] * 2,
    }
    module.transformer.h[0].mlp = nn.Identity()
    with pytest.raises(UserError, match="its mlp part is not found.*take another loss"):
        with taken(module.transformer, place_N, ("mlp",), lambda x: x):
            pass


@pytest.mark.parametrize("masked", [Mapo(beta=0.5), *SPARSE], ids=["mapo", "common", "independent"])
def test_splitting_and_padding_change_nothing(masked):
    learner = learned(tiny(), masked)
    moved(learner.module)
    batch = paired(learner)
    objective = PreferenceObjective([(masked, None)])
    loss, found, metrics = gradients(learner, batch, objective)
    shuffled = batch.rows([7, 3, 0, 5, 8, 2, 6, 1, 4])
    wide = replace(widen(replace(batch, adv_BT=batch.behaviour_logp_BT), 3), adv_BT=None)
    assert batch.ref_logp_BT is not None
    wide = replace(wide, ref_logp_BT=torch.nn.functional.pad(batch.ref_logp_BT, (0, 3), value=torch.nan))
    for other, budget in ((batch, 24), (shuffled, 24), (shuffled, 60), (wide, 30)):
        again, found_again, metrics_again = gradients(learner, other, objective, budget)
        assert again == pytest.approx(loss, rel=1e-5)
        assert metrics_again == pytest.approx(metrics, rel=1e-4)
        assert_close(found_again, found, rtol=1e-4)


def test_at_the_reference_the_loss_is_that_of_a_coin_and_an_update_is_one_of_its_gradient():
    learner = learner_of(tiny(), reference=True)
    objective, batch = PreferenceObjective([(Mapo(), None)], entropies="value"), paired(learner)
    metrics = learner.update(batch, objective)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["divergence"] == pytest.approx(0, abs=1e-6)
    assert metrics["entropy"] > 0 and learner.update(batch, objective)["loss"] < metrics["loss"]


def test_masks_are_learned_with_an_optimizer_of_their_own_which_is_saved(tmp_path):
    loss = SparsePo(masks="independent", dropout=0.1, l1_ratio=0.01)
    objective = PreferenceObjective([(loss, None)])
    whole, saved, restored = (learned(tiny(), loss) for _ in range(3))
    batch, before = paired(whole), parameters(whole)
    metrics = whole.update(batch, objective)
    assert metrics["masks/grad_norm"] > 0
    moments = whole.roles[MASKS].slot.adamw  # pyright: ignore[reportOptionalMemberAccess]
    assert {group["weight_decay"] for group in moments.param_groups} == {loss.weight_decay, 0.0}
    assert moments is not whole.slots["rl"].adamw and moments.state
    assert any(not torch.equal(now, before[name]) for name, now in parameters(whole).items())
    assert saved.update(batch, objective) == metrics
    saved.save(tmp_path)
    restored.restore(tmp_path)
    assert restored.update(batch, objective) == whole.update(batch, objective)
    assert all(torch.equal(now, parameters(whole)[name]) for name, now in parameters(restored).items())
    assert restored.fingerprint() == whole.fingerprint()


def parameters(learner: TorchLearner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.roles[MASKS].backend.trained.items()}


def test_two_masks_are_refused():
    with pytest.raises(UserError, match="losses has two with masks of tokens"):
        check_losses((Mapo(), SparsePo()))
    check_losses((Mapo(), Dpo()))
