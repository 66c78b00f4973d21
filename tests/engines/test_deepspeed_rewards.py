"""Reward models on two ranks are those of the torch learner at every stage of ZeRO, and go on exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.algorithms.preferences import Dpo
from alignment.algorithms.reward_losses import BradleyTerry
from alignment.algorithms.value_losses import HlGauss, Scalar
from alignment.engines.policy_learner import PolicyLearner
from alignment.engines.reward_roles import RewardRoleSpec
from alignment.engines.value_model import ValueShape
from alignment.references import Copy
from tests.engines.helpers import Made
from tests.engines.preference_checks import Case, batch_of
from tests.engines.rank_checks import Call, embedded, rank_of
from tests.engines.ranks import worlds  # noqa: F401 - a fixture

OPTIONS: dict[str, Any] = {"lr": 3e-3, "eps": 1e-3, "micro_batch_tokens": 44}
HEADS = {"scalar": Scalar(), "hl_gauss": HlGauss(low=-3, high=3, bins=9)}
NAMES = ("reward_model_0", "reward_model_1")
CASE = Case((Dpo(),), Copy())


def members(head: str) -> dict[str, Any]:
    """Two models whose heads begin unlike."""
    loss, shape = BradleyTerry(centring=0.1), ValueShape(HEADS[head])
    return {name: RewardRoleSpec(name, loss, shape, Made(), seed) for seed, name in enumerate(NAMES)}  # pyright: ignore[reportArgumentType]


def advance(learner: PolicyLearner, count: int, start: int = 0) -> tuple[list[dict[str, float]], np.ndarray]:
    """Updates of both members on batches of five pairs, unlike shares of two ranks; and their rewards then."""
    found: list[dict[str, float]] = []
    for step in range(start, start + count):
        batch = batch_of(CASE, step)
        told = {name: learner.update(batch, None, slot=name) for name in NAMES}
        found.append({f"{name}/{key}": value for name in NAMES for key, value in told[name].items()})
    rewards = [learner.annotate(batch_of(CASE, 9), {f"reward:{name}"}).reward_B for name in NAMES]
    return found, np.stack([reward.float().cpu().numpy() for reward in rewards if reward is not None])


def on_rank(head: str, folder: str | None, **options: Any) -> Any:
    """Three updates by one learner; or two, saved and gone on with by another."""
    learner = rank_of(roles=members(head), **options)
    if folder is not None:
        advance(learner, 2)
        learner.save(Path(folder))
        learner.close()
        learner = rank_of(roles=members(head), **options)
        learner.restore(Path(folder))
    result = advance(learner, 3) if folder is None else advance(learner, 1, start=2)
    learner.close()
    return result


@pytest.mark.parametrize(
    ("head", "stage"),
    [
        ("scalar", 2),
        ("hl_gauss", 3),
        *(pytest.param("scalar", stage, marks=pytest.mark.full) for stage in (0, 1, 3)),
    ],
)
def test_two_ranks_are_the_torch_learner_and_go_on_exactly(worlds, tmp_path, head, stage):  # noqa: F811
    learner = embedded(roles=members(head), **OPTIONS)
    before = advance(learner, 0)[1]
    expected, said = advance(learner, 3)
    call = Call(on_rank, {"zero_stage": stage, **OPTIONS})
    metrics, ours = worlds(2).run(call, head, None)[0]
    for one, other in zip(metrics, expected, strict=True):
        assert one == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in other.items()}
    np.testing.assert_allclose(ours, said, rtol=0, atol=1e-4)
    assert min(np.abs(said[0] - said[1]).max(), *np.abs(said - before).max(1)) > 1e-2, "members differ, and learn"
    after, again = worlds(2).run(call, head, str(tmp_path))[0]
    assert after == metrics[2:] and np.array_equal(again, ours)
