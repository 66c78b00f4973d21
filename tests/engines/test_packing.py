"""Rows end to end: the packs, that no row sees another, and that loss and gradients are those of rows alone."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_flash_attention_utils import _is_packed_sequence, _prepare_from_posids
from trl.data_utils import _pack_bfd

from alignment.algorithms.objective import Objective
from alignment.algorithms.value_losses import Scalar
from alignment.batching import pack
from alignment.engines.logprobs import LogProbs
from alignment.engines.packing import Layout
from alignment.engines.value_model import ValueShape
from alignment.engines.value_roles import HeadRoleSpec
from alignment.errors import UserError
from alignment.partition import Share
from alignment.types import Batch
from tests.engines.helpers import chunk_mb, critic, grpo, learner_of, make_batch, tiny, with_returns

LENGTHS = st.lists(st.integers(1, 12), max_size=20)


def test_golden_packs():
    assert pack([3, 7, 2, 5, 4, 1], 8) == [[1, 5], [3, 0], [4, 2]]
    assert pack([3, 12, 5], 8) == [[1], [2, 0]], "a row that is too long stays alone, and is not cut"
    assert pack([], 8) == []


@given(LENGTHS, st.integers(12, 30))
def test_packs_hold_every_row_once_and_are_as_full_as_those_of_trl(lengths: list[int], capacity: int) -> None:
    packs = pack(lengths, capacity)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    ours = sorted(sum(lengths[i] for i in members) for members in packs)
    assert all(total <= capacity for total in ours)
    if lengths:
        table = pa.table({"input_ids": pa.array([[0] * n for n in lengths], type=pa.list_(pa.int64()))})
        theirs = _pack_bfd(table, capacity)
        assert ours == sorted(len(row) for row in theirs["input_ids"].to_pylist())


def test_the_layout_of_a_micro_batch():
    ids_BT = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]])
    layout = Layout.of(ids_BT, torch.tensor([3, 2, 1]), torch.tensor([0, 1, 1]), tiny())
    assert layout.ids_PT.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert layout.position_PT.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert layout.start_B.tolist() == [0, 0, 2]
    apart_BT1 = layout.apart(layout.ids_PT[..., None])
    assert [row[:n] for row, n in zip(apart_BT1[..., 0].tolist(), (3, 2, 1), strict=True)] == [[1, 2, 3], [4, 5], [6]]


@pytest.mark.parametrize("ranks", [1, 3])
def test_micro_batches_of_packs_stay_in_the_budget_and_hold_every_row_once(ranks: int) -> None:
    batch = make_batch(17)
    seen: list[int] = []
    counts = set()
    for rank in range(ranks):
        micros = Share(rank, ranks, pack_tokens=20).micro_batches(batch, 45)
        counts.add(len(micros))
        for rows, micro in micros:
            seen += rows.tolist()
            if not len(rows):
                continue
            assert micro.pack_B is not None and torch.equal(micro.ids_BT, batch.rows(rows).ids_BT)
            totals = torch.zeros(int(micro.pack_B.max()) + 1, dtype=torch.int64)
            totals.index_add_(0, micro.pack_B, micro.length_B)
            assert totals.min() > 0 and totals.max() <= 20 and len(totals) * int(totals.max()) <= 45
    assert sorted(seen) == batch.loss_mask_BT.any(1).nonzero()[:, 0].tolist() and len(counts) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_two_sides_of_a_pair_stay_together(ranks: int) -> None:
    batch = make_batch(8)
    batch = replace(batch, side_B=torch.tensor([1, -1] * 4, dtype=torch.int8))
    seen: list[int] = []
    for rank in range(ranks):
        for rows, micro in Share(rank, ranks, pack_tokens=40).micro_batches(batch, 60):
            seen += rows.tolist()
            for pack_of in [] if micro.pack_B is None else micro.pack_B.unique():
                groups = micro.group_B[micro.pack_B == pack_of]
                assert set(groups.tolist()).isdisjoint(micro.group_B[micro.pack_B != pack_of].tolist())
    assert sorted(seen) == batch.loss_mask_BT.any(1).nonzero()[:, 0].tolist()


def gradients(module: nn.Module, batch: Batch, share: Share, budget: int, packing: bool) -> tuple[Tensor, list[Tensor]]:
    module.zero_grad()
    logprobs, objective = LogProbs(module, chunk_mb(1000), packing=packing), Objective.supervised()
    prepared, total = objective.prepare(batch), torch.zeros(())
    for _, micro in share.micro_batches(prepared, budget):
        loss = objective.loss(*logprobs(micro, "value"), micro)[0]
        loss.backward()
        total += loss.detach()
    return total, [p.grad.clone() for p in module.parameters() if p.grad is not None]


EXACT: list[tuple[str, dict[str, Any]]] = [
    *((name, {"attn_implementation": how}) for name in ("Qwen3", "Llama", "GPT2") for how in ("sdpa", "eager")),
    ("Qwen2", {}),
    ("Mistral", {"sliding_window": 3}),
    ("Gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 3}),
]


@pytest.mark.parametrize(("architecture", "options"), EXACT, ids=str)
@pytest.mark.parametrize("budget", [24, 1000])
def test_loss_and_gradient_are_those_of_rows_alone(architecture: str, options: dict[str, Any], budget: int) -> None:
    """In micro-batches of one pack and of all, in another order of rows, with wider padding."""
    module, batch = tiny(architecture, **options), make_batch(9)
    loss, alone = gradients(module, batch, Share(), 1000, False)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    for given_batch in (batch, batch.rows(order)):
        packed_loss, packed = gradients(module, given_batch, Share(pack_tokens=24), budget, True)
        torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_no_token_sees_another_row():
    module, batch = tiny(), make_batch(4)
    packed = replace(batch, pack_B=torch.zeros(4, dtype=torch.int64))
    logprobs = LogProbs(module, chunk_mb(1000), packing=True)
    with torch.no_grad():
        before_BT = logprobs(packed)[0]
        changed = replace(packed, ids_BT=packed.ids_BT.clone())
        changed.ids_BT[0] = (changed.ids_BT[0] + 1) % 19
        after_BT = logprobs(changed)[0]
    assert not torch.equal(before_BT[0], after_BT[0]) and torch.equal(before_BT[1:], after_BT[1:])


def test_kernels_of_flash_attention_get_one_row_and_its_lengths():
    """They are not here to be run; what transformers hands them is."""
    body: Any = tiny().base_model
    body.config._attn_implementation = "flash_attention_2"
    layout = Layout.of(torch.ones(3, 5, dtype=torch.int64), torch.tensor([5, 2, 4]), torch.tensor([0, 1, 1]), body)
    assert layout.position_PT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]]
    assert _is_packed_sequence(layout.position_PT, batch_size=1)
    states = torch.zeros(1, 11, 2, 8)
    _, _, _, (lengths, _), (longest, _) = _prepare_from_posids(states, states, states, layout.position_PT)
    assert lengths.tolist() == [0, 5, 7, 11] and longest == 5


@pytest.mark.parametrize(("architecture", "options"), [("Bloom", {"n_head": 2}), ("Mamba", {"state_size": 4})], ids=str)
def test_a_model_whose_tokens_see_the_row_before_is_refused(architecture: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"learner.packing: {architecture}ForCausalLM .* set packing to false"):
        LogProbs(tiny(architecture, **options), chunk_mb(3), packing=True)


def without_positions(module: Any) -> str:
    forward = module.model.forward
    module.model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    return "does not take position_ids"


def with_positions_of_its_own(module: Any) -> str:
    embed = module.transformer.wpe.forward
    module.transformer.wpe.forward = lambda ids: embed(torch.arange(ids.shape[1]).expand_as(ids))
    return "positions do not begin again"


def in_chunks(module: Any) -> str:
    module.config.attention_chunk_size = 8
    return "counted from the beginning of the whole row"


@pytest.mark.parametrize("spoilt", [without_positions, with_positions_of_its_own, in_chunks])
def test_each_way_to_fail_is_told(spoilt: Any) -> None:
    module = tiny("GPT2" if spoilt is with_positions_of_its_own else "Qwen3")
    reason = spoilt(module)
    with pytest.raises(UserError, match=reason):
        LogProbs(module, chunk_mb(3), packing=True)


HEAD: dict[str, Any] = {"critic": HeadRoleSpec(ValueShape(Scalar(), "vocabulary"), 0.5)}


@pytest.mark.parametrize("roles", [{}, {"critic": critic()}, HEAD], ids=["none", "model", "head"])
def test_the_learner_trains_the_same_with_and_without(roles: dict[str, Any]) -> None:
    """Rollouts with two epochs, two mini-batches and a reference, and demonstrations; a critic reads rows apart."""
    needs, found = {"old_logp", "reference", "entropy", *(["values"] if roles else [])}, []
    for packing in (False, True):
        options = {"lr": 1e-3, "micro_batch_tokens": 30, "packing": packing, "pack_tokens": 30}
        learner, metrics = learner_of(tiny(), 50, 0, True, roles, **options), []
        for seed in range(3):
            batch = with_returns(learner.annotate(make_batch(9, seed), needs))
            metrics.append(learner.update(batch, grpo(epochs=2, minibatches=2)))
            metrics.append(learner.update(batch, Objective.supervised(), slot="sft"))
        found.append((metrics, [p.detach().clone() for p in learner.module.parameters()]))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
