"""Groups that were trained on, kept for curricula that replay: ``archive/step_00000012.jsonl`` in the run's folder.

A component's state names groups by step and uid; what they hold is here. A file is written before its step is
completed, and again when a resumed run does the step again: the same where the step is.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignment.durable import replace_file
from alignment.errors import UserError
from alignment.types import Group, Prompt, Rollout

_FILE = re.compile(r"step_(\d{8,})\.jsonl")
OPEN_STEPS = 8
"""Steps whose lines are held in memory."""


@dataclass
class GroupArchive:
    """The folder of one run. Prompts are not written: they are looked up by their ids."""

    folder: Path
    prompts: Sequence[Prompt]
    max_age: int
    """How many steps back groups may be asked for."""
    _lines: OrderedDict[int, Mapping[int, str]] = field(default_factory=OrderedDict)
    _by_id: dict[str, Prompt] = field(default_factory=dict)

    def add(self, step: int, groups: Iterable[Group]) -> None:
        """Writes the groups of the batch that is trained at ``step``."""
        self.folder.mkdir(exist_ok=True)
        lines = [
            json.dumps({"uid": g.uid, "prompt": g.prompt.id, "rollouts": [r.to_json() for r in g.rollouts]})
            for g in groups
        ]
        replace_file(self._path(step), "".join(f"{line}\n" for line in lines).encode(), synced=False)
        self._lines.pop(step, None)

    def group(self, step: int, uid: int) -> Group:
        """The group ``uid`` of the batch that was trained at ``step``, as it was then.

        Raises:
            UserError: It is not there: somebody removed or changed the file.
        """
        line = self._of(step).get(uid)
        if line is None:
            raise UserError(
                f"{self._path(step)} lacks group {uid}, which is to be trained on again; put the file back, or start "
                f"again with --fresh (the old run is kept aside)"
            )
        return self._group(line)

    def groups(self, step: int, first: int, count: int) -> list[Group]:
        """``count`` groups of the batch that was sampled at ``step``, from the one numbered ``first`` on.

        Raises:
            UserError: They are not there: somebody removed the file.
        """
        lines = self._of(step)
        if not lines:
            raise UserError(
                f"{self._path(step)} is not there, and the run's next steps train on it; put the file back, or start "
                f"again with --fresh (the old run is kept aside)"
            )
        return [self._group(line) for line in list(lines.values())[first : first + count]]

    def _group(self, line: str) -> Group:
        found = json.loads(line)
        if not self._by_id:
            self._by_id = {prompt.id: prompt for prompt in self.prompts}
        rollouts = tuple(Rollout.from_json(rollout) for rollout in found["rollouts"])
        return Group(found["uid"], self._by_id[found["prompt"]], rollouts)

    def prune(self, anchors: Iterable[int]) -> None:
        """Removes what a run that goes on from any of the steps ``anchors`` will not ask for."""
        anchors = list(anchors)
        for step, path in self._files().items():
            if not any(anchor - self.max_age <= step < anchor for anchor in anchors):
                path.unlink()

    def _of(self, step: int) -> Mapping[int, str]:
        """The lines of a step, by uid."""
        if step not in self._lines:
            path = self._path(step)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            self._lines[step] = {int(re.findall(r"\d+", line)[0]): line for line in lines}
            while len(self._lines) > OPEN_STEPS:
                self._lines.popitem(last=False)
        return self._lines[step]

    def _files(self) -> dict[int, Path]:
        paths = self.folder.iterdir() if self.folder.exists() else ()
        return {int(found[1]): path for path in paths if (found := _FILE.fullmatch(path.name))}

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.jsonl"
