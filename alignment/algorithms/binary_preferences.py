"""Losses that ask of each completion whether it was wanted, not which of two was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.algorithms.preferences import REFERENCE, Beta, Pairs, Rows, Weight, preference_losses
from alignment.registry import option
from alignment.types import Signals


@preference_losses.register("kto", source="KTO (arXiv 2402.01306)", evidence="end to end")
@dataclass(frozen=True)
class Kto:
    """``d (1 - sigmoid(beta (ratio - z)))`` of a wanted completion, ``u (1 - sigmoid(beta (z - ratio)))`` of another.

    ``z`` estimates the divergence from the reference: the mean ratio, at least 0 and without gradient, over rows of the
    mini-batch in which each prompt is followed by a completion of the pair before, of another prompt; it is 0 where
    all pairs have one prompt. The paper keeps ``d n_wanted / (u n_unwanted)`` between 1 and 4/3.
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
    """``-log sigmoid(beta ratio_w - d) - log sigmoid(-(beta ratio_l - d))``, the sum of both sides.

    ``d`` is the mean of all rewards ``beta ratio`` of earlier steps, chosen and rejected, each step by its pairs (from
    memory: the paper's is a moving average). TRL's ``bco_pair`` has 0 in its place. The paper's matching of the two
    sides' distributions of prompts is left out: both sides of a pair have the same prompt.
    """

    beta: Beta = 0.1
    weight: Weight = 1.0
    needs: ClassVar[tuple[str, ...]] = REFERENCE

    def init(self) -> dict[str, float]:
        """Nothing seen."""
        return {"mean": 0.0, "pairs": 0.0}

    def observe(self, state: Mapping[str, float], signals: Signals) -> dict[str, float]:
        """The running mean with the update's pairs in it."""
        metrics = signals.metrics
        new = metrics.get("pairs", 0.0)
        if not new or "ratio/chosen" not in metrics:
            return dict(state)
        mean = self.beta * (metrics["ratio/chosen"] + metrics["ratio/rejected"]) / 2
        seen = state["pairs"] + new
        return {"mean": state["mean"] + (mean - state["mean"]) * new / seen, "pairs": seen}

    def metrics(self, state: Mapping[str, float]) -> dict[str, float]:
        """The shift ``d``."""
        return {"shift": state["mean"]}

    def pair_loss(self, state: Mapping[str, float] | None, pairs: Pairs) -> Tensor:
        """``[P]``."""
        shift = state["mean"] if state else 0.0
        chosen_P, rejected_P = self.beta * pairs.chosen.ratio_R - shift, self.beta * pairs.rejected.ratio_R - shift
        return -logsigmoid(chosen_P) - logsigmoid(-rejected_P)
