"""The sinks that a recipe names: JSON lines, TensorBoard, Weights & Biases. The last two are imported when used."""

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from alignment.console import console_sink
from alignment.errors import UserError
from alignment.jsonl import to_json
from alignment.metrics import Record, Sink
from alignment.recipe import Recipe
from alignment.recipe_sections import WandbSink as WandbConfig
from alignment.recipe_yaml import SECRET_KEY, SECRET_VALUE
from alignment.runs import truncate_jsonl
from alignment.types import Group, Rollout, keyed_seed

_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def redact(value: Any) -> Any:
    """``value`` without what looks like a secret. Loading a recipe refuses those; this is the last door they meet."""
    if isinstance(value, Mapping):
        return {k: "***" if isinstance(v, str) and SECRET_KEY.search(str(k)) else redact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v) for v in value]
    return SECRET_VALUE.sub("***", _LOGIN.sub("***@", value)) if isinstance(value, str) else value


def make_sinks(recipe: Recipe) -> list[Sink]:
    """The sinks of ``run.sinks``, in the recipe's order."""
    made: list[Sink] = []
    for config in recipe.run.sinks:
        if isinstance(config, WandbConfig):
            made.append(WandbSink(config.project, config.entity, config.mode))
        else:
            made.append({"console": console_sink, "jsonl": JsonlSink, "tensorboard": TensorBoardSink}[config.name]())
    return made


class JsonlSink:
    """Appends to ``metrics.jsonl`` and ``rollouts.jsonl`` in the run's folder. Each line reaches the file at once.

    Lines of steps after the checkpoint that a run resumes from are dropped first: those steps are run again.

    Args:
        rollout_groups: Groups written of those that :meth:`rollouts` is given. Which ones depends on the step and the
            groups alone.
    """

    def __init__(self, rollout_groups: int = 2) -> None:
        self.rollout_groups = rollout_groups
        self._files: dict[str, TextIO] = {}

    def start(self, run: Mapping[str, Any]) -> None:
        resumed = run.get("resumed_from")
        for name in ("metrics", "rollouts"):
            path = Path(run["folder"]) / f"{name}.jsonl"
            truncate_jsonl(path, -1 if resumed is None else resumed)
            self._files[name] = path.open("a", encoding="utf-8", newline="\n", buffering=1)

    def log(self, record: Record) -> None:
        place = {"step": record.step, "stage": record.stage, "stage_step": record.stage_step, "kind": record.kind}
        taken = place.keys() & record.metrics.keys()
        if taken:
            raise UserError(f"metrics may not be called {', '.join(sorted(taken))}: each line has these already")
        metrics = {k: v if isinstance(v, int) else float(v) for k, v in record.metrics.items()}
        self._write("metrics", {**place, "time": round(time.time(), 3), **metrics})

    def rollouts(self, step: int, stage: str, groups: Sequence[Group]) -> None:
        chosen = sorted(groups, key=lambda g: keyed_seed("rollouts.jsonl", step, g.uid))[: self.rollout_groups]
        for group in sorted(chosen, key=lambda g: g.uid):
            columns = {k: v for k, v in group.prompt.row.items() if k != "prompt"}
            prompt = {"id": group.prompt.id, "prompt": group.prompt.row.get("prompt"), "columns": columns}
            sampled = [_describe(rollout) for rollout in group.rollouts]
            self._write("rollouts", {"step": step, "stage": stage, "group": group.uid, **prompt, "rollouts": sampled})

    def finish(self, result: Mapping[str, Any]) -> None:
        """``result.json`` is written by the run itself, whichever sinks it has."""

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        self._files[name].write(to_json(line) + "\n")


def _describe(rollout: Rollout) -> dict[str, Any]:
    return {
        "id": rollout.id,
        "text": rollout.text,
        "reward": rollout.reward,
        "correct": rollout.correct,
        "scores": {k: {"value": s.value, "status": s.status, "detail": s.detail} for k, s in rollout.scores.items()},
        "tokens": len(rollout.token_ids),
        "finish_reason": rollout.finish_reason,
        "source": rollout.source,
        "versions": rollout.versions,
    }


class TensorBoardSink:
    """Writes scalars under ``train/`` and ``eval/`` to the folder ``tensorboard`` of the run.

    On resume, points after the checkpoint are purged: those steps are run again.
    """

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, run: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise UserError(_missing("tensorboard")) from error
        resumed = run.get("resumed_from")
        self._writer = SummaryWriter(
            str(Path(run["folder"]) / "tensorboard"), purge_step=None if resumed is None else resumed + 1
        )
        if resumed is None:
            self._writer.add_text("recipe", f"```json\n{to_json(redact(run['recipe']))}\n```")

    def log(self, record: Record) -> None:
        for name, value in record.metrics.items():
            self._writer.add_scalar(f"{record.kind}/{name}", value, record.step)

    def rollouts(self, step: int, stage: str, groups: Sequence[Group]) -> None:
        """Rollouts are in ``rollouts.jsonl``."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """The result is in ``result.json``."""

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """Logs to Weights & Biases. The run's id is kept in the file ``wandb_id`` of the run, so that a resumed run goes on
    in the same place. The recipe goes along as the configuration, without secrets; no file and no output does.

    Args:
        project: The project there.
        entity: User or team; None for the account's default.
        mode: ``online``, ``offline`` or ``disabled``; None follows ``WANDB_MODE``.
    """

    def __init__(
        self,
        project: str = "alignment",
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        self.project, self.entity = project, entity
        self.mode: Literal["online", "offline", "disabled"] | None = mode
        self._run: Any = None

    def start(self, run: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(_missing("wandb")) from error
        folder = Path(run["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=run["name"],
                id=_run_id(folder, fresh=run.get("resumed_from") is None),
                resume="allow",
                dir=str(folder),
                config=redact(run["recipe"]),
                mode=self.mode,
                # Its capture of the output and its own messages would fight with the live display.
                settings=wandb.Settings(console="off", silent=True, save_code=False),
            )
        except wandb.UsageError as error:  # pyright: ignore[reportAttributeAccessIssue]
            remedy = "log in with `wandb login`, or set WANDB_MODE=offline in the environment"
            raise UserError(f"run.sinks names wandb, which cannot start: {error}; {remedy}") from error
        # A resumed run logs some steps again. W&B's own step must never go back, so ours is a metric.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self._run.log({"step": record.step, **{f"{record.kind}/{k}": v for k, v in record.metrics.items()}})

    def rollouts(self, step: int, stage: str, groups: Sequence[Group]) -> None:
        """Rollouts are in ``rollouts.jsonl``."""

    def finish(self, result: Mapping[str, Any]) -> None:
        self._run.summary.update({"status": result["status"], "eval": result["eval"]})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _run_id(folder: Path, *, fresh: bool) -> str:
    """The id in ``folder/wandb_id``; a new one when the run starts afresh or has none."""
    path = folder / "wandb_id"
    if fresh or not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _missing(extra: str) -> str:
    return f"run.sinks names {extra}, which is not installed; install the extra: pip install 'alignment-rl[{extra}]'"
