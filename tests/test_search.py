"""The search for numbers of a recipe: it is ``nelder_mead`` over runs, and the runs' folders are its memory."""

import json
from pathlib import Path
from typing import Any

import pytest

import alignment.search as search_module
from alignment.algorithms.nelder_mead import nelder_mead
from alignment.errors import UserError
from alignment.recipe import Recipe
from alignment.runs import Run
from alignment.search import search
from alignment.signals import Stopped
from tests.test_train import Recorder, lines
from tests.tiny import RECIPE, merged, write

HERE = "stages.0.algorithm.weighting.thresholds"
LOW, EVEN = ({"name": "format", "as": name, "pattern": p} for name, p in (("low", "[0-4].*"), ("even", ".*[02468]")))
HELD = {"low": 0.5, "even": 0.5}
BOUNDS = {f"{HERE}.{name}": (0.0, 1.0) for name in HELD}
CORNERS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]


def recipe(folder: Path, **thresholds: float) -> Path:
    """The tiny recipe with a Lagrangian; only names of thresholds matter, a search sets the numbers."""
    weighting = {"name": "lagrangian", "thresholds": thresholds or HELD}
    online = merged(RECIPE["stages"][1], {"steps": 2, "algorithm": {"weighting": weighting}})
    return write(folder, {"rewards": ["exact_match", LOW, EVEN], "evaluation": {"every": 0}, "stages": [online]})


def bowl(point: Any) -> float:
    return (point[0] - 0.3) ** 2 + (point[1] - 0.7) ** 2


@pytest.fixture
def trained(monkeypatch):
    """The points that were trained, in order; a run is worth ``1 - bowl``."""
    points: list[list[float]] = []

    def train(recipe: Recipe, **_: Any) -> dict[str, Any]:
        folder = Path(recipe.run.output) / recipe.run.name
        resolved = recipe.resolved()
        point = list(resolved["stages"][0]["algorithm"]["weighting"].get("thresholds", {"any": 0, "value": 0}).values())
        if not Run(folder).recipe.exists():
            points.append(point)
            folder.mkdir(parents=True)
        Run(folder).write_recipe(resolved, recipe.folder)
        lines = [{"kind": "eval", "accuracy": 9.0}, {"kind": "eval", "accuracy": 1 - bowl(point)}, {"kind": "train"}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"status": "complete", "folder": str(folder)}

    monkeypatch.setattr(search_module, "train", train)
    return points


def test_it_takes_the_steps_of_nelder_mead(tmp_path, trained):
    cache: Any = []
    found = nelder_mead(bowl, CORNERS, iterations=8, cache=cache)
    given: dict[str, Any] = {"iterations": 8, "start": CORNERS, "near": 5e-3 / 4}
    candidates = search(recipe(tmp_path), dict.fromkeys(BOUNDS, (-2.0, 2.0)), **given)
    assert trained == [point for point, _ in cache] and len(candidates) == found.evaluations == 13
    assert list(candidates[0].settings) == list(BOUNDS) and list(candidates[0].settings.values()) == found.point
    assert [c.value for c in candidates] == sorted((1 - value for _, value in cache), reverse=True)
    assert {c.folder.name for c in candidates} == {f"tiny.candidate-{i}" for i in range(13)}
    again = search(recipe(tmp_path), dict.fromkeys(BOUNDS, (-2.0, 2.0)), **given)
    assert again == candidates and len(trained) == 13, "the folders are its memory"


def test_what_is_close_to_a_run_that_is_there_is_not_trained(tmp_path, trained):
    path = recipe(tmp_path)
    first = search(path, BOUNDS, iterations=0, start=CORNERS)
    assert len(trained) == 3
    again = search(path, BOUNDS, iterations=0, start=[(0.004, 0.004), (0.996, 0.0), (0.0, 1.0)])
    assert len(trained) == 3 and again == first
    search(path, BOUNDS, iterations=0, start=[(0.006, 0.004), (0.996, 0.0), (0.0, 1.0)])
    assert trained[3:] == [[0.006, 0.004]]


