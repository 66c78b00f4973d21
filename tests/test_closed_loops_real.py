"""Components of every kind at once on vLLM, DeepSpeed and Ray: each has its effect, and a run that was stopped and went
on is the uninterrupted one.

That each component does so on the embedded engines is said in ``test_curricula_learned.py``, ``test_weightings.py``,
``algorithms/test_entropy_controls.py`` and ``test_mixing.py``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import alignment
import alignment.job as job_module
from alignment.engines.deepspeed_learner import DeepSpeedLearner
from alignment.evaluation.evaluate import Evaluation
from alignment.types import Group
from tests.recorded_rollouts import record
from tests.test_real_engines import CLUSTER
from tests.test_train import Recorder, contents
from tests.tiny import SUMS, merged, tiny

STOP = 5
"""After the second of six online steps."""
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
    return merged(CLUSTER, {"run": {"name": name, "save_every": 0}, **changes})


@dataclass
class Seen:
    """What became of a run, in one part or two."""

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


def run(
    folder: Path, change: dict[str, Any], patch: Any, stops: Sequence[int | None], given: Sequence[Any] = ()
) -> Seen:
    """Trains, once for each of ``stops``, the step after which it is stopped. Evaluations are ``given``, if any are."""
    seen, answers = Seen(), iter(given)
    evaluate, gram = job_module.evaluate, DeepSpeedLearner.gram

    def evaluated(*args: Any) -> Evaluation:
        seen.evaluations.append(next(answers) if given else evaluate(*args))
        return seen.evaluations[-1]

    def measured(*args: Any) -> Tensor:
        seen.grams.append(gram(*args))
        return seen.grams[-1]

    folder.mkdir()
    with patch.context() as patched:
        patched.setattr(job_module, "evaluate", evaluated)
        patched.setattr(DeepSpeedLearner, "gram", measured)
        for stop in stops:
            sink = Recorder(stop)
            result = alignment.train(tiny(folder, change), sinks=[sink])
            assert result["status"] == ("complete" if stop is None else "interrupted")
            seen.steps += [dict(r.metrics) for r in sink.records if r.kind == "train" and r.stage == "rl"]
            seen.groups += sink.groups
    seen.folder = result["folder"]
    return seen


def stopped_and_whole(folder: Path, change: dict[str, Any], patch: Any) -> tuple[Seen, Seen]:
    """A run on the real engines that was stopped and went on, and one of the same rollouts that was not: which token
    comes out of vLLM may hang on what was batched with it."""
    parts = run(folder / "parts", change, patch, [STOP, None])
    record(folder / "rollouts.jsonl", parts.groups)
    recorded = {"sampler": {"name": "recorded", "path": str(folder / "rollouts.jsonl")}, "transport": "nowhere"}
    again = merged(change, {"plugins": ["tests.recorded_rollouts"], "stages": {1: recorded}})
    return parts, run(folder / "whole", again, patch, [None], parts.evaluations)


def assert_same(parts: Seen, whole: Seen) -> None:
    """Weights, moments, roles, the states of components and all metrics that no clock or transport had a part in."""
    ours, theirs = contents(parts.folder), contents(whole.folder)
    learned = [name for name in ours if name.startswith("learner/")]
    assert ours.keys() == theirs.keys() and len(learned) > 3
    assert [name for name in learned if ours[name] != theirs[name]] == []
    assert parts.saved == whole.saved
    assert len(parts.steps) == 6 and list(map(timeless, parts.steps)) == list(map(timeless, whole.steps))


def timeless(step: dict[str, float]) -> dict[str, float]:
    passing = ("time/", "publish_", "tokens_per_s", "rollouts_per_s")
    return {name: value for name, value in step.items() if not name.startswith(passing)}


def test_a_prompt_model_gradients_steering_and_interleaved_imitation(live_ray, tmp_path, monkeypatch):
    """One batch is in flight while one is learned from, also when the run is stopped."""
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
    parts, whole = stopped_and_whole(tmp_path, merged(change, {"data": {"eval": None}}), monkeypatch)
    assert {r.sampler for g in parts.groups for r in g.rollouts} == {"vllm"} and parts.steps[0]["mismatch_kl"] < 1e-6
    assert parts.column("staleness") == [0, 1, 0, 1, 1, 1], "what was in flight was sampled again"

    saved = parts.saved
    assert saved.keys() == {"curricula.0", "curricula.1", "weighting", "mixer"}
    assert parts.moved("curricula.1/candidates", "curricula.1/chosen", "curricula.1/error")
    assert min(parts.column("prompt_value/fitted_tokens")) > 0 and saved["curricula.1"]["version"] == 6
    assert parts.column("curricula.0/dropped")[-1] == len(saved["curricula.0"]["dropped"]) > 0

    assert len(parts.grams) == 6 and all((gram.diagonal() >= 0).all() for gram in parts.grams)
    assert (parts.grams[0].diagonal() > 0).all() and parts.grams[0].det() > 0, "two gradients, and not one twice"
    assert parts.moved("weighting/weight/low", "weighting/weight/digit") and saved["weighting"]["skipped"] == 0
    assert sum(saved["weighting"]["weights"].values()) == pytest.approx(1.0)

    assert parts.moved("control_weight") and max(parts.column("control_weight")) < 1, "steer weighs tokens down"
    assert max(parts.column("control_dropped")) > 0, "clip_cov leaves some out"

    taught = [number for number, step in enumerate(parts.steps) if "sft/loss" in step]
    assert taught and taught[0] < 2 < taught[-1], "it has moments when the run is stopped, and uses them afterwards"
    for step in (parts.steps[number] for number in taught):
        assert step["sft/optimizer_steps"] == step["demonstrations"] == 1 and step["sft/grad_norm"] > 0
        assert step["sft/lr"] == pytest.approx(0.5 * step["lr"])
    assert parts.column("mixer/used")[-1] == saved["mixer"]["used"] >= len(taught)
    assert any(name.startswith("learner/slot-sft") for name in contents(parts.folder))
    assert_same(parts, whole)


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
    parts, whole = stopped_and_whole(tmp_path, merged(change, often), monkeypatch)
    saved = parts.saved
    assert saved.keys() == {"curricula.0", "curricula.2", "weighting"}
    assert parts.moved("curricula.0/q/1", "curricula.0/q/2", "curricula.0/share/1", "curricula.2/groups")
    ledger = [json.loads(line) for line in (Path(parts.folder) / "ledger.jsonl").read_text().splitlines()]
    assert any(line["replayed"] for line in ledger) and max(parts.column("dropped_groups")) > 0
    assert len(saved["curricula.2"]["entries"]) == parts.column("curricula.2/groups")[-1] > 0

    factors = [1.0, *parts.column("weighting/meta")[:-1]]
    assert parts.column("lr") == pytest.approx([1e-3 * factor for factor in factors]) and len(set(factors)) > 2
    assert min(parts.column("update_norm")) > 0 and saved["weighting"]["front"]
    assert min(parts.column("entropy_penalty")) >= 0 < max(parts.column("entropy_penalty"))
    assert sum(parts.column("demonstrations")) > 0 and max(parts.column("imitated")) > 0
    assert_same(parts, whole)
