"""Hypervolume-guided weighting: a step counts for more after a checkpoint that extended the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from alignment.algorithms.weightings import weighted_sum, weightings
from alignment.errors import UserError
from alignment.registry import option
from alignment.types import Batch, Signals

Point = Sequence[float]
EVALUATED = ("accuracy", "length", "truncated")
"""What an evaluation measures beside reward components."""


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume of the union of the boxes between ``reference`` and each point; all coordinates are maximised.

    Exact, by recursive slicing along the first coordinate (Fonseca, Paquete and Lopez-Ibanez, 2006). A coordinate
    below the reference counts as the reference, so that such a point adds nothing.
    """
    boxes = {tuple(max(x - r, 0.0) for x, r in zip(point, reference, strict=True)) for point in points}
    return _volume([box for box in boxes if min(box) > 0])


def _volume(boxes: Sequence[tuple[float, ...]]) -> float:
    """Of the union of boxes from the origin."""
    if not boxes:
        return 0.0
    if len(boxes[0]) == 1:
        return max(boxes)[0]
    ordered, total, slab = sorted(boxes, reverse=True), 0.0, list[tuple[float, ...]]()
    for box, below in zip(ordered, [*(b[0] for b in ordered[1:]), 0.0], strict=True):
        if not any(dominates(other, box[1:]) for other in slab):
            slab = [other for other in slab if not dominates(box[1:], other)] + [box[1:]]
        if box[0] > below:
            total += (box[0] - below) * _volume(slab)
    return total


def dominates(one: Point, other: Point) -> bool:
    """Whether ``one`` is at least as good everywhere; equal points dominate each other."""
    return all(a >= b for a, b in zip(one, other, strict=True))


def meta_reward(contribution: float) -> float:
    """``0.5 + 1.5 tanh(contribution)``: from 0.5, where the front was not extended, to 2."""
    return 0.5 + 1.5 * math.tanh(contribution)


