"""`align eval --compare A B`: two evaluations, problem by problem."""

import json
import shutil
from dataclasses import asdict

import pytest

from alignment.errors import UserError
from alignment.evaluation.compare import compare_folders
from alignment.evaluation.statistics import compare
from tests.evaluation.evaluated import align, character_model, results

ARGUMENTS = ("--max-tokens", 4, "--samples", 4, "--temperature", 1.0)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Evaluations of two models; the second saw more problems of gcd, and another task."""
    folder = tmp_path_factory.mktemp("two")
    for name, seed, limit, tasks in (("a", 0, 20, "gcd,counting"), ("b", 1, 30, "gcd,reversal")):
        model = character_model(folder / f"model_{name}", seed=seed)
        arguments = ("--tasks", tasks, "--limit", limit, *ARGUMENTS, "--output", folder / name)
        assert align("eval", model, *arguments).exit_code == 0
    return folder / "a", folder / "b"


def judged(folder, verdicts):
    """Replaces the verdicts of the task gcd: so many of each problem's samples are right."""
    path = folder / "gcd" / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        right = verdicts(line["problem"])
        for number, sample in enumerate(line["samples"]):
            sample["correct"] = None if right is None else number < right
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [line["problem"] for line in lines]


def test_problems_are_paired_and_the_others_counted(two):
    shared = judged(two[0], lambda problem: 1)
    judged(two[1], lambda problem: (3 if problem != shared[0] else None) if problem in shared else 0)
    found = compare_folders(*two)
    assert list(found["tasks"]) == ["gcd"]
    gcd = found["tasks"]["gcd"]
    assert (gcd["problems"], gcd["only_a"], gcd["only_b"]) == (19, 1, 10)
    assert (gcd["a"], gcd["b"], gcd["difference"]) == (0.25, 0.75, 0.5)
    assert (gcd["wins"], gcd["ties"], gcd["losses"]) == (19, 0, 0) and gcd["p"] < 1e-3
    assert gcd == {**asdict(compare([0.25] * 19, [0.75] * 19)), "only_a": 1, "only_b": 10}
    assert any("the data is not the same" in note for note in found["notes"])
    assert any("11 problems have a verdict in one evaluation only" in note for note in found["notes"])
    assert [note for note in found["notes"] if "only" in note][:2] == [
        f"counting is in {two[0]} only",
        f"reversal is in {two[1]} only",
    ]
    assert found["a"]["checkpoint"].endswith("model_a")


def test_it_is_printed_as_a_table_and_as_json(two):
    shown = align("eval", "--compare", *two)
    assert shown.exit_code == 0 and f"A: {results(two[0])['checkpoint']['address']} in {two[0]}" in shown.stdout
    assert "wins" in shown.stdout and "note: counting is in" in shown.stdout
    found = json.loads(align("eval", "--compare", *two, "--json").stdout)
    assert found == json.loads(json.dumps(compare_folders(*two)))


def test_what_would_not_be_the_checkpoints_is_refused(two, tmp_path):
    for change, message in (
        (("gcd", "chat", True), "chat: False in A, True in B"),
        (("gcd", "reward", {"name": "numeric_match"}), "reward: {'name': 'exact_match'"),
    ):
        other = copied(two[1], tmp_path / change[1], change)
        with pytest.raises(UserError, match="gcd was put to the two in different ways") as refused:
            compare_folders(two[0], other)
        assert message in str(refused.value)
    other = copied(two[1], tmp_path / "sampled", ("gcd", "samples", 8))
    assert "gcd: samples differ: 4 in A, 8 in B" in compare_folders(two[0], other)["notes"]


def copied(folder, target, change):
    """An evaluation with another value in its config."""
    shutil.copytree(folder, target)
    found = results(target)
    task, key, value = change
    found["tasks"][task][key] = value
    (target / "results.json").write_text(json.dumps(found))
    return target


def test_mistakes(two, tmp_path):
    none = align("eval", "--compare", two[0], tmp_path)
    assert none.exit_code == 2 and f"{tmp_path} holds no evaluation" in none.stderr
    both = align("eval", "model", "--compare", *two)
    assert both.exit_code == 2 and "leave model out" in both.stderr
    model = character_model(tmp_path / "model")
    assert (
        align("eval", model, "--tasks", "sorting", "--limit", 2, *ARGUMENTS, "--output", tmp_path / "c").exit_code == 0
    )
    apart = align("eval", "--compare", two[0], tmp_path / "c")
    assert apart.exit_code == 2 and "no task in common" in apart.stderr
    (tmp_path / "c" / "results.json").unlink()
    assert "no task of" in align("eval", "--compare", two[0], tmp_path / "c").stderr
