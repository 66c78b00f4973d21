"""Golden numbers and statuses of the rewards that come with the project."""

import dataclasses
import math
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alignment.reward_registry import RewardFunction, reward_functions
from alignment.score import Score
from rewards import ExactMatch, Format, Length, NumericMatch, Overlong, RelativeLength, Repetition
from rewards.matching import last_number
from rewards.repetition import repeated_share


def judge(reward: RewardFunction, completions: list[str], **columns: Any) -> list[Score]:
    """As text and as chat, which must agree."""
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    prompts = ["q"] * len(completions)
    found = [reward(prompts, form, **columns) for form in (completions, chats)]
    assert found[0] == found[1]
    return [s if isinstance(s, Score) else Score(s) for s in found[0]]


def values(reward: RewardFunction, completions: list[str], **columns: Any) -> list[float | None]:
    return [s.value for s in judge(reward, completions, **columns)]


def lengths(reward: RewardFunction, tokens: list[int], **columns: Any) -> list[float | None]:
    return values(reward, columns.pop("texts", ["x"] * len(tokens)), length_tokens=tokens, **columns)


def test_exact_match() -> None:
    found = judge(ExactMatch(), ["42", " 42\n", "042", "42!", "", "4"], answer=["42", "42 ", "42", "42", "42", None])
    assert [(s.value, s.status) for s in found] == [
        (1.0, "ok"), (1.0, "ok"), (0.0, "wrong"), (0.0, "wrong"), (0.0, "wrong"), (None, "skipped"),
    ]  # fmt: skip
    assert [s.answer for s in found] == ["42", "42", "042", "42!", "", None]
    assert values(ExactMatch(column="gold"), ["7"], gold=[7], answer=["8"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("so it is -3.", -3),
        ("3 + 4 = 7.", 7),
        ("5-3", 3),
        ("5 - -3", -3),
        ("f(2)-3", 3),
        ("a = \N{MINUS SIGN}3", -3),
        ("+8", 8),
        ("1,234,567.50", Fraction(2469135, 2)),
        ("1, 2", 2),
        ("12,34", 34),
        ("$.5", Fraction(1, 2)),
        ("2e-3", Fraction(2, 1000)),
        ("1E3", 1000),
        ("it is 3/4", Fraction(3, 4)),
        ("-1 / 3", Fraction(-1, 3)),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"-\dfrac{-6}{4}", Fraction(3, 2)),
        ("#### 1,000", 1000),
        ("1/0", None),
        ("none", None),
        ("", None),
        ("9" * 5000, None),
        ("1e999", 10**999),
    ],
)
def test_last_number(text: str, value: Fraction | int | None) -> None:
    assert last_number(text) == value


@given(st.fractions())
def test_last_number_reads_what_python_writes(value: Fraction) -> None:
    assert last_number(f"the answer: {value}") == value


@given(st.text(alphabet="0123456789+-.,/eE \\frac{}()", max_size=60))
def test_last_number_never_fails(text: str) -> None:
    number = last_number(text)
    assert number is None or isinstance(number, Fraction)


@pytest.mark.parametrize("text", ["1" * 100_000, "1 " * 50_000, "1," * 50_000, "1/" * 50_000, "\\frac{1}" * 20_000])
def test_last_number_takes_linear_time(text: str) -> None:
    started = time.process_time()
    last_number(text)
    assert time.process_time() - started < 5.0, "quadratic time would be minutes"


def test_numeric_match() -> None:
    found = judge(
        NumericMatch(),
        ["0.50", "1/2", "maybe 0.51", "none", "7", "7"],
        answer=["1/2", 0.5, "0.5", "0.5", "no number", None],
    )
    assert [(s.value, s.status) for s in found] == [
        (1.0, "ok"), (1.0, "ok"), (0.0, "wrong"), (0.0, "unparseable"), (None, "skipped"), (None, "skipped"),
    ]  # fmt: skip
    assert [s.answer for s in found] == ["1/2", "1/2", "51/100", None, None, None]


def test_numeric_tolerances() -> None:
    assert values(NumericMatch(abs_tol=0.5), ["10.5", "9.4"], answer=["10", "10"]) == [1.0, 0.0]
    assert values(NumericMatch(rel_tol=0.125), ["-9", "-9.1"], answer=["-8", "-8"]) == [1.0, 0.0]
    big = "123456789012345678901234567890"
    assert values(NumericMatch(), [big, big[:-1] + "1"], answer=[big, big]) == [1.0, 0.0], "floats would agree"


