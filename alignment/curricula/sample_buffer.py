"""Groups of earlier batches, to fill a batch that is short."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from alignment.curricula.contract import curricula
from alignment.registry import option
from alignment.types import Batch, Context, Group, Signals, keyed_seed


@curricula.register(
    "sample_buffer",
    source="Skywork R1V2: Multimodal Hybrid Reinforcement Learning for Reasoning (arXiv 2504.16656): selective sample "
    "buffer",
    evidence="end to end",
)
@dataclass(frozen=True)
class SampleBuffer:
    """Remembers groups that carried an advantage, and gives them back when a filter leaves a batch short.

    After each update the groups of the batch that were sampled for it and whose mean ``|A|`` is above 0 are remembered,
    at most ``capacity``, the oldest forgotten first. What a batch lacks is drawn from them without replacement, with
    ``P(g) ~ (mean |A_g|)^alpha``, ``mean |A_g|`` the mean over rollouts of each one's mean over tokens. Weighting by
    the advantage is from memory (selective sample replay of VL-Rethinker, arXiv 2504.08837, does so); capacity, alpha
    and age are this project's.

    A replayed rollout keeps the log-probabilities that it was sampled with, so the correction (``tis``) weighs its
    tokens by ``pi_old / mu``; the policy loss clips against the policy at the start of the update, as for any rollout,
    not against the one that sampled it. Its advantage is computed anew. A group is at most ``max_age`` versions old,
    counted from its oldest token. The state holds numbers only; the groups lie in the run's folder (``archive``).

    It fills what a filter leaves open and filters nothing itself: put ``difficulty_filter`` beside it, with
    ``max_refills: 0`` to replay in place of sampling more, or above that to replay after sampling more, and with
    ``on_exhausted: short``, since a batch stays short where the buffer has not enough.
    """

    on_exhausted: ClassVar[str] = "short"

    capacity: Annotated[int, option("groups that are remembered", unit="groups", ge=1)] = 256
    max_age: Annotated[int, option("policy versions that a replayed token may be old", unit="versions", ge=1)] = 8
    alpha: Annotated[float, option("exponent of the mean |A|; 0: all alike", ge=0)] = 1.0

    def init(self) -> dict[str, Any]:
        """Nothing is remembered. An entry is a step, the group's uid, the version of its oldest token, its mean |A|."""
        return {"entries": []}

    def replay(self, state: Any, need: int, context: Context) -> list[Group]:
        """At most ``need`` groups that are not too old, by weight."""
        fresh = [entry for entry in state["entries"] if context.step - entry[2] <= self.max_age]
        count = min(need, len(fresh))
        if not count:
            return []
        assert context.archive is not None, "the loop gives curricula that replay an archive"
        generator = torch.Generator().manual_seed(keyed_seed("sample_buffer", context.seed, context.step))
        weights = torch.tensor(self.weights([entry[3] for entry in fresh]), dtype=torch.float64)
        picked = torch.multinomial(weights, count, generator=generator).tolist()
        return [_again(context.archive(*fresh[i][:2]), context.step) for i in picked]

    def weights(self, magnitudes: Sequence[float]) -> list[float]:
        """``|A|^alpha``, normalised; 0 stays 0 whatever ``alpha`` is."""
        raised = [m**self.alpha if m > 0 else 0.0 for m in magnitudes]
        return [w / sum(raised) for w in raised]

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        """The entries with those of this batch, without those that the next step finds too old."""
        step, magnitude = signals.context.step, _magnitudes(signals.batch)
        entries = list(state["entries"])
        for group in signals.groups:
            found = [magnitude.get(keyed_seed(r.id), -1.0) for r in group.rollouts]
            if found and min(found) >= 0 and max(found) > 0:  # trained on as it is, and not for nothing
                first = min([r.versions[0][0] for r in group.rollouts if r.versions], default=step)
                entries.append([step, group.uid, first, sum(found) / len(found)])
        return {"entries": [e for e in entries if step + 1 - e[2] <= self.max_age][-self.capacity :]}

    def metrics(self, state: Any) -> dict[str, float]:
        """``groups``: how many are remembered."""
        return {"groups": float(len(state["entries"]))}


def _magnitudes(batch: Batch) -> dict[int, float]:
    """Mean |A| over the trained tokens of each row, by the key of its rollout."""
    assert batch.adv_BT is not None, "what is observed was credited"
    mask_BT = batch.loss_mask_BT
    mean_B = (batch.adv_BT.abs() * mask_BT).double().sum(1) / mask_BT.sum(1).clamp(min=1)
    return dict(zip(batch.key_B.tolist(), mean_B.tolist(), strict=True))


def _again(group: Group, step: int) -> Group:
    """The group as replayed at ``step``. Its rollouts get ids of their own, and with them random choices."""
    rollouts = [
        replace(r, source="replay" if r.source == "policy" else r.source, id=f"{r.id}@{step}") for r in group.rollouts
    ]
    return Group(group.uid, group.prompt, tuple(rollouts))
