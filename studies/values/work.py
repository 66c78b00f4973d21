"""The order of work: learning rates on seeds of their own, then every arm on every reported seed."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

from alignment.engines.value_model import ValueModel
from alignment.studies.cells import Cells
from studies.values import arms
from studies.values.heads import KnownStates, error, known_states
from studies.values.models import corrupted, fit
from studies.values.settings import Settings
from studies.values.world import World, make_world

Rows = list[dict[str, Any]]
Cell = tuple[str, int, Callable[[], Rows]]
"""Name, seed, and what computes its rows."""
Say = Callable[[str], None]
BASE = "scalar"
"""The head of the value model that decoding uses: the one of the paper on value-augmented sampling."""


class Start:
    """What the arms of a seed share, made when it is first needed."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.seed, self.settings = seed, settings
        self._model: tuple[float, ValueModel] | None = None

    @cached_property
    def world(self) -> World:
        """The frozen policy, the reward and labelled completions."""
        return make_world(self.seed, self.settings)

    @cached_property
    def known(self) -> KnownStates:
        """States of known value."""
        return known_states(self.world)

    def head(self, head: str, lr: float, noise: float) -> ValueModel:
        """A value model fitted to labels of which a share is corrupted."""
        return fit(self.world, head, lr, corrupted(self.world.labelled, noise, self.settings, self.seed))

    def model(self, lr: float) -> ValueModel:
        """The value model that arms decode with."""
        if self._model is None or self._model[0] != lr:
            self._model = (lr, self.head(BASE, lr, 0.0))
        return self._model[1]


def trials(start: Start, noises: Sequence[float]) -> Iterator[Cell]:
    """Cells of a seed that the learning rates of heads are chosen by."""
    for head in start.settings.heads:
        for lr in start.settings.value_lrs:
            for noise in noises:

                def cell(head: str = head, lr: float = lr, noise: float = noise) -> Rows:
                    return [{"head": head, "lr": lr, "error": error(start.head(head, lr, noise), start.known)}]

                yield _trial(head, lr, noise), start.seed, cell


def tuning(start: Start) -> Iterator[Cell]:
    """Cells of a seed that all learning rates are chosen by."""
    settings = start.settings
    yield from trials(start, settings.tuning_noises)
    for lr in settings.ppo_lrs:

        def tried(lr: float = lr) -> Rows:
            [row] = arms.ppo(start.world, settings.tuning_coefficient, lr)
            return [{"lr": lr, "objective": row["gold"] - settings.tuning_coefficient * row["kl"]}]

        yield f"tune_ppo/{lr:g}", start.seed, tried


def chosen(cells: Cells, settings: Settings) -> dict[str, float]:
    """The learning rate of each head, by the error over tuning seeds and noises, and of ``ppo``, by its objective."""
    rates = {head: best_rate(cells, settings, head, settings.tuning_noises) for head in settings.heads}
    rates["ppo"] = max(settings.ppo_lrs, key=lambda lr: _mean(cells, [f"tune_ppo/{lr:g}"], settings, "objective"))
    return rates


def best_rate(cells: Cells, settings: Settings, head: str, noises: Sequence[float]) -> float:
    """The learning rate of smallest error over tuning seeds and ``noises``."""
    names = {lr: [_trial(head, lr, noise) for noise in noises] for lr in settings.value_lrs}
    return min(settings.value_lrs, key=lambda lr: _mean(cells, names[lr], settings, "error"))


def reported(start: Start, rates: Mapping[str, float]) -> Iterator[Cell]:
    """Cells of a seed that the results are made of."""
    settings, seed, lr = start.settings, start.seed, rates[BASE]
    yield "frozen", seed, lambda: arms.frozen(start.world)
    yield f"best_of_n/{lr:g}", seed, lambda: arms.best_of_n(start.world, start.model(lr))
    yield f"vas/{lr:g}", seed, lambda: arms.value_augmented(start.world, start.model(lr), settings.top_k, "vas")

    def vocabulary() -> Rows:
        model = fit(start.world, BASE, lr, start.world.labelled, "vocabulary")
        return list(arms.value_augmented(start.world, model, 0, "vas_vocabulary"))

    yield f"vas_vocabulary/{lr:g}", seed, vocabulary
    for coefficient in settings.ppo_coefficients:

        def ppo(coefficient: float = coefficient) -> Rows:
            return list(arms.ppo(start.world, coefficient, rates["ppo"]))

        yield f"ppo/{coefficient:g}/{rates['ppo']:g}", seed, ppo
    for head in settings.heads:
        for noise in settings.noises:
            yield _fitted(start, head, noise, rates[head], plain=head == BASE and noise == 0)


