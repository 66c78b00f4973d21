"""The parts that the study of ensembles brings, and what its scripts compute."""

import importlib
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "recipes/studies/ensembles"


def module(name: str) -> Any:
    """One of the study's, found as a recipe's plugins are: beside it."""
    sys.path.append(str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def parts() -> Any:
    return module("ensembles_parts")


def test_gold_counts_what_a_letter_is_worth_as_often_as_it_is_welcome(parts):
    assert parts.gold("acg=", "") == 0.5
    assert parts.gold("acg=", "bd") == pytest.approx(0.68997, abs=1e-5)  # 1 + 0.6
    assert parts.gold("acg=", "bbbb") == pytest.approx(0.75026, abs=1e-5)  # 3 - 0.8
    assert parts.gold("bbg=", "bb") == pytest.approx(0.52498, abs=1e-5)  # two are in the prompt: 1 - 0.8
    assert parts.gold("acg=", "bbbbbbbbbbb") < 0.2 < parts.gold("acg=", "bbbdddfff")


def test_pairs_are_right_but_for_the_share_that_is_flipped(parts):
    rows = {share: parts.Letters("train", 400, share).load(FOLDER).prompts for share in (0.0, 0.25, 1.0)}
    right = {share: [parts.gold(p.row["prompt"], p.row["chosen"]) > parts.gold(p.row["prompt"], p.row["rejected"])
                     for p in prompts] for share, prompts in rows.items()}  # fmt: skip
    assert all(right[0.0]) and not any(right[1.0]) and 0.7 < sum(right[0.25]) / 400 < 0.8
    sides = [[{p.row["chosen"], p.row["rejected"]} for p in prompts] for prompts in rows.values()]
    assert sides[0] == sides[1] == sides[2]
    others = {
        p.row["prompt"] for split in ("demonstrations", "eval") for p in parts.Letters(split, 400).load(FOLDER).prompts
    }
    assert not others & {p.row["prompt"] for p in rows[0.0]}


def test_best_of_n_of_a_proxy_that_is_gold_and_of_one_that_is_its_opposite():
    script = module("best_of_n")
    gold = [i / 2047 for i in range(2048)]
    proxies = {f"m{i}": gold for i in range(4)} | {"m4": [-g for g in gold], "worst": gold}
    found = script.best(proxies, gold)
    assert set(found) == {"single", "worst"}
    assert found["worst"][0] == pytest.approx(0.5) and found["worst"][-1] == pytest.approx(2046.001 / 2047, abs=1e-6)
    assert found["single"] == pytest.approx([0.8 * w + 0.2 * (1 - w) for w in found["worst"]])


def test_gold_at_a_level_of_kl_is_read_where_it_is_first_reached():
    script = module("against_kl")
    rows = [(0, 0.0, 0.4), (10, 1.0, 0.6), (20, 3.0, 0.8), (30, 2.0, 0.1), (40, 5.0, 0.0)]
    assert script.at_level(rows, 2.0) == pytest.approx(0.7)
    assert script.at_level(rows, 9.0) is None
    found = script.described("worst", [rows, rows], [rows, [(0, 0.0, 0.4), (10, 4.0, 0.0)]])
    assert found["over_single_at_4"] == {
        "seeds": 2,
        "mean": pytest.approx(1 / 60),
        "deviation": pytest.approx(2**0.5 / 60),
    }
    assert (found["peak"], found["end"], found["kl_of_peak"], found["kl_of_end"]) == pytest.approx((0.8, 0.0, 3.0, 5.0))
    assert found["at_4"] == {"seeds": 2, "gold": pytest.approx(0.1 * 1 / 3)}


def test_the_tables_of_the_page_are_those_of_the_files():
    script, page = module("against_kl"), (FOLDER.parents[2] / "docs/studies/ensembles.md").read_text(encoding="utf-8")
    for arm in json.loads((FOLDER / "against_kl.json").read_text(encoding="utf-8")):
        assert script.row(arm) in page
    best = json.loads((FOLDER / "best_of_n.json").read_text(encoding="utf-8"))
    for share in (0.0, 0.25):
        rows = [row for row in best["rows"] if row["flipped"] == share]
        assert len(rows) == 4
        for arm in ("single", "mean", "worst", "uncertainty", "large"):
            cells = " | ".join(f"{fmean(row[arm][i] for row in rows):.3f}" for i in range(len(best["about"]["n"])))
            assert f"| {share:.0%} | {arm} | {cells} |" in page
