"""Runs docs/tasks.md: its commands, its recipe, its own task, and its table against what the tasks say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from alignment.data.reasoning_gym_tasks import ALLOWED
from alignment.recipe import load
from alignment.tasks.levels import level_table
from alignment.tasks.task import tasks
from tests.recipes_for_tests import write

TEXT = (Path(__file__).parents[2] / "docs/tasks.md").read_text()


def blocks(header: str) -> list[str]:
    return re.findall(rf"^```{header}\n(.*?)^```$", TEXT, re.M | re.S)


def test_the_commands_work_in_their_order(tmp_path):
    for name, text in re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", TEXT, re.M | re.S):
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    said = {}
    for line in [line for block in blocks("console run") for line in block.splitlines()]:
        done = subprocess.run(shlex.split(line), cwd=tmp_path, env=env, text=True, capture_output=True)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        said[line] = done.stdout
    assert len(said) == 4
    assert all(name in said["align list tasks"] for name in tasks.names())
    assert re.search(
        r"2 +4 +10,000 +about 0\.\d+ +max \d \d \d \d=\d", said["align list tasks largest --plugin my_tasks"]
    )


def test_the_table_is_what_the_tasks_say():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip("`") for row in rows) == tasks.names()
    for name, example, sizes, problems, floors, reward in rows:
        task = tasks.build(name.strip("`"))
        table = level_table(task)
        assert [int(n) for n in re.findall(r"\d+", sizes)] == [row["size"] for row in table]
        assert reward.strip("`") == task.reward
        counts = ["not known"] if not table[0]["problems_exact"] else [shown(row["problems"]) for row in table]
        assert problems == ", ".join(counts), name
        assert floors == ", ".join(f"{row['floor']:.3f}" for row in table), name
        assert set("".join(re.findall(r"`([^`]*)`", example))) <= set(task.alphabet), name


def shown(number: int) -> str:
    return f"{number:,}" if number < 10**8 else f"{number:.1e}".replace("e+0", "e").replace("e+", "e")


def test_the_recipe_for_reasoning_gym_loads(tmp_path):
    part = tmp_path / "part.yaml"
    part.write_text(blocks("yaml part=reasoning_gym")[0].replace("size: 2000", "size: 20"))
    recipe = load([write(tmp_path), part])
    prompts = recipe.data.train.load(recipe.folder).prompts
    assert len(prompts) == 20 and recipe.rewards[0].function.answer_in == "tags"
    assert f"{len(ALLOWED)} of its tasks can be named" in TEXT
    assert YAML(typ="safe").load(blocks("yaml part=reasoning_gym")[0])["data"]["train"]["size"] == 2000
