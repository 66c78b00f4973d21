"""Follows CONTRIBUTING.md literally: writes the files that the page shows, runs the commands that it shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = {name: text for name, text in re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S)}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in BLOCKS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def bash(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-e", *command], cwd=folder, env=env, text=True, capture_output=True)


def test_the_page_can_be_followed_literally(folder):
    assert {path.suffix for path in map(Path, BLOCKS)} == {".py", ".yaml", ""}
    done = bash("run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    assert (folder / "runs" / "length-power" / "result.json").is_file()


@pytest.mark.parametrize(("mistake", "answer"), [("power: 7", "<= 1"), ("powr: 0.7", "'power'")])
def test_the_mistakes_it_suggests_are_named_with_their_line(folder, mistake, answer):
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("power: 0.7", mistake))
    line = next(n for n, text in enumerate(recipe.read_text().split("\n"), 1) if mistake in text)
    done = bash("-c", "align check recipe.yaml", folder=folder)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and f"recipe.yaml:{line}" in said and answer in said, said


def test_the_code_on_the_page_is_in_the_house_style(folder):
    config = ["--config", ROOT / "pyproject.toml"]
    for check in (["check", "--ignore", "D,I001"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, *config, folder], text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
