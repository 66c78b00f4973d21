"""``align replay``: computes credit and loss of a recorded step again, with or without changes, without the model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.objective import Objective
from alignment.algorithms.state import fresh
from alignment.algorithms.tokens import masked_mean
from alignment.errors import UserError
from alignment.flight import Flight, Update, load_flight
from alignment.recipe import OnlineStage, Recipe, load
from alignment.runs import Run, resolve
from alignment.types import Batch

ANNOTATED = {
    "old_logp": "old_logp_BT",
    "reference": "ref_logp_BT",
    "entropy": "entropy_BT",
    "entropy_drift": "entropy_drift_BT",
    "values": "values_BT",
}
_CREDITED = ("reward_B", "token_reward_BT", "adv_BT", "returns_BT", "weight_BT", "scale_BT")


@dataclass(frozen=True)
class Replay:
    """A recorded step beside the same step computed again."""

    flight: Flight
    batch: Batch
    """Credited again."""
    recorded: Mapping[str, float]
    recomputed: Mapping[str, float]
    pull_BT: Tensor
    """Derivative of the recomputed loss by each token's log-probability, summed over the updates."""

    @property
    def identical(self) -> bool:
        """Whether every advantage and every metric is the recorded one, bit for bit."""
        assert self.batch.adv_BT is not None and self.flight.batch.adv_BT is not None
        return torch.equal(self.batch.adv_BT, self.flight.batch.adv_BT) and self.recorded == self.recomputed


def replay(
    run: str | Path,
    step: int,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    output: str | Path = "runs",
) -> Replay:
    """Replays ``step`` of ``run`` under its recipe changed by ``overrides``, and shows it.

    The new log-probabilities are the recorded ones: the question answered is what this step would have been told to
    do, not where a whole run would have gone.

    Args:
        run: The run's folder, or its name inside ``output``.
        step: One of the steps that the flight recorder kept.
        overrides: ``stages.1.algorithm.advantage=rloo`` and the like, as for training.
        console: Where to show it; None shows nothing.
        output: Where names of runs are looked up.

    Raises:
        UserError: No such run or step; the changed recipe is wrong, or needs what was not recorded.
    """
    folder, which = resolve(str(run), output)
    if which != "latest":
        raise UserError(f"{run}: a replay reads the flight recorder, not a checkpoint; give RUN alone and --step")
    known = Run(folder)
    flight = load_flight(known.flight, step)
    recipe, changed = (load([known.recipe], texts, known.beside) for texts in ((), overrides))
    weights = {spec.column: spec.weight for spec in changed.rewards}
    was = dict(zip(flight.batch.objectives, flight.batch.weights_K.tolist(), strict=True))
    weights_K = torch.tensor([weights.get(name, was[name]) for name in was], dtype=torch.float32)
    result = recompute(flight, _algorithm(recipe, flight), _algorithm(changed, flight), weights_K)
    if console is not None:
        console.print(report(result, changed=bool(overrides)))
    return result


def recompute(flight: Flight, recorded: Algorithm, algorithm: Algorithm, weights_K: Tensor | None = None) -> Replay:
    """Credit and loss of ``flight`` under ``algorithm``.

    Args:
        flight: The recorded step.
        recorded: The algorithm that it was recorded under. A component of the same kind keeps its recorded state.
        algorithm: The one to compute.
        weights_K: Weights of the reward components; the recorded ones if None.

    Raises:
        UserError: ``algorithm`` needs what was not recorded.
    """
    before, now = recorded.components(), algorithm.components()
    kept = {name for name in now if type(now[name]) is type(before.get(name))}
    states = fresh(now) | {name: state for name, state in flight.states.items() if name in kept}
    objective = Objective.of(algorithm, states)
    batch = replace(flight.batch, **dict.fromkeys(_CREDITED))
    if weights_K is not None:
        batch = replace(batch, weights_K=weights_K)
    batch = _supplied(batch, flight, objective.needs() | algorithm.needs)
    if objective.entropies == "gradient" and any(c.entropy_BT is None for u in flight.updates for c in u.calls):
        raise UserError(_lacking(flight, "entropy"))
    batch = credit(batch, algorithm, states)
    pull_BT = torch.zeros(batch.ids_BT.shape)
    updates = [_update(batch, objective, update, pull_BT) for update in flight.updates]
    return Replay(
        flight,
        batch,
        _advantage_metrics(flight.batch) | _finish(objective, [[c.sums for c in u.calls] for u in flight.updates]),
        _advantage_metrics(batch) | _finish(objective, updates),
        pull_BT,
    )


