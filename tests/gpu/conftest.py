"""Everything here needs a CUDA device; ``tests/conftest.py`` skips it without one, and says so at the end."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(1800))
