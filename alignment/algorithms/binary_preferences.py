"""Losses that ask of each completion whether it was wanted, not which of two was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.algorithms.preferences import REFERENCE, Beta, Rows, Weight, preference_losses
from alignment.registry import option
from alignment.types import Signals


@preference_losses.register("kto", source="KTO (arXiv 2402.01306)", evidence="end to end")
@dataclass(frozen=True)
class Kto:
    """``d (1 - sigmoid(beta (ratio - z)))`` of a wanted completion, ``u (1 - sigmoid(beta (z - ratio)))`` of another.

    ``z`` estimates the divergence from the reference: the mean ratio, at least 0 and without gradient, over rows of the
    mini-batch in which each prompt is followed by a completion of the pair before, of another prompt; it is 0 where
    all pairs of a step have one prompt, so stages of one pair a step are refused. The paper keeps ``d n_wanted / (u
    n_unwanted)`` between 1 and 4/3.
    """

    beta: Beta = 0.1
    desirable: Annotated[float, option("d, of wanted completions", gt=0)] = 1.0
    undesirable: Annotated[float, option("u, of the others", gt=0)] = 1.0
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = ("reference", "logp")
    mismatched: ClassVar[bool] = True

    def row_loss(self, state: None, rows: Rows) -> Tensor:
        """``[R]``."""
        ahead_R = self.beta * (rows.ratio_R - rows.shift_R)
        wanted_R = self.desirable * (1 - ahead_R.sigmoid())
        return torch.where(rows.wanted_R, wanted_R, self.undesirable * (1 - (-ahead_R).sigmoid()))


@preference_losses.register(
    "bco",
    source="Binary Classifier Optimization (arXiv 2404.04656), as in MPO (arXiv 2411.10442)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Bco:
    """``-log sigmoid(beta ratio_w - d) - log sigmoid(-(beta ratio_l - d))``, the sum of both sides of a pair.

    Of completions that were judged by themselves it is twice the mean of those that they are on: the same where there
    are as many wanted ones as others. ``d`` is the mean of all rewards ``beta ratio`` of earlier steps, chosen and
    rejected (from memory: the paper's is a moving average). TRL's ``bco_pair`` has 0 in its place. The paper's matching
    of the two sides' distributions of prompts is left out: both sides of a pair have the same prompt, and for other
    rows that is not so.
    """

    beta: Beta = 0.1
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE

    def init(self) -> dict[str, float]:
        """Nothing seen."""
        return {"mean": 0.0, "rows": 0.0}

    def observe(self, state: Mapping[str, float], signals: Signals) -> dict[str, float]:
        """The running mean with the update's completions in it."""
        metrics, new = signals.metrics, signals.metrics.get("rows", 0.0)
        if not new:
            return dict(state)
        wanted = metrics["wanted"]
        sums = wanted * metrics.get("ratio/chosen", 0.0) + (new - wanted) * metrics.get("ratio/rejected", 0.0)
        seen = state["rows"] + new
        return {"mean": state["mean"] + (self.beta * sums - new * state["mean"]) / seen, "rows": seen}

    def metrics(self, state: Mapping[str, float]) -> dict[str, float]:
        """The shift ``d``."""
        return {"shift": state["mean"]}

    def row_loss(self, state: Mapping[str, float] | None, rows: Rows) -> Tensor:
        """``[R]``: a mean over rows is half the mean over pairs of the sum of both, so each counts double."""
        ahead_R = self.beta * rows.ratio_R - (state["mean"] if state else 0.0)
        return -2 * logsigmoid(torch.where(rows.wanted_R, ahead_R, -ahead_R))
