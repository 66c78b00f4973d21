"""The command line: ``align``. Nothing heavy is imported before a command needs it."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from alignment.durable import StorageError
from alignment.errors import UserError

app = typer.Typer(
    name="align",
    help="Align language models and train them to reason with reinforcement learning.",
    epilog="Start with: align init my_project && align train my_project/recipe.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
Command = TypeVar("Command", bound=Callable[..., Any])
Recipes = Annotated[list[Path], typer.Argument(help="Recipe files, merged from left to right.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a value, e.g. run.seed=1 or stages.0.steps=10; repeatable."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def command(example: str) -> Callable[[Command], Command]:
    """Registers a function as a command. What a user can mend is told in plain words on stderr, with exit code 2
    (74 where the disk failed)."""

    def register(function: Command) -> Command:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except (UserError, StorageError, FloatingPointError) as error:
                Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
                raise typer.Exit(getattr(error, "exit_code", 2)) from None

        app.command(function.__name__.rstrip("_"), epilog=f"Example: [bold]{example}[/bold]")(run)
        return function

    return register


def _version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        number = version("alignment-rl")
    except PackageNotFoundError:
        number = "not installed, running from source"
    Console(soft_wrap=True, highlight=False).print(f"align {number}")
    raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Align language models and train them to reason with reinforcement learning."""


@command("align train recipes/quickstart.yaml --set run.seed=1")
def train(
    recipe: Recipes,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Put an earlier run of this name aside and start again.")
    ] = False,
    init_from: Annotated[
        str | None,
        typer.Option(metavar="RUN[@STEP|@best]", help="Start from the policy of another run's checkpoint."),
    ] = None,
) -> None:
    """Train a recipe, or go on where its run stopped.

    Ctrl-C saves the last completed step; the same command continues from there.
    """
    from alignment.recipe import load
    from alignment.trainer import train as train_recipe

    result = train_recipe(load(recipe, overrides or []), fresh_start=fresh, init_from=init_from)
    raise typer.Exit(int(result["exit_code"]))


