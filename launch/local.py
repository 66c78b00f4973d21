"""On this machine: the training is a child of the launcher."""

from launch.plan import Command, File, Job, Launch
from launch.shell import train_script
from launch.spec import ClusterSpec


def render_local(spec: ClusterSpec, job: Job) -> Launch:
    """A script that trains here."""
    script = File(job.folder / "train.sh", train_script(spec, job))
    return Launch(job.folder, (script,), Command(("bash", str(script.path)), job.workdir))
