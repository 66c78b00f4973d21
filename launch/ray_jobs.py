"""On a Ray cluster that is there already: through its job server, or as a driver on one of its machines."""

import sys

from launch.plan import Command, File, Job, Launch
from launch.shell import train_script
from launch.spec import ClusterSpec


def render_ray(spec: ClusterSpec, job: Job) -> Launch:
    """A script that trains on the cluster at ``spec.ray.address``.

    A job server starts the script on the cluster, where it must be able to read the launch folder; ``job.wait`` follows
    it. With the address of the head alone, the script runs here, and the launch lasts as long as it does.
    """
    address = spec.ray.address
    assert address is not None, "checked before"
    script = File(job.folder / "train.sh", train_script(spec, job))
    argv = ("bash", str(script.path))
    token = {}
    if spec.ray.token_file is not None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": spec.ray.token_file}
    if not address.startswith("http"):
        return Launch(job.folder, (script,), Command(argv, job.workdir, {"RAY_ADDRESS": address, **token}))
    address = address.rstrip("/")
    submit = [sys.executable, "-m", "launch.submit", f"--address={address}", f"--name={job.name}"]
    submit += [f"--workdir={job.workdir}", f"--save-s={spec.deadlines.save_s}", *(["--wait"] if job.wait else [])]
    return Launch(
        job.folder,
        (script,),
        Command((*submit, "--", *argv), job.workdir, token),
        f"ray job list --address {address} shows it, ray job stop --address {address} ID ends it",
    )
