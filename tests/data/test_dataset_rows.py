"""Rows of other projects become ours: field maps, layouts, templates, chat messages, preferences."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.data.files import DatasetSource
from alignment.data.rows import Columns, fill
from alignment.data.sources import sources
from alignment.errors import UserError
from alignment.types import prompt_key

QUESTION = "What is 6 times 7?"
USER, ANSWER = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "42"}
SYSTEM = {"role": "system", "content": "Be brief."}


def made(raw: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The row that ``raw`` becomes."""
    row, faults = Columns(**options).row(raw)
    assert not faults, faults
    return row


def wrong(raw: dict[str, Any], **options: Any) -> str:
    """What is wrong with it."""
    _, faults = Columns(**options).row(raw)
    return "; ".join(faults)


def test_dots_reach_into_nested_columns_and_leave_them_there():
    raw = {"a": {"b": [{"c": QUESTION}], "gold": 42}, "x.y": "flat", "other": 1}
    fields = {"prompt": "a.b.0.c", "answer": "a.gold", "flat": "x.y"}
    assert made(raw, field_map=fields) == {
        "a": raw["a"],
        "other": 1,
        "prompt": QUESTION,
        "answer": 42,
        "flat": "flat",
    }
    for path in ("a.b.1.c", "a.b.c", "a.none", "x.z", "other.deep"):
        assert wrong(raw, field_map={"prompt": path}) == f"has no {path!r} (field_map.prompt)"


def test_one_column_may_serve_twice():
    raw = {"question": QUESTION, "answer": "42"}
    fields = {"prompt": "question", "completion": "answer", "answer": "answer"}
    assert made(raw, field_map=fields) == {"prompt": QUESTION, "completion": "42", "answer": "42"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{question}\nPut your final answer within \\boxed{}.",
            f"{QUESTION}\nPut your final answer within \\boxed{{}}.",
        ),
        ("{question} {{question}} {2} { question } {", f"{QUESTION} {{question}} {{2}} {{ question }} {{"),
        ("{{{question}}}", f"{{{QUESTION}}}"),
        ("{about.level}: {about.hints.0}", "3: try"),
    ],
)
def test_templates(template, text):
    raw = {"question": QUESTION, "about": {"level": 3, "hints": ["try"]}}
    assert made(raw, template=template) == {**raw, "prompt": text}


@given(st.text().filter(lambda s: "{" not in s and "}" not in s), st.text())
def test_a_template_neither_reads_nor_changes_what_it_puts_in(around, value):
    assert fill(around + "{x}" + around, {"x": value}) == (around + value + around, [])
    assert fill("{{x}}" + around, {"x": value}) == ("{x}" + around, [])


def test_a_template_sees_our_columns_first_and_wraps_a_prompt():
    assert made({"q": "a", "prompt": "b"}, template="<{prompt}>", field_map={"prompt": "q"})["prompt"] == "<a>"
    assert made({"prompt": "b"}, template="<{prompt}>") == {"prompt": "<b>"}
    assert "has no 'boxed', which the template" in wrong({"q": "a"}, template="{q} \\x{boxed}")
    assert (
        wrong({"q": None}, template="{q}") == "'q' must be text or a number to stand in the template 'prompt', not null"
    )
    assert "not a list" in wrong({"q": ["a"]}, template="{q}") and "not true or false" in wrong(
        {"q": True}, template="{q}"
    )


def test_a_template_without_a_column_is_a_mistake():
    with pytest.raises(UserError, match="names no column"):
        DatasetSource("x.jsonl", prompt="Solve it within \\boxed{}.")


def test_text_becomes_a_user_message_and_messages_stay():
    assert made({"prompt": QUESTION}, chat=True) == {"prompt": [USER]}
    assert made({"prompt": [USER]}, chat=True) == {"prompt": [USER]}
    assert made({"q": QUESTION}, template="{q}", chat=True, system="Be brief.")["prompt"] == [SYSTEM, USER]
    own = [{"role": "system", "content": "Sing."}, USER]
    assert made({"prompt": own}, system="Be brief.") == {"prompt": own}
    assert "set chat: true" in wrong({"prompt": QUESTION}, system="Be brief.")


