"""Results that are published belong to the claim that stands beside them, and their page says the same."""

import hashlib
import json
from pathlib import Path

import pytest

from alignment.studies import report
from alignment.studies.claim import read_claim

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "recipes/studies").glob("*/results.json"))
CLAIMED = [path.parent for path in RESULTS if (path.parent / "claim.yaml").exists()]


def test_some_are_published():
    assert {"curriculum", "entropy"} <= {folder.name for folder in CLAIMED}


@pytest.mark.parametrize("folder", CLAIMED, ids=lambda folder: folder.name)
def test_results_claim_and_page_are_of_one_study(folder):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/studies" / f"{folder.name}.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((folder / "claim.yaml").read_bytes()).hexdigest()
    assert results["claim_sha256"] == digest and digest in page
    recipe = folder / read_claim(folder / "claim.yaml").claim.recipe
    files = {
        name: hashlib.sha256((recipe.parent / name).read_bytes()).hexdigest() for name in results["sources_sha256"]
    }
    assert results["sources_sha256"] == files and recipe.name in files
    assert any(name.endswith("_parts.py") for name in files)
    assert f"**Verdict: {results['verdict']}.**" in page and report.page(results, page) == page
    assert (ROOT / "docs/studies" / f"{folder.name}.png").stat().st_size > 1000
    claim = read_claim(folder / "claim.yaml").claim
    assert {arm["arm"] for arm in results["arms"]} == set(claim.compared)
    assert list(results["seeds"]["report"]) == list(claim.report_seeds)
    for arm in results["arms"]:
        assert f"| {arm['arm']} | {arm['value']:.4f} (" in page


def test_a_page_names_what_was_measured():
    accuracy, hard = (
        (ROOT / f"docs/studies/{name}.md").read_text(encoding="utf-8") for name in ("curriculum", "entropy")
    )
    assert "![Held-out accuracy over generated tokens]" in accuracy and "| accuracy, last evaluation |" in accuracy
    assert "![Held-out pass@16 of hard/* over steps]" in hard and "| pass@16 of hard/*, last evaluation |" in hard
