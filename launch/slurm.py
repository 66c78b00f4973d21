"""As a Slurm job: a batch script, and the script that it runs on the nodes, in their role as head, worker or driver."""

import shlex
from importlib.resources import files

from launch.plan import Command, File, Job, Launch
from launch.shell import assignments, driver, preparation, python_of
from launch.spec import ClusterSpec, Container

TEMP = "/tmp/align-$SLURM_JOB_ID"
"""On each node, for Ray."""


def render_slurm(spec: ClusterSpec, job: Job) -> Launch:
    """The scripts and the ``sbatch`` that submits them; with ``job.wait`` it lasts as long as the job."""
    batch = File(job.folder / "job.sbatch", _batch(spec, job))
    node = File(job.folder / "node.sh", _node(spec, job))
    sbatch = ("sbatch", *(["--wait"] if job.wait else []), str(batch.path))
    return Launch(
        job.folder,
        (batch, node),
        Command(sbatch, job.workdir),
        f"What it prints: {job.folder}/job.log. scancel --batch --signal=TERM JOB saves it and queues it again, "
        "scancel JOB ends it",
    )


def _batch(spec: ClusterSpec, job: Job) -> str:
    head = "".join(f"#SBATCH {option}\n" for option in _options(spec, job))
    container = _container(spec.container, job.uses_ray)
    values = {
        "folder": str(job.folder),
        "nodes": spec.nodes,
        "with_ray": "yes" if job.uses_ray else "",
        "head_lost_s": spec.deadlines.head_lost_s,
        "max_requeues": spec.slurm.max_requeues,
        "make_temp": "yes" if container["srun"] and job.uses_ray else "",
    }
    cpus = spec.cpus_per_node or '"$SLURM_CPUS_ON_NODE"'
    bare = f"srun --overlap --export=ALL --cpu-bind=none --cpus-per-task={cpus}"
    step = " ".join(['"${bare[@]}"', *container["srun"]])
    return (
        f"#!/bin/bash\n{head}# Written by align launch.\n"
        f"{assignments(values)}bare=({bare})\nstep=({step})\n"
        f"on_node=({' '.join([*container['prefix'], 'bash', _word(str(job.folder / 'node.sh'))])})\n\n"
        f"{_text('slurm_job.sh')}"
    )


def _options(spec: ClusterSpec, job: Job) -> list[str]:
    slurm, log = spec.slurm, str(job.folder / "job.log").replace("%", "%%")
    options = [f"--job-name={job.name}", f"--nodes={spec.nodes}", "--ntasks-per-node=1"]
    options += ["--exclusive"] if spec.cpus_per_node is None else [f"--cpus-per-task={spec.cpus_per_node}"]
    options += [f"--gpus-per-node={spec.gpus_per_node}"] if spec.gpus_per_node else []
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time}
    options += [f"--{name}={value}" for name, value in named.items() if value is not None]
    options += [f"--output={_word(log)}", "--open-mode=append", f"--chdir={_word(str(job.workdir))}"]
    # To the batch script alone, which tells the driver: srun would kill it, and Slurm all of Ray with it.
    options += [f"--signal=B:TERM@{spec.deadlines.save_s}"]
    options += ["--requeue"] if slurm.max_requeues else ["--no-requeue"]
    return options + list(slurm.extra)


def _node(spec: ClusterSpec, job: Job) -> str:
    values = {
        "folder": str(job.folder),
        "python": python_of(spec),
        "gpus": spec.gpus_per_node,
        "cpus": spec.cpus_per_node or "",
        "nodes_s": spec.deadlines.nodes_s,
        "head_lost_s": spec.deadlines.head_lost_s,
    }
    return (
        f"#!/bin/bash\n# What each node runs: node.sh head, worker or driver. Written by align launch.\n"
        f"set -eo pipefail\n{assignments(values)}"
        "role=$1\n"
        f"temp={TEMP} # short: Ray puts sockets below it\n"
        '[ "$role" != clean ] || exec rm -rf "$temp"\n'
        """[ "$role" = driver ] || trap 'echo "$?" >"$folder/ended.$SLURMD_NODENAME"' EXIT\n"""
        f"{preparation(spec)}"
        f"driver() {{ exec {driver(spec, job, watch=True)}; }}\n\n"
        f"{_text('slurm_node.sh')}"
    )


def _container(container: Container | None, uses_ray: bool) -> dict[str, list[str]]:
    """What a container adds: options of srun, and the words before a command on a node."""
    if container is None:
        return {"srun": [], "prefix": []}
    mounts = [_word(mount) for mount in container.mounts]
    if container.runtime == "pyxis":
        # Each step has a container of its own, and the driver needs the sockets of the head.
        mounts += [f'"{TEMP}:{TEMP}"'] if uses_ray else []
        srun = [f"--container-image={_word(container.image)}"]
        srun += [f"--container-mounts={','.join(mounts)}"] if mounts else []
        return {"srun": srun, "prefix": []}
    bind = ["--bind", ",".join(mounts)] if mounts else []
    return {"srun": [], "prefix": ["apptainer", "exec", "--nv", *bind, _word(container.image)]}


def _word(text: str) -> str:
    """One word for bash and for Slurm, which reads ``#SBATCH`` lines by rules of its own."""
    return shlex.quote(text)


def _text(name: str) -> str:
    return (files("launch") / name).read_text(encoding="utf-8")
