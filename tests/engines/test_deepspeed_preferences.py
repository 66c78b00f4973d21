"""Preferences on two ranks are those of the torch learner at every stage of ZeRO: metrics, references, weights."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from alignment.algorithms.binary_preferences import Bco, Kto
from alignment.algorithms.preferences import Dpo, Nll
from alignment.engines.outgoing import outgoing
from alignment.references import Copy, Ema, Refreshed
from alignment.tensorfile import read_tensors
from tests.engines import preference_checks as checks
from tests.engines.preference_checks import Case
from tests.engines.rank_checks import copy, embedded, numbers, run
from tests.engines.ranks import worlds  # noqa: F401 - a fixture
from tests.engines.test_deepspeed import assert_equal, assert_like, marked, on_ranks

OPTIONS: dict[str, Any] = {"lr": 3e-3, "micro_batch_tokens": 44}
"""Two pairs in a micro-batch; steps far beyond what is tolerated."""
DPO, KTO = (Dpo(beta=0.5),), (Kto(beta=0.5),)
MPO = (Dpo(weight=0.8), Bco(weight=0.2), Nll())


def name_of(reference: Any) -> str:
    return type(reference).__name__ + ("Merging" if getattr(reference, "merge", False) else "")


@cache
def expected(case: Case) -> tuple[list[dict[str, float]], np.ndarray, dict[str, np.ndarray]]:
    """What the torch learner finds."""
    learner = embedded(case.kind, reference=True, **OPTIONS)
    return *checks.steps_of(case, learner), numbers(dict(outgoing(learner.module, "merged")))


@pytest.mark.parametrize(
    ("case", "stage"),
    [
        *((Case(DPO, Copy()), stage) for stage in (0, 1, 2, 3)),
        (Case(DPO, Ema(decay=0.5)), 3),
        (Case(DPO, Refreshed(every=2)), 2),
        (Case(KTO, Copy()), 3),
        (Case(DPO, Copy(), kind="fresh"), 2),
        (Case(DPO, Ema(decay=0.5), kind="fresh"), 3),
        (Case(DPO, Refreshed(every=2, merge=True), kind="lora"), 1),
        (Case(DPO, Refreshed(every=1, merge=True), kind="lora"), 3),
        marked(Case(DPO, Ema(decay=0.5)), 0),
        marked(Case(DPO, Ema(decay=0.5)), 2),
        marked(Case(DPO, Refreshed(every=2)), 3),
        marked(Case(KTO, Copy()), 1),
        marked(Case(MPO, Copy()), 2),
        marked(Case(DPO, Refreshed(every=2), kind="lora"), 3),
        marked(Case(DPO, Refreshed(every=1, merge=True), kind="fresh"), 0),
        marked(Case(DPO, Refreshed(every=2, merge=True), kind="lora"), 2),
    ],
    ids=lambda value: (
        "-".join(["+".join(type(loss).__name__ for loss in value.losses), name_of(value.reference), value.kind])
        if isinstance(value, Case)
        else f"stage{value}"
    ),
)
def test_two_ranks_are_the_torch_learner(worlds, case, stage):  # noqa: F811
    metrics, reference, weights = expected(case)
    ours, of_reference, ours_after = on_ranks(worlds(2), checks.prefer, case, zero_stage=stage, **OPTIONS)
    assert_like(ours, metrics, 5e-5)
    np.testing.assert_allclose(of_reference, reference, rtol=0, atol=1e-4)
    assert_equal(ours_after, weights, 5e-5)


@pytest.mark.parametrize(
    ("stage", "dtype", "merge_before"),
    [
        (2, "float32", (1,)),
        (3, "float32", (1, 2)),
        marked(0, "float32", (1, 2)),
        marked(3, "float32", (1,)),
        marked(1, "bfloat16", (1,)),
        (3, "bfloat16", (1, 2)),
    ],
    ids=lambda value: "between" if value == (1, 2) else "within" if value == (1,) else None,
)
def test_a_run_resumes_exactly_within_a_round_and_between_two(worlds, tmp_path, stage, dtype, merge_before):  # noqa: F811
    world, options = worlds(2), {"zero_stage": stage, "dtype": dtype, "merge_before": merge_before}
    whole, saved, end = on_ranks(world, run, "lora", (0, 1, 2), None, tmp_path, 1, **options)
    second, _, resumed = on_ranks(world, run, "lora", (2,), tmp_path, **options)
    assert second == whole[2:]
    assert resumed == end != saved


@pytest.mark.parametrize(("before", "after"), [((1, 1), (2, 3)), marked((2, 3), (1, 2))])
def test_other_ranks_read_what_was_merged(worlds, tmp_path, before, after):  # noqa: F811
    (ranks, stage), (others, another) = before, after
    _, saved, _ = on_ranks(
        worlds(ranks), run, "lora", (0, 1), None, tmp_path / "old", 1, merge_before=(1,), zero_stage=stage
    )
    assert on_ranks(worlds(others), copy, "lora", tmp_path / "old", tmp_path / "new", zero_stage=another) == saved
    old, new = (read_tensors(tmp_path / name / "policy.safetensors") for name in ("old", "new"))
    assert any("base_layer" in name for name in old) and old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_an_adapter_is_merged_into_a_base_that_one_was_merged_into_before(worlds, tmp_path):  # noqa: F811
    """As a later stage does, whose model is made from the checkpoint of the one before."""
    learner = embedded("lora", reference=True, **OPTIONS)
    merged = Case(DPO, Refreshed(every=1, merge=True), kind="lora")
    checks.steps_of(merged, learner)
    learner.save(tmp_path / "learner")
    assert on_ranks(worlds(2), checks.taken_over, tmp_path, zero_stage=3, **OPTIONS) == learner.fingerprint()


def test_the_cases_are_unlike_each_other():
    """Otherwise ranks that ignored a reference or a loss would go unnoticed."""
    cases = [Case(DPO, Copy()), Case(DPO, Ema(decay=0.5)), Case(DPO, Refreshed(every=2)), Case(KTO, Copy())]
    losses = [expected(case)[0][-1]["loss"] for case in cases]
    references = [expected(case)[1] for case in cases[:3]]
    assert np.diff(sorted(losses)).min() > 1e-3
    assert min(np.abs(a - b).max() for i, a in enumerate(references) for b in references[:i]) > 1e-2
    assert expected(cases[3])[0][-1]["kl_shift"] > 1e-2, "KTO's shift has an effect"
