"""What a recipe may do and hardly should: told with file and line when it is loaded."""

from pathlib import Path

import pytest

from alignment.recipe import load
from tests.recipes_for_tests import BASE, only, write

STAGE = "stages.1"
DYNAMIC = "difficulty_filter, low: 0, high: 1"


def advised(folder: Path, *overrides: str) -> list[str]:
    return [str(warning) for warning in load([write(folder)], list(overrides)).warnings]


def mixed(folder: Path, mixer: str, filtered: str) -> list[str]:
    chosen = f"{STAGE}.curricula=[uniform, {{name: {filtered}}}]"
    return advised(folder, chosen, f"{STAGE}.algorithm.mixer={{name: {mixer}}}")


@pytest.mark.parametrize("mixer", ["hpt", "hpt, gate_share: 0.1", "hpt, soft: [[1, 1, 0]]"])
def test_a_filter_that_leaves_a_mixer_nothing_to_imitate_is_told(tmp_path, mixer):
    (found,) = mixed(tmp_path, mixer, DYNAMIC)
    assert "stages.1.algorithm.mixer: 'difficulty_filter' drops the groups that all rollouts failed" in found
    assert "before 'hpt' sees them, and of no other would it show a demonstration" in found


@pytest.mark.parametrize("filtered", [DYNAMIC, "difficulty_filter, low: null, high: null, measure: reward"])
@pytest.mark.parametrize("mixer", ["luffy", "srft", "grao, statistics: all", "hpt, gate: 2"])
def test_a_filter_that_takes_some_of_its_prompts_from_a_mixer_is_told(tmp_path, mixer, filtered):
    (found,) = mixed(tmp_path, mixer, filtered)
    assert "so their demonstrations are never learned from" in found


def test_the_line_of_the_mixer_is_told(tmp_path):
    own = BASE.replace("advantage: grpo", "advantage: grpo\n      mixer: hpt")
    (found,) = load([path := write(tmp_path, own)]).warnings
    line = next(i for i, text in enumerate(own.splitlines(), 1) if "mixer" in text)
    assert str(found).startswith(f"{path}:{line}: stages.1.algorithm.mixer: 'difficulty_filter' drops")


@pytest.mark.parametrize(
    ("mixer", "filtered"),
    [
        ("hpt", "difficulty_filter, low: 0, high: 0.99, inclusive: true"),
        ("hpt", "shuffled, of: difficulty_filter"),
        ("hpt, soft: [[0, 1, 0], [1, 0.5, 0.5]]", DYNAMIC),
        ("grao", DYNAMIC),
        ("blend", DYNAMIC),
        ("amft", DYNAMIC),
        ("relift", DYNAMIC),
    ],
)
def test_of_a_mixer_that_loses_nothing_to_the_filter_nothing_is_told(tmp_path, mixer, filtered):
    assert mixed(tmp_path, mixer, filtered) == []


@pytest.mark.parametrize("options", ["gate: 4", "gate_share: 1", "soft: [[1, 0, 1]]"])
def test_a_gate_that_imitates_every_prompt_is_told(tmp_path, options):
    (found,) = advised(tmp_path, f"{STAGE}.curricula=[uniform]", f"{STAGE}.algorithm.mixer={{name: hpt, {options}}}")
    assert "stages.1.algorithm.mixer: 'hpt' imitates every prompt, however many of its 4 rollouts are solved" in found


@pytest.mark.parametrize("options", ["gate: 3", "gate_share: 0.99", "soft: [[4, 0.1, 1]]"])
def test_of_a_gate_that_some_groups_pass_nothing_is_told(tmp_path, options):
    chosen = f"{STAGE}.algorithm.mixer={{name: hpt, {options}}}"
    assert advised(tmp_path, f"{STAGE}.curricula=[uniform]", chosen) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("gate: 1, gate_share: 0.5", "'gate' would have no effect beside 'gate_share'"),
        ("gate: 1, soft: [[1, 1, 0]]", "'gate' would have no effect beside 'soft'"),
        ("gate_share: 0.5, gate: 1, soft: [[1, 1, 0]]", "'gate_share' and 'gate' would have no effect beside 'soft'"),
    ],
)
def test_one_gate_is_taken(tmp_path, options, message):
    chosen = f"{STAGE}.algorithm.mixer={{name: hpt, {options}}}"
    assert f"{message}; take one of them away" in only(write(tmp_path), overrides=(chosen,))


def test_the_rate_of_a_gradient_that_runs_do_not_have_is_told_and_bounded(tmp_path):
    chosen = f"{STAGE}.algorithm.mixer={{name: amft, meta_rate: %s}}"
    (found,) = advised(tmp_path, chosen % "0.5")
    assert "stages.1.algorithm.mixer.meta_rate: has no effect: no learner computes" in found
    assert advised(tmp_path, chosen % "1e-4") == []
    assert "meta_rate" in only(write(tmp_path), overrides=(chosen % "1e6",))


def test_a_filter_that_shall_stop_the_run_beside_what_fills_it_up_is_told(tmp_path):
    chosen = f"{STAGE}.curricula=[uniform, {{name: difficulty_filter, on_exhausted: %s}}, sample_buffer]"
    (found,) = advised(tmp_path, chosen % "error")
    assert "stages.1.curricula: 'difficulty_filter' has on_exhausted 'error', which has no effect" in found
    assert "beside 'sample_buffer'" in found
    assert advised(tmp_path, chosen % "short") == []


def exploring(folder: Path, share: float, after: str = "") -> list[str]:
    chosen = f"{STAGE}.curricula=[uniform, {{name: prompt_curriculum, explore_frac: {share}}}{after}]"
    return advised(folder, chosen, f"{STAGE}.prompt_value=model")


def test_a_share_to_explore_with_that_is_no_prompt_is_told(tmp_path):
    (found,) = exploring(tmp_path, 0.1)
    assert "stages.1.curricula: explore_frac 0.1 of 'prompt_curriculum' is less than one of the 8 prompts" in found
    assert found.endswith("set it to 0.125 or more")
    assert exploring(tmp_path, 0.125) == exploring(tmp_path, 0.0) == []
    assert not any("none explores" in text for text in exploring(tmp_path, 0.1, ", {name: thompson, oversample: 2}"))
