"""Alarms: each is provoked by a run that has the trouble, and by no run that has not."""

import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import pytest

import alignment
from alignment.alarms import RULES, Alarms, Window
from tests.test_train import Recorder, lines
from tests.tiny import tiny

SOUND = {
    "entropy": 1.0,
    "accuracy": 0.4,
    "zero_variance": 0.3,
    "truncated": 0.05,
    "mismatch_kl": 1e-4,
    "reward_length_correlation": 0.1,
    "staleness": 0.0,
    "clipped_low": 0.01,
    "clipped_high": 0.01,
    "advantage_abs": 0.5,
}
TROUBLE = {
    "entropy_collapse": {"entropy": 0.15},
    "dead_groups": {"zero_variance": 0.8},
    "truncation": {"truncated": 0.3},
    "mismatch": {"mismatch_kl": 0.03},
    "reward_length_correlation": {"reward_length_correlation": 0.6},
    "stale_data": {"staleness": 1.0, "clipped_low": 0.15, "clipped_high": 0.1},
    "no_learning_signal": {"advantage_abs": 0.0},
}
REWARDS = """
    from alignment.reward_registry import texts

    def nothing(completions, **columns):
        return [0.0 for _ in completions]

    def longest(length_tokens, **columns):
        return [float(n) for n in length_tokens]

    def rarely(completions, **columns):
        return [float(text.startswith("7")) for text in texts(completions)]

    def half(completions, **columns):
        return [0.5 * text.startswith("7") for text in texts(completions)]
"""


def after(alarms: Alarms, *steps: dict[str, float], start: int = 1, **options: Any) -> list[str]:
    return [
        a.name
        for i, metrics in enumerate(steps)
        for a in alarms.after(start + i, "rl", "stages.1", SOUND | metrics, **options)
    ]


def test_every_rule_has_trouble_here():
    assert [rule.name for rule in RULES] == list(TROUBLE)
    assert after(Alarms(3), *[{}] * 20) == []


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_raises_its_alarm_once_and_no_other(name):
    alarms = Alarms(3)
    assert after(alarms, {}, {}, {}) == []
    assert after(alarms, *[TROUBLE[name]] * 6, start=4) == [name]
    assert [(a["step"] <= 6, a["last_step"]) for a in alarms.report()] == [(True, 9)]
    assert after(alarms, *[{}] * 6, *[TROUBLE[name]] * 3, start=10) == [name], "it may begin again"
    assert len(alarms.report()) == 2


def test_without_verdicts_accuracy_excuses_nothing():
    """Rewards on a scale, such as a reward model's."""
    scale, alarms = {"accuracy": float("nan")}, Alarms(2)
    assert after(alarms, scale, scale) == []
    trouble = TROUBLE["entropy_collapse"] | TROUBLE["dead_groups"] | scale
    assert after(alarms, trouble, trouble, trouble, start=3) == ["entropy_collapse", "dead_groups"]
    assert not any("nan" in a["evidence"] or "accuracy" in a["evidence"] for a in alarms.report())


def test_what_is_imitated_is_a_signal():
    silent = TROUBLE["no_learning_signal"]
    assert after(Alarms(2), *[silent | {"imitated": 0.0}] * 2) == ["no_learning_signal"]
    assert after(Alarms(2), *[silent | {"imitated": 1.0}] * 2) == []


def test_the_means_decide_and_a_missing_number_counts_as_none():
    assert after(Alarms(2), {"truncated": 0.0}, {"truncated": 0.39}) == []
    assert after(Alarms(2), {"truncated": 0.0}, {"truncated": 0.41}) == ["truncation"]
    assert after(Alarms(2), {"truncated": float("nan")}, {"truncated": 0.41}) == ["truncation"]
    assert Window([], [])["truncated"] != Window([], [])["truncated"]


def test_a_certain_policy_that_is_right_is_no_trouble():
    assert after(Alarms(2), {}, {}, *[{"entropy": 0.01, "accuracy": 0.95}] * 3) == []


