"""The description of a cluster, as typed, frozen records, read from a YAML file and ``--set cluster.KEY=VALUE``."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import to_json

from alignment.recipe_checks import secrets
from alignment.recipe_errors import problems_of
from alignment.recipe_sections import Count, Section
from alignment.recipe_tree import Mark, Node, Problem, RecipeError, mark_of, merge, plain
from alignment.recipe_yaml import parse_override, read_file

OWN_OPTIONS = {
    "nodes": "nodes",
    "gpus-per-node": "gpus_per_node",
    "gpus": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "gpus-per-socket": "gpus_per_node",
    "cpus-per-task": "cpus_per_node",
    "cpus-per-gpu": "cpus_per_node",
    "exclusive": "cpus_per_node",
    "oversubscribe": "cpus_per_node",
    "share": "cpus_per_node",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "time": "slurm.time",
    "signal": "deadlines.save_s",
    "requeue": "slurm.max_requeues",
    "no-requeue": "slurm.max_requeues",
    "job-name": "the recipe's run.name",
    "output": "the launch folder",
    "error": "the launch folder",
    "open-mode": "the launch folder",
    "chdir": "the working directory",
    "ntasks": "nodes",
    "ntasks-per-node": "nodes",
    "ntasks-per-gpu": "nodes",
    "ntasks-per-socket": "nodes",
    "ntasks-per-core": "nodes",
    "array": "what a launch is, one job",
    "wrap": "what a launch is, a script of its own",
    "wait": "--wait of align launch",
    "test-only": "--dry-run of align launch",
    "parsable": "the launch",
    "container": "container",
    "container-image": "container.image",
    "container-mounts": "container.mounts",
}
"""Options of sbatch that follow from something else, and from what."""
OWN_VARIABLES = re.compile(r"RAY_(ADDRESS|AUTH_\w+)|SLURM_\w+")
_LITERAL_SECRET = re.compile(r"\b\w*(API_?KEY|TOKEN|SECRET|PASSWORD)=(?![\"']?\$)[\"']?[^\s\"']", re.I)
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")


class Container(Section):
    """What the nodes of a Slurm job run in."""

    image: Annotated[str, Field(min_length=1)]
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """``pyxis`` is the plugin of ``srun`` (``--container-image``)."""
    mounts: tuple[str, ...] = ()
    """``FOLDER:FOLDER_INSIDE``. The working directory and the folder of runs have to be among them."""

    @field_validator("mounts")
    @classmethod
    def _pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if odd := next((m for m in value if not re.fullmatch(r"/[^:,\s]*:/[^:,\s]*(:r[ow])?", m)), None):
            raise ValueError(f"'{odd}' is not FOLDER:FOLDER_INSIDE, two absolute paths without spaces or commas")
        return value


class Slurm(Section):
    """What is asked of Slurm."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """As sbatch takes it, such as 24:00:00 or 2-00."""
    max_requeues: Annotated[int, Field(ge=0)] = 100
    """How often a job that was told to stop, and has saved, is queued again. 0: never."""
    extra: tuple[str, ...] = ()
    """More options of sbatch, such as ``--constraint=h100``."""

    @field_validator("partition", "account", "qos")
    @classmethod
    def _words(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.,@+-]+", value):
            raise ValueError(f"'{value}' is not one word")
        return value

    @field_validator("time")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None and not _TIME.fullmatch(value):
            raise ValueError(f"'{value}' is no time limit; write minutes, hours:minutes:seconds or days-hours")
        return value

    @field_validator("extra")
    @classmethod
    def _options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            if not re.match(r"--[a-z]", line) or "\n" in line:
                raise ValueError(f"'{line}' is no option of sbatch in its long form, such as --constraint=h100")
            try:
                first, *others = shlex.split(line)
            except ValueError as error:
                raise ValueError(f"'{line}' cannot be read: {error}") from error
            if second := next((word for word in others if word.startswith("-")), None):
                raise ValueError(f"'{line}' is more than one option; write {second} as an entry of its own")
            name = first.removeprefix("--").partition("=")[0]
            # Slurm takes the beginning of a name for the name.
            if own := next((own for own in (name, *OWN_OPTIONS) if own in OWN_OPTIONS and own.startswith(name)), None):
                raise ValueError(f"--{name} follows from {OWN_OPTIONS[own]}; change that")
        return value


class RayAddress(Section):
    """A Ray cluster that is there already."""

    address: str | None = None
    """``http://HOST:PORT`` is its job server (usually port 8265): the driver runs there. ``HOST:PORT`` is its head
    (usually port 6379): the driver runs here, on a machine of the cluster."""
    token_file: str | None = None
    """The cluster's token; relative to the file that says it. Null: what RAY_AUTH_TOKEN_PATH says, if it is set."""

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"(https?://)?[\w.-]+:\d+/?", value):
            raise ValueError(f"'{value}' is neither http://HOST:PORT, a job server, nor HOST:PORT, a head")
        return value


