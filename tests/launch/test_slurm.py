"""A real Slurm of two nodes that share nothing but the folder of runs; see ``slurm_cluster``.

One job is the quickstart on the real engines, shrunk; the others run a small Ray program.
"""

import contextlib
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.ledger import Ledger
from launch.plan import Job
from launch.slurm import render_slurm
from launch.spec import ClusterSpec, Deadlines, Slurm
from tests.launch.slurm_cluster import SlurmCluster, kill, wait_for

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(__file__).with_name("ray_program.py"))
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def two_nodes(**changes) -> ClusterSpec:
    given = {"nodes": 2, "cpus_per_node": 4, "deadlines": Deadlines(nodes_s=300, head_lost_s=10)}
    return ClusterSpec(**{**given, **changes})


def submit(slurm: SlurmCluster, folder: Path, spec: ClusterSpec, *command: str) -> int:
    """Writes the files here, and submits from inside."""
    launch = render_slurm(spec, Job("p", (PROGRAM, *command), slurm.shared, folder, uses_ray=True))
    launch.write()
    *sbatch, script = launch.command.argv
    return int(slurm.run(*sbatch, "--parsable", script).stdout)


@contextlib.contextmanager
def waited_for(slurm: SlurmCluster, folder: Path, *command: str) -> Iterator[tuple[int, subprocess.Popen]]:
    """What ``align launch --on slurm --wait`` runs, from inside: the job, and the process that waits for it."""
    job = Job("p", (PROGRAM, *command), slurm.shared, folder, uses_ray=True, wait=True)
    launch = render_slurm(two_nodes(), job)
    launch.write()
    inside = slurm.machines["controller"].command(*launch.command.argv, cwd=slurm.shared)
    waiting = subprocess.Popen(inside, env=slurm.environment, stdout=subprocess.PIPE, text=True)
    try:
        assert waiting.stdout is not None
        yield int(waiting.stdout.readline().rsplit(" ", 1)[1]), waiting
    finally:
        kill(waiting)
        waiting.communicate()


def assert_nothing_is_left(slurm: SlurmCluster) -> None:
    def left() -> list[str]:
        found = [p for name in ("n1", "n2") for p in slurm.machines[name].processes()]
        return [p for p in found if not any(daemon in p for daemon in ("slurmd", "munged", "signal.pause"))]

    wait_for(lambda: not left(), lambda: f"processes to end: {left()}", 60)


def test_the_nodes_share_nothing_but_one_folder(slurm):
    for name, other in (("n1", "n2"), ("n2", "n1")):
        for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run", str(Path.home()), str(slurm.shared)):
            slurm.run("touch", f"{folder}/from-{name}", on=name)
            seen = slurm.run("test", "-e", f"{folder}/from-{name}", on=other, check=False).returncode == 0
            assert seen == (folder == str(slurm.shared)), folder
        for folder in ("/", "/etc", "/usr", "/var", str(Path(__file__).parent)):
            assert slurm.run("touch", f"{folder}/from-{name}", on=name, check=False).returncode != 0, folder
        address = slurm.run("hostname", "--all-ip-addresses", on=name).stdout.split()
        assert len(address) == 1
        assert slurm.run("ip", "route", "get", "8.8.8.8", on=name, check=False).returncode != 0, "a way out"
    assert not list(Path("/tmp").glob("from-n*")) + list(Path.home().glob("from-n*"))


def test_actors_on_both_nodes_and_an_exit_code_other_than_zero(slurm, tmp_path_factory):
    folder = slurm.shared / "code 3 & more"  # a name that has to be quoted everywhere
    with waited_for(slurm, folder, "exit", str(slurm.shared), "3") as (number, waiting):
        job = slurm.wait_job(number, ENDED)
        assert waiting.wait(timeout=60) == 3, "--wait ends as the job does"
    log = (folder / "job.log").read_text()
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "3:0"), log + slurm.logs()
    places = json.loads((slurm.shared / "places.json").read_text())
    assert {(p["host"], p["address"]) for p in places} == {("n1", "10.77.0.11"), ("n2", "10.77.0.12")}
    assert all(p["tmp_is_private"] == "True" and p["mode"] == "token" and not p["token"] for p in places), places
    assert "align launch: 2 nodes: 10.77.0.11, 10.77.0.12" in log
    assert not list(folder.glob("token.*"))
    assert_nothing_is_left(slurm)


