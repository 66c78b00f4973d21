"""Components of every kind at once on vLLM, DeepSpeed and Ray: each has its effect, and a run that died and went on is
the uninterrupted one.

That components do so on the embedded engines is said in ``test_curricula_learned.py``, ``test_weightings.py``,
``algorithms/test_entropy_controls.py``, ``test_mixing.py`` and ``test_exact_resume.py``.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import alignment
import alignment.job as job_module
from alignment.checkpoint import Checkpoints
from alignment.engines.deepspeed_learner import DeepSpeedLearner
from alignment.evaluation.evaluate import Evaluation
from alignment.runs import Run
from alignment.types import Group
from tests.recorded_rollouts import record
from tests.test_real_engines import CLUSTER
from tests.test_train import Recorder, contents
from tests.tiny import SUMS, merged, tiny

DONE, LEFT = 5, 4
"""Steps before a run dies and after: three supervised and two online ones, and the other online ones."""
REWARDS = [
    {"name": "format", "as": "low", "pattern": "[01].*"},
    {"name": "format", "as": "digit", "pattern": ".*[0-9]", "weight": 0.5},
]
"""Ones that an untrained model sometimes earns, the first too seldom for every group to have a success."""
LEVELS: dict[str, Any] = {"name": "procedural", "task": {"name": "arithmetic", "sizes": [4, 9]}, "levels": [1, 2]}


def recipe(name: str, data: dict[str, Any], **stage: Any) -> dict[str, Any]:
    """What the tiny recipe becomes: every prompt has a demonstration."""
    same = data | {"split": "train"}
    changes = {
        "rewards": REWARDS,
        "data": {"train": same, "demonstrations": same},
        "stages": {1: {"steps": 6, **stage}},
    }
    return merged(CLUSTER, {"run": {"name": name, "save_every": 1}, **changes})


@dataclass
class Seen:
    """What became of a run."""

    folder: str = ""
    steps: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the online steps."""
    groups: list[Group] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    grams: list[Tensor] = field(default_factory=list)

    @property
    def saved(self) -> dict[str, Any]:
        """States of components in the newest checkpoint."""
        raw = contents(self.folder)["state.json"]
        assert isinstance(raw, bytes)
        return json.loads(raw)["components"]

    def column(self, name: str) -> list[float]:
        """A metric that every step has."""
        return [step[name] for step in self.steps]

    def moved(self, *names: str) -> bool:
        """Whether each of these changed after the first step, which has nothing to go by."""
        return all(len(set(self.column(name)[1:])) > 1 for name in names)


def run(folder: Path, change: dict[str, Any], patch: Any, given: Sequence[Evaluation] = ()) -> Seen:
    """Trains, or goes on; evaluations are ``given``, if any are."""
    seen, answers, sink = Seen(), iter(given), Recorder()
    evaluate, gram = job_module.evaluate, DeepSpeedLearner.gram

    def evaluated(*args: Any) -> Evaluation:
        seen.evaluations.append(next(answers) if given else evaluate(*args))
        return seen.evaluations[-1]

    def measured(*args: Any) -> Tensor:
        seen.grams.append(gram(*args))
        return seen.grams[-1]

    folder.mkdir(exist_ok=True)
    with patch.context() as patched:
        patched.setattr(job_module, "evaluate", evaluated)
        patched.setattr(DeepSpeedLearner, "gram", measured)
        result = alignment.train(tiny(folder, change), sinks=[sink])
    assert result["status"] == "complete"
    seen.folder, seen.groups = result["folder"], sink.groups
    seen.steps = [dict(r.metrics) for r in sink.records if r.kind == "train" and r.stage == "rl"]
    return seen


def gone_on(folder: Path, change: dict[str, Any], patch: Any, whole: Seen) -> Seen:
    """The rest of ``whole``, had it died when ``DONE`` steps were saved, on the same rollouts and evaluations: which
    token comes out of vLLM may hang on what was batched with it."""
    (folder / "parts").mkdir()
    record(folder / "rollouts.jsonl", whole.groups)
    recorded = {"sampler": {"name": "recorded", "path": str(folder / "rollouts.jsonl")}, "transport": "nowhere"}
    again = merged(change, {"plugins": ["tests.recorded_rollouts"], "stages": {1: recorded}})
    recipe = tiny(folder / "parts", again)
    copy = Run(Path(recipe.run.output) / recipe.run.name)
    shutil.copytree(whole.folder, copy.folder)
    copy.result.unlink()
    copy.write_recipe(recipe.resolved(), recipe.folder)  # only the sampler is another
    checkpoints = Checkpoints(copy.checkpoints)
    for step in [step for step in checkpoints.steps() if step > DONE]:
        shutil.rmtree(checkpoints.folder_of(step))
    (copy.checkpoints / "LATEST").write_text(f"{checkpoints.folder_of(DONE).name}\n")
    return run(folder / "parts", again, patch, whole.evaluations[-LEFT:])


def assert_same(rest: Seen, whole: Seen) -> None:
    """Weights, moments, roles, the states of components and all metrics that no clock or transport had a part in."""
    ours, theirs = contents(rest.folder), contents(whole.folder)
    learned = [name for name in ours if name.startswith("learner/")]
    assert ours.keys() == theirs.keys() and len(learned) > 3
    assert [name for name in learned if ours[name] != theirs[name]] == []
    assert rest.saved == whole.saved
    assert len(rest.steps) == LEFT and list(map(timeless, rest.steps)) == list(map(timeless, whole.steps[-LEFT:]))


