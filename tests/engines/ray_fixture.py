"""One live Ray cluster for all tests of the session: private, on the loopback interface, with a token.

A stage that asks for a private cluster while it is up uses it, as any second one of a process would. Other processes
join by ``cluster.address`` and ``environment``.
"""

import os
from dataclasses import dataclass

import pytest

from alignment.engines.ray_session import Session, connected


@dataclass(frozen=True)
class LiveCluster:
    session: Session

    @property
    def address(self) -> str:
        return self.session.address

    @property
    def environment(self) -> dict[str, str]:
        """For a process that joins."""
        return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.session.token_file)}


@pytest.fixture(scope="session")
def live_ray():
    with connected(None, num_cpus=64, num_gpus=0, object_store_mb=1024) as session:
        yield LiveCluster(session)