@pytest.mark.full
def test_told_to_stop_it_saves_and_is_queued_again_and_goes_on_and_ends_with_zero(slurm):
    folder, step = slurm.shared / "steps", slurm.shared / "step"
    with waited_for(slurm, folder, "steps", str(slurm.shared)) as (number, waiting):
        wait_for(step.exists, lambda: f"the first step\n{slurm.logs()}", 120)
        slurm.run("scancel", "--batch", "--signal=TERM", str(number))
        assert slurm.wait_job(number, ("PENDING",))["Restarts"] == "1", slurm.logs()
        state = json.loads((slurm.shared / "state.json").read_text())
        job = slurm.wait_job(number, ENDED)
        assert waiting.wait(timeout=60) == 0, "--wait lasts beyond a requeue, and ends as the last attempt does"
    log = (folder / "job.log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    again = json.loads((slurm.shared / "state.json").read_text())
    assert again == {"step": state["step"] + 3, "started_at": [0, state["step"]]}
    assert_nothing_is_left(slurm)


def where_it_shows(slurm: SlurmCluster, secret: str, token: Path) -> list[str]:
    """Command lines and environments of all processes on the nodes, what Slurm keeps, and files of the shared folder
    that hold the token; all but its own file."""
    found = []
    for name, machine in slurm.machines.items():
        inside = Path(f"/proc/{machine.pid}/root")
        kinds = [*inside.glob("proc/[0-9]*/cmdline"), *inside.glob("proc/[0-9]*/environ")]
        kinds += [path for path in inside.glob("run/align/**/*") if path.is_file()]
        kinds += [path for path in slurm.shared.rglob("*") if path.is_file() and path != token]
        for path in kinds:
            try:
                if secret.encode() in path.read_bytes():
                    found.append(f"{name}: {path}")
            except OSError:  # it has ended
                continue
    return found


def test_a_node_that_cannot_start_ends_the_job_at_once_and_is_named(slurm):
    folder = slurm.shared / "broken"
    spec = two_nodes(setup=('[ "$(hostname)" != n2 ] || { echo "there is no module cuda" >&2; exit 1; }',))
    job = slurm.wait_job(submit(slurm, folder, spec, "exit", str(slurm.shared), "0"), ENDED)
    log = (folder / "job.log").read_text()
    assert job["ExitCode"] == "69:0", log
    assert "Ray on n2 ended with exit code 1 before training began" in log
    cause = f"align launch: the end of {folder}/worker-n2.log:\n    there is no module cuda\n"
    assert cause in log, "why is seen without another file"
    assert log.count("the end of") == 1, "of the node that is at fault, and no other"
    assert_nothing_is_left(slurm)


def test_a_job_that_is_cancelled_is_not_queued_again(slurm):
    folder = slurm.shared / "cancelled"
    number = submit(slurm, folder, two_nodes(), "steps", str(slurm.shared))
    wait_for((folder / "driver.pid").exists, "the driver", 60)
    slurm.run("scancel", str(number))
    job = slurm.wait_job(number, ENDED)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), (folder / "job.log").read_text()
    assert_nothing_is_left(slurm)
    assert slurm.job(number)["JobState"] == "CANCELLED"


RL_STEPS = 16
SMALL = {
    "model.build": "{hidden_size: 64, layers: 2, heads: 2, kv_heads: 2, intermediate_size: 64}",
    "data.eval.size": 8,
    "rewards": '[{name: format, pattern: "[0-4].*"}]',  # one that an untrained model sometimes earns
    "stages.1.curricula": "[uniform]",
    "stages.0.steps": 2,
    "stages.0.batch_size": 4,
    "stages.1.steps": RL_STEPS,
    "stages.1.prompts_per_step": 4,
    "stages.1.group_size": 4,
    "stages.1.sampler.engines": 2,
    "cluster.nodes": 2,
    "cluster.cpus_per_node": 2,  # an engine each, and then one core each is left for a rank
}


