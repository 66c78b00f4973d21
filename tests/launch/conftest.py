"""A Slurm of two nodes for the tests that need one. Where there can be none, they are skipped loudly."""

from pathlib import Path

import pytest

from tests.launch.slurm_cluster import SlurmCluster, unavailable

_WHY = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory, request):
    why = unavailable()
    if why is not None:
        request.config.stash[_WHY] = why
        pytest.skip(f"no Slurm: {why}")
    shared = tmp_path_factory.mktemp("shared")
    cluster = SlurmCluster(shared, {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"})
    yield cluster
    cluster.close()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_terminal_summary(terminalreporter, config):
    if why := config.stash.get(_WHY, ""):
        terminalreporter.section("Slurm was not tested on this machine")
        terminalreporter.line(f"every test of tests/launch/test_slurm.py was SKIPPED: {why}", yellow=True)
