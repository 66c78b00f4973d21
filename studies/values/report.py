"""The results as JSON, as text in Markdown, and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from studies.values.measure import interval
from studies.values.settings import Settings
from studies.values.verdict import Claim, judge, judge_heads

NAMES = {
    "frozen": "frozen policy",
    "oracle": "best of n by the gold reward (oracle)",
    "rerank": "value re-ranking, best of n",
    "vas": "value-augmented sampling, beta",
    "vas_vocabulary": "the same with a vocabulary-wide head, beta",
    "ppo": "PPO, KL coefficient",
}
HEADS = {"scalar": "scalar", "two_hot": "two-hot", "hl_gauss": "HL-Gauss"}
ROWS = ("arms", "heads", "outcomes", "papers", "regime", "heads_apart", "outcomes_apart")
"""Of the results: lists that have one line for each entry in the file."""


def summarise(
    claim: Claim,
    settings: Settings,
    rates: Mapping[str, float],
    rows: Mapping[int, Any],
    apart: Mapping[int, Any] | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is kept: small, and enough for the tables and the plot.

    Args:
        claim: What was claimed.
        settings: Of the run.
        rates: Learning rates that were chosen.
        rows: Of each seed.
        apart: Rows of heads whose rates were chosen for each share of noise; None where they were not computed.
        about: More that is kept.
    """
    gates, outcomes = judge(claim, rows)
    flat = [row for of_seed in rows.values() for row in of_seed]
    return {
        "study": "values",
        "claim": claim.text,
        "claim_sha256": claim.sha256,
        "settings": settings.to_json(),
        "learning_rates": dict(rates),
        **about,
        "regime": gates,
        "outcomes": [outcome.to_json() for outcome in outcomes],
        "papers": [dict(paper) for paper in claim.papers],
        "arms": _arms(flat),
        "heads": _heads(flat),
        "heads_apart": [] if apart is None else _heads([row for of_seed in apart.values() for row in of_seed]),
        "outcomes_apart": [] if apart is None else [outcome.to_json() for outcome in judge_heads(claim, apart)],
    }


