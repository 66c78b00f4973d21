"""What is written and run: the same values that a dry run shows, no secrets among them, and bash can read them."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

import alignment.cli as cli
from launch.plan import Command, File, Job, Launch, next_folder
from launch.ray_jobs import render_ray
from launch.slurm import render_slurm
from launch.spec import ClusterSpec, Container, Deadlines, RayAddress, Slurm
from tests.recipes_for_tests import BASE, write

ON_RAY = BASE.replace("    learner: {name: torch, lr: 1e-3}", "    learner: {name: torch}\n    cluster: ray")
TRAIN = ("-m", "alignment", "train", "/lab/recipe.yaml", "--set", "run.name=a b")


def job(tmp_path: Path, **changes) -> Job:
    given = {"name": "big", "command": TRAIN, "workdir": tmp_path, "folder": tmp_path / "big.launch" / "1"}
    return Job(**{**given, "uses_ray": True, **changes})


def align(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["launch", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.stderr


def test_the_options_of_a_slurm_job(tmp_path):
    spec = ClusterSpec(
        nodes=4,
        gpus_per_node=8,
        slurm=Slurm(partition="gpu", account="lab", qos="high", time="24:00:00", extra=("--constraint=h100",)),
        deadlines=Deadlines(save_s=300),
    )
    batch = render_slurm(spec, job(tmp_path)).files[0]
    assert re.findall(r"^#SBATCH (.*)$", batch.content, re.M) == [
        "--job-name=big",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--exclusive",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--account=lab",
        "--qos=high",
        "--time=24:00:00",
        f"--output={tmp_path}/big.launch/1/job.log",
        "--open-mode=append",
        f"--chdir={tmp_path}",
        "--signal=B:TERM@300",
        "--requeue",
        "--constraint=h100",
    ]
    assert 'step=(srun --overlap --export=ALL --cpu-bind=none --cpus-per-task="$SLURM_CPUS_ON_NODE")' in batch.content
    once = render_slurm(ClusterSpec(cpus_per_node=4, slurm=Slurm(max_requeues=0)), job(tmp_path)).files[0].content
    assert "#SBATCH --cpus-per-task=4\n" in once and "#SBATCH --no-requeue\n" in once and "--exclusive" not in once


def test_setup_comes_before_anything_else_on_a_node(tmp_path):
    spec = ClusterSpec(
        nodes=2, setup=("module load cuda", "ulimit -n 65536"), env={"A": "it's"}, python="/venv/bin/python"
    )
    node = render_slurm(spec, job(tmp_path)).files[1].content
    lines = node.splitlines()
    first = lines.index("""export A='it'"'"'s'""")
    assert lines[first + 1 : first + 5] == [
        "# setup of the cluster description",
        "module load cuda",
        "ulimit -n 65536",
        "# end of setup",
    ]
    assert lines[first + 5] == (
        "driver() { exec /venv/bin/python -m launch.nodes --nodes=2 --timeout-s=300 "
        f"--watch={tmp_path}/big.launch/1 -- /venv/bin/python {' '.join(TRAIN[:-1])} 'run.name=a b'; }}"
    )
    assert not any("ray" in line for line in lines[: first + 5])


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_containers_are_around_what_runs_on_nodes_only(tmp_path, runtime):
    container = Container(image="/images/a b.sif", runtime=runtime, mounts=("/lab:/lab", "/d:/d:ro"))
    batch, node = render_slurm(ClusterSpec(container=container), job(tmp_path)).files
    step, on_node = re.search(r"^step=\((.*)\)\non_node=\((.*)\)$", batch.content, re.M).groups()
    script = f"bash {tmp_path}/big.launch/1/node.sh"
    if runtime == "pyxis":
        assert step.endswith("--container-image='/images/a b.sif' --container-mounts=/lab:/lab,/d:/d:ro")
        assert on_node == script
    else:
        assert "container" not in step
        assert on_node == f"apptainer exec --nv --bind /lab:/lab,/d:/d:ro '/images/a b.sif' {script}"
    assert "exec python3 -m launch.nodes" in node.content


def test_a_recipe_without_ray_starts_none(tmp_path):
    batch, node = render_slurm(ClusterSpec(), job(tmp_path, uses_ray=False)).files
    assert "with_ray=''\n" in batch.content and "launch.nodes" not in node.content


def test_a_job_server_and_a_head_are_told_apart_by_their_address(tmp_path):
    server = render_ray(ClusterSpec(ray=RayAddress(address="http://h:8265/")), job(tmp_path, wait=True)).command
    assert server.argv[1:] == (
        *("-m", "launch.submit", "--address=http://h:8265", "--name=big", f"--workdir={tmp_path}", "--save-s=120"),
        *("--wait", "--", "bash", f"{tmp_path}/big.launch/1/train.sh"),
    )
    head = render_ray(ClusterSpec(ray=RayAddress(address="h:6379", token_file="/t")), job(tmp_path)).command
    assert head.argv == ("bash", f"{tmp_path}/big.launch/1/train.sh")
    assert head.env == {"RAY_ADDRESS": "h:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/t"}


@pytest.mark.parametrize("on", ["local", "ray", "slurm"])
def test_a_dry_run_shows_what_is_written_and_run(elsewhere, monkeypatch, on):
    """The dry run's text is taken apart and compared with the files and the command of a real launch."""
    recipe = write(elsewhere, ON_RAY)
    cluster = elsewhere / "cluster.yaml"
    cluster.write_text("setup: ['true # $HOME']\nenv: {B: \"it's\"}\n")
    record = elsewhere / "ran"
    tools = elsewhere / "bin"
    tools.mkdir()
    for name in ("bash", "sbatch"):  # in place of what would be run, programs that write their arguments down
        (tools / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" "RAY_ADDRESS=$RAY_ADDRESS" >{record}\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-the-environment")
    options = [recipe, "--on", on, "--cluster", cluster, "--set", "run.seed=4"]
    options += ["--set", "cluster.ray.address=head:6379"] if on == "ray" else []
    code, shown, _ = align(*options, "--dry-run")
    assert code == 0 and not (elsewhere / "runs").exists(), "a dry run leaves nothing behind"
    assert "canary" not in shown
    code, _, err = align(*options)
    assert code == 0, err
    folder = elsewhere / "runs" / "base.launch" / "1"
    made, *files, ran = re.split(r"^# (?=make the folder|write /|in /)", shown, flags=re.M)[1:]
    assert made.strip() == f"make the folder {folder} (mode 0700)" and folder.stat().st_mode & 0o777 == 0o700
    assert len(files) == len(list(folder.iterdir())) == (2 if on == "slurm" else 1)
    for text in files:
        head, _, content = text.partition("\n")
        path, mode = re.fullmatch(r"write (\S+) \(mode (\d+)\)", head).groups()
        assert Path(path).read_text() + "\n" == content and content.count("\n") > 3
        assert stat.S_IMODE(Path(path).stat().st_mode) == int(mode, 8) == 0o700
        assert subprocess.run(["/bin/bash", "-n", path], capture_output=True, text=True).stderr == ""
    where, command = ran.strip().split("\n")
    assert where == f"in {elsewhere}, run"
    address = "head:6379" if on == "ray" else ""
    *words, last = record.read_text().splitlines()
    assert command == " ".join(["RAY_ADDRESS=head:6379"] * (on == "ray") + words) and last == f"RAY_ADDRESS={address}"
    # The next launch of the same run has a folder of its own.
    assert f"{folder.with_name('2')} (mode" in align(*options, "--dry-run")[1]