@weightings.register(
    "hypervolume",
    source="Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting (arXiv 2509.11452)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Hypervolume:
    """``meta sum_k w_k r_k`` with the recipe's weights and a ``meta`` that grows with the last evaluation's new volume.

    ``meta = 0.5 + 1.5 tanh(HV(front + v) - HV(front))`` for the evaluation ``v`` of the new policy, one number per
    objective, until the next evaluation; before there was one it is 1. A ``v`` that adds volume joins the front.
    The reference is the first evaluation: that of the policy the stage begins with.

    Deviations. The paper's code takes the volume in raw units, where a length in tokens saturates the tanh: here
    ``z = (v - reference) / scale`` with the given scale, or else the range of all evaluations so far. It does not clip
    at the reference and so gets negative volumes; here they are clipped. Dominated points leave the front, which
    changes no volume. An evaluation may be due less often than every step.

    ``apply_to``: a factor on all rewards cancels where advantages are divided by their own deviation. One on all
    advantages moves the loss, but AdamW divides by the gradient's size: as long as the factor stays it changes
    nothing, except against other terms of the loss, gradient clipping and eps; a change of it acts until the moments
    have followed, and early in training even in the other direction. ``lr``, our addition and the default, multiplies
    the learning rate of the update, so the step itself. ``update_norm`` is logged to tell.
    """

    streams: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("evaluation", "update_norm")

    apply_to: Annotated[Literal["reward", "advantage", "lr"], option("what is multiplied by the meta factor")] = "lr"
    objectives: Annotated[
        tuple[str, ...],
        option("reward components, or accuracy, length or truncated, of the evaluation; empty: every component"),
    ] = ()
    minimise: Annotated[tuple[str, ...], option("objectives that are better when smaller, such as length")] = ()
    scales: Annotated[
        dict[str, float],
        option("how much of an objective counts as 1 (above 0), by its name; others: the range seen so far"),
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = {*self.minimise, *self.scales} - set(self.objectives)
        if self.objectives and unknown:
            raise UserError(f"'minimise' and 'scales' name {sorted(unknown)}, which 'objectives' does not; add them")
        if not all(scale > 0 for scale in self.scales.values()):
            raise UserError(f"scales are above 0, not {self.scales}")

    @property
    def names(self) -> tuple[str, ...]:
        """The reward components that options name."""
        named = {*self.objectives, *self.minimise, *self.scales}
        return tuple(sorted(named - set(EVALUATED)))

    @property
    def unlisted(self) -> tuple[str, ...]:
        """What options name beside empty ``objectives``, which are the rewards, and is none unless one is called so."""
        return () if self.objectives else tuple(sorted({*self.minimise, *self.scales} & set(EVALUATED)))

    def init(self) -> dict[str, Any]:
        return {"objectives": [], "reference": None, "low": [], "high": [], "front": [], "latest": []} | {
            "meta": 1.0,
            "contribution": 0.0,
        }

    def scalarise(self, state: Any, batch: Batch) -> Tensor:
        reward_B = weighted_sum(batch)
        return reward_B * self._factor(state, "reward")

    def advantage_factor(self, state: Any) -> float:
        """What advantages are multiplied by."""
        return self._factor(state, "advantage")

    def lr_factor(self, state: Any) -> float:
        """What the learning rate of the update is multiplied by."""
        return self._factor(state, "lr")

    def _factor(self, state: Any, place: str) -> float:
        return float(state["meta"]) if self.apply_to == place else 1.0

    def observe(self, state: Any, signals: Signals) -> dict[str, Any]:
        names = list(self.objectives or signals.batch.objectives)
        if state["reference"] is None and signals.evaluation_before is not None:
            state = self._began(names, self._point(names, signals.evaluation_before), state)
        if signals.evaluation is None:
            return state
        point = self._point(names, signals.evaluation)
        return self._evaluated(point, state) if state["reference"] else self._began(names, point, state)

    def metrics(self, state: Any) -> dict[str, float]:
        """The factor, the front's size and volume, what was added last, and the last value of each objective."""
        signs = [-1.0 if name in self.minimise else 1.0 for name in state["objectives"]]
        latest = zip(state["objectives"], state["latest"], signs, strict=True)
        return {
            "meta": state["meta"],
            "contribution": state["contribution"],
            "front": len(state["front"]),
            "hypervolume": self._volume(state["front"], state),
            **{f"objective/{name}": sign * value for name, value, sign in latest},
        }

    def _point(self, names: Sequence[str], evaluation: Mapping[str, float]) -> list[float]:
        """One number per objective, to be maximised."""
        found = {name: evaluation.get(f"reward/{name}", evaluation.get(name, math.nan)) for name in names}
        lacking = [name for name, value in found.items() if not math.isfinite(value)]
        if lacking:
            raise UserError(
                f"weighting 'hypervolume': the evaluation has no value of {', '.join(lacking)}; name in "
                "weighting.objectives what applies to data.eval, or give it rows to which these rewards apply"
            )
        return [-value if name in self.minimise else value for name, value in found.items()]

    def _began(self, names: Sequence[str], point: list[float], state: Any) -> dict[str, Any]:
        """With the first evaluation, which is the reference."""
        begun = {"objectives": list(names), "reference": point, "low": point, "high": point, "latest": point}
        return {**state, **begun}

    def _evaluated(self, point: list[float], state: Any) -> dict[str, Any]:
        """With a later one."""
        low = [min(pair) for pair in zip(state["low"], point, strict=True)]
        high = [max(pair) for pair in zip(state["high"], point, strict=True)]
        moved = {**state, "low": low, "high": high, "latest": point}
        front: list[list[float]] = state["front"]
        contribution = 0.0
        if not any(dominates(other, point) for other in front):
            grown = self._volume([*front, point], moved) - self._volume(front, moved)
            contribution = max(0.0, grown)
        if contribution > 0:
            front = [other for other in front if not dominates(point, other)] + [point]
        return {**moved, "front": front, "meta": meta_reward(contribution), "contribution": contribution}

    def _volume(self, points: Sequence[Point], state: Any) -> float:
        """In units of the scales, above the reference."""
        if not points:
            return 0.0
        ranges = [high - low for low, high in zip(state["low"], state["high"], strict=True)]
        named = zip(state["objectives"], ranges, strict=True)
        scales = [self.scales.get(name) or spread or 1.0 for name, spread in named]
        reference: Point = state["reference"]
        scaled = [[(x - r) / s for x, r, s in zip(point, reference, scales, strict=True)] for point in points]
        return hypervolume(scaled, [0.0] * len(reference))
