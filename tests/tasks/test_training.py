"""Procedural tasks through a whole run: demonstrations, rewards, evaluation."""

import json

import pytest

import alignment
from alignment.data.sources import sources
from alignment.tasks.task import tasks
from tests.tiny import write

TASKS = [
    ({"name": "reversal", "sizes": [2, 3], "letters": "abcde"}, "exact_match", (1, 2), None),
    ({"name": "countdown", "sizes": [2, 3]}, "countdown", (1, 2), 40),
]


@pytest.mark.parametrize(("task", "reward", "levels", "size"), TASKS, ids=[task["name"] for task, *_ in TASKS])
def test_a_task_is_trained_on_and_judged_by_its_reward(tmp_path, task, reward, levels, size):
    built = tasks.build(task)
    assert built.reward == reward
    source = {"name": "procedural", "task": task, "levels": list(levels), "size": size}
    sections = {split: source | {"split": split} for split in ("train", "demonstrations", "eval")}
    change = {
        "model": {"build": {"alphabet": built.alphabet}},
        "data": {**sections, "max_prompt_tokens": 12},
        "rewards": [reward],
        "stages": {0: {"steps": 4}, 1: {"sampling": {"max_tokens": 8}}},
    }
    result = alignment.train(write(tmp_path, change))
    assert (
        result["status"] == "complete"
        and result["eval"]["after"]["n"] == (size or len(sources.build(sections["eval"]).load(tmp_path).prompts)) > 10
    )
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/rollouts.jsonl").read_text().splitlines()]
    assert {row["columns"]["level"] for row in rows} <= set(levels)
    scores = [rollout["scores"][reward] for row in rows for rollout in row["rollouts"]]
    assert len(scores) > 20 and {score["status"] for score in scores} <= {"ok", "wrong", "unparseable"}