def timeless(step: dict[str, float]) -> dict[str, float]:
    passing = ("time/", "publish_", "tokens_per_s", "rollouts_per_s")
    return {name: value for name, value in step.items() if not name.startswith(passing)}


def test_a_prompt_model_gradients_steering_and_interleaved_imitation(live_ray, tmp_path, monkeypatch):
    """One batch is in flight while one is learned from, also when the run dies."""
    change = recipe(
        "model",
        SUMS,
        prompt_value={"name": "model", "lr": 1e-2},
        curricula=[{"name": "instance_filter", "rollouts": 4}, {"name": "prompt_curriculum", "oversample": 2}],
        algorithm={
            "minibatches": 2,
            "weighting": {"name": "gradient", "rate": 0.1, "max_norm": None},
            "entropy_controls": [{"name": "steer", "lambda_min": 0.5}, {"name": "clip_cov", "share": 0.2}],
            "mixer": {"name": "relift", "batch_size": 1, "lr_ratio": 0.5},
        },
    )
    change = merged(change, {"data": {"eval": None}})
    whole = run(tmp_path / "whole", change, monkeypatch)
    assert {r.sampler for g in whole.groups for r in g.rollouts} == {"vllm"} and whole.steps[0]["mismatch_kl"] < 1e-6
    assert whole.column("staleness") == [0, 1, 1, 1, 1, 1]

    saved = whole.saved
    assert saved.keys() == {"curricula.0", "curricula.1", "curricula.2", "weighting", "mixer"}
    assert whole.moved("curricula.2/candidates", "curricula.2/chosen", "curricula.2/error")
    assert min(whole.column("prompt_value/fitted_tokens")) > 0 and saved["curricula.2"]["version"] == 6
    assert whole.column("curricula.1/dropped")[-1] == len(saved["curricula.1"]["dropped"]) > 0

    assert len(whole.grams) == 6 and all((gram.diagonal() >= 0).all() for gram in whole.grams)
    assert (whole.grams[0].diagonal() > 0).all() and whole.grams[0].det() > 0, "two gradients, and not one twice"
    assert whole.moved("weighting/weight/low", "weighting/weight/digit") and saved["weighting"]["skipped"] == 0
    assert sum(saved["weighting"]["weights"].values()) == pytest.approx(1.0)

    assert whole.moved("control_weight") and max(whole.column("control_weight")) < 1, "steer weighs tokens down"
    assert max(whole.column("control_dropped")) > 0, "clip_cov leaves some out"

    taught = [number for number, step in enumerate(whole.steps) if "sft/loss" in step]
    assert taught and taught[0] < 2 < taught[-1], "it has moments when the run dies, and uses them afterwards"
    for step in (whole.steps[number] for number in taught):
        assert step["sft/optimizer_steps"] == step["demonstrations"] == 1 and step["sft/grad_norm"] > 0
        assert step["sft/lr"] == pytest.approx(0.5 * step["lr"])
    assert whole.column("mixer/used")[-1] == saved["mixer"]["used"] >= len(taught)
    assert any(name.startswith("learner/slot-sft") for name in contents(whole.folder))
    assert_same(gone_on(tmp_path, change, monkeypatch, whole), whole)


@pytest.mark.full
def test_a_bandit_a_buffer_hypervolume_covariances_and_imitation_in_place(live_ray, tmp_path, monkeypatch):
    """In lockstep: what replaces a dropped group would else hang on which was done first."""
    filtered = {"low": 0.0, "high": 1.0, "max_refills": 0, "on_exhausted": "short"}
    change = recipe(
        "buffer",
        LEVELS,
        max_staleness=0,
        curricula=[
            {"name": "self_evolving", "by": ["level"]},
            {"name": "difficulty_filter", **filtered},
            "sample_buffer",
        ],
        algorithm={
            "minibatches": 2,
            "weighting": {"name": "hypervolume", "objectives": ["low", "digit"]},
            "entropy_controls": [{"name": "kl_cov", "share": 0.2}],
            "mixer": {"name": "hpt", "gate": 1},
        },
    )
    often = {"evaluation": {"every": 1, "samples": 4, "sampling": {"temperature": 1.0}}}
    change = merged(change, often)
    whole = run(tmp_path / "whole", change, monkeypatch)
    saved = whole.saved
    assert saved.keys() == {"curricula.0", "curricula.2", "weighting"}
    assert whole.moved("curricula.0/q/1", "curricula.0/q/2", "curricula.0/share/1", "curricula.2/groups")
    ledger = [json.loads(line) for line in (Path(whole.folder) / "ledger.jsonl").read_text().splitlines()]
    assert any(line["replayed"] for line in ledger) and max(whole.column("dropped_groups")) > 0
    assert len(saved["curricula.2"]["entries"]) == whole.column("curricula.2/groups")[-1] > 0

    factors = [1.0, *whole.column("weighting/meta")[:-1]]
    assert whole.column("lr") == pytest.approx([1e-3 * factor for factor in factors]) and len(set(factors)) > 2
    assert min(whole.column("update_norm")) > 0 and saved["weighting"]["front"]
    assert min(whole.column("entropy_penalty")) >= 0 < max(whole.column("entropy_penalty"))
    assert sum(whole.column("demonstrations")) > 0 and max(whole.column("imitated")) > 0
    assert_same(gone_on(tmp_path, change, monkeypatch, whole), whole)
