"""Environments, and the arithmetic that the calculator does on text a model wrote."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alignment.environments import Calculator, Environment, SingleTurn, environments
from alignment.safe_arithmetic import evaluate, show

ROW = {"prompt": "12*3="}
WRITTEN = st.text("[]()0123456789+-*/%. ab", max_size=40)


def test_single_turn_shows_the_prompt_and_ends():
    state, prompt = SingleTurn().reset(ROW)
    step = SingleTurn().step(state, "36")
    assert (prompt, step.done, step.observation, step.scores) == ("12*3=", True, "", {})


def test_single_turn_passes_messages_on():
    messages = [{"role": "user", "content": "hi"}]
    assert SingleTurn().reset({"prompt": messages})[1] == messages


def test_calculator_plays_two_turns():
    environment = environments.build({"name": "calculator", "result": "<{value}>"})
    assert isinstance(environment, Environment)
    state, prompt = environment.reset(ROW)
    assert prompt == "12*3="
    called = environment.step(json.loads(json.dumps(state)), "I ask [1+1] or rather [12*3]")
    assert (called.observation, called.done) == ("<36>", False)
    answered = environment.step(json.loads(json.dumps(called.state)), "[2+2] 36")
    assert (answered.done, answered.observation) == (True, "")


def test_calculator_does_not_change_the_state_it_is_given():
    state, _ = Calculator().reset(ROW)
    before = dict(state)
    Calculator().step(state, "[1]")
    assert state == before


def test_a_turn_without_a_call_ends_the_episode():
    environment = Calculator(max_turns=5)
    assert environment.step(environment.reset(ROW)[0], "36").done


def test_max_turns_bounds_the_turns_of_the_policy():
    environment = Calculator(max_turns=3)
    state, turns, done = environment.reset(ROW)[0], 0, False
    while not done:
        step = environment.step(state, "[1]")
        state, turns, done = step.state, turns + 1, step.done
    assert turns == 3


@pytest.mark.parametrize("expression", ["", "1/0", "9**9**9", "import os", "7 7", "1e9", "a", "((((", "\0", "1.2.3"])
def test_a_call_that_cannot_be_computed_gets_the_error_marker(expression):
    environment = Calculator(result="{value};", error="?")
    step = environment.step(environment.reset(ROW)[0], f"[{expression}]")
    assert (step.observation, step.done) == ("?;", False)


@given(WRITTEN)
def test_calculator_raises_nothing_whatever_the_policy_writes(completion):
    environment = Calculator()
    step = environment.step(environment.reset(ROW)[0], completion)
    assert step.done or step.observation.startswith("=")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"call": "["}, "regular expression"),
        ({"call": "calc"}, "one group"),
        ({"call": "(a)(b)"}, "one group"),
        ({"result": "36"}, "value"),
        ({"max_turns": 0}, "max_turns"),
        ({"turns": 2}, "turns"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        environments.build({"name": "calculator", **options})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12*3", "36"),
        (" 7/2 ", "7/2"),
        ("7//2", "3"),
        ("-7 % 3", "2"),
        ("0.1+0.2", "3/10"),
        ("2**10", "1024"),
        ("2**-2", "1/4"),
        ("-(3-5)*.5", "1"),
        ("2**255", str(2**255)),
    ],
)
def test_arithmetic_is_exact(text, value):
    assert show(evaluate(text)) == value


@given(st.integers(-999, 999), st.integers(-999, 999), st.sampled_from("+-*"), st.integers(1, 999))
def test_arithmetic_agrees_with_python(a, b, symbol, c):
    expected = Fraction({"+": a + b, "-": a - b, "*": a * b}[symbol], c)
    assert evaluate(f"(({a}){symbol}({b}))/{c}") == expected


@pytest.mark.parametrize(
    "text",
    ["2**256", "9**9**9", "10**-99", "(" * 150 + "1" + ")" * 150, "1" * 5000, "(" * 90 + "-" * 100 + "1", "1e99"]
    + [
        "",
        "()",
        "1 if 1 else 2",
        "1<2",
        "07",
        "0**-1",
        "1//0",
        "1%0",
        "2**0.5",
        "~1",
        "'a'*3",
        "__import__('os')",
        "x",
    ],
)
def test_what_is_not_small_arithmetic_is_refused_before_it_is_computed(text):
    with pytest.raises(ValueError):
        evaluate(text)
