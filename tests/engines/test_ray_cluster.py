"""Actors on a live private cluster: who they are, what they see, how they fail, and that nothing of them stays."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from alignment.engines import ray_cluster
from alignment.engines.config import Site
from alignment.engines.ray_cluster import RayCluster
from alignment.engines.ray_config import RayClusterConfig
from alignment.engines.ray_needs import Needs
from alignment.errors import EngineFailed, UserError
from tests.engines.ray_actors import Rank

ROOT = Path(__file__).parents[2]


def stage(ranks=0, engines=0):
    return SimpleNamespace(learner=SimpleNamespace(ranks=ranks), sampler=SimpleNamespace(engines=engines))


def site(**options):
    return Site(model=SimpleNamespace(), **options)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def open_ray(live_ray):
    """Opens clusters for a test, with short deadlines, and closes them after it."""
    opened = []

    def opener(ranks=0, engines=0, options=None, **site_options):
        config = RayClusterConfig(**{"start_timeout_s": 60.0, **(options or {})})
        context = config.open(stage(ranks, engines), site(**site_options))
        opened.append(context)
        return context.__enter__()

    yield opener
    for context in reversed(opened):
        context.__exit__(None, None, None)


def test_the_cores_of_a_machine_are_divided_among_the_processes_on_it(monkeypatch):
    """As Ray would place 32 ranks and 8 engines of 4 GPUs, which share, on 4 machines; no Ray is started."""
    needs = Needs(learner_ranks=32, engines=8, tensor_parallel=4, colocated=True, device="gpu")
    made = []

    def group(bundles, strategy):
        made.append(SimpleNamespace(bundle_count=len(bundles), number=len(made), ready=lambda: None))
        return made[-1]

    def where(group):
        return {"bundles_to_node_id": dict.fromkeys(range(4), f"node {group.number // 2}")}

    monkeypatch.setattr(ray_cluster, "placement_group", group)
    monkeypatch.setattr(ray_cluster, "placement_group_table", where)
    nodes = [{"NodeID": f"node {number}", "Resources": {"CPU": 96.0}} for number in range(4)]
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: nodes)
    session = SimpleNamespace(private=False, loopback=False)
    cluster = RayCluster(RayClusterConfig(), needs, site(), session)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(cluster, "wait", lambda *_: None)
    cluster.place()
    for slot in [*cluster._engine_slots, *cluster._learner_slots]:
        assert cluster._environment(slot)["OMP_NUM_THREADS"] == "6", "8 ranks and 2 engines of 4 on 96 cores"


def comes_true(question, within_s=120):
    deadline = time.monotonic() + within_s
    while not (answer := question()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pid):
    return comes_true(lambda: not runs(pid))


@pytest.fixture(scope="module")
def plugin_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    text = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Thing:\n    n: int\n"
    (folder / "only_here.py").write_text(text + "    def double(self):\n        return 2 * self.n\n")
    return folder


def test_ranks_know_their_place_and_have_what_the_recipe_has(open_ray, plugin_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(plugin_folder))
    from only_here import Thing  # pyright: ignore[reportMissingImports]

    options = {"environment": {"EXTRA": "yes"}, "threads": 3}
    cluster = open_ray(2, options=options, folders=(str(plugin_folder),), plugins=("only_here",))
    first, second = cluster.learner_actors(Rank, 2, "good day")
    found = cluster.wait([a.environment.remote() for a in (first, second)], "the environment", 30)
    assert [e["RANK"] for e in found] == [e["LOCAL_RANK"] for e in found] == ["0", "1"]
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"] and int(found[0]["MASTER_PORT"]) > 1024
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "3", "EXTRA": "yes"}
    assert all(e[name] == value for e in found for name, value in shared.items())
    refs = [second.greet.remote("you"), first.path.remote(), first.modules.remote("only_here")]
    greeting, path, imported = cluster.wait(refs, "answers", 30)
    assert greeting == "good day you from 1"
    assert imported and path[-1] == str(plugin_folder), "the recipe's folder hides nothing that is installed"
    assert cluster.wait([first.is_instance_of_plugin.remote(Thing(4))], "a plugin's object", 30) == [8]
    assert cluster.name_of(second) == f"learner rank 1 ({cluster.places[second._actor_id.hex()]})"


def test_errors_come_through_as_what_they_are(open_ray):
    cluster = open_ray(1)
    (rank,) = cluster.learner_actors(Rank, 1)
    with pytest.raises(UserError, match="^not like this: do that$"):
        cluster.wait([rank.refuse.remote()], "it", 30)
    with pytest.raises(ZeroDivisionError, match="in the actor"):
        cluster.wait([rank.divide.remote()], "it", 30)
    assert cluster.wait([rank.greet.remote("you")], "it", 30) == ["hello you from 0"], "it is still there"


def test_a_constructor_that_refuses_says_why(open_ray):
    with pytest.raises(UserError, match="^this rank cannot be: set something else$"):
        open_ray(1).learner_actors(Rank, 1, "hello", True)


def test_a_dead_rank_is_named_with_its_last_words_even_if_another_complains_first(open_ray):
    cluster = open_ray(2)
    first, second = cluster.learner_actors(Rank, 2)
    second_pid = cluster.places[second._actor_id.hex()].pid
    refs = [first.complain_when_the_other_is_gone.remote(), second.say_and_die.remote()]
    with pytest.raises(EngineFailed) as raised:
        cluster.wait(refs, "the learner to update", 60)
    text = str(raised.value)
    assert text.startswith(
        f"learner rank 1 (process {second_pid} on 127.0.0.1) died while the run waited for the learner"
    )
    assert "about to go" in text


def test_who_does_not_answer_is_named_and_can_be_ended(open_ray):
    calls = []
    cluster = open_ray(1, idle=lambda: calls.append(1))
    (rank,) = cluster.learner_actors(Rank, 1)
    pid = cluster.places[rank._actor_id.hex()].pid
    with pytest.raises(
        EngineFailed, match=rf"waited 0.5 s for an answer; no answer from learner rank 0 \(process {pid}"
    ):
        cluster.wait([rank.stop.remote()], "an answer", 0.5)
    assert len(calls) >= 3
    cluster.kill(rank)
    assert gone(pid), "SIGTERM would never reach a stopped process"


def test_waiting_can_be_given_up(open_ray):
    def give_up():
        raise InterruptedError("enough")

    cluster = open_ray(1)
    (rank,) = cluster.learner_actors(Rank, 1)
    with pytest.raises(InterruptedError):
        cluster.wait([rank.sleep.remote(30)], "nothing", 60, give_up)


def test_devices_come_back_and_actors_go(live_ray):
    assert comes_true(lambda: ray.available_resources()["CPU"] == 64)
    with RayClusterConfig(cpus_per_process=2.0).open(stage(2, 1), site()) as cluster:
        actors = [*cluster.learner_actors(Rank, 2), *cluster.engine_actors(Rank, 1)]
        pids = [place.pid for place in cluster.places.values()]
        assert len(set(pids)) == len(actors) == 3
        assert comes_true(lambda: ray.available_resources()["CPU"] == 58)
    assert all(gone(pid) for pid in pids)
    assert comes_true(lambda: ray.available_resources()["CPU"] == 64)


def test_too_small_a_cluster_is_refused_before_anything_starts(live_ray):
    with pytest.raises(UserError, match=r"needs 65 learner CPUs; the cluster has 64 CPUs on 1 node"):
        RayClusterConfig(address=live_ray.address).open(stage(65), site()).__enter__()
    with pytest.raises(UserError, match=r"needs 1 engine GPU; the cluster has 0 GPUs on 1 node"):
        RayClusterConfig(device="gpu").open(stage(0, 1), site()).__enter__()


def test_devices_that_others_hold_are_waited_for_no_longer_than_asked(live_ray):
    with RayClusterConfig(cpus_per_process=40.0).open(stage(1), site()):
        with pytest.raises(EngineFailed, match=r"waited 1 s for devices to be free.*others use them.*24 CPUs"):
            options = RayClusterConfig(address=live_ray.address, cpus_per_process=40.0, start_timeout_s=1.0)
            options.open(stage(1), site()).__enter__()


PROGRAM = """
    import os, signal, sys, time
    from types import SimpleNamespace
    import alignment
    from alignment.engines.config import Site
    from alignment.engines.ray_config import RayClusterConfig
    from tests.engines.ray_actors import Rank

    def main(how):
        seen = []
        signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
        stage = SimpleNamespace(learner=SimpleNamespace(ranks=1), sampler=SimpleNamespace(engines=1))
        with RayClusterConfig(start_timeout_s=60.0).open(stage, Site(model=None)) as cluster:
            (rank,) = cluster.learner_actors(Rank, 1)
            (engine,) = cluster.engine_actors(Rank, 1)
            engine.stop.remote()
            print(cluster.session.folder, cluster.session.address, cluster.session.token_file, flush=True)
            sys.stdin.readline()
            if how == "error":
                raise RuntimeError("an error of the run")
            if how == "term":
                os.kill(os.getpid(), signal.SIGTERM)
                assert seen, "Ray took the handler"
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        if how == "term":
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(seen) == 2, "Ray's own handler was left behind"

    main(sys.argv[1])