def markdown(results: Mapping[str, Any]) -> str:
    """Verdicts, what the papers say, and the table."""
    primary, *secondary = results["outcomes"]
    lines = [f"**Primary: {primary['verdict']}.** {_sentence(primary)}", ""]
    lines += ["| regime | at least | measured | |", "|---|---|---|---|"]
    lines += [
        f"| {g['text']} | {g['at_least']:g} | {g['measured']:.2f} | {'met' if g['met'] else 'not met'} |"
        for g in results["regime"]
    ]
    lines += ["", *_outcomes("secondary claim", secondary)]
    lines += ["", "| what the papers say | source |", "|---|---|"]
    lines += [f"| {paper['says']} | {paper['source']} |" for paper in results["papers"]]
    lines += ["", *_table(results["arms"]), "", *_head_table(results["heads"])]
    if results["heads_apart"]:
        lines += [
            "",
            "Not part of the claim: the same with a learning rate chosen for each share of corrupted labels.",
            "",
        ]
        lines += [*_head_table(results["heads_apart"]), "", *_outcomes("contrast", results["outcomes_apart"])]
    return "\n".join([*lines, "", *_costs(results)]) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Gold over KL, gold over operations, and the error of heads over noise.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for arm in ("oracle", "rerank", "vas", "vas_vocabulary", "ppo"):
        rows = [row for row in results["arms"] if row["arm"] in ("frozen", arm)]
        for axis, x in ((axes[0], "kl"), (axes[1], "flop")):
            own = rows if x == "kl" else [row for row in rows if row["arm"] == arm]
            own = sorted(own, key=lambda row, x=x: row[x])
            error = [[row["gold"] - _ends(row)[0] for row in own], [_ends(row)[1] - row["gold"] for row in own]]
            scale = 1.0 if x == "kl" else 1e-6
            label = NAMES[arm].partition(",")[0] if arm != "vas_vocabulary" else "the same, vocabulary-wide head"
            axis.errorbar([row[x] * scale for row in own], [r["gold"] for r in own], error, marker=".", label=label)
    axes[0].set(xlabel="KL from the frozen policy, nats per completion", ylabel="gold reward, sd", xlim=(0, 6))
    axes[1].set(xlabel="model passes, MFLOP per completion", ylabel="gold reward, sd", xscale="log")
    axes[0].set_ylim(-0.1, 3.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=5, fontsize=8)
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].xaxis.set_minor_formatter(ticker.NullFormatter())
    for i, (head, name) in enumerate(HEADS.items()):
        own = [row for row in results["heads"] if row["head"] == head]
        error = [[row["error"] - _ends(row)[0] for row in own], [_ends(row)[1] - row["error"] for row in own]]
        beside = [100 * row["noise"] + 0.5 * (i - 1) for row in own]  # or their intervals would hide each other
        axes[2].errorbar(beside, [r["error"] for r in own], error, marker=".", label=name)
    axes[2].set(xlabel="corrupted labels, %", ylabel="squared error of values, share of variance")
    axes[2].legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def _arms(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = list(dict.fromkeys((row["arm"], row["at"]) for row in rows if row["arm"] in NAMES))
    keys.sort(key=lambda key: list(NAMES).index(key[0]))
    found: list[dict[str, Any]] = []
    for arm, at in keys:
        own = [row for row in rows if row["arm"] == arm and row["at"] == at]
        gold = [row["gold"] for row in own]
        mean = {name: fmean(row[name] for row in own) for name in ("gold", "kl", "flop")}
        found.append(
            {"arm": arm, "at": at, **mean, "interval": _finite(gold), "kl_interval": _finite([r["kl"] for r in own])}
        )
    return found


def _heads(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    own = [row for row in rows if row["arm"] == "head"]
    keys = list(dict.fromkeys((row["head"], row["noise"]) for row in own))
    found: list[dict[str, Any]] = []
    for head, noise in keys:
        errors = [row["error"] for row in own if row["head"] == head and row["noise"] == noise]
        found.append({"head": head, "noise": noise, "error": fmean(errors), "interval": _finite(errors)})
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| arm | at | gold, sd (95 %) | KL, nats | MFLOP per completion |", "|---|---|---|---|---|"]
    for row in rows:
        bound = "≤ " if row["arm"] in ("oracle", "rerank") and row["at"] > 1 else ""
        gold = f"{row['gold']:.2f} {_bracket(row)}"
        lines.append(
            f"| {NAMES[row['arm']]} | {row['at']:g} | {gold} | {bound}{row['kl']:.2f} | {row['flop'] / 1e6:.1f} |"
        )
    return lines


def _head_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    noises = list(dict.fromkeys(row["noise"] for row in rows))
    lines = [
        "| error of values, share of variance (95 %) | " + " | ".join(f"{n:.0%} corrupted" for n in noises) + " |",
        "|---|" + "---|" * len(noises),
    ]
    for head, name in HEADS.items():
        own = {row["noise"]: row for row in rows if row["head"] == head}
        lines.append(f"| {name} | " + " | ".join(f"{own[n]['error']:.3f} {_bracket(own[n], 3)}" for n in noises) + " |")
    return lines


def _outcomes(what: str, outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [f"| {o['text']} | {o['minimum_effect']:g} {o['unit']} | {_span(o)} | {o['verdict']} |" for o in outcomes]
    return [f"| {what} | least effect | measured, 95 % | verdict |", "|---|---|---|---|", *rows]


def _costs(results: Mapping[str, Any]) -> list[str]:
    cost = {name: f"{flop / 1e9:.0f} GFLOP" for name, flop in results["training_flop"].items()}
    once = f"Before anything is decoded, a value model costs {cost['value_model']} once, PPO {cost['ppo']} for each"
    rates = ", ".join(f"{name} {rate:g}" for name, rate in results["learning_rates"].items())
    minutes = f"{results['seconds'] / 60:.0f} minutes on one core of a machine that did other work beside it"
    return [
        f"{once} coefficient, drawing {results['settings']['labels']:,} completions included.",
        f"Learning rates that were chosen: {rates}. The run took {minutes}.",
        f"SHA-256 of the claim: `{results['claim_sha256'][:16]}`.",
    ]


def _sentence(outcome: Mapping[str, Any]) -> str:
    least = f"{outcome['minimum_effect']:g} {outcome['unit']}"
    return f"{outcome['text']}: {_span(outcome)} {outcome['unit']}, where at least {least} was claimed."


def _span(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:+.2f} {_bracket(row)}"


def _bracket(row: Mapping[str, Any], digits: int = 2) -> str:
    low, high = row["interval"]
    return "(one seed)" if low is None else f"({low:.{digits}f} to {high:.{digits}f})"


def _ends(row: Mapping[str, Any]) -> tuple[float, float]:
    low, high = row["interval"]
    at = row["gold"] if "gold" in row else row["error"]
    return (at, at) if low is None else (low, high)


def _finite(values: Sequence[float]) -> list[float | None]:
    return [None, None] if len(values) < 2 else list(interval(values))
