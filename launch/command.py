"""What is between the command ``align launch`` and the renderers: its arguments, and what is checked before anything is
written."""

import sys
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

from alignment.engines.config import clusters
from alignment.engines.ray_needs import Needs
from alignment.engines.ray_needs import Node as Machine
from alignment.errors import UserError
from alignment.recipe import Recipe, load
from alignment.recipe_tree import Mark, Node, Problem, RecipeError, mark_of
from launch.local import render_local
from launch.plan import Job, next_folder
from launch.ray_jobs import render_ray
from launch.slurm import render_slurm
from launch.spec import ClusterSpec, is_cluster_override, load_cluster

RENDERERS = {"local": render_local, "ray": render_ray, "slurm": render_slurm}


def launch(
    recipes: Sequence[Path], on: str, cluster: Path | None, overrides: Sequence[str], dry_run: bool, wait: bool
) -> int:
    """Checks a recipe and a cluster, then shows, or writes and runs, what starts the one on the other.

    Args:
        recipes: As for ``align train``.
        on: ``local``, ``ray`` or ``slurm``.
        cluster: The cluster's description; None: defaults.
        overrides: ``cluster.a.b=c`` changes the cluster, everything else the recipe.
        dry_run: Show, and do nothing.
        wait: Return when the job has ended, with its exit code.

    Returns:
        The exit code: the recipe's, where the launch lasts as long as the job.

    Raises:
        RecipeError: The recipe or the description is wrong, or they do not go together. Nothing was written.
        UserError: The job cannot be started.
    """
    if on not in RENDERERS:
        raise UserError(f"--on {on}: give one of {', '.join(RENDERERS)}")
    spec, root = load_cluster(cluster, [text for text in overrides if is_cluster_override(text)])
    recipe = load(recipes, for_recipe := [text for text in overrides if not is_cluster_override(text)])
    ray_stages = [index for index, stage in enumerate(recipe.stages) if clusters.name_of(stage.cluster) == "ray"]
    if problems := [*_misfits(on, spec, root, bool(ray_stages)), *_too_small(on, spec, root, recipe)]:
        raise RecipeError(problems)
    sys.stderr.write(_note(on, spec, recipe))
    joins = bool(ray_stages) and on != "local"
    if joins:  # the cluster that the launcher starts or names, in place of a private one
        for_recipe += [f"stages.{index}.cluster.address=auto" for index in ray_stages]
        load(recipes, for_recipe)
    job = Job(
        name=recipe.run.name,
        command=_train(recipes, for_recipe),
        workdir=Path.cwd(),
        folder=next_folder(Path(recipe.run.output).resolve(), recipe.run.name),
        uses_ray=joins,
        wait=wait,
    )
    launching = RENDERERS[on](spec, job)
    if dry_run:
        sys.stdout.write(launching.shown())
        return 0
    launching.command.check()
    launching.write()
    code = launching.run()
    if not wait and code == 0 and launching.next_steps:
        sys.stderr.write(f"align launch: {launching.next_steps}\n")
    return code


def _train(recipes: Sequence[Path], overrides: Sequence[str]) -> tuple[str, ...]:
    """The arguments of the interpreter that trains. Paths are in full: the job may start elsewhere."""
    sets = [word for text in overrides for word in ("--set", text)]
    return ("-m", "alignment", "train", *(str(path.resolve()) for path in recipes), *sets)


def _note(on: str, spec: ClusterSpec, recipe: Recipe) -> str:
    """What may be meant otherwise, though it goes together."""
    if on != "slurm" or spec.gpus_per_node or all(map(_asks_for_cpus, recipe.stages)):
        return ""
    return "align launch: gpus_per_node is 0, so this trains on CPUs\n"


def _asks_for_cpus(stage: Any) -> bool:
    """Whether a stage says itself that it wants no GPU."""
    return "cpu" in (getattr(stage.cluster, "device", None), getattr(stage.learner, "device", None))


def _too_small(on: str, spec: ClusterSpec, root: Node, recipe: Recipe) -> Iterator[Problem]:
    """What the described nodes lack for a stage on Ray. Where nothing is said of nodes that are there, nothing is."""
    if on != "slurm" and not spec.gpus_per_node:
        return
    cores = inf if spec.cpus_per_node is None or on == "local" else spec.cpus_per_node
    nodes = [Machine(spec.gpus_per_node, cores)] * spec.nodes
    for stage in recipe.stages:
        if clusters.name_of(stage.cluster) != "ray":
            continue
        asked: Any = stage.cluster
        device = "gpu" if asked.device == "gpu" or (asked.device == "auto" and spec.gpus_per_node) else "cpu"
        if device == "cpu" and cores == inf:
            continue
        needs = Needs.of(stage, asked.placement == "colocated", device, asked.cpus_per_process)
        if (lacking := needs.shortfall(nodes)) is not None:
            place = ("nodes" if spec.gpus_per_node or device == "cpu" else "gpus_per_node",)
            yield Problem(mark_of(root, place), place, f"stage '{stage.name}': {lacking}")


def _misfits(on: str, spec: ClusterSpec, root: Node, uses_ray: bool) -> Iterator[Problem]:
    """What the description says that this way of launching, or the recipe, cannot follow."""

    def problem(message: str, *place: str) -> Problem:
        return Problem(mark_of(root, place), place, message)

    if on == "local" and spec.nodes > 1:
        yield problem(f"--on local is one machine, not {spec.nodes}; launch --on slurm or ray", "nodes")
    if on == "ray" and spec.ray.address is None:
        yield problem("--on ray needs the address of a cluster: http://HOST:8265 or HOST:6379", "ray", "address")
    if on == "ray" and not uses_ray:
        yield Problem(Mark("recipe"), ("stages",), "no stage has 'cluster: ray', so --on ray would train without it")
    if on == "slurm" and spec.ray.address is not None:
        yield problem("--on slurm starts a Ray cluster of its own; set it to null", "ray", "address")
    if on != "slurm" and spec.container is not None:
        yield problem(f"only --on slurm starts containers; set it to null for --on {on}", "container")
    if spec.nodes > 1 and not uses_ray and on == "slurm":
        message = f"no stage of the recipe has 'cluster: ray', so {spec.nodes - 1} of {spec.nodes} nodes would idle"
        yield problem(message, "nodes")