def test_format_by_tags() -> None:
    texts = [
        "<think>a\nb</think>\n<answer>3</answer> ",
        "<think></think><answer></answer>",
        "<answer>3</answer><think>a</think>",
        "<think>a</think>so<answer>3</answer>",
        "<think>a</think><answer>3</answer>.",
        "<think><think>a</think><answer>3</answer>",
        "<think>a</think><answer>3",
        "",
    ]
    assert values(Format(), texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert judge(Format(), [""])[0].status == "wrong"
    assert values(Format(tags=("a-1",)), ["<a-1>x</a-1>", "<a-1>x</a-1> x"]) == [1.0, 0.0]


def test_format_by_pattern() -> None:
    texts = ["ab", "a\nb", "xaby", "ba"]
    assert values(Format(pattern="a.*b"), texts) == [1.0, 1.0, 0.0, 0.0]
    assert values(Format(pattern="a.*b", match="contains"), texts) == [1.0, 1.0, 1.0, 0.0]


def test_length() -> None:
    assert lengths(Length(target_tokens=10, per_token=0.01, max_penalty=0.5), [0, 10, 11, 30, 60, 1000]) == (
        pytest.approx([0.0, 0.0, -0.01, -0.2, -0.5, -0.5])
    )


def test_overlong_is_that_of_dapo() -> None:
    assert lengths(Overlong(), [1, 16384, 18432, 20480, 25000]) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert lengths(Overlong(max_tokens=4, cache_tokens=4), [0, 1, 4, 5]) == [0.0, -0.25, -1.0, -1.0]


def test_relative_length() -> None:
    texts = ["the answer is 2", "2", "it is 12", "3"]
    found = lengths(RelativeLength(), [10, 20, 30, 50], texts=texts, answer=["2"] * 4)
    assert found == [0.5, 0.25, 0.0, -0.5]
    assert lengths(RelativeLength(), [10, 20], texts=["x = -2", "2"], answer=["2"] * 2) == [0.0, -0.5]
    assert lengths(RelativeLength(column=None), [10, 20, 30, 50]) == [0.5, 0.25, 0.0, -0.5]
    assert lengths(RelativeLength(), [7, 7], texts=["2", "3"], answer=["2", "2"]) == [0.0, 0.0]
    assert lengths(RelativeLength(), [7, 8], answer=[None, None]) == [None, None]
    assert RelativeLength.group_level, "its worth depends on the whole group"


def test_repetition() -> None:
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1], [1], []]
    assert values(Repetition(n=2), ["x"] * 5, completion_ids=ids) == [0.0, -0.75, -0.5, 0.0, 0.0]
    assert values(Repetition(n=2, max_penalty=0.2), ["x"], completion_ids=ids[1:2]) == pytest.approx([-0.15])
    assert repeated_share([7] * 1000, 3) == pytest.approx(1 - 1 / 998)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "overlong", "max_tokens": 5, "cache_tokens": 6},
        {"name": "format", "pattern": "("},
        {"name": "format", "tags": ["a", "a"]},
        {"name": "format", "tags": ["a b"]},
        {"name": "format", "tags": []},
        {"name": "format", "match": "some"},
        {"name": "length"},
        {"name": "length", "target_tokens": 1, "per_token": 0},
        {"name": "repetition", "n": 0},
        {"name": "numeric_match", "rel_tol": -1},
        {"name": "numeric_match", "abs_tol": math.inf},
        {"name": "exact_match", "colum": "answer"},
    ],
)
def test_bad_options_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        reward_functions.build(entry)


@pytest.mark.parametrize("entry", list(reward_functions), ids=lambda e: e.name)
def test_every_reward_is_documented_and_survives_its_own_description(entry: Any) -> None:
    assert entry.summary.endswith((".", ";", ":")) or len(entry.summary) > 20
    assert all(o["description"] for o in entry.options())
    needed = {
        "length": {"target_tokens": 3},
        "judge": {"base_url": "http://localhost:8000/v1", "model": "m"},
        "reward_model": {"stage": "rm"},
    }
    component = entry.cls(**needed.get(entry.name, {}))
    assert reward_functions.build(reward_functions.dump(component)) == component
    assert dataclasses.is_dataclass(component)