def test_nulls_that_a_table_adds_to_messages_are_no_content():
    message = {**USER, "name": None, "tool_calls": None}
    assert made({"prompt": [message]}) == {"prompt": [USER]}
    assert prompt_key(made({"prompt": [message]})["prompt"]) == prompt_key([USER])


def test_a_dialogue_that_ends_with_an_answer_is_a_demonstration():
    assert made({"messages": [SYSTEM, USER, ANSWER]}, field_map={"prompt": "messages"}) == {
        "prompt": [SYSTEM, USER],
        "completion": "42",
    }
    assert made({"prompt": [USER], "completion": [ANSWER]}) == {"prompt": [USER], "completion": "42"}
    assert made({"prompt": [USER], "completion": [USER, ANSWER]}) == {"prompt": [USER], "completion": "42"}
    assert "ends with a message of the 'user'" in wrong({"prompt": [USER], "completion": [ANSWER, USER]})


def test_a_whole_dialogue_is_a_prompt_and_what_follows():
    later = {"role": "user", "content": "Sure?"}
    dialogue = [SYSTEM, USER, ANSWER, later, ANSWER]
    whole = {"prompt": [SYSTEM, USER], "completion": [ANSWER, later, ANSWER], "level": 1}
    assert made({"messages": dialogue, "level": 1}) == whole
    assert made({"prompt": [SYSTEM, USER], "completion": dialogue, "level": 1}) == whole
    assert made({"messages": [USER, {**ANSWER, "name": None}]}) == {"prompt": [USER], "completion": "42"}
    assert made({"messages": [SYSTEM, USER]}) == {"prompt": [SYSTEM, USER]}, "a prompt to answer"
    assert made({"messages": dialogue, "prompt": "Hi"}) == {"messages": dialogue, "prompt": "Hi"}, "another column"
    assert "the first is not the assistant's" in wrong({"messages": [ANSWER, USER]})
    assert "the first is not the assistant's" in wrong({"messages": [{"role": "user"}]})
    assert "'prompt' is text; set chat: true" in wrong({"prompt": "Hi", "completion": [ANSWER, later, ANSWER]})
    assert "after the prompt comes the assistant's" in wrong({"prompt": [USER], "completion": [later, ANSWER]})


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [
        {"role": "user", "content": f'{QUESTION} Let\'s think step by step and output the final answer after "####".'}
    ],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 0, "answer": "6 * 7 = 42\n#### 42", "question": QUESTION},
}


def parquet(folder: Path, rows: list[dict[str, Any]], schema: Any = None) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / "rows.parquet")
    return folder / "rows.parquet"