class Deadlines(Section):
    """How long things may take, in seconds."""

    nodes_s: Count = 300
    """Until all nodes have joined Ray."""
    save_s: Count = 120
    """From the signal to stop until Slurm's time limit: the last completed step has to be saved by then."""
    head_lost_s: Count = 30
    """After the head is gone, until nodes end by themselves."""


class ClusterSpec(Section):
    """One description of a cluster, for every way to launch. What a way has no use for, it leaves alone."""

    nodes: Count = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_node: Count | None = None
    """Null: whole nodes, with all their cores."""
    python: str | None = None
    """The interpreter on the nodes, which has ``alignment`` installed. Null: the one that launches, and in a container
    its ``python3``."""
    setup: tuple[str, ...] = ()
    """Lines of bash, run on each node before anything else, such as ``module load cuda``. One that fails ends it."""
    env: Mapping[str, str] = Field(default_factory=dict)
    """Variables for every process. Secrets come from the environment that launches, or from a file that ``setup``
    reads."""
    container: Container | None = None
    slurm: Slurm = Slurm()
    ray: RayAddress = RayAddress()
    deadlines: Deadlines = Deadlines()

    @field_validator("setup")
    @classmethod
    def _no_secrets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(_LITERAL_SECRET.search(line) for line in value):
            raise ValueError(
                "a line sets a secret, and launch files are copied and shown: export it where you launch, or put it "
                "into a file that only you can read and write 'source FILE' here"
            )
        return value

    @field_validator("env")
    @classmethod
    def _variables(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name, content in value.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"'{name}' is not the name of a variable")
            if OWN_VARIABLES.fullmatch(name):
                raise ValueError(f"{name} is set by the launcher; leave it out")
            if "\n" in content or "\0" in content:
                raise ValueError(f"{name} has more than one line")
        return value


def is_cluster_override(text: str) -> bool:
    """Whether a ``--set`` changes the cluster; all others change the recipe."""
    return text.partition("=")[0].partition(".")[0].strip() == "cluster"


def load_cluster(path: Path | None, overrides: Sequence[str] = ()) -> tuple[ClusterSpec, Node]:
    """The cluster that a file and overrides describe, and its values with their marks.

    Args:
        path: A YAML file; None: all defaults.
        overrides: ``cluster.a.b=c`` texts.

    Raises:
        RecipeError: Every mistake, each with the file and line, or the override, that made it.
    """
    problems: list[Problem] = []
    root = read_file(path, problems) if path is not None else Node({}, Mark("the default cluster"))
    root = Node({"cluster": root}, root.mark)
    for text in overrides:
        try:
            root = merge(root, parse_override(text, problems))
        except RecipeError as error:
            problems += error.problems
    root = root.value["cluster"]
    hidden = "looks like a secret, and launch files are copied and shown: export it where you launch instead"
    problems += [replace(problem, message=hidden) for problem in secrets(root)]
    places = {problem.place for problem in problems}
    data = plain(root)
    spec = None
    try:
        spec = ClusterSpec.model_validate_json(to_json(data), strict=True)
    except ValidationError as error:
        problems += [p for p in problems_of(error.errors(), root, data, ClusterSpec) if p.place not in places]
    if problems:
        raise RecipeError(sorted(problems, key=lambda p: (p.mark.line is None, p.mark.line or 0)))
    assert spec is not None
    return _located(spec, root), root


def _located(spec: ClusterSpec, root: Node) -> ClusterSpec:
    """The same with the path of the token in full."""
    if spec.ray.token_file is None:
        return spec
    beside = mark_of(root, ("ray", "token_file")).folder
    path = (beside / Path(spec.ray.token_file).expanduser()).resolve()
    return spec.model_copy(update={"ray": spec.ray.model_copy(update={"token_file": str(path)})})
