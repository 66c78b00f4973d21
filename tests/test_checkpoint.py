"""Checkpoints under kills, full disks and flipped bits."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.checkpoint import (
    CheckpointDamaged,
    CheckpointFailed,
    Checkpoints,
    load_state,
    save_state,
    verify,
)
from alignment.durable import StorageError, parse, problems_of, render
from alignment.errors import UserError
from alignment.origin import policy_weights
from alignment.types import TrainState

META = {"config_hash": "c0ffee", "world_size": 1}
FILES = {"state.json": b'{"step": 1}', "learner/policy.safetensors": bytes(range(256)) * 8, "learner/empty": b""}


def write(step, size=1):
    """A writer whose files differ between steps and are written in several pieces."""

    def fill(folder):
        for name, content in FILES.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                file.write(b"%d" % step * size)

    return fill


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, write(step), META)


def unused(_problem):
    raise AssertionError(_problem)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep_last=2)


# What a save leaves


def test_a_save_publishes_files_manifest_and_pointer(checkpoints):
    path = checkpoints.save(7, write(7), {**META, "seconds": {"rl": 1.5}})
    assert path.name == "step_00000007"
    assert {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} == {*FILES, "manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["schema"], manifest["step"], manifest["meta"]["config_hash"]) == (1, 7, "c0ffee")
    assert manifest["files"]["learner/empty"]["size"] == 1
    assert (checkpoints.root / "LATEST").read_text() == "step_00000007\n"
    assert sorted(p.name for p in checkpoints.root.iterdir()) == ["LATEST", "step_00000007"]
    saved = checkpoints.latest(unused)
    assert (saved.step, saved.folder, saved.meta) == (7, path, {**META, "seconds": {"rl": 1.5}})


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [50]), (2, [40, 50]), (9, [10, 20, 30, 40, 50])])
def test_the_newest_are_kept(tmp_path, keep_last, kept):
    checkpoints = Checkpoints(tmp_path, keep_last)
    save(checkpoints, 10, 20, 30, 40, 50)
    assert checkpoints.steps() == kept


def test_the_best_is_kept_beside_the_newest(checkpoints):
    save(checkpoints, 10, 20)
    checkpoints.mark_best(10, 0.5)
    save(checkpoints, 30, 40, 50)
    assert checkpoints.steps() == [10, 40, 50]
    checkpoints.mark_best(50, 0.75)
    assert (checkpoints.best.step, checkpoints.best.value) == (50, 0.75)
    save(checkpoints, 60)
    assert checkpoints.steps() == [50, 60]
    assert checkpoints.load("best", unused).step == 50


def test_nothing_is_kept_means_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="keep_last is 0; it must be at least 1"):
        Checkpoints(tmp_path, 0)


def test_saving_a_step_again_replaces_it(checkpoints):
    save(checkpoints, 10, 20)
    checkpoints.save(20, lambda folder: (folder / "other").write_text("new"), META)
    assert (checkpoints.latest(unused).folder / "other").read_text() == "new"
    assert sorted(p.name for p in checkpoints.root.iterdir()) == ["LATEST", "step_00000010", "step_00000020"]


def test_steps_beyond_a_save_belong_to_an_abandoned_future(checkpoints):
    save(checkpoints, 10, 20)
    flip(checkpoints.root / "step_00000020/state.json")
    assert checkpoints.latest(lambda _: None).step == 10
    save(checkpoints, 15)
    assert checkpoints.steps() == [10, 15]
    assert checkpoints.latest(unused).step == 15


def test_leftovers_of_dead_processes_go_with_the_next_save_and_are_never_read(checkpoints):
    save(checkpoints, 10)
    shutil.copytree(checkpoints.root / "step_00000010", checkpoints.root / ".tmp-step_00000020-00ff")
    (checkpoints.root / ".tmp-LATEST-00ff").write_text("step_0000")
    assert checkpoints.latest(unused).step == 10
    save(checkpoints, 30)
    assert sorted(p.name for p in checkpoints.root.iterdir()) == ["LATEST", "step_00000010", "step_00000030"]


def test_meta_must_survive_json_and_name_the_recipe(checkpoints):
    with pytest.raises(AssertionError, match="config_hash"):
        checkpoints.save(1, write(1), {"world_size": 1})
    with pytest.raises(ValueError, match=r"the manifest does not come back.*value\['meta'\]\['evaluations'\]"):
        checkpoints.save(1, write(1), {**META, "evaluations": {10: 0.5}})
    assert checkpoints.steps() == []


# Damage


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    at = len(data) // 2 if at is None else at
    data[at] ^= 0x01
    path.write_bytes(data)


ALL = [*FILES, "manifest.json"]


@pytest.mark.parametrize("name", ALL)
def test_one_flipped_byte_is_caught_and_named_and_the_step_before_is_used(checkpoints, name):
    save(checkpoints, 10, 20)
    flip(checkpoints.root / "step_00000020" / name)
    reports = []
    assert checkpoints.latest(reports.append).step == 10
    assert len(reports) == 1
    assert "step_00000020" in reports[0]
    assert name in reports[0]
    assert "what was written" in reports[0] or "JSON" in reports[0]
    with pytest.raises(CheckpointDamaged, match=name):
        checkpoints.load(20, unused)


def test_every_byte_of_a_manifest_counts(checkpoints):
    checkpoints.save(10, lambda folder: (folder / "state.json").write_text("{}"), META)
    path = checkpoints.root / "step_00000010"
    good = (path / "manifest.json").read_bytes()
    for at in range(len(good)):
        flip(path / "manifest.json", at)
        assert verify(path), f"byte {at} ({good[at : at + 1]!r}) may change unseen"
        (path / "manifest.json").write_bytes(good)
    assert verify(path) == []


@pytest.mark.parametrize("name", ALL)
def test_truncated_deleted_and_swapped_files_are_named(checkpoints, name):
    save(checkpoints, 10, 20)
    old, new = checkpoints.root / "step_00000010" / name, checkpoints.root / "step_00000020" / name
    good = new.read_bytes()
    new.write_bytes(good[:-1])
    truncated = verify(checkpoints.root / "step_00000020")
    new.unlink()
    deleted = verify(checkpoints.root / "step_00000020")
    new.write_bytes(old.read_bytes())
    swapped = verify(checkpoints.root / "step_00000020")
    for problems in (truncated, deleted, swapped):
        assert any(problem.startswith(f"{name}: ") for problem in problems)
    new.write_bytes(good)
    assert verify(checkpoints.root / "step_00000020") == []


def test_a_file_more_a_link_and_a_renamed_folder_are_named(checkpoints):
    save(checkpoints, 10, 20)
    path = checkpoints.root / "step_00000020"
    (path / "learner/extra").touch()
    assert verify(path) == ["learner/extra: not in the manifest"]
    (path / "learner/extra").unlink()
    (path / "state.json").rename(checkpoints.root / "elsewhere")
    (path / "state.json").symlink_to(checkpoints.root / "elsewhere")
    assert "links instead of files: state.json" in verify(path)[0]
    shutil.rmtree(path)
    (checkpoints.root / "step_00000010").rename(path)
    assert "is of step 10, which is not what the folder's name says" in verify(path)[0]


def test_a_manifest_of_another_version_is_not_guessed_at(checkpoints):
    save(checkpoints, 10)
    path = checkpoints.root / "step_00000010/manifest.json"
    path.write_bytes(render({**parse(path), "schema": 2}))
    assert verify(path.parent) == ["manifest.json: has schema version 2, this program reads version 1"]


def test_when_none_verifies_the_run_does_not_start_over(checkpoints):
    assert checkpoints.latest(unused) is None
    save(checkpoints, 10, 20)
    for step in (10, 20):
        flip(checkpoints.root / f"step_000000{step}/learner/policy.safetensors")
    with pytest.raises(CheckpointDamaged, match=r"(?s)--fresh.*step_00000020.*step_00000010"):
        checkpoints.latest(lambda _: None)


def test_a_checkpoint_that_vanished_is_reported(checkpoints):
    save(checkpoints, 10, 20)
    reports = []
    shutil.rmtree(checkpoints.root / "step_00000020")
    assert checkpoints.latest(reports.append).step == 10
    shutil.rmtree(checkpoints.root / "step_00000010")
    with pytest.raises(CheckpointDamaged, match="step_00000020, named by LATEST, is missing"):
        checkpoints.latest(reports.append)
    assert len(reports) == 2


def test_damaged_pointers_are_named(checkpoints):
    save(checkpoints, 10)
    checkpoints.mark_best(10, 0.5)
    for at in range(14):
        good = (checkpoints.root / "LATEST").read_bytes()
        flip(checkpoints.root / "LATEST", at)
        reports = []
        assert checkpoints.latest(reports.append).step == 10
        assert len(reports) == 1
        assert "LATEST" in reports[0]
        (checkpoints.root / "LATEST").write_bytes(good)
    flip(checkpoints.root / "BEST")
    with pytest.raises(CheckpointDamaged, match="BEST"):
        checkpoints.load("best", unused)


def test_a_step_that_is_not_there_is_answered_with_those_that_are(checkpoints):
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoints.load("latest", unused)
    save(checkpoints, 10, 20)
    with pytest.raises(UserError, match="step 30 has no checkpoint; steps with a checkpoint: 10, 20"):
        checkpoints.load(30, unused)
    with pytest.raises(UserError, match="no step is marked as best"):
        checkpoints.load("best", unused)
    assert checkpoints.load(10, unused).step == checkpoints.load("latest", unused).step - 10


# Death. A child process dies at the k-th thing that it does to the disk; the parent looks at what is left.


@pytest.fixture
def no_fsync(monkeypatch):
    """Waiting for the disk means nothing to those who die by a kill, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"})


