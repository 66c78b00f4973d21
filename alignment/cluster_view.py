"""Shows how a recipe lies on a cluster, in a terminal."""

import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.cluster_plan import Hardware, Holding, StageOnCluster, counted, gib


def show_cluster(stages: Sequence[StageOnCluster], hardware: Hardware, console: Console) -> None:
    """For each stage the layout, the memory of each kind of GPU, and a verdict."""
    for stage in stages:
        console.print(_table(stage, hardware))
        for holding in stage.holdings:
            console.print(_memory(holding))
        console.print(_verdict(stage), markup=False, highlight=False, soft_wrap=True, style=_colour(stage))
        for line in (*stage.remedies, *stage.notes):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        console.print()


def _colour(stage: StageOnCluster) -> str:
    return "bold green" if stage.fits else "bold red"


def _verdict(stage: StageOnCluster) -> str:
    if stage.fits:
        # An engine alone on a GPU takes its whole share, whatever that is: what is left says nothing.
        learning = [holding for holding in stage.holdings if holding.what != "engine"]
        if not learning:
            return f"{stage.stage} fits"
        least = min(learning, key=lambda holding: holding.spare)
        return f"{stage.stage} fits: {gib(least.spare)} to spare where it is tightest ({least.what}, {least.fullest})"
    return "\n".join([f"{stage.stage} does not fit:", *(f"  {problem}" for problem in stage.problems)])


def _table(stage: StageOnCluster, hardware: Hardware) -> Table:
    table = Table(
        title=f"stage {stage.stage} on {hardware}",
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        padding=(0, 2),
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, line in _nodes(stage):
        table.add_row(label, escape(line))
    if stage.cache is not None:
        cache = stage.cache
        held = f"{cache.tokens:,} tokens an engine: {counted(cache.sequences, 'row')} of the greatest length at once"
        table.add_row("cache", f"{held}, of {cache.wanted:,} that it gets")
    if stage.host_bytes:
        table.add_row("host memory", f"{gib(stage.host_bytes)} on the node with most learner ranks")
    return table


def _nodes(stage: StageOnCluster) -> Iterator[tuple[str, str]]:
    """Nodes by what they hold, neighbours that hold the same kind of thing in one line."""
    for number, held in enumerate(stage.nodes):
        yield f"node {number}", ", ".join(_runs(held))


def _runs(held: Sequence[str]) -> Iterator[str]:
    """GPUs in order; those next to each other that hold the same, or the same kind of thing each, together."""
    start = 0
    for index in range(1, len(held) + 1):
        if index < len(held) and (held[index] == held[start] or _alike(held[start : index + 1])):
            continue
        where = f"GPU {start}" if index == start + 1 else f"GPUs {start}-{index - 1}"
        first, last = held[start] or "idle", held[index - 1] or "idle"
        yield f"{where} {first}" if first == last else f"{where} {first} to {last}"
        start = index


def _alike(held: Sequence[str]) -> bool:
    """Whether these differ, each from each, in their numbers alone."""
    return len(set(held)) == len(held) and len({re.sub(r"\d+", "", what) for what in held}) == 1


def _memory(holding: Holding) -> Table:
    table = Table(
        title=f"memory of {'each of ' if holding.gpus > 1 else ''}{counted(holding.gpus, 'GPU')} ({holding.what})",
        title_justify="left",
        title_style="dim",
        box=None,
        show_header=False,
        padding=(0, 2),
    )
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for phase, parts in holding.phases.items():
        said = ", ".join(f"{name} {gib(amount)}" for name, amount in parts.items() if amount)
        table.add_row(phase, gib(sum(parts.values())), f"[dim]{said}[/dim]")
    table.add_row("limit", gib(holding.limit))
    return table
