"""Preferences on two ranks are those of the torch learner at every stage of ZeRO: metrics, references, weights."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from alignment.algorithms.binary_preferences import Bco, Kto
from alignment.algorithms.preferences import Dpo, Nll
from alignment.engines.outgoing import outgoing
from alignment.errors import UserError
from alignment.references import Copy, Ema, Refreshed
from tests.engines import preference_checks as checks
from tests.engines.preference_checks import Case
from tests.engines.rank_checks import embedded, numbers
from tests.engines.ranks import worlds  # noqa: F401 - a fixture
from tests.engines.test_deepspeed import assert_equal, assert_like, marked, on_ranks

OPTIONS: dict[str, Any] = {"lr": 3e-3, "micro_batch_tokens": 44}
"""Two pairs in a micro-batch; steps far beyond what is tolerated."""
DPO, KTO = (Dpo(beta=0.5),), (Kto(beta=0.5),)
MPO = (Dpo(weight=0.8), Bco(weight=0.2), Nll())


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
        marked(Case(DPO, Ema(decay=0.5)), 0),
        marked(Case(DPO, Ema(decay=0.5)), 2),
        marked(Case(DPO, Refreshed(every=2)), 3),
        marked(Case(KTO, Copy()), 1),
        marked(Case(MPO, Copy()), 2),
        marked(Case(DPO, Refreshed(every=2), kind="lora"), 3),
    ],
    ids=lambda value: (
        "-".join(["+".join(type(loss).__name__ for loss in value.losses), type(value.reference).__name__, value.kind])
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


def test_a_model_that_adapters_were_merged_into_is_refused(monkeypatch):
    from alignment.adapters import merge_adapter
    from alignment.engines.deepspeed_backend import ZeroBackend
    from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
    from tests.engines.helpers import lora

    module = lora()
    merge_adapter(module, 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    with pytest.raises(UserError, match="adapters were merged into the model.*export it merged"):
        ZeroBackend(module, DeepSpeedLearnerConfig(ranks=1))


def test_the_cases_are_unlike_each_other():
    """Otherwise ranks that ignored a reference or a loss would go unnoticed."""
    cases = [Case(DPO, Copy()), Case(DPO, Ema(decay=0.5)), Case(DPO, Refreshed(every=2)), Case(KTO, Copy())]
    losses = [expected(case)[0][-1]["loss"] for case in cases]
    references = [expected(case)[1] for case in cases[:3]]
    assert np.diff(sorted(losses)).min() > 1e-3
    assert min(np.abs(a - b).max() for i, a in enumerate(references) for b in references[:i]) > 1e-2
    assert expected(cases[3])[0][-1]["kl_shift"] > 1e-2, "KTO's shift has an effect"
