"""What a run makes of its data: bad rows, over-long prompts, demonstrations, preferences, and what it says of them."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import alignment
from alignment.data.load import LoadedData, accepted, load_data, read_section
from alignment.data.sources import describe
from alignment.errors import UserError
from alignment.models import encode_prompt, encode_prompts, load_model
from alignment.plan import make_plan
from alignment.recipe import Recipe, load
from alignment.recipe_sections import Build, ModelConfig
from alignment.recipe_tree import RecipeError
from alignment.scoring import Scorer
from tests.tiny import RECIPE, merged

SOUND = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]


def file(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> dict[str, str]:
    """A source that reads ``rows``; texts are lines as they stand."""
    (folder / name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return {"name": "dataset", "path": name}


def tiny(folder: Path, change: dict[str, Any]) -> Recipe:
    """The tiny recipe; a source in ``change`` takes the place of another whole."""
    values = merged(RECIPE, {"run": {"output": str(folder / "runs")}, **change, "data": {}})
    values["data"] |= change.get("data", {})
    with (folder / "tiny.yaml").open("w") as stream:
        YAML().dump(json.loads(json.dumps(values)), stream)
    return load([folder / "tiny.yaml"])


def loaded(folder: Path, change: dict[str, Any]) -> LoadedData:
    recipe = tiny(folder, change)
    with Scorer.from_recipe(recipe) as scorer:
        return load_data(recipe, load_model(recipe.model, 0), scorer)


def section(folder: Path, rows: list[Any], **data: Any) -> tuple[LoadedData, dict[str, Any]]:
    """The data with ``rows`` to train on, and the report about them."""
    found = loaded(folder, {"data": {"train": file(folder, rows), **data}})
    return found, dict(found.report["train"])


def test_what_is_said_of_a_section(tmp_path):
    rows = [*SOUND[:3], SOUND[0], {"prompt": "9+9+9=", "answer": "27"}]
    found, report = section(tmp_path, rows, max_prompt_tokens=5)
    content = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    assert report == {
        "origin": f"{tmp_path}/rows.jsonl",
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "rows": 5,
        "used": 4,
        "bad": 0,
        "bad_rows": [],
        "over_long": 1,
        "distinct": 3,
        "floor": 0.5,
    }
    assert [p.row["prompt"] for p in found.train] == ["0+0=", "0+1=", "0+2=", "0+0="]
    assert found.report["eval"]["over_long"] == 0 and len(found.held_out) == found.report["eval"]["used"] == 6


def test_the_digest_tells_other_rows_and_another_order(tmp_path):
    digests = [section(tmp_path, rows)[1]["sha256"] for rows in (SOUND[:2], SOUND[1::-1], SOUND[:3], SOUND[:2])]
    assert len(set(digests[:3])) == 3 and digests[3] == digests[0]


def test_prompts_that_are_all_too_long_are_an_error(tmp_path):
    with pytest.raises(
        UserError,
        match=r"data.train: all 100 prompts have more than data.max_prompt_tokens \(3\) tokens; the shortest has 4",
    ):
        section(tmp_path, SOUND, max_prompt_tokens=3)


def test_every_section_leaves_out_its_over_long_prompts(tmp_path):
    long = {"prompt": "1+1+1+1=", "answer": "4", "completion": "4", "chosen": "4", "rejected": "3"}
    short = {"prompt": "1+1=", "answer": "2", "completion": "2", "chosen": "2", "rejected": "3"}
    source = file(tmp_path, [long, short])
    names = ("train", "eval", "demonstrations", "preferences")
    found = loaded(tmp_path, {"data": {**dict.fromkeys(names, source), "max_prompt_tokens": 5}})
    assert {name: found.report[name]["over_long"] for name in names} == dict.fromkeys(names, 1)
    for prompts in (found.train, found.held_out):
        assert [p.row["prompt"] for p in prompts] == ["1+1="]
    assert len(found.demonstrations) == len(found.preferences) == 1


def test_bad_rows_are_named_by_line_and_section(tmp_path):
    rows = [*SOUND[:5], {"prompt": "1+x=", "answer": "?"}, "{oops", {"prompt": ""}]
    with pytest.raises(UserError) as caught:
        section(tmp_path, rows)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "data.train: 3 of 8 rows cannot be used; mend or remove them, or set data.on_bad_row: skip (for at most 1% of "
        "the rows):"
    )
    places = [line.split(": ")[0].removeprefix(f"{tmp_path}/") for line in lines[1:]]
    assert places == ["rows.jsonl:7", "rows.jsonl:8", "rows.jsonl:6"]
    assert "does not know 'x'" in lines[3]


def test_one_percent_may_be_skipped_and_no_more(tmp_path, caplog):
    rows = [*SOUND, *SOUND, "{oops", {"prompt": "1+x=", "answer": "?"}]
    with pytest.raises(
        UserError, match="2 of 198 rows cannot be used; more than the 1% that data.on_bad_row: skip leav"
    ):
        section(tmp_path, rows[4:], on_bad_row="skip")
    with caplog.at_level(logging.WARNING):
        found, report = section(tmp_path, rows, on_bad_row="skip")
    assert (report["rows"], report["used"], report["bad"], len(found.train)) == (202, 200, 2, 200)
    assert report["bad_rows"][0].startswith(f"{tmp_path}/rows.jsonl:201: not JSON")
    assert report["bad_rows"][1].startswith(f"{tmp_path}/rows.jsonl:202: the model does not know 'x'")
    assert "data.train: 202 rows from" in caplog.text and "2 bad rows skipped, the first: " in caplog.text


REWARDS = """\
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.reward_registry import reward_functions


