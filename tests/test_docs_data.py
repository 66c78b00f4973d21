"""Follows docs/data.md: every recipe on the page is loaded with the files it names, every command is run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from ruamel.yaml import YAML

from alignment.data.files import DatasetSource
from alignment.data.load import SECTIONS, read_section
from alignment.recipe import Recipe, load
from tests.data.test_dataset_rows import VERL

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/data.md").read_text()
FILES = {name: text for name, text in re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S)}
PARTS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL] * 200), tmp_path / f"gsm8k/{name}.parquet")
    return tmp_path


def with_data(folder: Path, part: str) -> Recipe:
    """The page's recipe with its data replaced by what another block says."""
    values: dict[str, Any] = YAML(typ="safe").load(FILES["recipe.yaml"])
    values["data"] = YAML(typ="safe").load(part)["data"]
    (folder / "other.yaml").write_text(json.dumps(values))
    return load([folder / "other.yaml"])


def test_the_page_has_what_this_test_follows():
    rows = {f"{name}.jsonl" for name in ("train", "prompts", "solved", "pairs", "dialogues")}
    assert set(FILES) == rows | {"recipe.yaml", "run"} and len(PARTS) == 5
    assert len(re.findall("^```(yaml|console|jsonl|python)", PAGE, re.M)) == len(FILES) + len(PARTS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.splitlines()[1].strip()[:20])
def test_every_recipe_loads_with_its_files(folder, part):
    recipe = with_data(folder, part)
    for name in SECTIONS:
        source = getattr(recipe.data, name)
        if isinstance(source, DatasetSource) and source.path != "openai/gsm8k":
            section = read_section(recipe, name)
            assert section is not None and section.prompts and not section.bad


def test_what_the_rows_become(folder):
    def first(recipe: Recipe, name: str, index: int = 0) -> dict[str, Any]:
        section = read_section(recipe, name)
        assert section is not None
        return dict(section.prompts[index].row)

    text = "What is 6 times 7?\nPut your final answer within \\boxed{}."
    row = first(load([folder / "recipe.yaml"]), "train")
    assert row == {
        "question": "What is 6 times 7?",
        "level": 1,
        "answer": "42",
        "prompt": [{"role": "user", "content": text}],
    }
    verl, openrlhf = with_data(folder, PARTS[1]), with_data(folder, PARTS[2])
    assert first(verl, "train")["answer"] == "42" and first(verl, "train")["data_source"] == "openai/gsm8k"
    assert first(verl, "demonstrations")["completion"] == VERL["extra_info"]["answer"]
    asked = [{"role": "user", "content": "What is 6 times 7?"}]
    assert first(openrlhf, "train") == {"prompt": asked, "answer": "42", "datasource": "tables"}
    assert first(openrlhf, "demonstrations", 1)["completion"] == "2"
    dialogues = with_data(folder, PARTS[3])
    assert [len(first(dialogues, "demonstrations", i)["completion"]) for i in range(2)] == [3, 3]
    assert first(openrlhf, "preferences", 2) == {"prompt": "3+3?", "completion": "6", "label": True}
    pair = first(openrlhf, "preferences")
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (
        [{"role": "user", "content": "Hi"}],
        "Hello!",
        "What?",
    )


def test_the_command_says_what_the_page_says(folder):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(["bash", "-e", "run"], cwd=folder, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.search(r"^```text\n(data.train .*?)\n```$", PAGE, re.M | re.S)
    assert shown is not None and shown[1].replace("/home/me", str(folder)) in done.stdout, done.stdout
