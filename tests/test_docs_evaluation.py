"""docs/evaluation.md: every command on the page runs, and the numbers it quotes are ours."""

import json
import re
from pathlib import Path

import pytest

import alignment
from alignment.evaluation.benchmarks import choose
from alignment.evaluation.statistics import interval, pass_at_k
from tests.evaluation.evaluated import ALPHABET, align, bpe_model, records, results
from tests.tiny import tiny

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
GSM8K = [
    {
        "question": f"Ann has {n} pears and buys {n + 1} more. How many has she?",
        "answer": f"{n}+{n + 1}\n#### {2 * n + 1}",
    }
    for n in range(2, 8)
]
CAPITALS = [{"country": "France", "capital": "Paris"}, {"country": "Kenya", "capital": "Nairobi"}]


def blocks(language):
    """Blocks of code of the page, and what stands behind the language."""
    return re.findall(rf"```{language}([^\n]*)\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the page's commands name, in which they all were run; and what each printed."""
    folder = tmp_path_factory.mktemp("page")
    alphabet = {"model": {"build": {"alphabet": ALPHABET}}, "stages": {0: {"steps": 2}, 1: {"steps": 2}}}
    alignment.train(tiny(folder, {"run": {"name": "quickstart"}, **alphabet}))
    bpe_model(folder / "my_model", [row["question"] for row in GSM8K])
    bpe_model(folder / "my_other_model", [row["question"] for row in GSM8K], seed=1)
    for name, rows in (("gsm8k_test", GSM8K), ("capitals", CAPITALS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for attributes, code in blocks("python"):
        (folder / attributes.removeprefix(" file=")).write_text(code)
    commands = [line for _, code in blocks("console") for line in code.splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shown = {line: align(*line.removeprefix("align ").split()) for line in commands}
    return folder, shown


def test_every_command_of_the_page_runs(place):
    _, shown = place
    assert len(shown) == 7
    for line, result in shown.items():
        assert result.exit_code == 0, f"{line}\n{result.output}"
        assert "score" in result.stdout or "wins" in result.stdout


def test_the_commands_did_what_the_page_says(place):
    folder, _ = place
    own = results(folder / "evaluations" / "quickstart@best")["tasks"]
    assert list(own) == ["arithmetic", "gcd"] and own["gcd"]["samples"] == 4
    measured = results(folder / "evaluations" / "my_model")["tasks"]
    assert list(measured) == ["gsm8k", "capitals"], "tasks may be added"
    assert measured["gsm8k"]["chat"] and measured["gsm8k"]["data"]["problems"] == len(GSM8K)
    prompts = [line["prompt"][0]["content"] for line in records(folder / "evaluations" / "my_model", "capitals")]
    assert prompts == ["The capital of France is", "The capital of Kenya is"]


def test_the_table_of_benchmarks_is_that_of_the_definitions():
    for name in ("gsm8k", "math500", "olympiadbench"):
        (one,) = choose([name])
        (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, flags=re.MULTILINE)
        assert one.resolved()["source"]["path"] in row
    (gsm8k,), (math500,), (gcd,) = (choose([name]) for name in ("gsm8k", "math500", "gcd"))
    for one, told in ((gsm8k, "1, greedy, 1,024 tokens"), (gcd, "1, greedy, 128 tokens")):
        assert told == f"{one.samples}, greedy, {one.sampling.max_tokens:,} tokens" and told in PAGE
    told = f"temperature {math500.sampling.temperature}, top-p {math500.sampling.top_p}, "
    assert f"{math500.samples}, {told}{math500.sampling.max_tokens:,} tokens" in PAGE


def test_the_numbers_of_the_page():
    assert pass_at_k(16, 1, 16) == 1 and round(1 - (15 / 16) ** 16, 2) == 0.64
    low, high = interval([1.0] * 30)
    assert (round(100 * low), round(100 * high)) == (89, 100)


def test_options_of_the_page_are_options_of_the_command():
    known = set(re.findall(r"--[a-z][a-z-]+", align("eval", "--help").output))
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= known
