"""On this machine: the training is a child, gets our signals, and its exit code is ours."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import render_local
from launch.plan import Job
from launch.spec import ClusterSpec
from tests.recipes_for_tests import BASE, write

ROOT = Path(__file__).parents[2]
LONG = (
    BASE.replace("name: rl\n    steps: 4", "name: rl\n    steps: 100000")
    .replace("{name: base,", "{name: base, save_every: 0,")
    .replace("[uniform, difficulty_filter]", "[uniform]")
)


def align(*args: object, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "alignment", "launch", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_is_the_program_s(tmp_path, code):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nassert os.environ['SET'] == 'x y' and os.environ['MORE'] == '1'\nsys.exit(int(sys.argv[1]))"
    )
    spec = ClusterSpec(env={"SET": "x y"}, setup=("export MORE=1",))
    launch = render_local(spec, Job("p", (str(program), str(code)), tmp_path, tmp_path / "p.launch" / "1", False))
    launch.write()
    assert launch.run() == code


def test_a_setup_that_fails_starts_nothing(tmp_path):
    spec = ClusterSpec(setup=("false", "touch reached"))
    launch = render_local(spec, Job("p", ("-c", "1/0"), tmp_path, tmp_path / "p.launch" / "1", False))
    launch.write()
    assert launch.run() == 1 and not (tmp_path / "reached").exists()


def test_a_signal_reaches_the_recipe_which_saves_and_goes_on_with_the_same_command(tmp_path):
    recipe = write(tmp_path, LONG)
    metrics = tmp_path / "runs" / "base" / "metrics.jsonl"

    def steps() -> list[int]:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]

    ended: list[int] = []
    for signum, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        launch = align(recipe, cwd=tmp_path)
        before = max(steps(), default=0)
        deadline = time.monotonic() + 120
        while max(steps(), default=0) < before + 5:
            assert launch.poll() is None, launch.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        launch.send_signal(signum)
        out, err = launch.communicate(timeout=120)
        assert launch.returncode == code, out + err
        ended.append(max(steps()))
    assert steps() == list(range(1, ended[-1] + 1)), "no step twice, none left out"
    assert re.search(rf"resumed from step {ended[0]}\b", out)
    assert sorted(path.name for path in (tmp_path / "runs" / "base.launch").iterdir()) == ["1", "2"]