@reward_functions.register("{name}", source="this test")
@dataclass(frozen=True)
class Strict:
    \"\"\"Reads only answers that are numbers.\"\"\"

    def __call__(self, prompts, completions, *, answer, **columns):
        return [float(c == a) for c, a in zip(completions, answer)]

    def check(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[str | None]:
        return [None if row["answer"].isdigit() else "the answer " + row["answer"] + " is no number" for row in rows]
"""


def test_rows_that_a_reward_cannot_use_are_bad(tmp_path):
    (tmp_path / "strict_rows_reward.py").write_text(REWARDS.format(name="strict_rows"))
    change = {"plugins": ["strict_rows_reward"], "rewards": ["strict_rows"]}
    data = {"train": file(tmp_path, [*SOUND, {"prompt": "1+2=", "answer": "three"}])}
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, {**change, "data": data})
    assert str(caught.value).startswith("data.train: 1 of 101 rows cannot be used; ")
    assert f"{tmp_path}/rows.jsonl:101: reward 'strict_rows': the answer three is no number" in str(caught.value)
    found = loaded(tmp_path, {**change, "data": {**data, "on_bad_row": "skip"}})
    assert len(found.train) == 100 and found.report["train"]["bad"] == 1


def test_a_column_that_a_reward_needs_and_the_data_lacks(tmp_path):
    with pytest.raises(UserError, match="needs the column 'answer', which the data set lacks"):
        section(tmp_path, [{"prompt": "1+1="}])


def test_a_row_without_the_column_that_others_have_is_a_bad_row(tmp_path):
    with pytest.raises(UserError) as caught:
        section(tmp_path, [SOUND[0], {"prompt": "1+1="}])
    said = (
        f"{tmp_path}/rows.jsonl:2: reward 'exact_match' needs the column 'answer', which the row lacks; it has prompt"
    )
    assert str(caught.value).splitlines()[1:] == [said]


def test_demonstrations_meet_the_prompts_of_another_file(tmp_path):
    shown = [
        {"question": "0+1=", "id": "first", "solution": "1"},
        {"question": "5+5=", "id": "second", "solution": "10"},
        {"question": "0+1=", "id": "third", "solution": "01"},
    ]
    source = {**file(tmp_path, shown, "shown.jsonl"), "field_map": {"prompt": "question", "completion": "solution"}}
    found, _ = section(tmp_path, SOUND[:3], demonstrations=source)
    met = {p.row["prompt"]: [r.text for r in found.demonstrations.get(p.key, ())] for p in found.train}
    assert met == {"0+0=": [], "0+1=": ["1", "01"], "0+2=": []}
    (rollout, _) = found.demonstrations[found.train[1].key]
    assert (rollout.id, rollout.prompt_id) == ("demonstration/first", "first")
    tokenizer = load_model(tiny(tmp_path, {}).model, 0).tokenizer
    assert tokenizer.decode(rollout.prompt_ids) == "0+1=" and rollout.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(rollout.token_ids[:-1]) == "1" and all(rollout.loss_mask)


def test_preferences_are_pairs_of_rollouts(tmp_path):
    rows = [
        {"prompt": "0+1=", "chosen": "1", "rejected": "2"},
        {"prompt": "0+1=", "chosen": "1", "rejected": "10", "chosen_score": 1, "rejected_score": -0.5},
        {"prompt": "5+5=", "chosen": "10", "rejected": "55"},
    ]
    found, _ = section(tmp_path, SOUND[:3], preferences=file(tmp_path, rows, "pairs.jsonl"))
    texts = [[r.text for r in pair.rollouts] for pair in found.preferences]
    assert texts == [["1", "2"], ["1", "10"], ["10", "55"]] and found.report["preferences"]["rows"] == 3
    assert [[r.reward for r in pair.rollouts] for pair in found.preferences[:2]] == [[None, None], [1, -0.5]]
    assert [pair.uid for pair in found.preferences] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "said"),
    [("demonstrations", "no row has 'completion'"), ("preferences", "no row has 'chosen' and 'rejected'")],
)
def test_a_section_that_lacks_its_column(tmp_path, name, said):
    with pytest.raises(UserError, match=f"data.{name}: {said}; the columns of the first are prompt, answer: name the"):
        loaded(tmp_path, {"data": {name: file(tmp_path, SOUND)}})


def test_one_row_without_the_column_is_a_bad_row(tmp_path):
    recipe = tiny(
        tmp_path, {"data": {"demonstrations": file(tmp_path, [{"prompt": "1", "completion": "2"}, SOUND[0]])}}
    )
    found = read_section(recipe, "demonstrations")
    assert found is not None and found.bad == (f"{tmp_path}/rows.jsonl:2: has no 'completion'",)
    with pytest.raises(UserError, match=r"data.demonstrations: 1 of 2 rows cannot be used"):
        accepted(found, "error")


def test_messages_without_a_chat_template_are_said_once(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}] * 3
    with pytest.raises(UserError, match="data.train: the prompt is a list of chat messages, but the tokenizer has no"):
        section(tmp_path, rows)


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != loop.first %}{{ raise_exception('first the user') }}{% endif %}"
    "{{ '+' + m.content }}{% endfor %}{{ '=' }}"
)


def test_many_prompts_are_encoded_as_each_is():
    tokenizer = load_model(ModelConfig(build=Build(alphabet="0123456789+=")), 0).tokenizer
    tokenizer.chat_template = ALTERNATE
    chats = [[{"role": "user", "content": text}] for text in ("1", "22", "333")]
    mixed = ["1+1=", chats[0], "", chats[1], "2+2=", chats[2]]
    assert encode_prompts(tokenizer, mixed) == [encode_prompt(tokenizer, prompt) for prompt in mixed]
    assert encode_prompts(tokenizer, [chats[1]]) == encode_prompts(tokenizer, ["+22="])
    assert encode_prompts(tokenizer, []) == []
    with pytest.raises(UserError, match="does not know 'x'"):
        encode_prompts(tokenizer, ["1", "x"])


def test_a_row_that_the_chat_template_refuses_is_a_bad_row(tmp_path):
    good, bad = ([{"role": role, "content": "1"}] for role in ("user", "system"))
    rows = [{"prompt": prompt, "answer": "2"} for prompt in (good, bad)]
    recipe = tiny(tmp_path, {"data": {"train": file(tmp_path, rows)}})
    model = load_model(recipe.model, 0)
    model.tokenizer.chat_template = ALTERNATE
    with Scorer.from_recipe(recipe) as scorer, pytest.raises(UserError) as caught:
        load_data(recipe, model, scorer)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"{tmp_path}/rows.jsonl:2: the tokenizer's chat template cannot ren")
    assert "first the user" in lines[1]


def test_a_run_keeps_the_report(tmp_path):
    rows = [*SOUND, *SOUND, "{oops", {"prompt": "1+1+1+1+1=", "answer": "5"}]
    result = alignment.train(tiny(tmp_path, {"data": {"train": file(tmp_path, rows), "on_bad_row": "skip"}}))
    report = result["data"]["train"]
    assert (report["rows"], report["used"], report["bad"], report["over_long"]) == (202, 200, 1, 1)
    assert result["data"] == json.loads(Path(result["folder"], "result.json").read_text())["data"]
    assert set(result["data"]) == {"train", "demonstrations", "eval"}


def test_check_shows_the_sections_and_names_bad_rows_at_the_recipes_line(tmp_path):
    rows = [*SOUND, *SOUND, "{oops", {"prompt": "1+1+1+1+1=", "answer": "5"}]
    change = {"data": {"train": file(tmp_path, rows)}}
    with pytest.raises(RecipeError) as caught:
        make_plan(tiny(tmp_path, change))
    (problem,) = caught.value.problems
    assert problem.place == ("data", "train") and f"{tmp_path}/tiny.yaml:" in str(problem)
    assert "1 of 202 rows cannot be used" in problem.message and "rows.jsonl:201: not JSON" in problem.message
    assert not problem.message.startswith("data.train")
    plan = make_plan(tiny(tmp_path, {"data": {**change["data"], "on_bad_row": "skip"}}))
    assert plan.data["train"] == loaded(tmp_path, {"data": {**change["data"], "on_bad_row": "skip"}}).report["train"]


COUNTS = {
    "gsm8k/train.jsonl": ({"prompt": "question"}, 7473),
    "gsm8k/test.jsonl": ({"prompt": "question"}, 1319),
    "math500/test.jsonl": ({"prompt": "problem"}, 500),
    "olympiadbench/test.jsonl": ({"prompt": "question", "answer": "final_answer.0"}, 675),
    "humaneval/HumanEval.jsonl.gz": ({}, 164),
    "ifeval/input_data.jsonl": ({"id": "key"}, 541),
}


@pytest.mark.parametrize("path", COUNTS)
def test_public_files_load_through_a_recipe(real_data, tmp_path, path):
    fields, count = COUNTS[path]
    source = {"name": "dataset", "path": str(real_data / path), "field_map": fields}
    found = read_section(tiny(tmp_path, {"data": {"train": source}}), "train")
    assert found is not None and len(found.prompts) == found.rows == count and not found.bad
    assert len({p.id for p in found.prompts}) == count
    assert describe(found.prompts)["distinct"] == len({p.key for p in found.prompts}) <= count
