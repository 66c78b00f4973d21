"""The description of a cluster: what it may say, and how mistakes in it are told."""

import json
from pathlib import Path

import pytest

from alignment.recipe_tree import RecipeError
from launch.spec import ClusterSpec, is_cluster_override, load_cluster

FULL = """\
nodes: 4
gpus_per_node: 8
cpus_per_node: 96
python: /shared/venv/bin/python
setup:
  - module load cuda
  - export HF_TOKEN=$(cat ~/.hf_token)
env: {NCCL_DEBUG: WARN}
container: {image: /shared/images/align.sqsh, runtime: pyxis, mounts: ["/shared:/shared", "/data:/data:ro"]}
slurm: {partition: gpu, account: lab, qos: high, time: 1-12:00:00, max_requeues: 5, extra: ["--constraint=h100"]}
ray: {address: null}
deadlines: {nodes_s: 600, save_s: 300, head_lost_s: 60}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def told(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_cluster(path, overrides)
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_everything_can_be_said(tmp_path):
    spec, _ = load_cluster(write(tmp_path, FULL))
    assert (spec.nodes, spec.gpus_per_node, spec.cpus_per_node) == (4, 8, 96)
    assert spec.container is not None and spec.container.mounts[1] == "/data:/data:ro"
    assert spec.slurm.time == "1-12:00:00" and spec.env == {"NCCL_DEBUG": "WARN"}
    assert spec.deadlines.save_s == 300


def test_nothing_need_be_said():
    assert load_cluster(None)[0] == ClusterSpec()


def test_overrides_come_last(tmp_path):
    path = write(tmp_path, FULL)
    overrides = ["cluster.nodes=2", "cluster.slurm.time=30", "cluster.container=null", "cluster.setup=[true]"]
    with pytest.raises(RecipeError) as caught:
        load_cluster(path, overrides)
    assert sorted(str(caught.value).splitlines()) == [
        "--set cluster.setup=[true]: setup.0: expected text, given true; put it in quotes to make it text",
        "--set cluster.slurm.time=30: slurm.time: expected text, given the number 30; put it in quotes to make it text",
    ]
    spec, _ = load_cluster(path, ["cluster.nodes=2", "cluster.slurm.time='30'", "cluster.container=null"])
    assert (spec.nodes, spec.slurm.time, spec.container, spec.gpus_per_node) == (2, "30", None, 8)
    assert load_cluster(None, ["cluster={nodes: 3}"])[0].nodes == 3


def test_which_overrides_are_the_cluster_s():
    assert is_cluster_override("cluster.nodes=2") and is_cluster_override("cluster={nodes: 2}")
    assert not is_cluster_override("stages.0.cluster.address=auto") and not is_cluster_override("run.name=cluster.x")


def test_every_mistake_is_told_with_its_line(tmp_path):
    path = write(
        tmp_path,
        "nodes: 0\ngpu_per_node: 8\nslurm:\n  partition: gpu big\n  time: soon\n  extra:\n    - --nodes=3\n"
        "ray: {address: 'head'}\ncontainer: {image: x, mounts: ['/a:b']}\nenv: {A B: c}\n",
    )
    found = told(path)
    assert [line.split(": ")[0] for line in found] == [f"cluster.yaml:{line}" for line in (1, 2, 4, 5, 6, 8, 9, 10)], (
        found
    )
    text = "\n".join(found)
    assert "expected a number >= 1, given the number 0" in text
    assert "there is no key 'gpu_per_node'; did you mean 'gpus_per_node'?" in text
    assert "'gpu big' is not one word" in text and "'soon' is no time limit" in text
    assert "--nodes follows from nodes; change that" in text
    assert "'head' is neither http://HOST:PORT, a job server, nor HOST:PORT, a head" in text
    assert "'/a:b' is not FOLDER:FOLDER_INSIDE" in text and "'A B' is not the name of a variable" in text


@pytest.mark.parametrize(
    "text",
    [
        "env: {WANDB_API_KEY: abc}",
        "env: {X: hf_abcdefghijklmnopqrstuvwx}",
        "setup: ['export WANDB_API_KEY=abc']",
        "setup: [\"export HF_TOKEN='abc'\"]",
        "setup: ['echo hf_abcdefghijklmnopqrstuvwx']",
        "env: {RAY_AUTH_TOKEN: abc}",
    ],
)
def test_secrets_are_refused_and_not_repeated(tmp_path, text):
    text = "\n".join(line.partition(": ")[2] for line in told(write(tmp_path, text)))
    assert "secret" in text and "abc" not in text


def test_a_secret_may_come_from_a_file_or_the_environment(tmp_path):
    lines = ["export HF_TOKEN=$(cat ~/.hf_token)", 'export HF_TOKEN="$MINE"', "source ~/secrets.sh"]
    assert load_cluster(write(tmp_path, f"setup: {json.dumps(lines)}"))[0].setup == tuple(lines)


def test_what_the_launcher_sets_cannot_be_set(tmp_path):
    (line,) = told(write(tmp_path, "env: {RAY_ADDRESS: x}"))
    assert "RAY_ADDRESS is set by the launcher" in line


@pytest.mark.parametrize(
    ("option", "told_of"),
    [
        ("--no-requeue", "--no-requeue follows from slurm.max_requeues"),
        ("--array=1-3", "--array follows from what a launch is, one job"),
        ("--arr=1-3", "--arr follows from what a launch is, one job"),
        ("--gpus=8", "--gpus follows from gpus_per_node"),
        ("--nod 3", "--nod follows from nodes"),
        ("--error=elsewhere", "--error follows from the launch folder"),
        ("--oversubscribe", "--oversubscribe follows from cpus_per_node"),
        ("--ntasks-per-gpu=1", "--ntasks-per-gpu follows from nodes"),
        ("--wrap=true", "--wrap follows from what a launch is, a script of its own"),
        ("--constraint=h100 --array=1-3", "is more than one option; write --array=1-3 as an entry of its own"),
        ("--constraint=h100 -a 1-3", "is more than one option; write -a as an entry of its own"),
        ("--comment='a", "cannot be read"),
    ],
)
def test_options_that_contradict_the_launcher_are_refused(tmp_path, option, told_of):
    (line,) = told(write(tmp_path, f"slurm: {{extra: [{json.dumps(option)}]}}"))
    assert told_of in line, line


@pytest.mark.parametrize(
    "option", ["--constraint h100", "--comment='a --b'", "--gres=tmp:1", "--exclude=n1", "--hint=x"]
)
def test_other_options_are_taken(tmp_path, option):
    assert load_cluster(write(tmp_path, f"slurm: {{extra: [{json.dumps(option)}]}}"))[0].slurm.extra == (option,)


def test_the_token_s_path_is_relative_to_who_says_it(tmp_path):
    spec, _ = load_cluster(write(tmp_path, "ray: {address: 'a:1', token_file: token}"))
    assert spec.ray.token_file == str(tmp_path / "token")
    spec, _ = load_cluster(None, ["cluster.ray.token_file=token"])
    assert spec.ray.token_file == str(Path.cwd() / "token")


def test_an_unreadable_file(tmp_path):
    assert "no such file" in told(tmp_path / "none.yaml")[0]
    assert "cluster.yaml:2: " in told(write(tmp_path, "nodes: 1\nnodes: 2\n"))[0]
