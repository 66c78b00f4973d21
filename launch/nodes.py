"""``python -m launch.nodes --nodes N -- COMMAND``: becomes the command once N nodes have joined Ray.

The address is that of ``RAY_ADDRESS``. Past the deadline, or when a node could not start, it says which nodes are there
and exits with 69. A SIGTERM before the command has begun exits with 75: nothing was lost.
"""

import argparse
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from alignment.errors import UserError
from alignment.signals import EXIT_CODES

UNAVAILABLE = 69
"""``EX_UNAVAILABLE`` of ``sysexits.h``: there is no cluster to run on."""
POLL_S = 0.5


class NoCluster(UserError):
    """The nodes are not there."""

    exit_code = UNAVAILABLE


def address_of(text: str) -> str:
    """``text``, which is HOST:PORT.

    Raises:
        NoCluster: It is not.
    """
    if not re.fullmatch(r"[^\s/]+:\d{1,5}", text) or int(text.rpartition(":")[2]) > 65535:
        raise NoCluster(f"RAY_ADDRESS has to be HOST:PORT of the head of a Ray cluster, and is '{text}'")
    return text


def wait_for_nodes(address: str, nodes: int, timeout_s: float, watch: Path | None = None) -> list[str]:
    """Waits until at least ``nodes`` nodes are part of the cluster.

    Args:
        address: ``HOST:PORT`` of the head.
        nodes: How many, the head among them.
        timeout_s: Deadline.
        watch: Where a node whose Ray has ended leaves a file ``ended.NODE`` with its exit code.

    Returns:
        Their addresses.

    Raises:
        NoCluster: Past the deadline, or because a node has ended.
    """
    deadline = time.monotonic() + timeout_s
    host, _, port = address.rpartition(":")
    while True:
        found = _alive(address) if _answers(host, int(port)) else f"no answer from Ray's head at {address}"
        if not isinstance(found, str) and len(found) >= nodes:
            return found
        for path in sorted(watch.glob("ended.*")) if watch else []:
            node = path.name.removeprefix("ended.")
            raise NoCluster(
                f"Ray on {node} ended with exit code {path.read_text().strip()} before training began; see "
                f"{watch}/head.log and worker-{node}.log"
            )
        if time.monotonic() > deadline:
            if not isinstance(found, str):
                found = f"only {len(found)} of {nodes} nodes ({', '.join(found)}) joined Ray"
            logs = f"; see head.log and worker-*.log in {watch}" if watch else ""
            raise NoCluster(f"{found}, {timeout_s:g} s (deadlines.nodes_s) after the start{logs}")
        time.sleep(POLL_S)


def _alive(address: str) -> list[str] | str:
    """The addresses of the nodes that Ray knows and that live; or why it cannot be asked yet."""
    import ray
    from ray.exceptions import RayError

    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            signal.signal(signal.SIGTERM, _stop)  # Ray took it
        return sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        return f"Ray's head at {address} takes no driver: {error}"


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _stop(*_: object) -> None:
    sys.exit(EXIT_CODES["SIGTERM"])


def main(argv: Sequence[str]) -> int:
    """Runs the command line; does not return if all is well."""
    parser = argparse.ArgumentParser(prog="python -m launch.nodes")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--watch", type=Path)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        address = address_of(os.environ.get("RAY_ADDRESS", ""))
        joined = wait_for_nodes(address, given.nodes, given.timeout_s, given.watch)
    except NoCluster as error:
        sys.stderr.write(f"align launch: {error}\n")
        return error.exit_code
    import ray

    ray.shutdown()
    sys.stderr.write(f"align launch: {len(joined)} nodes: {', '.join(joined)}\n")
    os.execvp(given.command[0], given.command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
