"""Data sets on the hub, against a small server on this machine: downloads, refusals, and no hub at all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.hub_server import COMMIT, REPOSITORY, hub

NOBODY = "http://127.0.0.1:9"
CODE = """
import json, sys, time
from pathlib import Path
from alignment.data.files import sources

found = []
for options in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        dataset = sources.build({"name": "dataset", **options}).load(Path("here"))
        rows = [[prompt.row, prompt.origin] for prompt in dataset.prompts]
        answer = {"rows": rows, "origin": dataset.origin}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    found.append({**answer, "seconds": time.monotonic() - start})
print(json.dumps(found))
"""
SUMS: dict[str, Any] = {"path": REPOSITORY, "field_map": {"prompt": "question", "answer": "gold"}}
TRAIN: dict[str, Any] = {**SUMS, "split": "train"}


def load(home: Path, endpoint: str, *options: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """What loading with each of ``options`` gave, in one fresh process with its own cache and hub."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**clean, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, "-c", CODE, json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with hub() as address:
        yield address


@pytest.fixture(scope="module")
def online(home, endpoint) -> list[dict[str, Any]]:
    revision = {"revision": COMMIT}
    wrong = [SUMS, {**SUMS, "split": "dev"}, {**TRAIN, "config": "hard"}, {**TRAIN, "revision": "v9"}]
    return load(home, endpoint, TRAIN, {**TRAIN, **revision}, *wrong, {"path": "lab/none"})


def test_a_split_is_downloaded_and_its_commit_named(online):
    for found in online[:2]:
        assert found["origin"] == f"lab/sums (default, train) at {COMMIT}"
        assert found["rows"] == [
            [{"prompt": "1+1=", "answer": 2}, "lab/sums train: row 1"],
            [{"prompt": "2+2=", "answer": 4}, "lab/sums train: row 2"],
        ]


def test_what_the_hub_does_not_have_is_an_error_that_says_what_there_is(online):
    several, split, config, revision, nothing = (found["error"] for found in online[2:])
    assert several == "UserError: 'lab/sums' has several splits; choose one with split: train, test"
    assert "Unknown split \"dev\". Should be one of ['train', 'test']" in split
    assert "'hard' not found. Available: ['default']" in config
    assert revision.startswith("UserError: 'lab/sums' is no folder, and the hub says: ") and "Revision" in revision
    assert nothing.startswith("UserError: 'lab/none' is no folder, and the hub says: ") and "Repository" in nothing


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "told"])
def test_without_the_hub_an_earlier_download_is_used(home, online, environment):
    whole, commit, branch, split = load(
        home,
        NOBODY,
        TRAIN,
        {**TRAIN, "revision": COMMIT},
        {**TRAIN, "revision": "v9"},
        {**SUMS, "split": "dev"},
        **environment,
    )
    for found in (whole, commit):
        assert (found["rows"], found["origin"]) == (online[0]["rows"], online[0]["origin"])
    assert f"commit {COMMIT} was downloaded before, not 'v9'; give that commit as revision, or down" in branch["error"]
    assert "Unknown split" in split["error"]


def test_without_the_hub_and_a_download_the_remedy_is_told_at_once(tmp_path):
    first, second = load(tmp_path, NOBODY, TRAIN, {"path": "gsm8k"})
    for found, path in ((first, "lab/sums"), (second, "gsm8k")):
        assert found["error"].startswith(f"UserError: '{path}' is no file or folder in here, was not downloaded before")
        assert "the hub cannot be reached" in found["error"]
        assert found["error"].endswith("download its files onto this machine and give the path of a file or folder")
        assert found["seconds"] < 3


def test_what_is_no_hub_id_is_not_asked_for(tmp_path):
    paths = ("./lab/sums", "lab/sums/data", "lab/sums.jsonl", "a b")
    for found in load(tmp_path, NOBODY, *({"path": path} for path in paths)):
        assert "there is no such file or folder (a relative path starts at here)" in found["error"], found
