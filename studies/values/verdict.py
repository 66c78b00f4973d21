"""From rows to verdicts: contrasts of a claim that was written down before, each with an interval and one word."""

import hashlib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from alignment.studies.statistics import Word, word
from studies.values.measure import at_kl, best_of_n_kl, interval

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """What was claimed before anything was measured."""

    text: str
    primary: Mapping[str, Any]
    secondary: Sequence[Mapping[str, Any]]
    regime: Sequence[Mapping[str, Any]]
    papers: Sequence[Mapping[str, Any]]
    sha256: str
    """Of the file."""


def read_claim(path: Path) -> Claim:
    """The claim of a TOML file.

    Raises:
        ValueError: There is none, or it lacks something.
    """
    try:
        data = path.read_bytes()
        claim = tomllib.loads(data.decode())
        parts = {name: claim[name] for name in ("primary", "secondary", "regime", "papers")}
        return Claim(claim["claim"], **parts, sha256=hashlib.sha256(data).hexdigest())
    except (OSError, KeyError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f"{path} is no claim ({error}); the study's own is recipes/studies/values/claim.toml"
        ) from error


def verdict(differences: Sequence[float], minimum: float, regime: bool = True) -> Word:
    """One word on a claim that the mean of ``differences``, one for each seed, is at least ``minimum``; see
    :func:`alignment.studies.statistics.word`."""
    return word(fmean(differences), interval(differences), minimum, regime)


@dataclass(frozen=True)
class Outcome:
    """What came of a contrast."""

    name: str
    text: str
    unit: str
    differences: Sequence[float]
    """One for each seed."""
    minimum: float
    word: Word

    def to_json(self) -> dict[str, Any]:
        """As plain values; infinite ends of an interval are None."""
        low, high = (end if math.isfinite(end) else None for end in interval(self.differences))
        about = {"name": self.name, "text": self.text, "unit": self.unit, "minimum_effect": self.minimum}
        numbers = {"mean": fmean(self.differences), "interval": [low, high], "differences": list(self.differences)}
        return about | numbers | {"verdict": self.word}


def judge(claim: Claim, rows: Mapping[int, Rows]) -> tuple[list[dict[str, Any]], list[Outcome]]:
    """How each gate of the regime stands, and the outcome of every contrast, the primary first.

    Args:
        claim: Its contrasts name arms.
        rows: Of each seed.
    """
    gates = [_gate(gate, rows) for gate in claim.regime]
    reached = all(gate["met"] for gate in gates)
    return gates, [_outcome(contrast, rows, reached) for contrast in (claim.primary, *claim.secondary)]


def judge_heads(claim: Claim, rows: Mapping[int, Rows]) -> list[Outcome]:
    """The outcomes of the contrasts between heads alone, on other rows than those that were claimed of."""
    return [_outcome(contrast, rows, True) for contrast in claim.secondary if contrast["kind"] == "heads"]


def family(rows: Rows, arm: str) -> list[Mapping[str, Any]]:
    """The members of an arm, the frozen policy at 0 nats among them."""
    return [row for row in rows if row["arm"] in ("frozen", arm)] if arm != "frozen" else _of(rows, arm)


def gold_at(rows: Rows, arm: str, kl: float) -> float:
    """Gold that an arm attains within ``kl`` nats, see :func:`studies.values.measure.at_kl`."""
    return at_kl([(row["kl"], row["gold"]) for row in family(rows, arm)], kl)


def gold_for(rows: Rows, arm: str, flop: float) -> float:
    """Gold that an arm attains with ``flop`` operations per completion, interpolated over their logarithm."""
    return at_kl([(math.log(row["flop"]), row["gold"]) for row in _of(rows, arm)], math.log(flop))


def _outcome(contrast: Mapping[str, Any], rows: Mapping[int, Rows], reached: bool) -> Outcome:
    found = [_difference(contrast, of_seed) for of_seed in rows.values()]
    word = verdict(found, contrast["minimum_effect"], reached)
    return Outcome(contrast["name"], contrast["text"], contrast["unit"], found, contrast["minimum_effect"], word)


def _of(rows: Rows, arm: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["arm"] == arm]


def _difference(contrast: Mapping[str, Any], rows: Rows) -> float:
    if contrast["kind"] == "heads":
        a, b = (_error(rows, contrast[side], contrast["noise"]) for side in ("a", "b"))
        return math.log(b / a)  # of errors, so a smaller one of a is a gain
    kl = best_of_n_kl(contrast["at_best_of"])
    a = gold_at(rows, contrast["a"], kl)
    if contrast["kind"] == "matched_flop":
        return a - gold_for(rows, contrast["b"], _of(rows, contrast["a"])[0]["flop"])
    return a - gold_at(rows, contrast["b"], kl)


def _error(rows: Rows, head: str, noise: float) -> float:
    [row] = [row for row in _of(rows, "head") if row["head"] == head and row["noise"] == noise]
    return row["error"]


def _gate(gate: Mapping[str, Any], rows: Mapping[int, Rows]) -> dict[str, Any]:
    value = fmean(_gate_value(gate["what"], of_seed) for of_seed in rows.values())
    return {"text": gate["text"], "at_least": gate["at_least"], "measured": value, "met": value >= gate["at_least"]}


def _gate_value(what: str, rows: Rows) -> float:
    if what == "oracle_gain":
        return max(row["gold"] for row in _of(rows, "oracle")) - _of(rows, "frozen")[0]["gold"]
    assert what == "explained_variance_end", what
    return _of(rows, "value_model")[0][what]
