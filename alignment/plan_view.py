"""Shows a recipe and its plan in a terminal."""

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table
from ruamel.yaml import YAML

from alignment.cluster_view import show_cluster
from alignment.plan import Plan, StagePlan
from alignment.recipe import Recipe

UNKNOWN = "known once the model is loaded"


def show_plan(recipe: Recipe, plan: Plan, console: Console) -> None:
    """The resolved recipe as YAML, then its data, model and stages in numbers."""
    text = _yaml(recipe)
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(_overview(recipe, plan))
    for stage in plan.stages:
        console.print()
        console.print(_stage(stage))
    if plan.hardware is not None:
        console.print()
        show_cluster(plan.cluster, plan.hardware, console)
    console.print(
        "\n[dim]Memory is an estimate for the parts named; the allocator, temporary buffers and the framework itself "
        "come on top.[/dim]"
    )


def _yaml(recipe: Recipe) -> str:
    yaml, out = YAML(), io.StringIO()
    yaml.width = 120
    yaml.dump(recipe.resolved(), out)
    return out.getvalue().rstrip() + "\n"


def _overview(recipe: Recipe, plan: Plan) -> Table:
    table = _table("plan")
    table.add_row("written to", escape(str(recipe.run.folder)))
    size = UNKNOWN
    if plan.parameters is not None:
        trained = "" if plan.trainable == plan.parameters else f", {plan.trainable:,} trained"
        size = f"{plan.parameters:,} parameters{trained}"
    table.add_row("model", escape(plan.model))
    table.add_row("size", size)
    for name, numbers in plan.data.items():
        table.add_row(f"data.{name}", escape(_section(numbers)))
    return table


def _section(numbers: Mapping[str, Any]) -> str:
    """A section of the data in words."""
    if numbers["rows"] is None:
        return f"{numbers['origin']} from the hub (there is no such file or folder), fetched when training starts"
    parts = [f"{numbers['rows']:,} rows", f"{numbers['used']:,} used", f"{numbers['distinct']:,} distinct"]
    if numbers["bad"]:
        parts.append(f"{numbers['bad']:,} bad skipped")
    if numbers["over_long"]:
        parts.append(f"{numbers['over_long']:,} over-long left out")
    if numbers["floor"]:
        parts.append(f"always the same answer scores {numbers['floor']:.1%}")
    return f"{', '.join(parts)}; from {numbers['origin']}"


def _stage(stage: StagePlan) -> Table:
    table = _table(f"stage {stage.name} ({stage.stage}): {stage.steps:,} steps, each of")
    if stage.sampled:
        rows = f"{stage.prompts:,} prompts x {stage.group_size} completions = {stage.rollouts:,} rollouts"
    else:
        what = "demonstrations" if stage.stage == "sft" else "pairs" if stage.group_size > 1 else "completions"
        rows = f"{stage.prompts:,} {what}"
    table.add_row("rows", rows)
    tokens = UNKNOWN
    if stage.step_tokens is not None:
        tokens = f"at most {stage.step_tokens:,} ({stage.row_tokens:,} in a row)"
    table.add_row("tokens", tokens)
    table.add_row("mini-batches", f"{stage.minibatches} x {stage.minibatch_rows:,} rows")
    if stage.micro_batches is not None:
        table.add_row("micro-batches", f"at most {stage.micro_batches:,} in a mini-batch")
    table.add_row("passes", escape(" > ".join(stage.passes)))
    if stage.memory_bytes is not None:
        parts = ", ".join(f"{what} {_bytes(n)}" for what, n in stage.memory_bytes.items() if n and what != "total")
        table.add_row("memory", f"about {_bytes(stage.memory_bytes['total'])} ({parts})")
    else:
        table.add_row("memory", UNKNOWN)
    for place, component in stage.components.items():
        table.add_row(f"[dim]{place}[/dim]", escape(component))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _bytes(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
