"""Sources by name, and the files of the source `dataset`: they are read strictly, and every bad row is named."""

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import alignment.recipe  # noqa: F401 - registers all sources
from alignment.data.files import DatasetSource
from alignment.data.sources import Source, describe, sources
from alignment.errors import UserError

HERE = Path()
SPLITS = ("train", "demonstrations", "eval")
SUMS = '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "4"}\n'


def write(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(folder: Path, path: str = "rows.jsonl", **options) -> list[dict]:
    return [dict(prompt.row) for prompt in DatasetSource(path, **options).load(folder).prompts]


def test_the_sources_are_selectable_by_name():
    assert sources.names() == ["dataset", "procedural", "reasoning_gym"]
    built = [sources.build({"name": "procedural", "task": "arithmetic", "split": s}) for s in SPLITS]
    assert all(isinstance(source, Source) for source in built)


def test_describe_gives_counts_and_the_floor_of_a_constant_answer(tmp_path):
    lines = [
        '{"prompt":"a","answer":"1"}',
        '{"prompt":"a","answer":1}',
        '{"prompt":"b","answer":"2"}',
        '{"prompt":"c"}',
    ]
    assert describe(DatasetSource(str(write(tmp_path, "\n".join(lines)))).load(HERE).prompts) == {
        "prompts": 4,
        "distinct": 3,
        "floor": 2 / 3,
    }
    assert describe([]) == {"prompts": 0, "distinct": 0, "floor": 0.0}


def test_lines_are_read_relative_to_the_recipe_and_columns_renamed(tmp_path):
    path = write(tmp_path, '\ufeff{"question":"1+1=","gold":2,"level":3}\r\n\n{"question":"2+2=","gold":4,"level":1}\n')
    found = DatasetSource("rows.jsonl", field_map={"prompt": "question", "answer": "gold"}).load(tmp_path)
    assert [p.row for p in found.prompts] == [
        {"prompt": "1+1=", "answer": 2, "level": 3},
        {"prompt": "2+2=", "answer": 4, "level": 1},
    ]
    assert [p.origin for p in found.prompts] == [f"{path}:1", f"{path}:3"]
    assert found.origin == str(path) and found.bad == ()


def test_messages_and_text_with_unusual_line_separators(tmp_path):
    given = [{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": "one\u2028two\x85three"}]
    write(tmp_path, "\n".join(json.dumps(row, ensure_ascii=False) for row in given))
    assert rows(tmp_path) == given


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    values = [json.loads(line) for line in SUMS.splitlines()]
    write(tmp_path, SUMS)
    write(tmp_path, gzip.compress(SUMS.encode()), "rows.jsonl.gz")
    write(tmp_path, json.dumps(values), "rows.json")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "rows.parquet")
    found = {
        name: DatasetSource(name).load(tmp_path)
        for name in ("rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet")
    }
    assert all([p.row for p in dataset.prompts] == values for dataset in found.values())
    assert len({tuple(p.id for p in dataset.prompts) for dataset in found.values()}) == 1
    places = {name: dataset.prompts[1].origin.removeprefix(f"{tmp_path}/") for name, dataset in found.items()}
    assert places == {
        "rows.jsonl": "rows.jsonl:2",
        "rows.jsonl.gz": "rows.jsonl.gz:2",
        "rows.json": "rows.json: row 2",
        "rows.parquet": "rows.parquet: row 2",
    }


def test_values_of_a_table_become_json_values(tmp_path):
    import datetime

    table = pyarrow.table(
        {
            "prompt": ["a", "b"],
            "score": pyarrow.array([0.5, float("nan")]),
            "price": [Decimal("1.50"), None],
            "day": [datetime.date(2024, 2, 29), None],
            "tags": [["x", "y"], []],
            "nested": [{"deep": {"n": 1}}, None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    first, second = rows(tmp_path, "rows.parquet")
    assert (
        json.loads(json.dumps(first, allow_nan=False))
        == first
        == {
            "prompt": "a",
            "score": 0.5,
            "price": "1.50",
            "day": "2024-02-29",
            "tags": ["x", "y"],
            "nested": {"deep": {"n": 1}},
        }
    )
    assert second == {"prompt": "b", "score": None, "price": None, "day": None, "tags": [], "nested": None}


def test_what_json_cannot_hold_is_a_bad_row(tmp_path):
    table = pyarrow.table({"prompt": ["a", "b", "c"], "image": [b"png", None, None], "x": [0.0, float("inf"), 1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = DatasetSource("rows.parquet").load(tmp_path)
    assert [p.row["prompt"] for p in found.prompts] == ["c"]
    assert [text.removeprefix(f"{tmp_path}/") for text in found.bad] == [
        "rows.parquet: row 1: column 'image' holds bytes, which JSON cannot; take the column out of the file",
        "rows.parquet: row 2: column 'x' holds an infinite number, which JSON cannot; take the column out of the file",
    ]


def test_a_folder_is_its_files_by_name(tmp_path):
    write(tmp_path, '{"prompt": "b"}', "all/part-2.jsonl")
    write(tmp_path, '[{"prompt": "a"}]', "all/part-1.json")
    write(tmp_path, "not data", "all/README.md")
    assert [row["prompt"] for row in rows(tmp_path, "all")] == ["a", "b"]
    write(tmp_path, "", "none/README.md")
    with pytest.raises(
        UserError, match=r"none has no file that ends in .jsonl, .jsonl.gz, .json, .parquet; it has REA"
    ):
        rows(tmp_path, "none")


def test_the_splits_of_a_folder_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        for part in (0, 1):
            write(tmp_path, f'{{"prompt": "{split}{part}"}}', f"data/{split}-0000{part}-of-00002.jsonl")
    with pytest.raises(UserError, match="files of several splits; choose one with split: test or train"):
        rows(tmp_path, "data")
    assert [row["prompt"] for row in rows(tmp_path, "data", split="train")] == ["train0", "train1"]
    with pytest.raises(UserError, match=r"no file of split 'dev'; it has test-00000-of-00002.jsonl, "):
        rows(tmp_path, "data", split="dev")


@pytest.mark.parametrize("option", [{"config": "main"}, {"revision": "main"}, {"split": "train"}])
def test_options_of_the_hub_are_refused_for_a_file(tmp_path, option):
    write(tmp_path, SUMS)
    with pytest.raises(UserError, match=r"is for data sets on the hub, but .*rows.jsonl is here; leave it out"):
        rows(tmp_path, **option)


def test_the_seed_picks_rows_and_the_file_orders_them(tmp_path):
    write(tmp_path, "\n".join(f'{{"prompt": "{n}"}}' for n in range(100)))
    one, again, other = (rows(tmp_path, size=30, seed=seed) for seed in (0, 0, 1))
    numbers = [int(row["prompt"]) for row in one]
    assert one == again and one != other and numbers == sorted(numbers) and len(set(numbers)) == 30
    assert max(numbers) > 60, "not just the first ones"
    fewer = [row["prompt"] for row in rows(tmp_path, size=10)]
    assert set(fewer) < {row["prompt"] for row in one}, "a larger size only adds rows"
    assert rows(tmp_path, size=100) == rows(tmp_path)
    with pytest.raises(UserError, match="has 100 rows, fewer than the 101 asked for"):
        rows(tmp_path, size=101)


def test_ids_hang_on_the_prompt_so_that_adding_a_row_renames_none(tmp_path):
    write(tmp_path, '{"prompt":"a","x":1}\n{"prompt":"b"}\n{"x":2,"prompt":"a"}\n')
    before = DatasetSource("rows.jsonl").load(tmp_path).prompts
    names = [p.id for p in before]
    assert names == [before[0].key, before[1].key, f"{before[0].key}-1"]
    write(tmp_path, '{"prompt":"new"}\n{"prompt":"a","x":1}\n{"prompt":"b"}\n{"x":2,"prompt":"a"}\n')
    assert [p.id for p in DatasetSource("rows.jsonl").load(tmp_path).prompts][1:] == names


def test_a_column_id_is_the_id_and_must_be_one(tmp_path):
    path = write(
        tmp_path,
        '{"prompt":"a","id":7}\n{"prompt":"b","id":"x"}\n{"prompt":"c","id":"7"}\n{"prompt":"d","id":null}\n',
    )
    found = DatasetSource("rows.jsonl").load(tmp_path)
    assert [p.id for p in found.prompts] == ["7", "x"]
    assert found.bad == (
        f"{path}:3: 'id' '7' is that of {path}:1 already; rename the column if it is no id",
        f"{path}:4: 'id' must be text or a number, not null; rename the column if it is no id",
    )
    renamed = DatasetSource("rows.jsonl", field_map={"number": "id"}).load(tmp_path)
    assert len(renamed.prompts) == 4 and renamed.prompts[3].row["number"] is None


def test_every_bad_row_is_named_and_the_others_are_there(tmp_path):
    bad = [b'{"question": "x"}', b"[1]", b"{oops", b'{"prompt": ""}', b'{"prompt": "a", "answer": null}']
    bad += [b'{"prompt": "a", "completion": 3}', b'{"prompt": "\xff"}', b'{"prompt": NaN}', b'{"prompt": [{}]}']
    path = write(tmp_path, b"\n".join([b'{"prompt": "good"}', *bad]))
    found = DatasetSource("rows.jsonl").load(tmp_path)
    assert [p.row for p in found.prompts] == [{"prompt": "good"}]
    assert [text.split(": ")[0] for text in found.bad] == [f"{path}:{n}" for n in range(2, 11)]
    expected = ("question", "list", "not JSON", "not empty", "null", "must be text", "UTF-8", "NaN", "messages")
    assert all(what in text for what, text in zip(expected, found.bad, strict=True)), found.bad


def test_no_usable_row_at_all_is_an_error_that_shows_the_first_twenty(tmp_path):
    write(tmp_path, '{"prompt":"a"}\n' * 33)
    with pytest.raises(UserError, match=r"rows.jsonl:1: has no 'gold' \(field_map.answer\)") as caught:
        rows(tmp_path, field_map={"answer": "gold"})
    assert str(caught.value).startswith("none of the 33 rows of ")
    assert str(caught.value).count("has no 'gold'") == 20 and str(caught.value).endswith("and 13 more")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(UserError, match="has no rows"):
        rows(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl.gz", b"plain text", r"cannot read .*a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(SUMS.encode())[:-9], r"cannot read .*a.jsonl.gz: Compressed file ended"),
        ("a.parquet", b"no parquet", r"cannot read .*a.parquet: "),
        ("a.json", b'{"prompt": "a"}', r"holds dict where a list of objects is expected; .* called .jsonl"),
        ("a.json", SUMS.encode(), r"cannot read .*a.json: not JSON: Extra data.* called .jsonl"),
        ("a.csv", b"prompt\na\n", r"cannot read .*a.csv: its name must end in .jsonl, .jsonl.gz, .json, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, said):
    write(tmp_path, content, name)
    with pytest.raises(UserError, match=said):
        rows(tmp_path, name)


def test_a_missing_file_says_where_relative_paths_start(tmp_path):
    with pytest.raises(UserError, match=rf"nowhere.jsonl.*starts at {tmp_path}"):
        rows(tmp_path, "nowhere.jsonl")
    with pytest.raises(UserError, match="there is no such file or folder$"):
        rows(tmp_path, str(tmp_path / "nowhere"))


def test_the_floor_of_worked_solutions_is_of_the_answers_in_them(real_data, tmp_path):
    lines = [
        '{"prompt":"a","answer":"1+1\\n#### 2"}',
        '{"prompt":"b","answer":"so \\\\boxed{2}"}',
        '{"prompt":"c","answer":"3"}',
    ]
    assert describe(DatasetSource(str(write(tmp_path, "\n".join(lines)))).load(HERE).prompts)["floor"] == 2 / 3
    source = DatasetSource(str(real_data / "gsm8k/train.jsonl"), prompt="{question}")
    assert describe(source.load(HERE).prompts)["floor"] == 210 / 7473


def test_a_blank_prompt_is_a_bad_row(tmp_path):
    path = write(tmp_path, SUMS + '{"prompt": "  ", "answer": "4"}\n')
    (bad,) = DatasetSource(str(path)).load(HERE).bad
    assert ":3: " in bad and "'prompt' is blank" in bad


def test_reasoning_gym_never_hangs(monkeypatch):
    from alignment.data import reasoning_gym

    for base in (2, 16):
        config = {"min_base": base, "max_base": base}
        with pytest.raises(UserError, match=f"never returns with min_base = max_base = {base}: .*max_base larger"):
            reasoning_gym.ReasoningGym("base_conversion", "train", config=config).load(HERE)
    config = {"min_base": 2, "max_base": 3}
    assert len(reasoning_gym.ReasoningGym("base_conversion", "train", 3, config).load(HERE).prompts) == 3
    monkeypatch.setattr(reasoning_gym, "SPARE_SECONDS", -5.0)
    with pytest.raises(UserError, match=r"gcd gave 0 of 4 problems for split 'train' in -1 s; lower size"):
        reasoning_gym.ReasoningGym("gcd", "train", size=4).load(HERE)
