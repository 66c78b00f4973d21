"""docs/reward_models.md: its recipes, put together, train a reward model and are rewarded by it."""

import re
from pathlib import Path

import yaml

import alignment
from alignment.recipe import load
from tests.test_preference import FORMAT, TRAIN, recipe
from tests.test_train import Recorder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reward_models.md").read_text(encoding="utf-8")
RECIPES = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)]
ONLINE = {"stage": "online", "steps": 1, "prompts_per_step": 4, "group_size": 2, "sampling": {"max_tokens": 3}}
LEARNER = {"name": "torch", "lr": 1e-3}


def test_the_page_has_what_this_test_follows():
    assert len(RECIPES) == 3 == len(re.findall(r"^```\w", PAGE, re.M))


def test_the_recipes_train(tmp_path):
    fitted = {**RECIPES[0]["stages"][0], "steps": 2, "batch_size": 4, "members": 2, "learner": LEARNER}
    path = recipe(tmp_path, fitted, data=TRAIN)
    (tmp_path / "held_out.jsonl").write_text((tmp_path / "pairs.jsonl").read_text())
    first = alignment.train(path)
    members = Path(first["folder"]) / "reward_models" / "rm"
    (tmp_path / "my_reward_model").symlink_to(members / "member_0")
    for number in (1, 2):
        whole = yaml.safe_load(path.read_text())
        whole["run"]["name"] = f"number-{number}"
        whole["data"] |= RECIPES[0]["data"]
        whole["rewards"] = [*FORMAT, *RECIPES[number]["rewards"]]
        ours = RECIPES[number].get("stages", [{}])[0]
        whole["stages"] = [fitted, {**ONLINE, "learner": LEARNER, **ours}]
        file = tmp_path / f"number_{number}.yaml"
        file.write_text(yaml.safe_dump(whole))
        sink = Recorder()
        assert alignment.train(load([file]), sinks=[sink])["status"] == "complete"
        columns = {entry.get("as", entry["name"]) for entry in RECIPES[number]["rewards"]}
        assert columns <= set(sink.groups[0].rollouts[0].scores)
