"""The account of every group: trained, dropped and by whom, or in flight. ``ledger.jsonl`` in the run's folder; and
``evaluations.jsonl``, what evaluations found of each problem.

One line per online step: ``{"step", "trained", "replayed", "dropped": {uid: by}, "in_flight", "launched"}`` with the
groups' uids. Uids count launches, so every number below ``launched`` is in exactly one of these places.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.runs import truncate_jsonl
from alignment.score import Tally

if TYPE_CHECKING:
    from alignment.collect import Sealed


@dataclass(frozen=True)
class Ledger:
    """The file ``path``, one line per step."""

    path: Path

    def append(self, step: int, sealed: "Sealed") -> None:
        """Writes what became of the groups of the batch that made ``step``."""
        fresh = {group.uid for group in sealed.fresh}
        line = {
            "step": step,
            "trained": sorted(fresh),
            "replayed": [g.uid for g in sealed.groups if g.uid not in fresh],
            "dropped": {str(uid): by for uid, by in sealed.dropped_by.items()},
            "in_flight": [uid for uid, _ in sealed.state.in_flight],
            "launched": sealed.state.launched,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drops the lines of steps after ``step``, which are run again."""
        truncate_jsonl(self.path, step)

    def fates(self) -> dict[int, str]:
        """``trained``, ``dropped by NAME`` or ``in flight`` for every uid, as of the last line.

        Raises:
            ValueError: A uid has no fate, or two: the account does not add up.
        """
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        found: dict[int, str] = {}
        for line in lines:
            dropped = {int(uid): f"dropped by {by}" for uid, by in line["dropped"].items()}
            fates = dict.fromkeys(line["trained"], "trained") | dropped
            settled = [*line["trained"], *dropped]
            if twice := sorted((found.keys() & fates.keys()) | {uid for uid, n in Counter(settled).items() if n > 1}):
                raise ValueError(f"{self.path}: step {line['step']} uses groups {twice} a second time")
            found |= fates
        if lines:
            if twice := sorted(found.keys() & set(lines[-1]["in_flight"])):
                raise ValueError(f"{self.path}: groups {twice} are settled and in flight")
            found |= dict.fromkeys(lines[-1]["in_flight"], "in flight")
            if lost := sorted(set(range(lines[-1]["launched"])) - found.keys()):
                raise ValueError(f"{self.path}: nobody knows what became of groups {lost}")
        return found


@dataclass(frozen=True)
class Verdicts:
    """The file ``path``, one line per evaluation: ``{"step", "problems": {id: [correct, judged, total]}}``, the fields
    of :class:`~alignment.score.Tally`."""

    path: Path

    def append(self, step: int, problems: Mapping[str, Tally]) -> None:
        """Writes what was found of every problem."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "problems": problems}) + "\n")

    def rewind(self, step: int) -> None:
        """Drops the lines of evaluations after ``step``, which are made again; -1 drops them all."""
        truncate_jsonl(self.path, step)

    def read(self) -> dict[int, dict[str, Tally]]:
        """The verdicts by step."""
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return {line["step"]: {id_: Tally(*found) for id_, found in line["problems"].items()} for line in lines}
