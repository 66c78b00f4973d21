"""Which curricula go together: every pair in a recipe does what the table says, and the page shows the table."""

from itertools import combinations_with_replacement, permutations
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.curricula import PAIRS, DifficultyFilter, Shuffled, Thompson, Uniform, curricula, pair, remarks
from alignment.curricula.pairs import DRAWERS, REFINERS
from alignment.recipe import load
from tests.recipes_for_tests import only, problems, write

PAGE = (Path(__file__).parents[1] / "docs/curricula.md").read_text(encoding="utf-8")
OURS = [e.name for e in curricula if e.cls.__module__.startswith("alignment.") and e.name != "shuffled"]
SIGNS = {"works": "works", "warns": "**warns**", "refused": "refused"}


def table() -> str:
    """The table of pairs as the page has it: below the diagonal, as pairs have no order."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in OURS) + " |", "|---" * (len(OURS) + 1) + "|"]
    for i, row in enumerate(OURS):
        cells = [SIGNS[pair(row, column).verdict] if j <= i else "" for j, column in enumerate(OURS)]
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reasons() -> str:
    """What the page says of the pairs that do not just work, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for (a, b), told in sorted(PAIRS.items()):
        if told.verdict != "works" and not (a in DRAWERS and b in DRAWERS):
            found.setdefault((told.verdict, told.why), []).append(f"`{a}` with `{b}`")
    return "\n".join(f"- {', '.join(names)}: {why}." for (_, why), names in found.items())


def test_every_pair_is_in_the_table():
    assert set(PAIRS) == set(combinations_with_replacement(sorted(OURS), 2)) and len(OURS) == 8
    assert {entry.name for entry in curricula if getattr(entry.cls, "draws", False)} >= set(DRAWERS)
    asks = {e.name for e in curricula if hasattr(e.cls, "candidates") and e.name in OURS}
    assert asks == set(REFINERS)


def test_the_page_shows_the_table_and_the_reasons():
    assert table() in PAGE, table()
    assert reasons() in PAGE, reasons()


def test_a_component_from_elsewhere_works_with_all():
    assert pair("mine", "uniform").verdict == "works"


def test_a_shuffled_filter_goes_with_what_the_filter_goes_with():
    for other in (Thompson(), Uniform()):
        said = [[*remarks((Uniform(), other, f))] for f in (DifficultyFilter(), Shuffled(of=DifficultyFilter()))]
        assert said[0] == said[1]


NEEDED = ["stages.1.prompt_value=model"]


@pytest.mark.parametrize(("a", "b"), list(combinations_with_replacement(sorted(OURS), 2)))
def test_a_recipe_with_a_pair_is_refused_warned_of_or_fine(tmp_path, a, b):
    path, told = write(tmp_path), pair(a, b)
    for first, second in dict.fromkeys(permutations((a, b))):
        ordered = second not in DRAWERS or first in DRAWERS or first not in REFINERS
        listed = f"{first}, {second}".replace("difficulty_filter", "{name: difficulty_filter, on_exhausted: short}")
        overrides = [f"stages.1.curricula=[{listed}]", *NEEDED]
        found = problems(path, overrides=tuple(overrides))
        if told.verdict == "refused" or not ordered:
            assert len(found) == 1 and found[0].startswith("--set stages.1.curricula=["), found
            assert "must be the first" in found[0] or told.why in found[0]
            continue
        assert found == []
        said = [str(w) for w in load([path], overrides).warnings if "does nothing" not in str(w)]
        assert len(said) == (told.verdict == "warns") and all(told.why in text for text in said), said
        assert all(text.startswith(f"--set {overrides[0]}: stages.1.curricula: '") for text in said)


def test_a_warning_names_the_line_and_is_no_reason_to_refuse(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text().replace("[uniform, difficulty_filter]", "[thompson, difficulty_filter]"))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "thompson" in text)
    (warning,) = load([path]).warnings
    assert str(warning).startswith(
        f"{path}:{line}: stages.1.curricula: 'thompson' with 'difficulty_filter': both look for"
    )
    shown = CliRunner().invoke(app, ["check", str(path)])
    assert shown.exit_code == 0 and f"warning: {path}:{line}: stages.1.curricula" in shown.output
    assert load([write(tmp_path, name="plain.yaml")]).warnings == []


def test_a_buffer_needs_a_filter_and_a_correction(tmp_path):
    path, buffer = write(tmp_path), "stages.1.curricula=[uniform, sample_buffer]"
    (warning,) = load([path], [buffer]).warnings
    assert "'sample_buffer' does nothing where no filter leaves a batch short" in str(warning)
    text = only(path, overrides=(buffer, "stages.1.algorithm.correction=null"))
    assert "'sample_buffer' trains on rollouts of an earlier policy" in text and "correction to 'tis'" in text
