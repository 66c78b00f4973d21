"""The results of a study as text in Markdown, and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import UserError
from alignment.studies.judge import COLUMNS
from alignment.studies.pages import BEGIN, END, insert

AXES = {
    "flops": ("operations of all models, FLOP", "FLOP"),
    "tokens": ("generated tokens", "tokens"),
    "steps": ("steps", "steps"),
}


def page(results: Mapping[str, Any], before: str | None) -> str:
    """The page of a study with its results: a new one, or ``before`` with what stands between its marks replaced.

    Raises:
        ValueError: ``before`` lacks the marks.
    """
    if before is None:
        before = f"# Study: {results['study']}\n\n{results['claim'].strip()}\n\n{BEGIN}\n{END}\n"
    return insert(before, markdown(results))


def check_page(before: str, name: str) -> None:
    """Raises:
    UserError: The page has no place for results.
    """
    if not (BEGIN in before and END in before.partition(BEGIN)[2]):
        raise UserError(
            f"{name} is there already and has no place for results: put a line {BEGIN} and, below it, {END}"
        )


def markdown(results: Mapping[str, Any]) -> str:
    """The verdict, what it rests on, and what the papers say."""
    primary, measure = results["primary"], results["measure"]
    named, score = _measure(measure), _score(measure)
    found = f"{primary['mean']:+.4f} {_span(primary)}; at least {primary['minimum_effect']:g} was claimed."
    lines = [f"**Verdict: {results['verdict']}.** {primary['arm']} over {primary['against']}, {named}: {found}"]
    lines += ["", f"![Held-out {score} over {AXES[measure['over']][0]}]({results['study']}.png)", ""]
    lines += [
        f"| arm | {named} ({primary['level']:.0%}) | {score}, last evaluation | steps | generated tokens | FLOP "
        "| chosen |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [_row(arm) for arm in results["arms"]]
    if results["gate"]:
        lines += ["", "| regime | asked for | measured | |", "|---|---|---|---|"]
        lines += [
            f"| {g['text'] or g['metric'] + ', ' + g['when']} ({g['arm']}) | {_asked(g)} | {g['measured']:.3f} "
            f"| {'met' if g['met'] else 'not met'} |"
            for g in results["gate"]
        ]
    if results["controls"]:
        lines += ["", "| control | |", "|---|---|"]
        lines += [f"| {_control(c)} | {'yes' if c['passed'] else '**no**'} |" for c in results["controls"]]
    if results["papers"]:
        lines += ["", "| arm | what the papers say | source |", "|---|---|---|"]
        lines += [f"| {p['arm'] or 'all'} | {p['says']} | {p['source']} |" for p in results["papers"]]
    return "\n".join([*lines, "", *_about(results)]) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """The mean curve of each arm over the cost, with the band of its seeds.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit = results["measure"]["over"]
    figure, axis = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for arm in dict.fromkeys(cell["arm"] for cell in results["cells"]):
        curves = [np.array(cell["curve"], dtype=float) for cell in results["cells"] if cell["arm"] == arm]
        end = results["measure"]["budget"] or min(curve[-1, COLUMNS[unit]] for curve in curves)
        at = np.linspace(min(curve[0, COLUMNS[unit]] for curve in curves), end, 200)
        values = np.array([np.interp(at, curve[:, COLUMNS[unit]], curve[:, 3]) for curve in curves])
        [line] = axis.plot(at, values.mean(0), label=arm)
        axis.fill_between(at, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel=AXES[unit][0], ylabel=f"held-out {_score(results['measure'])}")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def _row(arm: Mapping[str, Any]) -> str:
    chosen = ", ".join(f"{key}={value}" for key, value in arm["chosen"].items()) or "-"
    chosen += " (at an end of the grid)" if arm["at_end_of_grid"] else ""
    flop = f"{arm['flops']:.3g}" if arm["flops"] else "not counted"
    numbers = f"{arm['final']:.4f} | {arm['steps']:.0f} | {arm['tokens']:,.0f} | {flop}"
    return f"| {arm['arm']} | {arm['value']:.4f} {_span(arm)} | {numbers} | {chosen} |"


def _about(results: Mapping[str, Any]) -> Sequence[str]:
    seeds, budget = results["seeds"], results["measure"]["budget"]
    spent = f"{budget:.4g} {AXES[results['measure']['over']][1]} each" if budget else "as far as the runs went"
    tuned = ", ".join(map(str, seeds["tune"])) or "none"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return [
        f"Report seeds: {', '.join(map(str, seeds['report']))}; tuning seeds: {tuned}; budget: {spent}. The interval "
        "of the contrast is a bootstrap over seeds and problems, those of arms are Student's over seeds; bands of the "
        "plot are from the lowest to the highest seed.",
        f"All runs took {results['seconds'] / 60:.0f} minutes of one thread; {versions}.",
        f"SHA-256 of the claim: `{results['claim_sha256']}`.",
    ]


def _measure(measure: Mapping[str, Any]) -> str:
    if measure["metric"] == "matched":
        return f"{_score(measure)} where accuracy reaches {measure['accuracy']:g}"
    if measure["metric"] in ("final", "after_peak"):
        return f"{_score(measure)} at the budget{', less its peak' if measure['metric'] == 'after_peak' else ''}"
    return f"mean {_score(measure)} over {measure['over']}"


def _score(measure: Mapping[str, Any]) -> str:
    of = "" if measure["problems"] == "*" else f" of {measure['problems']}"
    return (measure["of"] if measure["pass_at"] == 1 else f"pass@{measure['pass_at']}") + of


def _control(control: Mapping[str, Any]) -> str:
    if "equals" in control:
        return f"{control['arm']} equals {control['equals']}, bit for bit"
    return f"{control['arm']} no better than {control['no_better_than']}: {control['mean']:+.4f} {_span(control)}"


def _asked(gate: Mapping[str, Any]) -> str:
    ends = [("at least", gate["at_least"]), ("at most", gate["at_most"])]
    return ", ".join(f"{name} {value:g}" for name, value in ends if value is not None)


def _span(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return "(one seed)" if low is None else f"({low:.4f} to {high:.4f})"
