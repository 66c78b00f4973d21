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
ROOT = Path(__file__).parents[2]
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
    assert 'bare=(srun --overlap --export=ALL --cpu-bind=none --cpus-per-task="$SLURM_CPUS_ON_NODE")' in batch.content
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
    temp = "/tmp/align-$SLURM_JOB_ID"
    script = f"bash {tmp_path}/big.launch/1/node.sh"
    if runtime == "pyxis":
        assert step.endswith(
            "--container-image='/images/a b.sif' --container-mounts=/lab:/lab,/d:/d:ro," + f'"{temp}:{temp}"'
        )
        assert on_node == script and "make_temp=yes\n" in batch.content
    else:
        assert "container" not in step and "make_temp=''\n" in batch.content
        assert on_node == f"apptainer exec --nv --bind /lab:/lab,/d:/d:ro '/images/a b.sif' {script}"
    assert "exec python3 -m launch.nodes" in node.content


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_nothing_in_the_name_of_a_mount_or_image_is_run(tmp_path, runtime):
    mark = tmp_path / "ran"
    container = Container(image=f"/$(touch {mark})", runtime=runtime, mounts=(f"/a$(touch${{IFS}}{mark}):/b;`x`",))
    batch = render_slurm(ClusterSpec(container=container), job(tmp_path)).files[0].content
    lines = "\n".join(re.findall(r"^(?:bare|step|on_node)=.*$", batch, re.M))
    shown = subprocess.run(
        ["bash", "-c", lines + '\nprintf "%s\\n" "${step[@]}" "${on_node[@]}"'],
        env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not mark.exists() and not shown.stderr
    mounts = container.mounts[0]
    if runtime == "pyxis":
        assert f"--container-mounts={mounts},/tmp/align-7:/tmp/align-7" in shown.stdout.splitlines()
    else:
        assert shown.stdout.splitlines()[-5:-2] == ["--bind", mounts, container.image]


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


DAPO, SMALL = ROOT / "recipes/dapo_32b.yaml", ROOT / "recipes/quickstart_cluster.yaml"
EIGHT = "cluster.gpus_per_node=8"


@pytest.mark.parametrize(
    ("recipe", "on", "sets", "told"),
    [
        (DAPO, "slurm", [EIGHT, "cluster.nodes=4"], None),
        (
            DAPO,
            "slurm",
            [EIGHT, "cluster.nodes=3"],
            "nodes: stage 'rl': the run needs 32 learner GPUs + 32 engine GPUs",
        ),
        (DAPO, "slurm", ["cluster.nodes=16", "cluster.gpus_per_node=2"], "each of 8 engines needs 4 GPUs on one node"),
        (DAPO, "slurm", [EIGHT, "cluster.nodes=4", "cluster.cpus_per_node=8"], "asks Ray for 64 CPUs"),
        (DAPO, "slurm", ["stages.0.cluster.device=gpu"], "gpus_per_node: stage 'rl': the run needs 32 learner GPUs"),
        (SMALL, "slurm", ["cluster.cpus_per_node=2"], "needs 2 learner CPUs + 1 engine CPU; the cluster has 2 CPUs"),
        (SMALL, "slurm", ["cluster.cpus_per_node=3"], None),
        (DAPO, "ray", ["cluster.ray.address=a:1"], None),
        (DAPO, "ray", ["cluster.ray.address=a:1", EIGHT], "the cluster has 8 GPUs on 1 node"),
        (SMALL, "local", ["cluster.gpus_per_node=2"], "needs 2 learner GPUs + 1 engine GPU; the cluster has 2 GPUs"),
        (SMALL, "local", ["cluster.gpus_per_node=3", "cluster.cpus_per_node=1"], None),
    ],
)
def test_a_cluster_that_is_too_small_for_the_recipe_is_told_before_anything_is_written(
    elsewhere, recipe, on, sets, told
):
    code, _, err = align(recipe, "--on", on, "--dry-run", *(word for text in sets for word in ("--set", text)))
    assert (code, told is None or told in err) == (0 if told is None else 2, True), err


@pytest.mark.parametrize(
    ("sets", "told"), [([], True), (["stages.1.cluster.device=cpu", "stages.0.learner.device=cpu"], False)]
)
def test_a_job_without_gpus_is_said_to_train_on_cpus(elsewhere, sets, told):
    code, _, err = align(SMALL, "--on", "slurm", "--dry-run", *(word for text in sets for word in ("--set", text)))
    assert code == 0 and ("align launch: gpus_per_node is 0, so this trains on CPUs\n" in err) == told


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