"""


def mentioning(marker):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if marker.encode() in text and runs(int(folder.name)):
            found.append(int(folder.name))
    return found


def listening(pids):
    """Local addresses of the sockets on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link) if link.is_symlink() else ""
            inodes |= {target[8:-1]} if target.startswith("socket:[") else set()
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["well", "error", "term", "killed"])
def test_a_private_cluster_is_loopback_and_leaves_no_process(tmp_path, how):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, str(program), how],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        folder, address, token_file = run.stdout.readline().split()
        marker = str(Path(token_file).parent)
        processes = mentioning(marker)
        assert len(processes) >= 5, "gcs, raylet, agents and two actors"
        loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
        assert listening([*processes, run.pid]) <= loopback and address.startswith("127.0.0.1:")
        assert Path(token_file).stat().st_mode & 0o777 == 0o600
        _, errors = run.communicate("\n", timeout=120)
    assert run.returncode == {"well": 0, "error": 1, "term": 0, "killed": -signal.SIGKILL}[how], errors
    assert all(gone(pid) for pid in processes), mentioning(marker)
    if how != "killed":
        assert not Path(marker).exists()
        assert errors == "" or how == "error", "Ray says nothing of itself"


def join(live_ray, **changes):
    text = (
        "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False);"
        " print(ray.cluster_resources()['CPU'])"
    )
    environment = {k: v for k, v in (live_ray.environment | changes).items() if v is not None}
    return subprocess.run(
        [sys.executable, "-c", text, live_ray.address], env=environment, capture_output=True, text=True, timeout=120
    )


