"""What a preference stage compares the policy with: the policy at the stage's start, or one that follows it."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, runtime_checkable

from alignment.registry import Registry, option


@runtime_checkable
class Reference(Protocol):
    """Where log-probabilities of the reference come from, and how it moves."""

    kept: ClassVar[bool]
    """Whether the learner holds its weights; otherwise its log-probabilities are computed once and kept."""

    def share(self, step: int) -> float:
        """How far it goes towards the policy after a stage's step ``step`` (from 1): 0 not at all, 1 the whole way."""
        ...

    # Optional: ``merges(step)``, whether a LoRA adapter is merged into the model before a stage's step ``step`` (from
    # 0), which makes the policy of then the reference.


references: Registry[Reference] = Registry("references", Reference, "What preferences compare the policy with")


@references.register("copy", source="Direct Preference Optimization (arXiv 2305.18290)", evidence="end to end")
@dataclass(frozen=True)
class Copy:
    """The policy as the stage began. While an adapter is new that is the model without it, not copied."""

    kept: ClassVar[bool] = True

    def share(self, step: int) -> float:
        """Never moves."""
        return 0.0


@references.register("cached", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Cached:
    """The policy as the stage began, by its log-probabilities of all pairs: one pass over them, and no copy in memory.

    They are kept in the run's folder, so that a resumed run has the same. For pairs that are given, not sampled.
    """

    kept: ClassVar[bool] = False

    def share(self, step: int) -> float:
        """Never moves."""
        return 0.0


@references.register("ema", source="Trust-region DPO (arXiv 2404.09656), soft update", evidence="end to end")
@dataclass(frozen=True)
class Ema:
    """A moving average of the policy's weights: after each step ``reference += (1 - decay) (policy - reference)``.

    It is kept in the type of the weights: in bfloat16, shares below about 1/256 are lost. Under LoRA the average is of
    the adapter's factors A and B, each by itself; their product is near the average of the policy's weights, not equal.
    """

    decay: Annotated[float, option("what it keeps of itself in a step", ge=0, lt=1)] = 0.99
    kept: ClassVar[bool] = True

    def share(self, step: int) -> float:
        """A little, after each step."""
        return 1.0 - self.decay


@references.register(
    "refreshed",
    source="Trust-region DPO (arXiv 2404.09656), hard update; with merge, MrDPO (arXiv 2410.06682)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Refreshed:
    """A copy of the policy that is taken again after every ``every`` steps, a round: multi-round DPO.

    Under LoRA the copy is of the adapter, which computes what merging it into the weights would, and the same adapter
    is trained on. With ``merge`` each round has an adapter of its own, as in MrDPO: the one before is added to the
    weights for good, and the reference is the model without the new one, so no copy is kept. The schedule of the
    learning rate goes on over all rounds (not stated by the source).
    """

    every: Annotated[int, option("length of a round", unit="steps", ge=1)]
    merge: Annotated[bool, option("at each round's start, the adapter is merged into the model and begun anew")] = False
    kept: ClassVar[bool] = True

    def share(self, step: int) -> float:
        """The whole way at the end of a round; not at all where merging moves it."""
        return 1.0 if step % self.every == 0 and not self.merge else 0.0

    def merges(self, step: int) -> bool:
        """At the start of each round, the first as well: an adapter of an earlier stage belongs to the reference."""
        return self.merge and step % self.every == 0
