"""On a Ray cluster that is there already, of one node that this test starts and ends: by the address of its head, and
by its job server where Ray has one."""

import importlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import submit
from launch.nodes import NoCluster, wait_for_nodes
from launch.plan import Job, Launch
from launch.ray_jobs import render_ray
from launch.spec import ClusterSpec, Deadlines, RayAddress
from tests.launch.slurm_cluster import wait_for

PROGRAM = str(Path(__file__).with_name("ray_program.py"))


def has_job_server() -> bool:
    try:
        importlib.import_module("ray.dashboard.optional_deps")  # what Ray itself tries
    except ImportError:
        return False
    return True


JOB_SERVER = has_job_server()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The address of a running head and that of its job server, and the file of its token."""
    folder = tmp_path_factory.mktemp("ray")
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(16))
    port, server = free_port(), free_port()
    temp = Path("/tmp") / f"align-test-{os.getpid()}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=4", f"--temp-dir={temp}"]
    command += [
        f"--include-dashboard={str(JOB_SERVER).lower()}",
        f"--dashboard-port={server}",
        "--dashboard-host=127.0.0.1",
    ]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # another cluster of this machine has Ray's own
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: "runtime started" in (folder / "head.log").read_text(), (folder / "head.log").read_text, 90)
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{server}", token
    finally:
        process.terminate()  # it ends what it started
        process.wait(timeout=60)
        subprocess.run(["rm", "-rf", temp], check=True)


def launch(spec: ClusterSpec, folder: Path, *command: str, wait: bool = True) -> Launch:
    number = len(list(folder.glob("*.launch")))
    rendered = render_ray(spec, Job("p", (PROGRAM, *command), folder, folder / f"{number}.launch", True, wait))
    rendered.write()
    return rendered


def run(rendered: Launch, **env: str) -> subprocess.CompletedProcess:
    command = rendered.command
    return subprocess.run(
        command.argv,
        cwd=command.workdir,
        env={**os.environ, **command.env, "OMP_NUM_THREADS": "1", **env},
        text=True,
        capture_output=True,
        timeout=180,
    )


@pytest.mark.parametrize("code", [0, 3])
def test_a_driver_here_joins_the_cluster(tmp_path, head, code):
    spec = ClusterSpec(ray=RayAddress(address=head[0], token_file=str(head[2])))
    done = run(launch(spec, tmp_path, "exit", str(tmp_path), str(code)))
    assert done.returncode == code, done.stderr
    (place,) = json.loads((tmp_path / "places.json").read_text())
    assert f"align launch: 1 nodes: {place['address']}\n" in done.stderr and place["mode"] == "token"


def test_too_few_nodes_are_an_error_that_counts_them(tmp_path, head):
    spec = ClusterSpec(
        nodes=2, ray=RayAddress(address=head[0], token_file=str(head[2])), deadlines=Deadlines(nodes_s=3)
    )
    done = run(launch(spec, tmp_path, "exit", str(tmp_path), "0"))
    assert done.returncode == 69, done.stderr
    assert re.search(r"only 1 of 2 nodes \([\d.]+\) joined Ray, 3 s \(deadlines.nodes_s\)", done.stderr)
    assert not (tmp_path / "places.json").exists()


def test_no_head_is_an_error_that_names_it():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(NoCluster, match=f"no answer from Ray's head at {address}, 0.1 s"):
        wait_for_nodes(address, 1, 0.1)


@pytest.mark.parametrize("address", ["", "head", "head:port", "head:", ":6379", "head:99999", "http://head:1"])
def test_an_address_that_is_none_is_an_error_that_shows_it(address):
    command = [sys.executable, "-m", "launch.nodes", "--nodes=1", "--timeout-s=5", "--", "true"]
    done = subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}, text=True, capture_output=True)
    assert done.returncode == 69
    assert done.stderr == (
        f"align launch: RAY_ADDRESS has to be HOST:PORT of the head of a Ray cluster, and is '{address}'\n"
    )


def test_a_node_that_could_not_start_ends_the_waiting(tmp_path):
    (tmp_path / "ended.n7").write_text("1\n")
    with pytest.raises(NoCluster, match=r"Ray on n7 ended with exit code 1 before training began; see .*worker-n7.log"):
        wait_for_nodes(f"127.0.0.1:{free_port()}", 2, 60, tmp_path)


def test_told_to_stop_while_it_waits_it_lost_nothing():
    command = [sys.executable, "-m", "launch.nodes", "--nodes=1", "--timeout-s=60", "--", "false"]
    env = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    waiting = subprocess.Popen(command, env=env)
    handled = f"{1 << (signal.SIGTERM - 1):016x}"
    status = Path(f"/proc/{waiting.pid}/status")
    wait_for(lambda: int(handled, 16) & int(status.read_text().split("SigCgt:")[1].split()[0], 16), "its handler")
    waiting.terminate()
    assert waiting.wait(timeout=30) == 75


@pytest.mark.skipif(not JOB_SERVER, reason="this Ray has no job server: pip install 'ray[default]'")
@pytest.mark.parametrize("code", [0, 3])
def test_a_job_server_takes_the_job_and_its_exit_code_comes_back(tmp_path, head, code):
    spec = ClusterSpec(ray=RayAddress(address=head[1], token_file=str(head[2])))
    done = run(launch(spec, tmp_path, "exit", str(tmp_path), str(code)))
    assert done.returncode == code, done.stderr
    assert "align launch: 1 nodes: " in done.stdout, "the job's own output is shown"
    assert json.loads((tmp_path / "places.json").read_text())[0]["mode"] == "token"


@pytest.mark.skipif(not JOB_SERVER, reason="this Ray has no job server: pip install 'ray[default]'")
def test_a_job_server_that_does_not_accept_the_token_is_an_error_that_says_so(tmp_path, head):
    spec = ClusterSpec(ray=RayAddress(address=head[1]))
    done = run(launch(spec, tmp_path, "exit", str(tmp_path), "0"), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="wrong")
    assert done.returncode == 69 and "did not take the job: Authentication" in done.stderr, done.stderr


@pytest.mark.skipif(not JOB_SERVER, reason="this Ray has no job server: pip install 'ray[default]'")
def test_a_job_that_is_stopped_has_time_to_save(tmp_path, head):
    from ray.job_submission import JobSubmissionClient

    spec = ClusterSpec(ray=RayAddress(address=head[1], token_file=str(head[2])))
    done = run(launch(spec, tmp_path, "steps", str(tmp_path), wait=False))
    assert done.returncode == 0, done.stderr
    job = done.stderr.rsplit(" ", 1)[1].strip()
    wait_for((tmp_path / "step").exists, "a step", 60)
    client = JobSubmissionClient(head[1], headers={"Authorization": f"Bearer {head[2].read_text()}"})
    client.stop_job(job)
    wait_for(lambda: client.get_job_info(job).status.is_terminal(), "the job's end", 60)
    assert (tmp_path / "state.json").exists()


class Server:
    """A job server, as its client shows it, whose connections break, each after so much."""

    def __init__(self, *connections: list[str | Exception], breaks_for_good: bool = False) -> None:
        self.connections, self.breaks_for_good = list(connections), breaks_for_good

    async def tail_job_logs(self, _job: str):
        if self.breaks_for_good:
            raise OSError("no route")
        for part in self.connections.pop(0):
            if isinstance(part, Exception):
                raise part
            yield part

    def get_job_info(self, _job: str):
        ended = SimpleNamespace(is_terminal=lambda: not self.connections)
        return SimpleNamespace(status=ended, driver_exit_code=3)


def test_the_output_of_a_job_is_shown_once_whatever_breaks(capsys, monkeypatch):
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    broken = RuntimeError("WebSocket connection closed unexpectedly")
    server = Server(["one\ntw", "o\n", broken], [broken], ["one\n", "two\nthr", "ee\n"])
    assert submit.follow(server, "job") == 3
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_job_server_that_stays_away_is_given_up(capsys, monkeypatch):
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    monkeypatch.setattr(submit, "LOST_S", 0.05)
    assert submit.follow(Server(breaks_for_good=True), "job") == 69
    assert "no answer from the job server for 0.05 s: no route" in capsys.readouterr().err


@pytest.mark.full  # Ray tries for 20 s
def test_without_the_token_there_is_no_way_in(tmp_path, head):
    spec = ClusterSpec(ray=RayAddress(address=head[0]), deadlines=Deadlines(nodes_s=5))
    done = run(launch(spec, tmp_path, "exit", str(tmp_path), "0"), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="wrong")
    assert done.returncode == 69 and "InvalidAuthToken" in done.stderr, done.stderr
    assert not (tmp_path / "places.json").exists()