def test_only_who_has_the_token_may_join(live_ray, tmp_path):
    (tmp_path / "wrong").write_text("0" * 64)
    assert join(live_ray).stdout.strip() == "64.0"
    wrong = join(live_ray, RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
    assert wrong.returncode != 0 and "token" in wrong.stderr.lower()
    without = join(live_ray, RAY_AUTH_MODE=None, RAY_AUTH_TOKEN_PATH=None, HOME=str(tmp_path))
    assert without.returncode != 0 and "64.0" not in without.stdout


def test_an_existing_cluster_is_joined_with_a_token_only(live_ray, tmp_path):
    text = textwrap.dedent("""
        import sys
        from types import SimpleNamespace
        from alignment.engines.config import Site
        from alignment.engines.ray_config import RayClusterConfig
        from alignment.errors import UserError
        from tests.engines.ray_actors import Rank
        stage = SimpleNamespace(learner=SimpleNamespace(ranks=1), sampler=None)
        try:
            config = RayClusterConfig(address=sys.argv[1], start_timeout_s=60.0)
            with config.open(stage, Site(model=None)) as cluster:
                (rank,) = cluster.learner_actors(Rank, 1)
                print(cluster.wait([rank.greet.remote("you")], "it", 30)[0])
        except UserError as error:
            print(f"refused: {error}")
    """)

    def run(address, **changes):
        environment = {k: v for k, v in (live_ray.environment | changes).items() if v is not None}
        command = [sys.executable, "-c", text, address]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert run(live_ray.address).stdout.strip() == "hello you from 0"
    alone = run(live_ray.address, RAY_AUTH_TOKEN_PATH=None, HOME=str(tmp_path)).stdout
    assert alone.startswith(f"refused: cluster.address {live_ray.address}: no token is set")
    off = run(live_ray.address, RAY_AUTH_MODE="disabled").stdout
    assert off.startswith(f"refused: cluster.address {live_ray.address}: RAY_AUTH_MODE is disabled")
    assert ray.nodes()[0]["Alive"], "the cluster outlives who joined it"
