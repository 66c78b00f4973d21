"""The flight recorder: the last batches of a run, with all that credit and loss were computed from.

One safetensors file per step holds the batch's tensors, the log-probabilities that the learner had at each update, and,
as JSON in the header, component states, metrics and what the objective returned. :mod:`alignment.replay` reads it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignment.algorithms.objective import Objective
from alignment.durable import replace_file
from alignment.errors import UserError
from alignment.types import Batch

FORMAT = 1
_FILE = re.compile(r"step_(\d{8,})\.safetensors")


@dataclass(frozen=True)
class Call:
    """One call of ``objective.loss``: one micro-batch of one update."""

    rows: Tensor
    """int64: rows of the batch (while it is watched: the keys of the rollouts)."""
    logp_BT: Tensor
    entropy_BT: Tensor | None
    loss: float
    sums: Mapping[str, float]


@dataclass(frozen=True)
class Update:
    """One update: a mini-batch (``rows`` as in :class:`Call`) and the calls that it was split into."""

    rows: Tensor
    calls: list[Call] = field(default_factory=list)
    logp_BT: Tensor | None = None
    """Of the policy before the update's step, of these rows; where the objective asked for it and was watched."""


@dataclass
class Watched:
    """An objective that also remembers what the learner gave it and what it answered. The learner cannot tell."""

    objective: Objective
    updates: list[Update] = field(default_factory=list)

    def prepare(self, minibatch: Batch) -> Batch:
        """As :meth:`Objective.prepare`, which is called once per mini-batch."""
        prepared = self.objective.prepare(minibatch)
        logp_BT = None if prepared.logp_BT is None else prepared.logp_BT.cpu()
        self.updates.append(Update(minibatch.key_B.cpu(), logp_BT=logp_BT))
        return prepared

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`Objective.loss`."""
        loss, sums = self.objective.loss(logp_BT, entropy_BT, micro)
        entropy_BT = entropy_BT if entropy_BT is None else entropy_BT.detach().cpu()
        numbers = {name: float(value) for name, value in sums.items()}
        call = Call(micro.key_B.cpu(), logp_BT.detach().cpu(), entropy_BT, float(loss.detach()), numbers)
        self.updates[-1].calls.append(call)
        return loss, sums

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """As :meth:`Objective.finish`."""
        return self.objective.finish(sums)

    @property
    def epochs(self) -> int:
        """As :attr:`Objective.epochs`."""
        return self.objective.epochs

    @property
    def minibatches(self) -> int:
        """As :attr:`Objective.minibatches`."""
        return self.objective.minibatches

    @property
    def lr_factor(self) -> float:
        """As :attr:`Objective.lr_factor`."""
        return self.objective.lr_factor

    @property
    def update_norm(self) -> bool:
        """As :attr:`Objective.update_norm`."""
        return self.objective.update_norm

    @property
    def entropies(self) -> Literal["none", "value", "gradient"]:
        """As :attr:`Objective.entropies`."""
        return self.objective.entropies

    @property
    def wants_logp(self) -> bool:
        """As :attr:`Objective.wants_logp`."""
        return self.objective.wants_logp


@dataclass(frozen=True)
class Flight:
    """A recorded step."""

    step: int
    stage: int
    """Index of the stage in the recipe."""
    batch: Batch
    """After credit assignment."""
    states: Mapping[str, Any]
    """Component states that credit and objective used, by place."""
    metrics: Mapping[str, float]
    """What the learner returned."""
    updates: Sequence[Update]
    """In order; one without a token to train on has no calls."""
    logp_from: str
    """``update``: the log-probabilities of the calls are those of the updates themselves. ``old_logp`` or
    ``behaviour_logp``: nobody watched the update, and these stand in for them."""
    tokens: Mapping[int, str]
    """Text of each token id in the batch, where the recorder could tell."""


class FlightRecorder:
    """Keeps the last ``keep`` steps in ``folder``.

    Args:
        folder: Made when needed.
        keep: Steps to keep.
        token_text: The text of a token id, for people who read a replay.
    """

    def __init__(self, folder: Path, keep: int, token_text: Callable[[int], str] | None = None) -> None:
        self.folder, self.keep, self.token_text = folder, keep, token_text

    def record(
        self,
        batch: Batch,
        objective: Objective | Watched,
        states: Mapping[str, Any],
        stage: int,
        step: int,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Writes one step, then deletes those that are too old, and those after ``step``, which a resumed run redoes.

        Args:
            batch: After credit assignment, as it went to the learner.
            objective: The one that the learner used. If it was :class:`Watched`, the log-probabilities of the
                update itself are kept.
            states: Component states that credit and objective used, by place; JSON values.
            stage: Index of the stage in the recipe.
            step: The step that the update completed.
            metrics: What the learner returned.
        """
        batch = batch.to("cpu")
        updates, logp_from = _updates(batch, objective)
        tensors = {f"batch.{f.name}": v for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
        for i, update in enumerate(updates):
            tensors |= _tensors(f"update.{i}", update)
        meta = {
            "format": FORMAT,
            "step": step,
            "stage": stage,
            "batch": {"objectives": batch.objectives, "step": batch.step, "seed": batch.seed},
            "states": states,
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "updates": [[{"loss": c.loss, "sums": dict(c.sums)} for c in update.calls] for update in updates],
            "logp_from": logp_from,
            "tokens": {i: self.token_text(i) for i in batch.ids_BT.unique().tolist()} if self.token_text else {},
        }
        data = save({name: t.contiguous().clone() for name, t in tensors.items()}, {"flight": json.dumps(meta)})
        self.folder.mkdir(parents=True, exist_ok=True)
        path = _path(self.folder, step)
        replace_file(path, data, synced=False)  # every step; what a power cut damages, loading it says
        known = recorded_steps(self.folder)
        for other in set(known) - set([s for s in known if s <= step][-self.keep :]):
            _path(self.folder, other).unlink()
        return path


def recorded_steps(folder: Path) -> list[int]:
    """The steps that ``folder`` holds, in order."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))


def load_flight(folder: Path, step: int) -> Flight:
    """The recorded ``step``.

    Raises:
        UserError: It was not recorded, or the file is damaged or of another format.
    """
    path = _path(folder, step)
    if not path.exists():
        steps = recorded_steps(folder)
        kept = f"recorded steps: {', '.join(map(str, steps))}" if steps else "no step is recorded"
        raise UserError(f"{folder} has no step {step}; {kept} (run.flight_steps in the recipe sets how many are kept)")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["flight"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}; replay another step") from error
    if meta["format"] != FORMAT:
        raise UserError(
            f"{path} has format {meta['format']}, this version reads {FORMAT}; use the version that wrote it"
        )
    about = meta["batch"]
    batch = Batch(
        **{name.removeprefix("batch."): value for name, value in tensors.items() if name.startswith("batch.")},
        objectives=tuple(about["objectives"]),
        step=about["step"],
        seed=about["seed"],
    )
    updates = [_update(f"update.{i}", tensors, calls) for i, calls in enumerate(meta["updates"])]
    tokens = {int(i): text for i, text in meta["tokens"].items()}
    return Flight(step, meta["stage"], batch, meta["states"], meta["metrics"], updates, meta["logp_from"], tokens)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def _tensors(name: str, update: Update) -> dict[str, Tensor]:
    tensors = {f"{name}.rows": update.rows}
    if update.logp_BT is not None:
        tensors[f"{name}.logp_BT"] = update.logp_BT
    for i, call in enumerate(update.calls):
        tensors |= {f"{name}.{i}.rows": call.rows, f"{name}.{i}.logp_BT": call.logp_BT}
        if call.entropy_BT is not None:
            tensors[f"{name}.{i}.entropy_BT"] = call.entropy_BT
    return tensors


def _update(name: str, tensors: Mapping[str, Tensor], calls: Sequence[Mapping[str, Any]]) -> Update:
    """The inverse of :func:`_tensors`; ``calls`` has the numbers."""
    found = [
        Call(
            tensors[f"{name}.{i}.rows"],
            tensors[f"{name}.{i}.logp_BT"],
            tensors.get(f"{name}.{i}.entropy_BT"),
            call["loss"],
            call["sums"],
        )
        for i, call in enumerate(calls)
    ]
    return Update(tensors[f"{name}.rows"], found, tensors.get(f"{name}.logp_BT"))


def _updates(batch: Batch, objective: Objective | Watched) -> tuple[list[Update], str]:
    """What was watched, by row; else one update at the log-probabilities that the batch itself holds."""
    row_of = {key: row for row, key in enumerate(batch.key_B.tolist())}
    watched = objective.updates if isinstance(objective, Watched) else []
    if watched and len(row_of) == len(batch):  # two rows of one rollout cannot be told apart by their key

        def rows(keys: Tensor) -> Tensor:
            return torch.tensor([row_of[key] for key in keys.tolist()], dtype=torch.int64)

        def of_rows(update: Update) -> Update:
            calls = [replace(call, rows=rows(call.rows)) for call in update.calls]
            return replace(update, rows=rows(update.rows), calls=calls)

        return [of_rows(update) for update in watched], "update"
    name = "behaviour_logp" if batch.old_logp_BT is None else "old_logp"
    logp_BT = batch.behaviour_logp_BT if batch.old_logp_BT is None else batch.old_logp_BT
    plain = objective.objective if isinstance(objective, Watched) else objective
    loss, sums = plain.loss(logp_BT, batch.entropy_BT, plain.prepare(batch))
    numbers = {key: float(value) for key, value in sums.items()}
    every = torch.arange(len(batch))
    return [Update(every, [Call(every, logp_BT, batch.entropy_BT, float(loss), numbers)])], name