def test_verl_parquet(tmp_path):
    text, number = pyarrow.string(), pyarrow.int64()
    message = pyarrow.struct([("content", text), ("role", text)])
    about = pyarrow.struct([("split", text), ("index", number), ("answer", text), ("question", text)])
    schema = pyarrow.schema(
        [
            ("data_source", text),
            ("prompt", pyarrow.list_(message)),
            ("ability", text),
            ("reward_model", pyarrow.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", about),
        ]
    )
    path = parquet(tmp_path, [VERL, VERL | {"prompt": [SYSTEM, USER]}], schema)
    found = sources.build({"name": "dataset", "path": "rows.parquet", "layout": "verl"}).load(tmp_path)
    assert [dict(p.row) for p in found.prompts] == [
        VERL | {"answer": "42"},
        VERL | {"answer": "42", "prompt": [SYSTEM, USER]},
    ]
    assert found.prompts[1].origin == f"{path}: row 2"
    demonstrations = {"prompt": "extra_info.question", "completion": "extra_info.answer"}
    (first, _) = (
        DatasetSource("rows.parquet", layout="verl", field_map=demonstrations, chat=True).load(tmp_path).prompts
    )
    assert first.row["prompt"] == [USER] and first.row["completion"] == "6 * 7 = 42\n#### 42"
    assert first.row["answer"] == "42"


def test_verl_written_by_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame([VERL, VERL]).to_parquet(tmp_path / "rows.parquet")
    found = DatasetSource("rows.parquet", layout="verl").load(tmp_path)
    assert [p.row["answer"] for p in found.prompts] == ["42", "42"]
    assert json.loads(json.dumps(found.prompts[0].row)) == VERL | {"answer": "42"}


def test_verl_without_a_gold_answer_is_named():
    assert "'answer' is null" in wrong(VERL | {"reward_model": {"style": "model", "ground_truth": None}}, layout="verl")


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        ({"input": QUESTION, "label": "42"}, {"prompt": QUESTION, "answer": "42"}),
        ({"context_messages": [USER], "datasource": "a"}, {"prompt": [USER], "datasource": "a"}),
        ({"prompt": QUESTION, "label": 42}, {"prompt": QUESTION, "answer": 42}),
        ({"input": None, "context_messages": [USER]}, {"prompt": [USER], "input": None}),
        ({"input": QUESTION, "output": "42"}, {"prompt": QUESTION, "completion": "42"}),
        ({"input": [USER], "output": [ANSWER]}, {"prompt": [USER], "completion": "42"}),
        ({"input": [USER, ANSWER]}, {"prompt": [USER], "completion": "42"}),
        (
            {"prompt": QUESTION, "chosen": "42", "rejected": "41"},
            {"prompt": QUESTION, "chosen": "42", "rejected": "41"},
        ),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "41"}], "margin": 2},
            {"prompt": [USER], "chosen": "42", "rejected": "41", "margin": 2},
        ),
    ],
)
def test_openrlhf_rows(raw, row):
    assert made(raw, layout="openrlhf") == row


def test_a_field_map_goes_over_a_layout():
    raw = {"input": "ignored", "question": QUESTION, "label": "42"}
    assert made(raw, layout="openrlhf", field_map={"prompt": "question"}) == {
        "input": "ignored",
        "prompt": QUESTION,
        "answer": "42",
    }


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_without_a_prompt_what_both_sides_begin_with_is_the_prompt():
    earlier = [USER, assistant("Seven?"), {"role": "user", "content": "No."}]
    raw = {"chosen": [*earlier, assistant("42")], "rejected": [*earlier, assistant("41")]}
    assert made(raw) == {"prompt": earlier, "chosen": "42", "rejected": "41"}
    text = "\n\nHuman: 6 times 7?\n\nAssistant:"
    assert made({"chosen": f"{text} 42", "rejected": f"{text} 40 or so"}) == {
        "prompt": text,
        "chosen": " 42",
        "rejected": " 40 or so",
    }


def test_a_side_that_repeats_the_prompt_is_what_follows_it():
    raw = {"prompt": QUESTION, "chosen": [USER, assistant("42")], "rejected": [USER, assistant("41")]}
    expected = {"prompt": [USER], "chosen": "42", "rejected": "41"}
    assert made(raw, chat=True) == expected
    assert made(raw, chat=True, system="Be brief.") == expected | {"prompt": [SYSTEM, USER]}
    turns = [assistant("Let me see."), {"role": "user", "content": "Well?"}, assistant("42")]
    assert made({"prompt": [USER], "chosen": turns, "rejected": "No."})["chosen"] == turns


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"prompt": QUESTION, "chosen": "42", "rejected": "42"}, "'chosen' and 'rejected' are equal"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": "42"}, "'chosen' and 'rejected' are equal"),
        ({"prompt": QUESTION, "chosen": "42"}, "has 'chosen' alone"),
        ({"prompt": QUESTION, "chosen": "", "rejected": "41"}, "'chosen' must be text or a list of messages"),
        ({"prompt": QUESTION, "chosen": [ANSWER, USER], "rejected": "41"}, "'prompt' is text; set chat: true"),
        ({"prompt": [USER], "chosen": [SYSTEM, ANSWER], "rejected": "41"}, "goes on with a message of the 'system'"),
        ({"chosen": "a", "rejected": "b"}, "has no 'prompt'"),
        ({"chosen": [ANSWER], "rejected": [assistant("41")]}, "has no 'prompt'"),
    ],
)
def test_preferences_that_are_none(raw, said):
    assert said in wrong(raw)
