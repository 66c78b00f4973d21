"""Steps of a preference stage on any learner: what the tests of preferences on ranks do there and in one process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from alignment.adapters import mark_merged, merged_names
from alignment.algorithms.preference_objective import PreferenceObjective
from alignment.algorithms.value_losses import Scalar
from alignment.batching import collate
from alignment.data.demonstrations import Shown
from alignment.data.sides import PAIRED, pair_of
from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
from alignment.engines.deepspeed_rank import DeepSpeedRank
from alignment.engines.policy_learner import PolicyLearner
from alignment.engines.value_model import ValueModel, ValueShape
from alignment.origin import copy_policy
from alignment.pairings import compared
from alignment.references import Reference
from alignment.types import Batch, Group, Prompt
from tests.engines.helpers import lora
from tests.engines.rank_checks import rank_of, whole_weights

PAIRS_OF_A_STEP = 5
"""An odd number: two ranks have unlike shares."""


@dataclass(frozen=True)
class Case:
    """What is learned by, beside what."""

    losses: tuple[Any, ...]
    reference: Reference
    kind: str = "tiny"
    """Of model."""
    steps: int = 3

    @property
    def mismatched(self) -> bool:
        """Whether a loss asks for other prompts' completions."""
        return any(hasattr(loss, "mismatched") for loss in self.losses)


def pairs(step: int) -> list[Group]:
    """Pairs of prompts of 3 tokens and completions of 2 to 8."""
    generator = torch.Generator().manual_seed(step)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 19, (count,), generator=generator).tolist())

    def shown(count: int) -> Shown:
        return Shown(tokens(count), (True,) * count, (("assistant", 0, count),), "")

    made = []
    for uid in range(PAIRS_OF_A_STEP):
        lengths: Sequence[int] = torch.randint(2, 9, (2,), generator=generator).tolist()
        key = f"{step}.{uid}"
        sides = {name: {key: shown(count)} for name, count in zip(PAIRED, lengths, strict=True)}
        made.append(pair_of(uid, Prompt(key, {"prompt": key}), tokens(3), sides))
    return made


def batch_of(case: Case, step: int) -> Batch:
    """As the stage makes it."""
    groups, sides = compared(pairs(step), case.mismatched, None)
    return replace(collate(groups, 0, (), (), step), side_B=torch.tensor(sides, dtype=torch.int8))


def steps_of(case: Case, learner: PolicyLearner) -> tuple[list[dict[str, float]], np.ndarray]:
    """Metrics of each step, and the reference's log-probabilities of one more batch."""
    objective = PreferenceObjective([(loss, None) for loss in case.losses])
    if any(map(case.reference.share, range(1, case.steps + 1))):
        learner.refresh_reference()
    metrics = []
    for step in range(case.steps):
        if hasattr(case.reference, "merges") and case.reference.merges(step):  # pyright: ignore[reportAttributeAccessIssue]
            learner.merge_adapter(step)
        batch = learner.annotate(batch_of(case, step), objective.needs)
        metrics.append(learner.update(batch, objective))
        if share := case.reference.share(step + 1):
            learner.refresh_reference(share)
    last = learner.annotate(batch_of(case, case.steps), {"reference"}).ref_logp_BT
    assert last is not None
    return metrics, last.cpu().numpy().copy()


def prefer(case: Case, **options: Any) -> tuple[list[dict[str, float]], np.ndarray, dict[str, np.ndarray]]:
    """:func:`steps_of` on this rank, and the weights after them."""
    learner = rank_of(case.kind, reference=True, **options)
    result = *steps_of(case, learner), whole_weights(learner)
    learner.close()
    return result


def taken_over(checkpoint: Path, **options: Any) -> str:
    """The fingerprint of a learner whose model is made from a checkpoint in which adapters were merged.

    After its own adapter was merged it has to be another one; and a value model on the same body comes back from its
    file whole, whatever it was before.
    """
    module = lora()
    copy_policy(checkpoint, module)
    config = DeepSpeedLearnerConfig(ranks=dist.get_world_size(), **options)
    learner = DeepSpeedRank(module, config, 100, 0, reference=True)
    found = learner.fingerprint()
    assert learner.merge_adapter(0) and learner.fingerprint() != found
    values = []
    for laid_over in (True, False):
        policy = lora()
        if laid_over:
            copy_policy(checkpoint, policy)
        model = ValueModel.of(policy, ValueShape(Scalar()))
        values.append(learner.backend.beside(model, config))
    saved = checkpoint / "value.safetensors"
    values[0].write(saved)
    mark_merged(values[1].module, merged_names(values[0].module))
    assert values[0].fingerprint() != values[1].fingerprint()
    values[1].read(saved)
    assert values[0].fingerprint() == values[1].fingerprint()
    for backend in values:
        backend.close()
    learner.close()
    return found
