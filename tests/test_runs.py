"""Run folders: names, addresses, the lock, and what a resume does to the records."""

import json
import os
import signal

import pytest

from alignment.checkpoint import Checkpoints
from alignment.errors import UserError
from alignment.recipe_tree import plain
from alignment.recipe_yaml import read_file
from alignment.runs import Run, open_run, resolve, truncate_jsonl

META = {"config_hash": "c0ffee", "world_size": 1}


def child(work):
    """A forked process that runs ``work`` and exits with what it returns."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work())
        except BaseException:  # the child must not return into pytest
            os._exit(77)
    return pid


def exit_status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def run(tmp_path):
    with open_run(tmp_path, "quick") as run:
        run.write_recipe({"run": {"name": "quick"}}, tmp_path)
    checkpoints = Checkpoints(run.checkpoints, 5)
    for step in (100, 200):
        checkpoints.save(step, lambda folder: (folder / "state.json").write_text("{}"), META)
    return run


# Names


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../up", "a@best", "x" * 101, "a b", "-x"])
def test_a_name_that_leaves_the_output_folder_or_breaks_addresses_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"run\.name"), open_run(tmp_path / "runs", name):
        pass
    assert not (tmp_path / "runs").exists()


def test_a_link_out_of_the_output_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quick").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a folder inside"), open_run(tmp_path / "runs", "quick"):
        pass


def test_opening_again_finds_what_is_there_and_fresh_puts_it_aside(tmp_path):
    for text in ("first", "second"):
        with open_run(tmp_path, "quick", fresh=True) as run:
            assert not (run.folder / "metrics.jsonl").exists()
            (run.folder / "metrics.jsonl").write_text(text)
    with open_run(tmp_path, "quick") as run:
        assert (run.folder / "metrics.jsonl").read_text() == "second"
    assert (tmp_path / "quick.1/metrics.jsonl").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quick", "quick.1"]


def test_fresh_on_nothing_leaves_nothing_behind(tmp_path):
    for _ in range(2):
        with open_run(tmp_path, "quick", fresh=True):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["quick"]


# The lock


def test_two_processes_do_not_write_one_run(tmp_path):
    def intrude():
        with pytest.raises(UserError, match=rf"written by process {os.getppid()} on .*another run\.name"):
            with open_run(tmp_path, "quick", fresh=True):
                pass
        with open_run(tmp_path, "other"):
            return 5

    with open_run(tmp_path, "quick"):
        assert exit_status(child(lambda: forget() or intrude())) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "quick"]


def forget():
    """A forked child knows its parent's locks; another process would not."""
    from alignment import runs

    runs._held.clear()


def test_one_process_does_not_open_a_run_twice_and_keeps_its_lock_when_it_tries(tmp_path):
    with open_run(tmp_path, "quick") as run:
        with pytest.raises(UserError, match="already open in this process"), open_run(tmp_path, "quick"):
            pass

        def intrude():
            forget()
            with pytest.raises(UserError, match="is being written"), run.locked():
                pass
            return 5

        assert exit_status(child(intrude)) == 5


def test_the_lock_of_a_killed_process_is_gone_even_if_its_worker_lives_on(tmp_path):
    read, wrote = os.pipe()

    def hold():
        with open_run(tmp_path, "quick"):
            worker = child(lambda: signal.pause() or 0)
            os.write(wrote, str(worker).encode())
            signal.pause()
        return 0

    pid = child(hold)
    worker = int(os.read(read, 20))
    try:
        with pytest.raises(UserError, match=f"process {pid}"), open_run(tmp_path, "quick"):
            pass
        os.kill(pid, signal.SIGKILL)
        assert exit_status(pid) == -signal.SIGKILL
        with open_run(tmp_path, "quick") as run:
            assert str(os.getpid()) in (run.folder / ".lock").read_text()
    finally:
        os.kill(worker, signal.SIGKILL)


# Addresses


def test_addresses(run, tmp_path, monkeypatch):
    path = str(run.folder)
    assert resolve(path) == (run.folder, "latest")
    assert resolve(f"{path}/@latest")[1] == "latest"
    assert resolve(f"{path}@best") == (run.folder, "best")
    assert resolve(f"{path}@200") == (run.folder, 200)
    assert resolve("quick@100", tmp_path) == (run.folder, 100)
    monkeypatch.chdir(tmp_path)
    assert resolve("quick@200")[1] == 200


def test_an_address_may_contain_an_at_sign(run, tmp_path):
    (tmp_path / "me@host").mkdir()
    moved = run.folder.rename(tmp_path / "me@host/quick")
    assert resolve(str(moved)) == (moved, "latest")
    assert resolve(f"{moved}@100") == (moved, 100)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("@300", "step 300 has no checkpoint; its steps with a checkpoint: 100, 200"),
        ("@bset", "after '@' comes a step, 'best' or 'latest', not 'bset'; its steps with a checkpoint: 100, 200"),
        ("@-1", "not '-1'"),
        ("@", "not ''"),
        ("2", "there is no run .*quick2; runs in .*: quick"),
    ],
)
def test_wrong_addresses_list_what_there_is(run, tmp_path, suffix, message):
    with pytest.raises(UserError, match=message):
        resolve(f"{run.folder}{suffix}", tmp_path)


def test_no_runs_at_all(tmp_path):
    with pytest.raises(UserError, match="there is no run gone; there are no runs in"):
        resolve("gone@best", tmp_path)


# Files


def test_the_recipe_reads_back_as_it_was_by_both_readers(tmp_path):
    resolved = {
        "run": {"name": "on", "seed": 0, "output": "1e3"},
        "learner": {"lr": 1e-05, "eps": 1e-8, "betas": [0.9, 0.95], "warmup": 2.0, "one": 1.0},
        "text": ["no", "null", "a: b", "é\n", "0123456789+-=", "~", " x ", ""],
        "none": None,
        "empty": [[], {}],
        "long": "word " * 60,
    }
    run = Run(tmp_path)
    run.write_recipe(resolved, tmp_path)
    assert run.read_recipe() == resolved
    assert list(run.read_recipe()) == list(resolved)
    back = plain(read_file(run.recipe, []))
    assert json.dumps(back) == json.dumps(resolved)


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        Run(tmp_path).read_recipe()


def test_a_run_whose_files_were_lost_or_changed_is_the_users_error(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(UserError, match=r"has no \.recipe_folder.*copy hidden files too"):
        print(run.beside)
    run.recipe.write_text("run: [")
    with pytest.raises(UserError, match="was changed and is no YAML any more"):
        run.read_recipe()


def test_the_result_is_strict_json(tmp_path):
    run = Run(tmp_path)
    run.write_result({"accuracy": float("nan"), "stages": [{"steps": 3}]})
    assert run.read_result() == {"accuracy": None, "stages": [{"steps": 3}]}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_lines_of_steps_that_are_run_again_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 1, "x": 0.10}\n{"step":2}\n{"step": 2, "kind": "eval", "text": "\xe2\x80\xa8"}\n'
    path.write_bytes(kept + b'{"step": 3}\n{"step": 4, "rew')
    assert truncate_jsonl(path, 2) == 2
    assert path.read_bytes() == kept
    assert truncate_jsonl(path, 2) == 0
    assert truncate_jsonl(path, -1) == 3
    assert path.read_bytes() == b""
    assert truncate_jsonl(tmp_path / "none.jsonl", 0) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"reward": 1}', '{"step": "a"}'])
def test_a_line_without_a_step_is_named_and_nothing_changes(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        truncate_jsonl(path, 1)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
