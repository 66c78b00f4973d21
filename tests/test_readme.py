"""Runs the README: its commands, its Python, its recipe and its example of a mistake."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.recipe import RecipeError, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = "--set stages.0.steps=10 --set stages.1.steps=10"
"""Added to the training commands: what they print is the same, a few hundred steps sooner."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[str]:
    return [line for block in blocks("console") for line in block.splitlines()]


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_commands_of_the_readme_work_in_their_order(tmp_path):
    lines = [line for line in commands() if line.startswith("align ")]
    assert len(lines) == 7
    for line in lines:
        words = shlex.split(line.replace("--step 250", "--step 20"))
        run(words + (shlex.split(SHORT) if words[1] == "train" else []), tmp_path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my_model")
    assert model.config.hidden_size == 64
    assert len(AutoTokenizer.from_pretrained(tmp_path / "my_model")("abc>")["input_ids"]) == 4


def test_the_make_targets_of_the_readme_exist():
    for line in commands():
        if line.startswith("make "):
            assert subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True).returncode == 0


def test_the_python_of_the_readme_works(tmp_path):
    (code,) = blocks("python")
    recipe = ROOT / "recipes/quickstart.yaml"
    short = f'["{recipe}"], overrides={SHORT.replace("--set ", "").split()}'
    code = code.replace('"recipes/quickstart.yaml"', short)
    assert "'accuracy'" in run([sys.executable, "-c", code], tmp_path)


def test_the_recipe_of_the_readme_checks_but_for_the_lab_it_does_not_have(tmp_path):
    (text,) = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab/rewards.py").write_text(
        "def short(completions, **_):\n    return [-len(c) for c in completions]\n"
    )
    code = f"from alignment.recipe import load; print(load([{str(path)!r}]).stages[0].steps)"
    assert run([sys.executable, "-c", code], tmp_path).strip() == "500"


def test_the_mistake_in_the_readme_is_told_as_it_says(tmp_path):
    run(["align", "init", "my_project"], tmp_path)
    recipe = tmp_path / "my_project/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("clip_high", "clip_hihg"))
    with pytest.raises(RecipeError) as told:
        load([recipe])
    expected = next(block for block in blocks("text") if "clip_hihg" in block).strip()
    assert expected in str(told.value).replace(f"{tmp_path}/", "")
