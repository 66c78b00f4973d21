"""A small Ray program for tests of the launcher: an actor on each node, then an exit code, or steps until SIGTERM.

``ray_program.py exit FOLDER CODE``, or ``ray_program.py steps FOLDER``: the first attempt goes on until it is told to
stop, saves and exits with 75; the next one does three more steps.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0.5)
class Worker:
    def where(self) -> dict[str, str]:
        mark = Path("/tmp/mark")
        there_before = mark.exists()
        mark.write_text(socket.gethostname())
        return {
            "host": socket.gethostname(),
            "address": ray.util.get_node_ip_address(),
            "tmp_is_private": str(not there_before),
            "token": os.environ.get("RAY_AUTH_TOKEN", ""),
            "mode": os.environ.get("RAY_AUTH_MODE", ""),
        }

    def add(self, number: int) -> int:
        return number + 1


def main(what: str, folder: Path, *rest: str) -> int:
    ray.init(address="auto", log_to_driver=False)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))  # after Ray, which takes it too
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    workers = [
        Worker.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    (folder / "places.json").write_text(json.dumps(ray.get([worker.where.remote() for worker in workers], timeout=60)))
    if what == "exit":
        return int(rest[0])
    saved = folder / "state.json"
    state = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "started_at": []}
    state["started_at"].append(state["step"])
    last = state["step"] + 3 if state["step"] else None
    while state["step"] != last and not stop:
        state["step"] = ray.get(workers[state["step"] % len(workers)].add.remote(state["step"]), timeout=60)
        (folder / "step").write_text(str(state["step"]))
        time.sleep(0.1)
    saved.write_text(json.dumps(state))
    return 75 if stop else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