def _fitted(start: Start, head: str, noise: float, lr: float, plain: bool) -> Cell:
    def cell() -> Rows:
        model = start.model(lr) if plain else start.head(head, lr, noise)
        return [{"arm": "head", "head": head, "noise": noise, "error": error(model, start.known)}]

    return f"head/{head}/{noise:g}/{lr:g}", start.seed, cell


def run(cells: Cells, settings: Settings, say: Say) -> dict[str, float]:
    """Computes what is missing; the learning rates that were chosen."""
    for seed in settings.tuning_seeds:
        _compute(cells, list(tuning(Start(seed, settings))), settings, say, f"tuning seed {seed}")
    rates = chosen(cells, settings)
    say("learning rates: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
    for i, seed in enumerate(settings.seeds):
        behind = len(settings.seeds) - i - 1
        _compute(cells, list(reported(Start(seed, settings), rates)), settings, say, f"seed {seed}", behind)
    return rates


def sensitivity(cells: Cells, settings: Settings, say: Say) -> None:
    """Computes what :func:`tuned_apart` needs: heads whose learning rate is chosen for each share of noise."""
    for seed in settings.tuning_seeds:
        _compute(cells, list(trials(Start(seed, settings), settings.noises)), settings, say, f"tuning seed {seed}")
    for i, seed in enumerate(settings.seeds):
        behind = len(settings.seeds) - i - 1
        _compute(cells, _apart(cells, Start(seed, settings)), settings, say, f"seed {seed}", behind)


def tuned_apart(cells: Cells, settings: Settings) -> dict[int, Rows] | None:
    """The rows of heads with learning rates of their own for each share of noise; None where they are not computed."""
    try:
        names = [name for name, _, _ in _apart(cells, Start(0, settings))]
        return {seed: [row for name in names for row in cells.found[name, seed]["rows"]] for seed in settings.seeds}
    except KeyError:
        return None


def _apart(cells: Cells, start: Start) -> list[Cell]:
    settings = start.settings
    pairs = [(head, noise) for head in settings.heads for noise in settings.noises]
    return [_fitted(start, h, n, best_rate(cells, settings, h, [n]), plain=h == BASE and n == 0) for h, n in pairs]


def results(cells: Cells, settings: Settings, rates: Mapping[str, float]) -> dict[int, Rows]:
    """The rows of each reported seed.

    Raises:
        KeyError: A cell is missing.
    """
    found: dict[int, Rows] = {}
    for seed in settings.seeds:
        names = [name for name, _, _ in reported(Start(seed, settings), rates)]
        found[seed] = [row for name in names for row in cells.found[name, seed]["rows"]]
    return found


def _compute(cells: Cells, todo: list[Cell], settings: Settings, say: Say, what: str, seeds_behind: int = 0) -> None:
    names = [name for name, _, _ in todo]
    for i, (name, seed, compute) in enumerate(todo):
        if cells.rows(name, seed) is not None:
            continue
        begun = time.monotonic()
        rows = compute()
        cells.add(name, seed, rows, time.monotonic() - begun)
        left = _left(cells, names[i + 1 :]) + seeds_behind * _left(cells, names)
        more = " and the seeds after it" if seeds_behind else ""
        say(f"{what}: {name} in {time.monotonic() - begun:.0f} s; this seed{more}: about {left / 60:.0f} min left")


def _left(cells: Cells, names: list[str]) -> float:
    mean = fmean(cell["seconds"] for cell in cells.found.values())
    return sum(cells.seconds(name.partition("/")[0], mean) for name in names)


def _trial(head: str, lr: float, noise: float) -> str:
    return f"tune_head/{head}/{lr:g}/{noise:g}"


def _mean(cells: Cells, names: list[str], settings: Settings, column: str) -> float:
    return fmean(cells.found[name, seed]["rows"][0][column] for name in names for seed in settings.tuning_seeds)
