"""The parts that scripts share."""

import shlex
import sys
from collections.abc import Mapping, Sequence

from launch.plan import Job
from launch.spec import ClusterSpec


def python_of(spec: ClusterSpec) -> str:
    """The interpreter on the nodes."""
    return spec.python or ("python3" if spec.container else sys.executable)


def assignments(values: Mapping[str, str | int]) -> str:
    """Lines that set variables of the shell."""
    return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())


def preparation(spec: ClusterSpec) -> str:
    """The lines that set the variables of the description and run its setup."""
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in spec.env.items()]
    if spec.setup:
        lines += ["# setup of the cluster description\n", *(f"{line}\n" for line in spec.setup), "# end of setup\n"]
    return "".join(lines)


def driver(spec: ClusterSpec, job: Job, watch: bool = False) -> str:
    """The command that trains, once all nodes are there, as a line of bash."""
    python = python_of(spec)
    command: Sequence[str] = [python, *job.command]
    if job.uses_ray:
        waiting = [python, "-m", "launch.nodes", f"--nodes={spec.nodes}", f"--timeout-s={spec.deadlines.nodes_s}"]
        waiting += [f"--watch={job.folder}"] if watch else []
        command = [*waiting, "--", *command]
    return shlex.join(command)


def train_script(spec: ClusterSpec, job: Job) -> str:
    """A script that prepares and then becomes the training."""
    return (
        "#!/bin/bash\n"
        f"# {job.name}, written by align launch\n"
        "set -eo pipefail\n"
        f"{preparation(spec)}"
        f"exec {driver(spec, job)}\n"
    )