def test_groups_of_a_task_that_is_nearly_solved_need_not_differ():
    assert after(Alarms(2), *[{"zero_variance": 0.9, "accuracy": 0.85}] * 3) == []


def test_groups_need_not_differ_where_a_critic_is_the_baseline():
    assert after(Alarms(2), *[{"zero_variance": 1.0}] * 3, of_groups=False) == []


def test_a_window_of_0_is_off():
    assert after(Alarms(0), *[TROUBLE["truncation"]] * 5) == []


def test_alarms_survive_a_checkpoint():
    whole, parts = Alarms(3), Alarms(3)
    steps = [{}, {}, {"truncated": float("nan")}, *[TROUBLE["truncation"]] * 5]
    found = after(whole, *steps)
    before = after(parts, *steps[:5])
    parts = Alarms.from_json(3, json.loads(json.dumps(parts.to_json()).replace("NaN", "null")))
    assert before + after(parts, *steps[5:], start=6) == found == ["truncation"]
    assert parts.report() == whole.report()


def trouble(folder: Path, rl: dict[str, Any], reward: str | None = None) -> Any:
    """A run of one online stage with an alarm window of three steps."""
    module = f"odd_{folder.parent.name}_{folder.name}".replace("-", "_")  # this process imports each of them
    (folder / f"{module}.py").write_text(textwrap.dedent(REWARDS))
    change: dict[str, Any] = {
        "run": {"alarm_window": 3, "save_every": 0},
        "evaluation": {"every": 0},
        "stages": {0: {"steps": 20}, 1: {"steps": 6, **rl}},
    }
    if reward:
        change |= {"rewards": [{"function": f"{module}.{reward}"}]}
    return tiny(folder, change)


@pytest.mark.parametrize(
    ("name", "rl", "reward"),
    [
        ("no_learning_signal", {}, "nothing"),
        ("truncation", {"sampling": {"max_tokens": 1}}, None),
        ("reward_length_correlation", {"group_size": 8}, "longest"),
        ("dead_groups", {"group_size": 2, "prompts_per_step": 16}, "rarely"),
        (
            "entropy_collapse",
            {"steps": 20, "group_size": 16, "learner": {"name": "torch", "lr": 0.02}},
            "half",
        ),
    ],
)
def test_a_run_with_the_trouble_says_so(tmp_path, caplog, name, rl, reward):
    with caplog.at_level(logging.WARNING):
        result = alignment.train(trouble(tmp_path, rl, reward))
    found = {alarm["name"]: alarm for alarm in result["alarms"]}
    assert name in found, found
    assert found[name]["stage"] == "rl" and 4 <= found[name]["step"] - 20 + 1
    assert any(f"{name}: " in message for message in caplog.messages)
    assert "stages.1." in found[name]["remedy"] or "data.train" in found[name]["remedy"]


def test_a_sampler_that_disagrees_with_the_learner_says_so(tmp_path, monkeypatch):
    from alignment.engines.transformers_sampler import TransformersSampler

    poll = TransformersSampler.poll

    def off(self, *args):
        from dataclasses import replace

        return [replace(c, logp=tuple(0.6 * value for value in c.logp)) for c in poll(self, *args)]

    monkeypatch.setattr(TransformersSampler, "poll", off)
    result = alignment.train(trouble(tmp_path, {}))
    assert "mismatch" in {alarm["name"] for alarm in result["alarms"]}


def test_a_resumed_run_has_the_alarms_of_the_uninterrupted_one(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = alignment.train(trouble(tmp_path / "whole", {}, "nothing"))
    recipe = trouble(tmp_path / "parts", {}, "nothing")
    assert alignment.train(recipe, sinks=[Recorder(22)])["exit_code"] == 130
    parts = alignment.train(recipe)
    assert parts["alarms"] == whole["alarms"] != []
    assert lines(parts["folder"]) == lines(whole["folder"])


def test_the_page_names_every_alarm():
    page = (Path(__file__).parents[1] / "docs/diagnosis.md").read_text()
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")] == [rule.name for rule in RULES]