@command("align check recipes/gsm8k_8gpu.yaml --nodes 1 --gpus 8")
def check(
    recipe: Recipes,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Also plan it for so many machines; default 1.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of each machine; default 1.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", min=1, help="Memory of each GPU in GiB; default 80.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the resolved recipe and its plan, or every mistake in it. Trains nothing and fetches nothing.

    With --nodes or --gpus also what lies where, how much memory it takes, and whether it fits: exit code 1 if not.
    """
    from alignment.plan import make_plan
    from alignment.plan_view import show_plan
    from alignment.recipe import load

    loaded = load(recipe, overrides or [])
    plan = make_plan(loaded, hardware(nodes, gpus, gpu_memory))
    if as_json:
        _print_json({"recipe": loaded.resolved(), "plan": plan.to_json()})
    else:
        show_plan(loaded, plan, Console())
        for warning in loaded.warnings:
            Console(stderr=True).print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    if not plan.fits:
        raise typer.Exit(1)


def hardware(nodes: int | None, gpus: int | None, gpu_memory: float | None) -> Any:
    """The machines that options describe; None if there are none."""
    from alignment.cluster_plan import Hardware

    if nodes is None and gpus is None and gpu_memory is None:
        return None
    return Hardware(nodes or 1, gpus or 1, gpu_memory or 80.0)


@command("align launch recipes/quickstart.yaml --on slurm --cluster cluster.yaml --dry-run")
def launch(
    recipe: Recipes,
    on: Annotated[str, typer.Option(metavar="local|ray|slurm", help="Where to train.")] = "local",
    cluster: Annotated[Path | None, typer.Option(metavar="FILE", help="The cluster's description.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written and run.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the job has ended, with its exit code.")] = False,
) -> None:
    """Train a recipe on this machine, on a Ray cluster that is there already, or as a Slurm job.

    --set cluster.KEY=VALUE changes the cluster's description, any other --set the recipe.
    """
    from launch.command import launch as launch_recipe

    raise typer.Exit(launch_recipe(recipe, on, cluster, overrides or [], dry_run, wait))


@command("align list policy_losses clip")
def list_(
    kind: Annotated[str | None, typer.Argument(help="A kind, such as advantages.", show_default=False)] = None,
    name: Annotated[str | None, typer.Argument(help="A component of that kind.", show_default=False)] = None,
    as_json: AsJson = False,
    plugins: Annotated[
        list[str] | None, typer.Option("--plugin", help="Also import this module, which registers components.")
    ] = None,
) -> None:
    """Show the kinds of component, the components of one, or the options of one."""
    from alignment.listing import describe_components, show_components

    found = describe_components(kind, name, plugins or [])
    if as_json:
        _print_json(found)
    else:
        show_components(found, Console())


@command("align init my_project")
def init(folder: Annotated[Path, typer.Argument(help="A folder that is empty or does not exist yet.")]) -> None:
    """Write a starting recipe, a reward function, data and a test into a folder."""
    from alignment.init_project import write_scaffold

    written = write_scaffold(folder)
    console = Console(highlight=False, soft_wrap=True)
    for path in written:
        console.print(f"  {path}", markup=False)
    console.print(
        f"\nNext:\n  align check {folder / 'recipe.yaml'}\n  align train {folder / 'recipe.yaml'}", markup=False
    )


@command("align export runs/quickstart@best my_model")
def export(
    run: Annotated[str, typer.Argument(metavar="RUN[@STEP|@best]", help="A run and one of its checkpoints.")],
    folder: Annotated[Path, typer.Argument(help="A folder that is empty or does not exist yet.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="Only the LoRA adapter.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Whole weights, with the adapter added to them.")] = False,
    role: Annotated[
        str | None, typer.Option(metavar="critic|prompt_value", help="The value model of the run, not its policy.")
    ] = None,
) -> None:
    """Write a checkpoint's policy as an ordinary Hugging Face folder, or its value model (--role critic).

    Value models are for `align eval --decoding value_augmented`, and for another stage's critic (start: FOLDER).
    """
    if adapter + merged + (role is not None) > 1:
        raise UserError("--adapter, --merged and --role exclude each other; give one, or none to let the model decide")
    if role is not None:
        from alignment.export_values import export_value_model

        written = export_value_model(run, folder, role)
    else:
        from alignment.export import export as export_run

        written = export_run(run, folder, "adapter" if adapter else "merged" if merged else "auto")
    Console(highlight=False, soft_wrap=True).print(f"wrote {written}", markup=False)


@command("align replay runs/quickstart --step 300 --set stages.1.algorithm.advantage=rloo")
def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run: its folder, or its name under runs.")],
    step: Annotated[int, typer.Option(help="A step that the flight recorder kept.")],
    overrides: Overrides = None,
) -> None:
    """Recompute credit and loss of a recorded step without the model, under a changed recipe if you like."""
    from alignment.replay import replay as replay_step

    replay_step(run, step, overrides or [], Console())


Text = str | None
Number = int | None
Several = list[str] | None


@command("align eval runs/quickstart@best --tasks arithmetic,gcd --max-tokens 32")
def eval_(
    checkpoint: Annotated[Text, typer.Argument(help="A model folder, a hub id, or RUN, RUN@STEP or RUN@best.")] = None,
    tasks: Annotated[str, typer.Option(metavar="NAME,NAME", help="Benchmarks and procedural tasks.")] = "",
    data: Annotated[Several, typer.Option(metavar="NAME=FILE", help="Its rows are in this file; repeatable.")] = None,
    samples: Annotated[Number, typer.Option(min=1, help="Completions of each problem.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    max_tokens: Annotated[Number, typer.Option(min=1, help="Longest completion.")] = None,
    max_prompt_tokens: Annotated[Number, typer.Option(min=1, help="Leave longer prompts out.")] = None,
    limit: Annotated[Number, typer.Option(min=1, help="At most so many problems of each.")] = None,
    chat: Annotated[str, typer.Option(metavar="auto|yes|no", help="Put prompts through the chat template.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of all samples.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder; default: evaluations/CHECKPOINT.")] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Completions sampled together.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Processes that score.")] = 1,
    dtype: Annotated[Text, typer.Option(metavar="float32|bfloat16", help="Of the weights.")] = None,
    settings: Annotated[
        Several,
        typer.Option(
            "--set", metavar="NAME.OPTION=VALUE", help="An option of a benchmark or the decoding; repeatable."
        ),
    ] = None,
    decoding: Annotated[Text, typer.Option(metavar="NAME", help="How tokens are chosen; its options: --set.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare two --output folders.")
    ] = None,
    as_json: AsJson = False,
    plugins: Annotated[Several, typer.Option("--plugin", help="Also import this module, for its benchmarks.")] = None,
) -> None:
    """Measure a checkpoint on benchmarks, or go on where its evaluation stopped; or compare two evaluations.

    Benchmarks: align list benchmarks. Procedural tasks: align list tasks. Decodings: align list decodings. Ctrl-C
    keeps every finished problem.
    """
    from alignment.evaluation import command as evaluation

    if compare is not None:
        evaluation.compare(compare, as_json, given=checkpoint)
        return
    selection = evaluation.selection(chat, limit, max_prompt_tokens)
    options = evaluation.options(checkpoint, tasks, data or [], samples, temperature, max_tokens, selection, dtype)
    options = replace(options, seed=seed, output=output, batch_rows=batch_rows, workers=workers, plugins=plugins or [])
    options = evaluation.decoded(replace(options, settings=evaluation.settings(settings or [])), decoding)
    raise typer.Exit(evaluation.evaluate(options, as_json))


@command("align study recipes/studies/curriculum/claim.yaml --quick")
def study(
    claim: Annotated[Path, typer.Argument(metavar="CLAIM.yaml", help="What is claimed, and how it is judged.")],
    quick: Annotated[bool, typer.Option("--quick", help="One seed, small: shows that it works; no verdict.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and check every recipe.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, each on one core.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results; default: runs/studies/NAME.")] = None,
    docs: Annotated[Path, typer.Option(help="Folder of the page and the plot of a whole study.")] = Path(
        "docs/studies"
    ),
) -> None:
    """Judge a claim about methods: tune every arm alike, run it over seeds, and say whether the claim holds.

    Go on where it stopped with the same command; Ctrl-C keeps what is finished. A claim is not changed once it is
    begun: its SHA-256 stands in the results. docs/studies.md says how to write one.
    """
    from alignment.studies.command import study as run_study

    raise typer.Exit(run_study(claim, out, docs, quick, dry_run, workers))


def main() -> None:
    """The command ``align``."""
    app(prog_name="align")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