def test_what_is_close_hangs_on_the_width_of_the_bounds(tmp_path, trained):
    bounds = {f"{HERE}.low": (0.0, 1e-3), f"{HERE}.even": (0.0, 1.0)}
    search(recipe(tmp_path), bounds, iterations=0, start=[(0.0, 0.0), (1e-5, 0.0), (4e-6, 0.0)])
    assert trained == [[0.0, 0.0], [1e-5, 0.0]]


def test_it_starts_within_the_bounds_and_stays_there(tmp_path, trained):
    bounds = {key: (low, 0.5) for key, low in zip(BOUNDS, (0.1, 0.2), strict=True)}
    candidates = search(recipe(tmp_path), bounds, iterations=6)
    assert all(0.1 <= x <= 0.5 and 0.2 <= y <= 0.5 for x, y in trained)
    assert all(0.1 < x < 0.5 and 0.2 < y < 0.5 for x, y in trained[:3]), "drawn"
    assert candidates[0].settings[f"{HERE}.even"] == 0.5, "the best is at an end"
    search(recipe(tmp_path), bounds, iterations=6)
    assert len(trained) == len(candidates), "the same draws"


NOISY = ["evaluation.samples=4", "evaluation.sampling.temperature=1.0", "stages.0.learner.lr=0.03"]


class SecondRun(Recorder):
    """Asks for a stop in the second run, after its first step."""

    def finish(self, result: Any) -> None:
        self.stop_after = 1


def test_a_search_that_was_stopped_goes_on_with_the_run_that_was_under_way(tmp_path):
    """Real runs, of one threshold."""
    key, found = f"{HERE}.low", []
    given: dict[str, Any] = {"metric": "reward/even", "iterations": 0, "overrides": NOISY}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        path = recipe(tmp_path / name, low=0.5)
        if name == "parts":
            with pytest.raises(Stopped):
                search(path, {key: (0.2, 0.9)}, sinks=[SecondRun()], **given)
            assert len(list((tmp_path / name / "runs").iterdir())) == 2
        found.append(search(path, {key: (0.2, 0.9)}, **given))
    whole, parts = ([(dict(c.settings), c.value, c.folder.name) for c in each] for each in found)
    assert whole == parts and len({settings[key] for settings, *_ in whole}) == len(whole) == 2
    for one, other in zip(*found, strict=True):
        assert lines(str(one.folder)) == lines(str(other.folder))
        last = [line for line in lines(str(one.folder)) if line["kind"] == "eval"][-1]
        assert one.value == last["reward/even"] and last["step"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bounds": {}}, r"low < high, by key; not {}"),
        ({"bounds": {f"{HERE}.low": 0.5}}, "bounds are pairs"),
        ({"bounds": {f"{HERE}.low": (0.1, float("inf"))}}, "of finite numbers"),
        ({"start": [(0.0, 0.0), (2.0, 0.0), (0.0, 1.0)]}, r"start: \(2.0, 0.0\) lies outside the bounds"),
        ({"bounds": {f"{HERE}.low": (0.5, 0.5)}}, "low < high, by key; not .*: [(]0.5, 0.5[)]"),
        ({"start": CORNERS[:2]}, "start needs 3 points of 2 numbers"),
        ({"overrides": ["data.eval=null"]}, "has no data.eval"),
        ({"metric": "accurcy"}, "has no number 'accurcy'; it has accuracy"),
        ({"bounds": {f"{HERE}.lwo": (0.0, 1.0)}}, "lwo, which is no reward of this recipe"),
    ],
)
def test_mistakes(tmp_path, trained, change, said):
    given: dict[str, Any] = {"bounds": BOUNDS, "start": CORNERS} | change
    if "bounds" in change:
        given["start"] = None
    with pytest.raises(UserError, match=said):
        search(recipe(tmp_path), **given)


def test_a_folder_of_another_search_is_refused(tmp_path, trained):
    path = recipe(tmp_path)
    search(path, {"stages.0.learner.lr": (0.1, 0.2)}, iterations=0, overrides=["stages.0.algorithm.weighting=fixed"])
    with pytest.raises(UserError, match=rf"candidate-0 is no candidate for {HERE}.low, {HERE}.even; give this search"):
        search(path, BOUNDS, iterations=0)
