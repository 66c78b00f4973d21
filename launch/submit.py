"""``python -m launch.submit --address http://HOST:PORT -- COMMAND``: gives a command to a Ray cluster's job server.

With ``--wait`` it shows the job's output and exits as the job does. Ctrl-C then leaves the job alone.
"""

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNAVAILABLE = 69
STOPPED = 143
"""A job that was stopped: Ray keeps no exit code of it. 128 + SIGTERM, as a shell says it."""
POLL_S = 1.0
LOST_S = 60.0
"""How long the job server may be out of reach before the launcher stops following."""


def submit(address: str, name: str, workdir: str, command: Sequence[str], save_s: int) -> tuple[Any, str]:
    """Gives the command to the job server.

    Args:
        address: ``http://HOST:PORT``.
        name: Shown beside the job.
        workdir: Where it runs; the cluster must have that folder.
        command: The program and its arguments.
        save_s: What the job may still take after it was told to stop.

    Returns:
        The client, and the job's id.
    """
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    entrypoint = f"cd {shlex.quote(workdir)} && exec {shlex.join(command)}"
    # Read by the process that looks after the job: three seconds, its default, are too few to save anything.
    runtime_env = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(save_s)}}
    return client, client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, metadata={"name": name})


def follow(client: Any, job: str) -> int:
    """Writes the job's output as it comes and gives its exit code."""
    output = _Output()
    lost_at: float | None = None
    while True:
        before = output.shown
        try:
            asyncio.run(_tail(client, job, output))
            info = client.get_job_info(job)
            if info.status.is_terminal():
                return _exit_code(info)
            lost_at = None
        except Exception as error:  # whatever a connection can break with
            lost_at = time.monotonic() if lost_at is None or output.shown > before else lost_at
            if time.monotonic() - lost_at > LOST_S:
                sys.stderr.write(f"align launch: no answer from the job server for {LOST_S:g} s: {error}\n")
                return UNAVAILABLE
        time.sleep(POLL_S)


@dataclass
class _Output:
    """What was shown of a job's output. A connection that is made again begins at its beginning."""

    shown: int = 0
    """Characters."""

    def write(self, text: str, at: int) -> int:
        """Shows what of ``text``, whose first character is number ``at``, is new; the number of the next character."""
        end = at + len(text)
        sys.stdout.write(text[max(0, self.shown - at) :])
        sys.stdout.flush()
        self.shown = max(self.shown, end)
        return end


async def _tail(client: Any, job: str, output: _Output) -> None:
    """Shows the job's output until it ends, or the connection does."""
    at = 0
    async for text in client.tail_job_logs(job):
        at = output.write(text, at)


def _exit_code(info: Any) -> int:
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code) % 256
    if info.status == "STOPPED":
        return STOPPED
    sys.stderr.write(f"align launch: the job {info.status}: {info.message}\n")
    return UNAVAILABLE


def main(argv: Sequence[str]) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.submit")
    parser.add_argument("--address", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--save-s", type=int, required=True)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(argv)
    from ray.exceptions import RayError

    try:
        client, job = submit(given.address, given.name, given.workdir, given.command, given.save_s)
    except (RayError, ConnectionError, RuntimeError) as error:
        sys.stderr.write(f"align launch: the job server at {given.address} did not take the job: {error}\n")
        return UNAVAILABLE
    sys.stderr.write(f"align launch: submitted as {job}\n")
    try:
        return follow(client, job) if given.wait else 0
    except KeyboardInterrupt:
        sys.stderr.write(f"align launch: {job} goes on; ray job stop --address {given.address} {job} ends it\n")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
