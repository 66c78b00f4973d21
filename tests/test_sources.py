"""Sources: splits never share a problem; files are read strictly, and every bad row is named."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alignment.dataset_source import Jsonl
from alignment.errors import UserError
from alignment.procedural import Arithmetic
from alignment.sources import Source, describe, sources
from alignment.tasks.arithmetic import Problem, problems

HERE = Path()
SPLITS = ("train", "demonstrations", "eval")


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_both_sources_are_selectable_by_name():
    assert sources.names() == ["arithmetic", "jsonl"]
    assert all(isinstance(sources.build({"name": "arithmetic", "split": s}), Source) for s in SPLITS)


@pytest.mark.parametrize(("text", "answer"), [((12, "+", 3), "15"), ((3, "-", 12), "-9"), ((0, "*", 7), "0")])
def test_answers_are_right(text, answer):
    problem = Problem(*text)
    assert problem.text == "".join(map(str, text)) + "="
    assert problem.answer == answer


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(5, 20), st.integers(5, 20))
def test_splits_are_disjoint_whatever_the_seeds_and_ranges(seed_a, seed_b, seed_c, max_a, max_b):
    train = {p.text for p in problems(("+", "-"), max_a, "train", seed_a)}
    demonstrations = {p.text for p in problems(("-", "+"), max_b, "demonstrations", seed_b)}
    held_out = {p.text for p in problems(("+", "-", "*"), max_a, "eval", seed_c)}
    assert not train & held_out and not demonstrations & held_out and not train & demonstrations


def test_splits_together_are_all_problems_and_each_is_large_enough():
    loaded = {split: Arithmetic(split, max_operand=49).load(HERE).prompts for split in SPLITS}
    assert sum(map(len, loaded.values())) == 50 * 50
    assert len({p.id for rows in loaded.values() for p in rows}) == 50 * 50
    assert len(loaded["demonstrations"]) >= 400 and len(loaded["eval"]) >= 400 and len(loaded["train"]) >= 1200


def test_a_sum_and_its_mirror_image_share_a_split_and_a_difference_need_not():
    assert all(Problem(a, "+", b).split == Problem(b, "+", a).split for a in range(30) for b in range(30))
    assert any(Problem(a, "-", b).split != Problem(b, "-", a).split for a in range(30) for b in range(30))


def test_the_seed_chooses_and_orders_and_nothing_else_does():
    first, again, other = (Arithmetic("train", size=100, seed=s).load(HERE).prompts for s in (0, 0, 1))
    assert first == again
    assert {p.id for p in first} != {p.id for p in other}
    assert Arithmetic("train", size=40).load(HERE).prompts == first[:40]


def test_this_split_is_the_same_on_every_machine():
    rows = Arithmetic("eval", size=3).load(HERE).prompts
    assert [p.row["prompt"] for p in rows] == ["29+20=", "13+17=", "19+32="]


def test_asking_for_more_problems_than_there_are_says_how_many_there_are():
    there = len(Arithmetic("eval", max_operand=9).load(HERE).prompts)
    assert len(Arithmetic("eval", max_operand=9, size=there).load(HERE).prompts) == there
    with pytest.raises(UserError, match=rf"has {there} different problems.*fewer than the {there + 1}"):
        Arithmetic("eval", max_operand=9, size=there + 1).load(HERE)


@pytest.mark.parametrize("options", [{"max_operand": 0}, {"size": 0}, {"operators": ["/"]}, {"operators": []}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        sources.build({"name": "arithmetic", "split": "train", **options})


def test_describe_gives_counts_and_the_floor_of_a_constant_answer(tmp_path):
    rows = ['{"prompt":"a","answer":"1"}', '{"prompt":"a","answer":1}', '{"prompt":"b","answer":"2"}', '{"prompt":"c"}']
    assert describe(Jsonl(str(write(tmp_path, "\n".join(rows)))).load(HERE).prompts) == {
        "prompts": 4,
        "distinct": 3,
        "floor": 2 / 3,
    }
    assert describe([]) == {"prompts": 0, "distinct": 0, "floor": 0.0}


def test_jsonl_reads_relative_to_the_recipe_and_renames_columns(tmp_path):
    write(tmp_path, '\ufeff{"question":"1+1=","gold":2,"level":3}\r\n\n{"question":"2+2=","gold":4,"level":1}\n')
    prompts = Jsonl("rows.jsonl", {"prompt": "question", "answer": "gold"}).load(tmp_path).prompts
    assert [p.row for p in prompts] == [
        {"prompt": "1+1=", "answer": 2, "level": 3},
        {"prompt": "2+2=", "answer": 4, "level": 1},
    ]


def test_jsonl_takes_messages_and_text_with_unusual_line_separators(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": "one\u2028two\x85three"}]
    write(tmp_path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert [p.row for p in Jsonl("rows.jsonl").load(tmp_path).prompts] == rows


def test_ids_hang_on_content_so_that_adding_a_row_renames_none(tmp_path):
    write(tmp_path, '{"prompt":"a","x":1}\n{"prompt":"b"}\n{"x":1,"prompt":"a"}\n')
    before = [p.id for p in Jsonl("rows.jsonl").load(tmp_path).prompts]
    assert len(set(before)) == 3 and before[2] == f"{before[0]}-1"
    write(tmp_path, '{"prompt":"new"}\n{"prompt":"a","x":1}\n{"prompt":"b"}\n{"x":1,"prompt":"a"}\n')
    assert [p.id for p in Jsonl("rows.jsonl").load(tmp_path).prompts][1:] == before


def test_every_bad_row_is_named_at_once(tmp_path):
    bad = [b'{"question": "x"}', b"[1]", b"{oops", b'{"prompt": ""}', b'{"prompt": "a", "answer": null}']
    bad += [b'{"prompt": "a", "completion": 3}', b'{"prompt": "\xff"}', b'{"prompt": NaN}', b'{"prompt": [{}]}']
    path = write(tmp_path, b"\n".join([b'{"prompt": "good"}', *bad]))
    with pytest.raises(UserError) as caught:
        Jsonl("rows.jsonl").load(tmp_path)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in range(2, 11)]
    expected = ("question", "list", "not JSON", "not empty", "null", "must be text", "UTF-8", "NaN", "messages")
    assert all(what in line for what, line in zip(expected, lines, strict=True)), lines


def test_a_missing_mapped_column_is_named_and_only_the_first_twenty_rows(tmp_path):
    write(tmp_path, '{"prompt":"a"}\n' * 33)
    with pytest.raises(UserError, match=r"rows.jsonl:1: has no 'gold' \(field_map.answer\)") as caught:
        Jsonl("rows.jsonl", {"answer": "gold"}).load(tmp_path)
    assert str(caught.value).count("has no 'gold'") == 20 and str(caught.value).endswith("and 13 more")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(UserError, match="has no rows"):
        Jsonl("rows.jsonl").load(tmp_path)


def test_a_missing_file_says_where_relative_paths_start(tmp_path):
    with pytest.raises(UserError, match=rf"nowhere.jsonl.*starts at {tmp_path}"):
        Jsonl("nowhere.jsonl").load(tmp_path)