def _algorithm(recipe: Recipe, flight: Flight) -> Algorithm:
    stage = recipe.stages[flight.stage] if flight.stage < len(recipe.stages) else None
    if not isinstance(stage, OnlineStage):
        raise UserError(f"step {flight.step} is of stage {flight.stage}, which is no online stage of the recipe")
    return stage.algorithm


def _supplied(batch: Batch, flight: Flight, needs: frozenset[str]) -> Batch:
    """``batch`` with every annotation that ``needs`` names.

    Of a step with one update, the policy before it is the one that the update's own numbers come from.
    """
    for need in sorted(needs & ANNOTATED.keys()):
        name = ANNOTATED[need]
        if getattr(batch, name) is not None:
            continue
        field = {"old_logp": "logp_BT", "entropy": "entropy_BT"}.get(need)
        calls = flight.updates[0].calls if len(flight.updates) == 1 and flight.logp_from == "update" else []
        if field is None or not calls or any(getattr(call, field) is None for call in calls):
            raise UserError(_lacking(flight, need))
        found_BT = torch.zeros(batch.ids_BT.shape)
        for call in calls:
            value_BT = getattr(call, field)
            found_BT[call.rows, : value_BT.shape[1]] = value_BT
        batch = replace(batch, **{name: found_BT})
    return batch


def _lacking(flight: Flight, need: str) -> str:
    held = ", ".join(sorted(n for n, field in ANNOTATED.items() if getattr(flight.batch, field) is not None)) or "none"
    return (
        f"step {flight.step} was recorded without {need!r}, which the changed algorithm needs (recorded: {held}). "
        "Leave the change out, or record a run whose recipe needs it"
    )


def _update(batch: Batch, objective: Objective, update: Update, pull_BT: Tensor) -> list[dict[str, float]]:
    """The sums of each call of one update, on the rows and in the order recorded; adds to ``pull_BT``."""
    place = {row: i for i, row in enumerate(update.rows.tolist())}
    minibatch = batch.rows(update.rows)
    if objective.wants_logp:
        minibatch = replace(minibatch, logp_BT=_logp_before(minibatch, update, place))
    minibatch = objective.prepare(minibatch)
    found = []
    for call in update.calls:
        micro = minibatch.rows([place[row] for row in call.rows.tolist()])
        width = micro.ids_BT.shape[1]
        logp_BT = call.logp_BT[:, :width].clone().requires_grad_()
        entropy_BT = None if call.entropy_BT is None else call.entropy_BT[:, :width]
        loss, sums = objective.loss(logp_BT, entropy_BT, micro)
        found.append({name: float(value) for name, value in sums.items()})
        (gradient_BT,) = torch.autograd.grad(loss, logp_BT)
        pull_BT[call.rows, :width] += gradient_BT
    return found


def _logp_before(minibatch: Batch, update: Update, place: Mapping[int, int]) -> Tensor:
    """Log-probabilities of the policy before the update's step: as recorded, or the numbers of the update itself."""
    if update.logp_BT is not None:
        return update.logp_BT
    logp_BT = torch.zeros(minibatch.ids_BT.shape)
    for call in update.calls:
        rows = [place[row] for row in call.rows.tolist()]
        width = min(logp_BT.shape[1], call.logp_BT.shape[1])
        logp_BT[rows, :width] = call.logp_BT[:, :width]
    return logp_BT