def test_the_recipe_of_the_real_engines_on_two_nodes_stopped_and_queued_again(slurm):
    sets = [f"--set={key}={value}" for key, value in {**SMALL, "run.output": slurm.shared / "runs"}.items()]
    recipe = ROOT / "recipes/quickstart_cluster.yaml"
    slurm.run(sys.executable, "-m", "alignment", "launch", recipe, "--on", "slurm", *sets, timeout_s=120)
    run, folder = slurm.shared / "runs/quickstart-cluster", slurm.shared / "runs/quickstart-cluster.launch/1"
    (number,) = map(int, slurm.run("squeue", "--noheader", "--format=%i").stdout.split())

    def steps() -> list[int]:
        path = run / "metrics.jsonl"
        found = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        return [line["step"] for line in found if line["kind"] == "train" and line["stage"] == "rl"]

    wait_for(lambda: len(steps()) > 3 or slurm.job(number)["JobState"] in ENDED, slurm.logs, 400)
    assert slurm.job(number)["JobState"] == "RUNNING", slurm.logs()
    for name in ("n1", "n2"):
        actors = [process for process in slurm.machines[name].processes() if process.startswith("ray::")]
        assert sum("RolloutEngine" in actor for actor in actors) == 1, (name, actors)
        assert sum("LearnerRank" in actor for actor in actors) == 1, (name, actors)
    (token,) = folder.glob("token.*")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
    assert not where_it_shows(slurm, token.read_text(), token)
    slurm.run("scancel", "--batch", "--signal=TERM", str(number))
    assert slurm.wait_job(number, ("PENDING",), 200)["Restarts"] == "1", slurm.logs()
    done = steps()
    assert done == list(range(3, 3 + len(done))) and len(done) < RL_STEPS
    job = slurm.wait_job(number, ENDED, 400)
    log = (folder / "job.log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert f"resumed from step {done[-1]}" in log and "queued again; it goes on from the last completed step" in log
    assert steps() == list(range(3, 3 + RL_STEPS)), "none was lost or done twice"
    assert json.loads((run / "result.json").read_text())["status"] == "complete"
    assert Ledger(run / "ledger.jsonl").fates() == dict.fromkeys(range(4 * RL_STEPS), "trained")
    assert_nothing_is_left(slurm)
    for name in ("n1", "n2"):
        assert f"align-{number}" not in slurm.run("ls", "/tmp", on=name).stdout.split()


@pytest.mark.full
def test_when_the_head_dies_the_job_ends_and_says_so(slurm):
    folder = slurm.shared / "headless"
    (slurm.shared / "step").unlink(missing_ok=True)
    (slurm.shared / "state.json").unlink(missing_ok=True)
    number = submit(slurm, folder, two_nodes(), "steps", str(slurm.shared))
    wait_for((slurm.shared / "step").exists, lambda: f"the first step\n{slurm.logs()}", 120)
    pid = slurm.run("pgrep", "-f", "gcs_server", on="n1").stdout.split()[0]
    slurm.run("kill", "-KILL", pid, on="n1")
    job = slurm.wait_job(number, ENDED)
    log = (folder / "job.log").read_text()
    assert job["JobState"] == "FAILED" and job["Restarts"] == "0", log
    assert (
        f"Ray's head on n1 has ended; see {folder}/head.log\nalign launch: the end of {folder}/head.log:\n    " in log
    )
    assert_nothing_is_left(slurm)


@pytest.mark.full  # Slurm counts in minutes
def test_before_its_time_limit_a_job_saves_and_is_queued_again(slurm):
    folder = slurm.shared / "limited"
    until_told = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); signal.pause()"
    spec = ClusterSpec(cpus_per_node=1, slurm=Slurm(time="2"), deadlines=Deadlines(save_s=60))
    launch = render_slurm(spec, Job("limited", ("-c", until_told), slurm.shared, folder, uses_ray=False))
    launch.write()
    number = int(slurm.run(*launch.command.argv[:-1], "--parsable", launch.command.argv[-1]).stdout)
    job = slurm.wait_job(number, ("PENDING", *ENDED), 180)
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1"), (folder / "job.log").read_text()
    slurm.run("scancel", str(number))
    assert_nothing_is_left(slurm)
