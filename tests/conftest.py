"""Tests that need a GPU are skipped without one, and said so at the end: a skipped test proves nothing."""

import os
from pathlib import Path

import pytest

import alignment  # noqa: F401 - before torch: it says how threads wait

import torch  # isort: skip

from tests.engines.ray_fixture import live_ray  # noqa: F401 - one live cluster for all tests

_SKIPPED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    gpu = [] if torch.cuda.is_available() else [item for item in items if item.get_closest_marker("gpu")]
    for item in gpu:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    config.stash[_SKIPPED] = len(gpu)


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(_SKIPPED, 0):
        terminalreporter.section("not tested on this machine")
        terminalreporter.line(f"{config.stash[_SKIPPED]} tests need a CUDA device and were SKIPPED", yellow=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public benchmark files: BENCHMARK_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("BENCHMARK_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "gsm8k" / "test.jsonl").is_file():
        pytest.skip(f"no benchmark files in {folder}; set BENCHMARK_DATA to a folder with gsm8k/, math500/, ...")
    return folder
