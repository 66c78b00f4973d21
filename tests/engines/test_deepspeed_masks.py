"""Preferences with masks of tokens on ranks are those of the torch learner at every stage of ZeRO: the loss, weights of
the policy and those of the networks that make masks; and they go on exactly.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignment.algorithms.masked_preferences import LearnedMasks, Mapo, SparsePo
from alignment.algorithms.preference_objective import PreferenceObjective
from alignment.algorithms.preferences import Nll
from alignment.engines.deepspeed_zero import gathered
from alignment.engines.outgoing import outgoing
from alignment.engines.policy_learner import PolicyLearner
from alignment.engines.token_masks import MASKS, MaskRoleSpec
from alignment.references import Copy
from alignment.types import Batch
from tests.engines.helpers import chunk_mb
from tests.engines.preference_checks import Case, batch_of
from tests.engines.rank_checks import embedded, numbers, rank_of, spoiled, whole_weights
from tests.engines.ranks import worlds  # noqa: F401 - a fixture
from tests.engines.test_deepspeed import Numbers, assert_equal, assert_like, marked, on_ranks

OPTIONS: dict[str, Any] = {"lr": 3e-3, "eps": 1e-3, "micro_batch_tokens": 44, "logits_chunk_mb": chunk_mb(3)}
"""Two pairs in a micro-batch, three tokens in a chunk, of which ranks have unlike numbers; and eps, or Adam makes much
of rounding where gradients are small."""
PRICES: dict[str, Any] = {"beta": 0.5, "dropout": 0.0, "l1_ratio": 0.02, "l1_divergence": 0.01}
LOSSES = {
    "mapo": Mapo(beta=0.5),
    "common": SparsePo(**PRICES),
    "independent": SparsePo(masks="independent", **PRICES),
    "dropout": SparsePo(masks="independent", beta=0.5, dropout=0.2, l1_ratio=0.02),
}
BESIDE = {"guided": (Nll(of="ground_truth", weight=0.1),)}
"""Losses that are added; of demonstrations, a row of which is no part of a pair."""
LOSSES["guided"] = LOSSES["independent"]
Found = tuple[list[dict[str, float]], Numbers, Numbers]


def roles_of(name: str) -> dict[str, Any]:
    masks = LOSSES[name].token_masks
    return {MASKS: MaskRoleSpec(masks, seed=2)} if isinstance(masks, LearnedMasks) else {}


def rows_of(step: int, guided: bool = False) -> Batch:
    """Five pairs, an odd number; in the second step one alone, so that a rank of two has none.

    ``guided``: the last is not one, but two demonstrations.
    """
    batch = batch_of(Case((), Copy()), step)
    assert batch.side_B is not None
    side_B = torch.where(batch.group_B == batch.group_B[-1], 2, batch.side_B) if guided else batch.side_B
    batch = replace(batch, side_B=side_B.to(torch.int8))
    return batch.rows(torch.tensor([0, 1])) if step == 1 else batch


def advance(learner: PolicyLearner, name: str, count: int, start: int = 0) -> list[dict[str, float]]:
    losses = [(loss, None) for loss in (LOSSES[name], *BESIDE.get(name, ()))]
    objective = PreferenceObjective(losses, entropies="value")
    batches = [
        learner.annotate(rows_of(step, name == "guided"), objective.needs) for step in range(start, start + count)
    ]
    metrics = [learner.update(batch, objective) for batch in batches]
    if start == 0:  # policy and reference are one, and which is ahead is rounding
        del metrics[0]["accuracy/pairs"]
    return metrics


def networks(learner: PolicyLearner) -> Numbers:
    """Whole weights of what learns masks."""
    found: Numbers = {}
    for key, p in learner.roles[MASKS].backend.trained.items() if MASKS in learner.roles else ():
        with gathered([p]):
            found |= numbers({key: p})
    return found


def on_rank(name: str, kind: str, folder: str | None, **options: Any) -> Found:
    """Three updates by one learner; or two, saved and gone on with by another."""
    learner = rank_of(kind, reference=True, roles=roles_of(name), **options)
    if folder is not None:
        advance(learner, name, 2)
        learner.save(Path(folder))
        learner.close()
        learner = rank_of(kind, reference=True, roles=roles_of(name), **options)
        learner.restore(Path(folder))
    metrics = advance(learner, name, 3) if folder is None else advance(learner, name, 1, start=2)
    found = metrics, whole_weights(learner), networks(learner)
    learner.close()
    return found


@dataclass(frozen=True)
class Spoiled(PreferenceObjective):
    """:func:`tests.engines.rank_checks.spoiled`."""

    what: str = "loss"
    seen: list[Batch] = field(default_factory=list)

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().loss(logp_BT, entropy_BT, micro)
        return spoiled(loss, self.what, micro, self.seen), sums


def spoiled_on_rank(name: str, **options: Any) -> Found:
    """Two good updates with three between them that come to nothing."""
    learner = rank_of("tiny", reference=True, roles=roles_of(name), **options)
    metrics, before = advance(learner, name, 1), whole_weights(learner)
    masks = networks(learner)
    for what in ("loss", "gradient", "error"):
        objective = Spoiled([(LOSSES[name], None)], what=what)
        batch = learner.annotate(rows_of(0), objective.needs)
        with pytest.raises(ValueError, match="second micro-batch") if what == "error" else nullcontext():
            found = learner.update(batch, objective)
            assert found["skipped_steps"] == 1 and "masks/grad_norm" not in found
    np.testing.assert_equal((whole_weights(learner), networks(learner)), (before, masks))
    found = metrics + advance(learner, name, 1, start=2), whole_weights(learner), networks(learner)
    learner.close()
    return found


@cache
def expected(name: str, kind: str) -> Found:
    """What the torch learner finds."""
    learner = embedded(kind, reference=True, roles=roles_of(name), **OPTIONS)
    before = numbers(dict(outgoing(learner.module, "merged"))), networks(learner)
    metrics = advance(learner, name, 3)
    after = numbers(dict(outgoing(learner.module, "merged"))), networks(learner)
    for ours, theirs in zip(after, before, strict=True):
        moves = [moved for key in ours if (moved := np.abs(ours[key] - theirs[key]).max())]
        assert not ours or np.median(moves) > 1e-3, "far beyond what is tolerated"
    return metrics, *after


@pytest.mark.parametrize(
    ("name", "kind", "stage"),
    [
        *((name, "tiny", stage) for name in ("mapo", "common", "independent") for stage in (0, 1, 2, 3)),
        ("guided", "tiny", 2),
        ("guided", "tiny", 3),
        ("mapo", "untied", 3),
        ("independent", "fresh", 3),
        ("independent", "capped", 3),
        ("common", "biased", 3),
        ("mapo", "adapted", 3),
        marked("mapo", "fresh", 3),
        marked("common", "lora", 2),
        marked("mapo", "capped", 3),
        marked("mapo", "biased", 3),
    ],
)
def test_two_ranks_are_the_torch_learner_however_micro_batched(worlds, name, kind, stage):  # noqa: F811
    metrics, weights, masks = expected(name, kind)
    assert len({round(m["loss"], 4) for m in metrics}) == 3
    for tokens in (22, 10_000) if kind == "tiny" else (44,):
        options = OPTIONS | {"zero_stage": stage, "micro_batch_tokens": tokens}
        ours, ours_after, our_masks = on_ranks(worlds(2), on_rank, name, kind, None, **options)
        assert_like(ours, metrics)
        assert_equal(ours_after, weights)
        assert_equal(our_masks, masks)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("options", [{"packing": True, "pack_tokens": 22}, {"gradient_checkpointing": True}])
def test_also_other_ways_to_save(worlds, stage, options):  # noqa: F811
    metrics, weights, masks = expected("independent", "tiny")
    ours, ours_after, our_masks = on_ranks(
        worlds(2), on_rank, "independent", "tiny", None, zero_stage=stage, **OPTIONS, **options
    )
    assert_like(ours, metrics)
    assert_equal(ours_after, weights)
    assert_equal(our_masks, masks)


@pytest.mark.parametrize(
    ("ranks", "stage", "dtype"),
    [
        (1, 2, "float32"),
        (2, 1, "float32"),
        (2, 3, "float32"),
        (2, 2, "bfloat16"),
        marked(2, 1, "bfloat16"),
        marked(2, 3, "bfloat16"),
    ],
)
def test_it_goes_on_exactly(worlds, tmp_path, ranks, stage, dtype):  # noqa: F811
    options = OPTIONS | {"zero_stage": stage, "dtype": dtype}
    metrics, weights, masks = on_ranks(worlds(ranks), on_rank, "dropout", "tiny", None, **options)
    assert all(m["optimizer_steps"] == 1 and m["masks/grad_norm"] > 0 for m in metrics)
    again = on_ranks(worlds(ranks), on_rank, "dropout", "tiny", str(tmp_path), **options)
    np.testing.assert_equal(again, (metrics[2:], weights, masks))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_is_not_finite_or_fails_leaves_policy_and_masks_as_they_were(worlds, stage):  # noqa: F811
    options: dict[str, Any] = OPTIONS | {"micro_batch_tokens": 22}
    learner = embedded(reference=True, roles=roles_of("independent"), **options)
    metrics = advance(learner, "independent", 1) + advance(learner, "independent", 1, start=2)
    weights = numbers(dict(outgoing(learner.module, "merged")))
    ours, ours_after, masks = on_ranks(worlds(2), spoiled_on_rank, "independent", zero_stage=stage, **options)
    assert_like(ours, metrics)
    assert_equal(ours_after, weights)
    assert_equal(masks, networks(learner))


def test_bfloat16_is_near_float32(worlds):  # noqa: F811
    metrics, weights, _ = expected("independent", "tiny")
    options = OPTIONS | {"zero_stage": 2, "dtype": "bfloat16"}
    ours, ours_after, masks = on_ranks(worlds(2), on_rank, "independent", "tiny", None, **options)
    for one, other in zip(ours, metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.02)
        assert one["masks/grad_norm"] == pytest.approx(other["masks/grad_norm"], rel=0.1)
    assert_equal(ours_after, weights, 0.02)
    assert_equal(masks, expected("independent", "tiny")[2], 2e-3)
