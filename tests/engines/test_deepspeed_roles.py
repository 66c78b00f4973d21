"""Models beside the policy, and what is measured beside training, on the ranks of the DeepSpeed learner: what the torch
learner gives, at every stage.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignment.algorithms.value_losses import HlGauss, Scalar
from alignment.engines.policy_learner import PolicyLearner
from alignment.engines.value_model import ValueShape
from alignment.engines.value_roles import HeadRoleSpec
from tests.engines.helpers import critic, grpo, learner_of, with_returns
from tests.engines.rank_checks import OPTIONS, Call, batches, module_of, numbers, rank_of, whole_weights
from tests.engines.ranks import worlds  # noqa: F401 - a fixture
from tests.engines.test_measures import measured

SHARED = HeadRoleSpec(ValueShape(Scalar()), coefficient=0.5, lr_ratio=2.0)
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [2, 2]]
# eps, or Adam makes much of rounding where gradients are small
OWN = {"lr": 1e-3, "eps": 1e-3}
ROLES: dict[str, dict[str, Any]] = {
    "model": {"critic": critic(HlGauss(bins=8), options=OWN), "prompt_value": critic(options=OWN, of_prompts=True)},
    "head": {"critic": SHARED, "prompt_value": "critic"},
}


def advance(learner: PolicyLearner, count: int, start: int = 0) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Updates with critic and prompt value model; metrics, and what they say in the end.

    The second has one row and one prompt, so that a rank of several has none of its own.
    """
    found: list[dict[str, float]] = []
    for step in range(start, start + count):
        few = step == 1
        batch, prompts = with_returns(batches(step + 1, 1 if few else 9)[step]), PROMPTS[:1] if few else PROMPTS
        values_BT = learner.annotate(replace(batch, values_BT=None), {"values", "old_logp"}).values_BT
        found.append(learner.update(replace(batch, values_BT=values_BT), grpo(minibatches=2)))
        targets = (torch.arange(len(prompts)) + 1) / 5
        found[-1] |= {f"fit/{k}": v for k, v in learner.fit("prompt_value", prompts, targets).items()}
    last = learner.annotate(replace(with_returns(batches(1)[0]), values_BT=None), {"values"})
    assert last.values_BT is not None
    return found, numbers({"values": last.values_BT, "prompts": learner.predict("prompt_value", PROMPTS)})


def on_rank(kind: str, module: str, folder: str | None, **options: Any) -> Any:
    """Two updates, saved and gone on with by another learner; or three by one."""
    roles = ROLES[kind]
    learner = rank_of(module, roles=roles, **options)
    if folder is not None:
        advance(learner, 2)
        learner.save(Path(folder))
        learner.close()
        learner = rank_of(module, roles=roles, **options)
        learner.restore(Path(folder))
        result = advance(learner, 1, start=2)
    else:
        result = advance(learner, 3)
    weights = whole_weights(learner)
    learner.close()
    return result, weights


@pytest.mark.parametrize("kind", ["model", "head"])
@pytest.mark.parametrize(
    ("stage", "module"),
    [(2, "tiny"), (3, "untied"), *(pytest.param(stage, "tiny", marks=pytest.mark.full) for stage in (0, 1))],
)
def test_roles_learn_as_with_the_torch_learner_and_go_on_exactly(worlds, tmp_path, kind, stage, module):  # noqa: F811
    options = OPTIONS | {"eps": 1e-3}
    embedded = learner_of(module_of(module), roles=ROLES[kind], **options)
    expected, said = advance(embedded, 3)
    (metrics, ours), weights = worlds(2).run(Call(on_rank, {"zero_stage": stage, "eps": 1e-3}), kind, module, None)[0]
    for one, other in zip(metrics, expected, strict=True):
        assert one == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in other.items()}
    for name in said:
        np.testing.assert_allclose(ours[name], said[name], rtol=0, atol=1e-5, err_msg=name)
    assert np.abs(said["values"]).max() > 5e-3
    (after, again), continued = worlds(2).run(
        Call(on_rank, {"zero_stage": stage, "eps": 1e-3}), kind, module, str(tmp_path)
    )[0]
    assert after == metrics[2:] and all(np.array_equal(again[n], ours[n]) for n in ours)
    assert all(np.array_equal(continued[n], weights[n]) for n in weights)
    assert not [name for name in weights if "value_head" in name], "a head is not sent to samplers"


@pytest.mark.parametrize("kind", ["model", "head"])
def test_roles_under_bfloat16_learn_and_go_on_exactly(worlds, tmp_path, kind):  # noqa: F811
    options = {"zero_stage": 2, "dtype": "bfloat16"}
    (metrics, ours), _ = worlds(2).run(Call(on_rank, options), kind, "tiny", None)[0]
    (after, again), _ = worlds(2).run(Call(on_rank, options), kind, "tiny", str(tmp_path))[0]
    assert after == metrics[2:] and all(np.array_equal(again[n], ours[n]) for n in ours)
    assert all(m["skipped_steps"] == 0 for m in metrics)


def measured_on_rank(module: str, **options: Any) -> Any:
    learner = rank_of(module, **options)
    result = measured(learner)
    learner.close()
    return result


@pytest.mark.parametrize(
    ("stage", "module"),
    [(0, "tiny"), (3, "untied"), *(pytest.param(stage, "tiny", marks=pytest.mark.full) for stage in (1, 2))],
)
def test_ranks_measure_what_one_process_does(worlds, stage, module):  # noqa: F811
    options = {"eps": 1e-3, "lr": 1e-2}
    grams, norms = measured(learner_of(module_of(module), **(OPTIONS | options)))
    for theirs, moves in worlds(2).run(Call(measured_on_rank, {"zero_stage": stage, **options}), module):
        assert moves == pytest.approx(norms, rel=1e-4)
        for name, gram_KK in grams.items():
            np.testing.assert_allclose(theirs[name], gram_KK, rtol=1e-3, atol=1e-7, err_msg=name)
