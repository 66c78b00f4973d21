"""A sampler that answers with recorded completions, so that two runs train on the very same rollouts.

A plugin of recipes: ``sampler: {name: recorded, path: FILE}`` with ``transport: nowhere``.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from alignment.engines.config import Site, samplers, transports
from alignment.types import Completion, Group, Request


def record(path: Path, groups: Iterable[Group]) -> None:
    """Writes every rollout of ``groups``, each a single turn, by its id."""
    with path.open("w") as file:
        for rollout in (rollout for group in groups for rollout in group.rollouts):
            made = (rollout.token_ids, rollout.behaviour_logp, rollout.finish_reason, rollout.versions)
            file.write(json.dumps(asdict(Completion(rollout.id, *made))) + "\n")


@samplers.register("recorded", source="a test")
@dataclass(frozen=True)
class RecordedConfig:
    """Answers with what is in a file."""

    needs_module: ClassVar[bool] = False
    path: str

    def build(self, site: Site, learner: Any) -> "Recorded":
        return Recorded(Path(self.path))


class Recorded:
    name = "vllm"  # what made the records

    def __init__(self, path: Path) -> None:
        plain = [json.loads(line) for line in path.read_text().splitlines()]
        self.known = {c["id"]: c for c in plain}
        self.waiting: list[str] = []

    def add(self, requests: Sequence[Request]) -> None:
        self.waiting += [request.id for request in requests]

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        asked, self.waiting = self.waiting, []
        return [self._completion(self.known[id_]) for id_ in asked]

    def _completion(self, c: dict[str, Any]) -> Completion:
        versions = tuple((version, start) for version, start in c["versions"])
        return Completion(c["id"], tuple(c["token_ids"]), tuple(c["logp"]), c["finish_reason"], versions)

    def abort(self, ids: Collection[str]) -> None:
        self.waiting = [id_ for id_ in self.waiting if id_ not in ids]

    def close(self) -> None: ...


@transports.register("nowhere", source="a test")
@dataclass(frozen=True)
class Nowhere:
    """For a sampler that has no weights."""

    def build(self, learner: Any, sampler: Any) -> "Nowhere":
        return self

    def publish(self, version: int) -> dict[str, float]:
        return {}