def die_at(k, root, power_cut):
    """Ends this process at its k-th open, mkdir, fsync, rename, unlink or rmdir below ``root``.

    With ``power_cut``, files that were not synced keep half of their bytes, as after a loss of power.
    """
    import sys

    seen, synced = 0, set()

    def tick():
        nonlocal seen
        seen += 1
        if seen != k:
            return
        for path in root.rglob("*") if power_cut else ():
            if path.is_file() and path.stat().st_ino not in synced:
                os.truncate(path, path.stat().st_size // 2)
        os._exit(9)

    def audited(event, args):
        if event in EVENTS and seen < k and (not isinstance(args[0], str) or "/proc" not in args[0]):
            tick()

    def counted(descriptor):
        tick()
        synced.add(os.fstat(descriptor).st_ino)

    os.fsync = counted
    for path in root.rglob("*"):
        synced.add(path.stat().st_ino)
    sys.addaudithook(audited)


def in_child(work):
    """Runs ``work`` in a forked process; its exit status, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # the child must not return into pytest
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_sound(checkpoints, last, wanted):
    """``last`` or ``wanted`` is there and verifies, and so does what LATEST names."""
    saved = checkpoints.latest(unused)
    assert (saved.step if saved else None) in (last, wanted)
    assert all(verify(path) == [] for path in checkpoints._found().values())
    pointer = checkpoints.root / "LATEST"
    if pointer.exists():
        step = int(pointer.read_text().removeprefix("step_"))
        assert checkpoints.load(step, unused).step == step
    if checkpoints.best is not None:
        assert checkpoints.load("best", unused).step == checkpoints.best.step


SCENARIOS = {  # steps saved before, keep_last, best
    "first": ((), 2, None),
    "prunes": ((10, 20), 1, None),
    "prunes beside the best": ((10, 20, 30), 2, 10),
    "replaces the only one": ((40,), 1, None),
    "replaces the best": ((30, 40), 1, 40),
}


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_death_at_any_point_of_a_save_leaves_a_verified_checkpoint(tmp_path, scenario, power_cut):
    before, keep_last, best = SCENARIOS[scenario]
    last = max(before, default=None)
    model = Checkpoints(tmp_path / "model", keep_last)
    for step in before:
        save(model, step)
        if step == best:
            model.mark_best(step, 0.5)
    statuses = []
    for k in range(1, 400):
        checkpoints = Checkpoints(tmp_path / f"at {k}", keep_last)
        if model.root.exists():
            shutil.copytree(model.root, checkpoints.root)

        def work(checkpoints=checkpoints, k=k):
            die_at(k, checkpoints.root, power_cut)
            save(checkpoints, 40)

        statuses.append(in_child(work))
        assert statuses[-1] in (0, 9)
        assert_sound(checkpoints, last, 40)
        save(checkpoints, 40)  # what a restarted run does
        assert checkpoints.latest(unused).step == 40
        assert not list(checkpoints.root.glob(".*"))
        if statuses[-1] == 0:
            break
    assert statuses == [9] * (len(statuses) - 1) + [0]
    assert len(statuses) > 30


@pytest.mark.usefixtures("no_fsync")
def test_a_replacement_that_died_twice_still_has_the_old_one(checkpoints):
    """The first death is between the two renames of a replacement, the second one anywhere in the save after it."""
    save(checkpoints, 10)
    (checkpoints.root / "step_00000010").rename(checkpoints.root / f".replaced-step_00000010-{'0' * 32}")
    assert checkpoints.steps() == [10]
    assert_sound(checkpoints, 10, 10)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(10, lambda folder: 1 / 0, META)
    assert checkpoints.latest(unused).folder == checkpoints.root / "step_00000010"


@pytest.mark.usefixtures("no_fsync")
def test_death_while_marking_the_best_leaves_the_old_or_the_new_one(tmp_path):
    for k in range(1, 50):
        checkpoints = Checkpoints(tmp_path / str(k), 2)
        save(checkpoints, 10, 20)
        checkpoints.mark_best(10, 0.5)

        def work(checkpoints=checkpoints, k=k):
            die_at(k, checkpoints.root, power_cut=True)
            checkpoints.mark_best(20, 0.75)

        status = in_child(work)
        assert (checkpoints.best.step, checkpoints.best.value) in ((10, 0.5), (20, 0.75))
        if status == 0:
            break
    assert status == 0
    assert checkpoints.best.step == 20


def test_sigkill_at_random_times(checkpoints):
    def work():
        step = 0
        while True:
            step += 1
            checkpoints.save(step, write(step, size=20_000), META)
            if step % 3 == 0:
                checkpoints.mark_best(step, 1.0)

    for attempt in range(8):
        pid = os.fork()
        if pid == 0:
            work()
        time.sleep(0.02 + 0.013 * attempt)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        saved = checkpoints.latest(unused)
        assert saved is None or verify(saved.folder) == []
        if (checkpoints.root / "LATEST").exists():
            step = int((checkpoints.root / "LATEST").read_text().removeprefix("step_"))
            assert checkpoints.load(step, unused).step == step
    assert checkpoints.steps()


@settings(max_examples=12, deadline=None)
@given(moves=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 120), st.booleans()), min_size=1, max_size=5))
def test_whatever_dies_in_whatever_order_latest_verifies(tmp_path_factory, moves):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("any"), keep_last=2)
    for step, k, best in moves:

        def work(step=step, k=k, best=best):
            die_at(k, checkpoints.root, power_cut=True)
            save(checkpoints, step)
            if best:
                checkpoints.mark_best(step, 0.5)

        had = checkpoints.steps()
        assert in_child(work) in (0, 9)
        assert checkpoints.steps() or not had
        there = checkpoints.latest(unused)
        assert_sound(checkpoints, there.step if there else None, step)


def test_everything_is_synced_before_it_gets_its_name_and_old_ones_go_last(checkpoints, monkeypatch):
    save(checkpoints, 10, 20)
    log, names = [], {}

    def fsync(descriptor, real=os.fsync):
        real(descriptor)
        log.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def rename(real):
        def renamed(source, target, **options):
            names[Path(target).name] = {p.relative_to(source) for p in Path(source).rglob("*")}
            log.append(("rename", Path(target)))
            return real(source, target, **options)

        return renamed

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename(os.rename))
    monkeypatch.setattr(os, "replace", rename(os.replace))
    save(checkpoints, 30)
    moves = [i for i, (kind, _) in enumerate(log) if kind == "rename"]
    published, latest, removed = moves
    assert [log[i][1].name for i in (published, latest)] == ["step_00000030", "LATEST"]
    assert log[removed][1].name.startswith(".tmp-removed-step_00000010")
    staging = next(path.parent for kind, path in log if path.name == "manifest.json")
    synced = [path for kind, path in log[:published] if kind == "fsync"]
    assert {staging / name for name in names["step_00000030"]} | {staging} <= set(synced)
    assert synced[-2:] == [staging / "manifest.json", staging]
    for before, after in ((published, latest), (latest, removed)):
        assert ("fsync", checkpoints.root) in log[before:after]


# Disks that fail


def assert_intact(checkpoints, error, step):
    assert error.value.exit_code == 74
    assert isinstance(error.value, StorageError)
    assert "saving step 20" in str(error.value)
    assert f"Complete checkpoints there: {step}" in str(error.value)
    assert checkpoints.latest(unused).step == step
    assert sorted(p.name for p in checkpoints.root.iterdir()) == ["LATEST", f"step_{step:08d}"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_full_disk(tmp_path, keep_last):
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", root], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root; the next test limits the size of files instead")
    try:
        fill_up(Checkpoints(root / "checkpoints", keep_last), 1_500_000)
    finally:
        subprocess.run(["umount", "-l", root], check=True)


def fill_up(checkpoints, size):
    import torch

    from alignment.tensorfile import write_tensors

    small, big = torch.zeros(1000), torch.zeros(size // 4)
    for tensors in (True, False):  # through safetensors and through plain files

        def fill(folder, tensors=tensors, content=small):
            if tensors:
                write_tensors(folder / "policy.safetensors", {"a": content})
            else:
                (folder / "state.json").write_bytes(content.numpy().tobytes())

        checkpoints.save(10, fill, META)

        def overfill(folder, fill=fill):
            (folder / "first").write_bytes(bytes(900_000))
            fill(folder, content=big)

        with pytest.raises(CheckpointFailed) as error:
            checkpoints.save(20, overfill, META)
        assert_intact(checkpoints, error, 10)


def test_files_that_may_not_grow(checkpoints):
    save(checkpoints, 10)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(CheckpointFailed, match="File too large") as error:
            checkpoints.save(20, lambda folder: (folder / "big").write_bytes(bytes(8192)), META)
        assert_intact(checkpoints, error, 10)

    assert in_child(work) == 0


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_an_error_of_the_disk_at_any_call_keeps_the_checkpoint_before(tmp_path, monkeypatch, call):
    for k in range(1, 40):
        checkpoints, calls, real = Checkpoints(tmp_path / str(k), 1), 0, getattr(os, call)
        save(checkpoints, 10)

        def fails(*args, real=real, k=k):
            nonlocal calls
            calls += 1
            if calls == k:
                raise OSError(5, "Input/output error")
            return real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, fails)
            try:
                save(checkpoints, 20)
            except CheckpointFailed as error:
                assert "Input/output error" in str(error)  # noqa: PT017 - the last round does not raise
            else:
                break
        assert_sound(checkpoints, 10, 20)
    assert 1 < k < 39


def test_a_mistake_of_the_writer_is_not_called_a_disk_error(checkpoints):
    save(checkpoints, 10)
    with pytest.raises(ZeroDivisionError) as error:
        checkpoints.save(20, lambda folder: 1 / 0, META)
    assert "saving step 20" in error.value.__notes__[0]
    assert sorted(p.name for p in checkpoints.root.iterdir()) == ["LATEST", "step_00000010"]


# The training state


def test_the_state_comes_back_bit_for_bit(tmp_path):
    components = {
        "curricula.0": {"order": [3, 1, 2], "rates": {"b": 0.1 + 0.2, "a": 5e-324}, "cursor": 2**70},
        "kl": {"coefficient": 1 / 3, "best": float("-inf"), "zero": -0.0},
        "weighting": None,
    }
    state = TrainState(7, 1, 3, 2**63 + 1, components, {"labels/rl": 1e300})
    save_state(tmp_path, state)
    back = load_state(tmp_path)
    assert back == state
    assert repr(back) == repr(state)  # -0.0, and the order of keys


def test_nan_in_a_state_comes_back(tmp_path):
    save_state(tmp_path, TrainState(components={"kl": {"last": float("nan")}}))
    assert repr(load_state(tmp_path).components["kl"]["last"]) == "nan"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"seen": {1, 2}}, "set"),
        ({"at": [0, (1, 2)]}, r"value\['at'\]\[1\] is \(1, 2\)"),
        ({"rates": {3: 0.5}}, r"value\['rates'\]"),
        (object(), "object"),
        ({"raw": b"x"}, "bytes"),
    ],
)
def test_a_state_that_json_cannot_hold_is_named(tmp_path, value, message):
    state = TrainState(components={"curricula.0": {"fine": 1}, "curricula.1": value})
    with pytest.raises(ValueError, match=rf"component 'curricula.1'.*{message}"):
        save_state(tmp_path, state)


def test_a_state_of_another_version_is_refused(tmp_path):
    save_state(tmp_path, TrainState())
    plain = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**plain, "phase": 1}))
    with pytest.raises(ValueError, match="does not have the same fields: phase"):
        load_state(tmp_path)


# Nothing is unpickled


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["state.json", "learner/policy.safetensors", "manifest.json"])
def test_a_pickle_in_a_checkpoint_never_runs(checkpoints, tmp_path, name):
    save(checkpoints, 10)
    path = checkpoints.root / "step_00000010"
    (path / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    assert problems_of(path)
    for read in (load_state, policy_weights, verify):  # even by one who did not verify
        try:
            read(path)
        except Exception as error:  # noqa: BLE001 - whatever it is, the payload did not run
            assert not isinstance(error, AssertionError)
    assert not (tmp_path / "executed").exists()
    pickle.loads((path / name).read_bytes())
    assert (tmp_path / "executed").exists(), "the payload works, so the test means something"
