"""docs/launching.md: its commands go through, its description loads, its tables say what the code says."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import alignment.cli as cli
from launch.nodes import UNAVAILABLE
from launch.plan import Job
from launch.slurm import render_slurm
from launch.spec import ClusterSpec, Container, load_cluster

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/launching.md").read_text()
COMMANDS = [
    line for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines() if line
]
((NAME, CLUSTER),) = re.findall(r"^```yaml file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_page_has_what_this_test_follows():
    assert len(COMMANDS) == 9 and len(re.findall(r"^```(yaml|console|python|bash|text)", PAGE, re.M)) == 6


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the page's files are, and the recipes."""
    (tmp_path / NAME).write_text(CLUSTER)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_goes_through(folder, line):
    """As a dry run, which does all but the writing and running; tests/launch does these."""
    words = line.removeprefix("align ").split()
    words += [] if "--dry-run" in words else ["--dry-run"]
    done = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert f"# make the folder {folder}/runs/" in done.stdout and f"# in {folder}, run\n" in done.stdout
    assert not (folder / "runs").exists()
    if "--cluster" in words:
        assert "#SBATCH --gpus-per-node=8\n" in done.stdout and "apptainer exec --nv" in done.stdout
        assert ("#SBATCH --time=2-00\n" if "--set" in words else "#SBATCH --time=24:00:00\n") in done.stdout


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Every key of a description with its default."""
    found: dict[str, object] = {}
    for name, field in model.model_fields.items():
        if name == "container":
            found |= fields(Container, "container.")
        elif isinstance(field.default, BaseModel):
            found |= fields(type(field.default), f"{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            found[prefix + name] = "" if field.is_required() else default
    return found


def test_the_table_has_every_key_with_its_default():
    told = {}
    for keys, default in re.findall(r"^\| (`[a-z_.`, ]+`) \| ([^|]*?) ?\|", PAGE, re.M):
        told |= {key: default for key in re.findall(r"`([a-z_.]+)`", keys)}
    words = {"None": "null", "()": "[]"}
    assert told == {key: words.get(str(value), str(value)) for key, value in fields(ClusterSpec).items()}


def test_the_description_of_the_page_loads(folder):
    spec, _ = load_cluster(folder / NAME)
    assert spec.nodes == 2 and spec.container is not None and spec.deadlines.save_s == 300


def test_what_ends_a_slurm_job_and_what_saves_it_is_what_the_launcher_says(tmp_path):
    told = render_slurm(ClusterSpec(), Job("p", ("x",), tmp_path, tmp_path / "1", True)).next_steps
    for line in ("scancel --batch --signal=TERM JOB", "scancel JOB"):
        assert line in PAGE and line in told


def test_the_exit_codes_of_the_page():
    codes = set(re.findall(r"^\| (\d+) \|", PAGE, re.M))
    assert codes == {"0", "2", str(UNAVAILABLE), "75"}