def _finish(objective: Objective, updates: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Metrics over all updates, from the sums of their calls: the loss per update, the others per token."""
    totals: dict[str, float] = {}
    for sums in chain.from_iterable(updates):
        for name, value in sums.items():
            join = max if name.endswith("_max") else float.__add__
            totals[name] = join(totals[name], value) if name in totals else value
    if not totals:
        return {}
    metrics = objective.finish({name: torch.tensor(total, dtype=torch.float64) for name, total in totals.items()})
    return metrics | {"loss": metrics["loss"] / sum(bool(calls) for calls in updates)}


def _advantage_metrics(batch: Batch) -> dict[str, float]:
    adv_BT, mask_BT = batch.adv_BT, batch.loss_mask_BT
    assert adv_BT is not None and batch.reward_B is not None
    rewards = batch.reward_B[batch.scored_B & ~batch.reward_B.isnan()]
    return {
        "reward": float(rewards.mean()) if len(rewards) else 0.0,
        "advantage_mean": float(masked_mean(adv_BT, mask_BT)),
        "advantage_abs_mean": float(masked_mean(adv_BT.abs(), mask_BT)),
        "advantage_zero": float(masked_mean((adv_BT == 0).float(), mask_BT)),
    }


# How it is shown


def report(result: Replay, *, changed: bool, groups: int = 8, tokens: int = 10) -> RenderableType:
    """Metrics, groups and tokens of a replay, as tables.

    Args:
        result: What :func:`recompute` found.
        changed: Whether the recipe was changed.
        groups: How many groups to show: those with the largest change, then the largest advantages.
        tokens: How many tokens to show: those that pull hardest.
    """
    flight = result.flight
    origin = {"update": "those of the update itself"}.get(flight.logp_from, f"{flight.logp_from} in their place")
    verdict = ("equal to the recorded step, bit for bit", "green") if result.identical else ("differs", "yellow")
    if not changed and not result.identical:
        verdict = ("not equal to the recorded step, though nothing was changed: other code or hardware", "red")
    parts = [Text.assemble(f"Step {flight.step}, {len(flight.batch)} rows: ", verdict)]
    parts += [Text(f"Log-probabilities: {origin}", "dim"), _metrics_table(result)]
    return Group(*parts, _groups_table(result, groups), _tokens_table(result, tokens))


def _table(title: str, *columns: str, left: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table


def _metrics_table(result: Replay) -> Table:
    table = _table("Metrics", "metric", "recorded", "recomputed", "difference", left=["metric"])
    for name in dict.fromkeys([*result.recorded, *result.recomputed]):
        was, now = result.recorded.get(name), result.recomputed.get(name)
        difference = "" if was is None or now is None or was == now else f"{now - was:+.3g}"
        table.add_row(name, *("-" if v is None else f"{v:.6g}" for v in (was, now)), difference)
    return table


def _groups_table(result: Replay, limit: int) -> Table:
    was_B, now_B = (_row_advantages(batch) for batch in (result.flight.batch, result.batch))
    reward_B, group_B = result.batch.reward_B, result.batch.group_B
    assert reward_B is not None
    by_group = {int(g): (group_B == g).nonzero()[:, 0] for g in group_B.unique()}

    def interest(g: int) -> tuple[float, float, int]:
        rows = by_group[g]
        return -float((now_B - was_B)[rows].abs().max()), -float(now_B[rows].abs().max()), g

    shown = sorted(sorted(by_group, key=interest)[:limit])
    title = f"Advantages, {len(shown)} of {len(by_group)} groups"
    table = _table(title, "group", "rewards", "recorded", "recomputed", left=["rewards", "recorded", "recomputed"])
    for g in shown:
        rows = by_group[g]
        scored = rows[~reward_B[rows].isnan()]
        counts = Counter(f"{r:.3g}" for r in sorted(reward_B[scored].tolist()))
        rewards = [f"{n} x {r}" if n > 1 else r for r, n in counts.items()]
        if len(scored) < len(rows):
            rewards.append(f"{len(rows) - len(scored)} unscored")
        table.add_row(str(g), ", ".join(rewards), *(_distinct(adv_B[scored]) for adv_B in (was_B, now_B)))
    return table


def _row_advantages(batch: Batch) -> Tensor:
    """Mean advantage of each row over its trained tokens."""
    assert batch.adv_BT is not None
    mask_BT = batch.loss_mask_BT.float()
    return (batch.adv_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)


def _distinct(values: Tensor, limit: int = 4) -> str:
    distinct = sorted({round(v, 4) for v in values.tolist()})
    return ", ".join(f"{v:+.3f}" for v in distinct[:limit]) + (", ..." if len(distinct) > limit else "")


def _tokens_table(result: Replay, limit: int) -> Table:
    batch, pull_BT = result.batch, result.pull_BT
    assert batch.adv_BT is not None
    table = _table("Tokens that pull hardest", "group", "row", "position", "token", "advantage", "d loss / d logp")
    width = batch.ids_BT.shape[1]
    order = pull_BT.abs().flatten().argsort(descending=True, stable=True)[:limit].tolist()
    for b, t in (divmod(i, width) for i in order):
        token = int(batch.ids_BT[b, t])
        text = repr(result.flight.tokens[token]) if token in result.flight.tokens else str(token)
        numbers = f"{float(batch.adv_BT[b, t]):+.4f}", f"{float(pull_BT[b, t]):+.3e}"
        table.add_row(str(int(batch.group_B[b])), str(b), str(t), Text(text), *numbers)
    return table
