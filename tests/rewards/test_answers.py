"""Where an answer stands, one spelling for each, and the numbers among them."""

import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.answers import read
from rewards.extraction import given_answer, gold_texts, last_box
from rewards.latex import normalise, number


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{\frac{1}{2}} then \boxed {x^{2}}.", "x^{2}"),
        (r"\fbox{5}", "5"),
        (r"\boxed{3} or \fbox{4}", "4"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{9}}", "9"),
        (r"\boxed{a \\} b", r"a \\"),
        (r"\boxed{}", ""),
        (r"\boxed{7} \boxed{8", None),
        (r"\boxed{7} \boxed 8", "8"),
        (r"\boxed{7} \boxed x", None),
        (r"\boxedx{7}", None),
        ("7", None),
    ],
)
def test_last_box(text: str, inside: str | None) -> None:
    assert last_box(text) == inside


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "\\boxed{1}" * 20_000,
        "\\boxed{" + "{" * 200_000,
        "\\boxed{" + "{}" * 100_000 + "}",
        "\\" * 200_000,
        "answer is " * 20_000,
        "<answer>" * 20_000,
        "<answer>1</answer>" * 10_000,
        "####" * 50_000,
        "answer: " + "1" * 200_000,
    ],
)
def test_extraction_takes_linear_time(text: str) -> None:
    started = time.process_time()
    for where in ("box", "box_or_number"):
        found = given_answer(text, where)
        read(found or "")
    assert time.process_time() - started < 5.0, "quadratic time would be minutes"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6*7 = 42\n#### 42\n", "42"),
        ("first #### 1\nlater #### 1,234 dollars\nbye 5", "1,234 dollars"),
        ("<answer>3</answer> then <answer> 4 </answer>", "4"),
        ("The answer is 18. There are 3 more.", "18"),
        ("the ANSWER IS: $3.50.\n7", "$3.50"),
        ("Final answer: 12\nBy 9", "12"),
        ("The answer is (C).", "(C)"),
        ("The answer is that Tom has now got 5 apples. He had 3.", "5"),
        ("we get 3 and then 7/2", "7/2"),
        ("The answer is **18**.", "18"),
        ("**Final Answer:** 18", "18"),
        ("**Answer**: 18", "18"),
        ("The answer is **18.** There are 3 more.", "18"),
        ('The answer is "18". There are 3 more.', "18"),
        ("The final answer is `18`. 3", "18"),
        ("*18*", "18"),
        ("#### **18**", "18"),
        ("#### ", None),
        ("nothing", None),
        (r"#### 5 but \boxed{6}", "6"),
        (r"#### 5 but \boxed{6", None),
    ],
)
def test_box_or_number(text: str, answer: str | None) -> None:
    assert given_answer(text, "box_or_number") == answer
    if "box" not in text:
        assert given_answer(text, "box") is None


@pytest.mark.parametrize(
    ("value", "golds"),
    [
        ("sum\n#### 1,080", ("1,080",)),
        (r"so \boxed{7} and \boxed{8}", ("8",)),
        (" x^2 ", ("x^2",)),
        (42, ("42",)),
        (27.0, ("27.0",)),
        (["$1$", 2, "#### 3"], ("$1$", "2", "3")),
        ([], ()),
        (["1", None], ()),
        ("", ()),
        (None, ()),
        (False, ()),
    ],
)
def test_gold_texts(value: Any, golds: tuple[str, ...]) -> None:
    assert gold_texts(value) == golds


@pytest.mark.parametrize(
    ("latex", "same"),
    [
        (r"\dfrac 12", r"\frac{1}{2}"),
        (r"\frac12x", r"\frac{1}{2}x"),
        (r"\frac{270}7", r"\frac{270}{7}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
        (r"\sqrt\frac{1}{2}", r"\sqrt\frac{1}{2}"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"\left( 3 , \;x^{2} \right)", "(3,x^2)"),
        (r"\pi x", r"\pi x"),
        (r"2 \pi", r"2\pi"),
        (r"\mathbf{a} \times b", r"{a}\cdot b"),
        (r"10,\!080", "10,080"),
        (r"10\,080", "10080"),
        ("10 080", "10080"),
        ("1 2", "1 2"),
        (r"\( 5 \)", "5"),
        ("$5$", "5"),
        (r"\$5", "5"),
        ("2^10", "2^{10}"),
        (r"a \\ b", r"a\\b"),
    ],
)
def test_normalise(latex: str, same: str) -> None:
    assert normalise(latex) == normalise(same) == same


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-1,234.5", Fraction(-2469, 2)),
        ("+.5", Fraction(1, 2)),
        ("5.", 5),
        ("2e-3", Fraction(1, 500)),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{-3}{4}", Fraction(3, 4)),
        (r"1\frac{4}{5}", Fraction(9, 5)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r"2\cdot10^{-3}", Fraction(1, 500)),
        (r"\frac{1}{0}", None),
        ("1/0", None),
        ("1,23", None),
        ("2+3", None),
        ("2^{10}", None),
        ("x", None),
        ("--5", None),
        ("", None),
        ("9" * 2000, None),
    ],
)
def test_number(text: str, value: Fraction | int | None) -> None:
    assert number(text) == value


@given(st.fractions())
def test_a_fraction_is_read_however_it_is_written(value: Fraction) -> None:
    sign = "-" if value < 0 else ""
    latex = rf"{sign}\dfrac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    for text in (str(value), latex, f"$x = {value}$", rf"\left({latex}\right)"):
        answer = read(text)
        assert answer is not None and answer.number == value and answer.text == str(value)


@given(st.text(alphabet=r"\{}()[],=^_ $%.;0123456789+-xpmfracsqtbeginmatrix&", max_size=80))
def test_whatever_is_written_can_be_read(text: str) -> None:
    read(text)
    given_answer(text, "box_or_number")