def test_stages_on_ray_join_the_cluster_that_the_launcher_names(elsewhere):
    recipe = write(elsewhere, ON_RAY)
    on_slurm = align(recipe, "--on", "slurm", "--dry-run")[1]
    assert f"train {recipe} --set stages.1.cluster.address=auto; }}" in on_slurm
    assert "with_ray=yes\n" in on_slurm
    here = align(recipe, "--dry-run")[1]
    assert f"train {recipe}\n" in here and "launch.nodes" not in here


def test_what_does_not_go_together_is_told_before_anything_is_written(elsewhere):
    plain, on_ray = write(elsewhere), write(elsewhere, ON_RAY, "ray.yaml")
    cluster = elsewhere / "cluster.yaml"
    cluster.write_text("nodes: 2\ncontainer: {image: x}\n")

    def told(recipe: Path, *options: object) -> str:
        code, out, err = align(recipe, *options)
        assert code == 2 and not out and not (elsewhere / "runs").exists()
        return err.replace(f"{elsewhere}/", "")

    assert told(plain, "--cluster", cluster) == (
        "cluster.yaml:1: nodes: --on local is one machine, not 2; launch --on slurm or ray\n"
        "cluster.yaml:2: container: only --on slurm starts containers; set it to null for --on local\n"
    )
    assert "1 of 2 nodes would idle" in told(plain, "--on", "slurm", "--cluster", cluster)
    assert "--on ray needs the address" in told(on_ray, "--on", "ray")
    assert "no stage has 'cluster: ray'" in told(plain, "--on", "ray", "--set", "cluster.ray.address=a:1")
    assert "set it to null" in told(on_ray, "--on", "slurm", "--set", "cluster.ray.address=a:1")
    assert "--on k8s: give one of local, ray, slurm" in told(plain, "--on", "k8s")
    assert "recipe" not in told(plain, "--set", "cluster.nods=2")
    assert "stages.0.steps" in told(plain, "--set", "stages.0.steps=none")


def test_nothing_is_written_where_the_program_is_missing(elsewhere, monkeypatch):
    monkeypatch.setenv("PATH", str(elsewhere))
    code, _, err = align(write(elsewhere), "--on", "slurm")
    assert code == 2 and "there is no program sbatch here" in err and not (elsewhere / "runs").exists()


def test_files_have_their_mode_whatever_the_umask_says_and_replace_nothing(tmp_path):
    launch = Launch(
        tmp_path / "a" / "1", (File(tmp_path / "a" / "1" / "x", "text", 0o600),), Command(("true",), tmp_path)
    )
    before = os.umask(0o777)
    try:
        (tmp_path / "a").mkdir()
        (tmp_path / "a").chmod(0o700)
        launch.write()
    finally:
        os.umask(before)
    assert stat.S_IMODE(launch.files[0].path.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="cannot make"):
        launch.write()
    assert next_folder(tmp_path, "a.b").name == "1"
