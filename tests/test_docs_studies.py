"""docs/studies.md: its claim loads, its commands run, its tables name what there is."""

import json
import re
import shlex
from pathlib import Path
from typing import get_args

from ruamel.yaml import YAML
from typer.testing import CliRunner

from alignment.cli import app
from alignment.studies.claim import Claim, read_claim
from alignment.studies.design import Study
from alignment.studies.statistics import Word

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
PRIMARY = {"arm": "steer", "against": "plain", "minimum_effect": 0.02}
((NAME, TEXT),) = re.findall(r"^```yaml file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S)


def test_every_command_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_bytes((ROOT / "recipes" / "quickstart.yaml").read_bytes())
    (tmp_path / "recipes" / NAME).write_text(TEXT)
    shown: list[str] = []
    for line in COMMANDS:
        done = CliRunner().invoke(app, shlex.split(line)[1:], env={"COLUMNS": "200"})
        assert done.exit_code == 0, f"{line}\n{done.output}"
        shown.append(done.output)
    assert "39 runs, 0 done" in shown[0] and shown[1].strip().endswith("quick: no verdict")
    assert "| no_bonus equals plain, bit for bit | yes |" in shown[1]
    assert not (tmp_path / "docs").exists()


def test_the_controls_of_the_page_are_those_of_a_claim(tmp_path):
    [fragment] = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    known = YAML(typ="safe")
    claim = {**known.load(TEXT), **known.load(fragment), "gate": [], "primary": PRIMARY}
    (tmp_path / "quickstart.yaml").write_bytes((ROOT / "recipes" / "quickstart.yaml").read_bytes())
    (tmp_path / NAME).write_text(json.dumps(claim))
    Study(read_claim(tmp_path / NAME), tmp_path / "out").check()


def test_the_page_has_every_key_and_every_verdict():
    assert len(COMMANDS) == 2
    top = set(re.findall(r"^(\w+):", TEXT, re.M))
    assert Claim.model_fields.keys() - top == {"level", "papers"}
    assert re.findall(r"^\| `([a-z ]+)` \|", PAGE, re.M) == list(get_args(Word))
