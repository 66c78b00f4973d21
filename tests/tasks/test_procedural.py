"""The source of procedural tasks: which rows it gives, when it refuses, and how a recipe holds it."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from alignment.data.procedural import Procedural
from alignment.data.sources import describe, sources
from alignment.errors import UserError
from alignment.recipe import load
from alignment.registry import registry_of
from alignment.tasks.arithmetic import Arithmetic
from alignment.tasks.countdown import Countdown
from alignment.tasks.number_theory import Gcd
from alignment.tasks.sequences import Reversal, Sorting
from tests.recipes_for_tests import only, write

HERE = Path()
SPLITS = ("train", "demonstrations", "eval")
QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"


def digest(prompts) -> str:
    rows = [[p.id, p.row["prompt"], p.row["answer"], p.row["completion"]] for p in prompts]
    return hashlib.sha256("\n".join(map(json.dumps, rows)).encode()).hexdigest()


@pytest.mark.parametrize(
    ("section", "rows", "expected"),
    [
        ("train", 2964, "0fe98bd969678236da87497879acf376fabadfe0af2f76f49228c28c7e699cd6"),
        ("demonstrations", 900, "f97049578b4fa14fd526c9a1502ba63347db8ef11d014b2f89f8c4b469f16b8c"),
        ("eval", 991, "a95ae0f0b2410f00527681fde4b52a09f0b3ee6897c9b9c76a1d9f90a788293c"),
    ],
)
def test_the_quickstart_has_the_problems_that_it_always_had(section, rows, expected):
    recipe = load([QUICKSTART])
    found = getattr(recipe.data, section).load(recipe.folder)
    assert (len(found.prompts), digest(found.prompts), found.origin) == (rows, expected, "arithmetic")


def test_several_operators_keep_their_order_too():
    task = Arithmetic(sizes=(20,), operators=("-", "*", "+"))
    assert digest(Procedural(task, "train", seed=5).load(HERE).prompts).startswith("1905b20394ce8fec")


def test_a_row_has_the_columns_of_its_task():
    source = Procedural(Countdown(), "train", levels=(2,), size=1)
    (prompt,) = source.load(HERE).prompts
    assert list(prompt.row) == ["prompt", "answer", "completion", "task", "level", "target", "numbers"]
    assert prompt.row["task"] == "countdown" and prompt.row["level"] == 2 and len(prompt.row["numbers"]) == 3
    assert prompt.id == f"countdown/{prompt.row['prompt']}"


def test_pairs_have_a_right_side_and_one_of_another_problem():
    found = Procedural(Arithmetic(sizes=(9,)), "train", pairs=True).load(HERE).prompts
    answers = {p.row["completion"] for p in found}
    assert all(p.row["chosen"] == p.row["completion"] != p.row["rejected"] in answers for p in found)
    plain = Procedural(Arithmetic(sizes=(9,)), "train").load(HERE).prompts
    assert digest(plain) == digest(found) and "chosen" not in plain[0].row
    with pytest.raises(UserError, match="so none is wrong"):
        Procedural(Arithmetic(sizes=(9,)), "train", size=1, pairs=True).load(HERE)


def test_splits_together_are_all_problems_and_each_is_large_enough():
    loaded = {split: Procedural(Arithmetic(sizes=(49,)), split).load(HERE).prompts for split in SPLITS}
    assert len({p.id for rows in loaded.values() for p in rows}) == sum(map(len, loaded.values())) == 50 * 50
    assert len(loaded["demonstrations"]) >= 400 and len(loaded["eval"]) >= 400 and len(loaded["train"]) >= 1200


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([Arithmetic(sizes=(9, 19, 400)), Sorting(), Gcd(), Countdown(), Reversal(sizes=(2, 3, 9))]),
    st.lists(st.permutations([1, 2, 3]).map(tuple), min_size=3, max_size=3),
    st.lists(st.integers(0, 99), min_size=3, max_size=3),
    st.integers(1, 18),
)
def test_splits_are_disjoint_whatever_the_levels_and_seeds(task, levels, seeds, size):
    loads = [
        Procedural(task, split, levels=level, size=size, seed=seed).load(HERE).prompts
        for split, level, seed in zip(SPLITS, levels, seeds, strict=True)
    ]
    keys = [{p.key for p in prompts} for prompts in loads]
    assert [len(k) for k in keys] == [size] * 3, "no prompt twice"
    assert not keys[0] & keys[1] and not keys[1] & keys[2] and not keys[0] & keys[2]


@pytest.mark.parametrize("task", [Arithmetic(), Sorting(), Countdown()])
def test_the_seed_chooses_and_orders_and_fewer_are_the_first_of_more(task):
    first, again, other = (Procedural(task, "train", size=30, seed=s).load(HERE).prompts for s in (0, 0, 1))
    assert first == again and {p.id for p in first} != {p.id for p in other}
    assert Procedural(task, "train", size=20).load(HERE).prompts == first[:20]


def test_levels_take_turns():
    prompts = Procedural(Sorting(), "train", levels=(3, 1), size=7).load(HERE).prompts
    assert [p.row["level"] for p in prompts] == [3, 1, 3, 1, 3, 1, 3]
    assert [p.row["prompt"].count(" ") for p in prompts] == [8, 3, 8, 3, 8, 3, 8]


def test_without_a_size_all_problems_of_all_levels_come_once():
    task = Arithmetic(sizes=(3, 5))
    loaded = [Procedural(task, split, levels=(1, 2)).load(HERE).prompts for split in SPLITS]
    prompts = [p.row["prompt"] for rows in loaded for p in rows]
    assert len(prompts) == len(set(prompts)) == 36


def test_asking_for_more_problems_than_there_are_says_how_many_there_are():
    task = Arithmetic(sizes=(9, 49))
    there = len(Procedural(task, "eval").load(HERE).prompts)
    assert len(Procedural(task, "eval", size=there).load(HERE).prompts) == there
    with pytest.raises(
        UserError, match=rf"has {there} different problems.*'eval' at level 1.*fewer than the {there + 1}"
    ):
        Procedural(task, "eval", size=there + 1).load(HERE)
    with pytest.raises(UserError, match=r"at level 1 \(sizes: 9\), fewer than its share 50 of the 100 asked for"):
        Procedural(task, "eval", levels=(2, 1), size=100).load(HERE)
    with pytest.raises(UserError, match=r"has 0 different problems"):
        Procedural(Arithmetic(sizes=(1,)), "demonstrations").load(HERE)


def test_drawn_problems_run_out_too():
    small = Countdown(sizes=(2,), largest=4)
    with pytest.raises(
        UserError, match=r"gave, in 10,000 draws without a new one, \d+ different problems for split 'ev"
    ):
        Procedural(small, "eval", size=36).load(HERE)
    parts = [set(), set(), set()]
    for part, split in zip(parts, SPLITS, strict=True):
        with pytest.raises(UserError, match="lower size") as told:
            Procedural(small, split, size=36).load(HERE)
        number = int(str(told.value).split("a new one, ")[1].split()[0])
        part |= {p.id for p in Procedural(small, split, size=number).load(HERE).prompts}
    assert sum(map(len, parts)) == len(set.union(*parts)) == 35, "all there are, see test_tasks.py"


@pytest.mark.parametrize(
    ("task", "many"), [(Sorting(sizes=(5,)), "9,034,502,400"), (Countdown(), "an unknown number of")]
)
def test_all_of_too_many_is_refused(task, many):
    with pytest.raises(UserError, match=rf"has {many} problems at level 1.*too many to take all; give a size"):
        Procedural(task, "train").load(HERE)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"task": {"name": "arithmetic", "sizes": [0]}}, "sizes"),
        ({"task": {"name": "arithmetic", "operators": ["/"]}}, "operators"),
        ({"task": {"name": "arithmetic", "operators": []}}, "operators"),
        ({"size": 0}, "size"),
        ({"levels": [4]}, "levels 1 to 3, one for each of its sizes"),
        ({"levels": [1, 1]}, "name each level once"),
        ({"levels": []}, "levels"),
        ({"levels": [0]}, "levels"),
    ],
)
def test_bad_options_are_refused(options, told):
    with pytest.raises(ValidationError, match=told):
        sources.build({"name": "procedural", "task": "arithmetic", "split": "train"} | options)


def test_a_recipe_says_which_line_asks_for_a_level_that_is_not_there(tmp_path):
    told = only(write(tmp_path), overrides=("data.train.levels=[2]",))
    assert told == "base.yaml:5: data.train: levels [2]: arithmetic has level 1, one for each of its sizes [9]"


def test_a_component_in_a_component_is_written_with_its_name_and_read_again(tmp_path):
    source = Procedural(Arithmetic(sizes=(9, 19), operators=("-",)), "eval", levels=(2,))
    written = sources.dump(source)
    assert written["task"] == {"name": "arithmetic", "sizes": [9, 19], "operators": ["-"]}
    assert sources.build(json.loads(json.dumps(written))) == source
    assert registry_of(source) is sources and registry_of(9) is None
    recipe = load([write(tmp_path)], ["data.eval.task={name: gcd, sizes: [40]}", "data.eval.size=20"])
    again = tmp_path / "again.json"
    again.write_text(json.dumps(recipe.resolved()))
    assert load([again]).data == recipe.data
    assert load([again]).data.eval == Procedural(Gcd(sizes=(40,)), "eval", size=20)
    assert load([write(tmp_path)], ["data.eval.task=gcd", "data.eval.size=9"]).data.eval.task == Gcd(), (
        "no options leak"
    )


def test_loaded_problems_are_described():
    found = describe(Procedural(Gcd(), "eval", size=100).load(HERE).prompts)
    assert found["prompts"] == found["distinct"] == 100 and 0.15 < found["floor"] < 0.4
