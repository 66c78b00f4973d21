"""docs/decoding.md: its commands and its program run."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from alignment.algorithms.decodings import decodings
from tests.engines.guided import value_folder
from tests.engines.helpers import tiny
from tests.evaluation.evaluated import ALPHABET, align, character_model

PAGE = (Path(__file__).parents[1] / "docs" / "decoding.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the page's commands name."""
    folder = tmp_path_factory.mktemp("page")
    character_model(folder / "my_model")
    body = tiny("Qwen3", 1, vocab_size=len(ALPHABET) + 2)
    value_folder(folder / "my_critic", 2, alphabet=ALPHABET, body=body)
    return folder


def test_every_command_of_the_page_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    lines = [line for code in re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL) for line in code.splitlines()]
    assert len(lines) == 5
    for line in lines:
        limit = ["--limit", "8"] if "--tasks" in line else []
        done = align(*shlex.split(line)[1:], *limit)
        assert done.exit_code == 0, f"{line}\n{done.output}"
    assert "decoded by value_augmented" in " ".join(done.output.split())


def test_the_program_of_the_page_runs(place, monkeypatch, capsys):
    [(name, code)] = re.findall(r"```python file=(\S+)\n(.*?)```", PAGE, flags=re.DOTALL)
    monkeypatch.chdir(place)
    (place / name).write_text(code, encoding="utf-8")
    runpy.run_path(name)
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"plain", "weak", "strong"}


def test_the_table_has_every_decoding_and_options_are_options():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE) == [
        "plain",
        "value_augmented",
        "emulated",
        "best_of_n",
        "chunk_rerank",
    ]
    known = {option["name"] for entry in decodings for option in entry.options()}
    assert set(re.findall(r"decoding\.([a-z_]+)=", PAGE)) <= known
    known = {flag for command in ("eval", "export") for flag in re.findall(r"--[a-z][a-z-]+", help_of(command))}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= known


def help_of(command):
    return align(command, "--help").output
