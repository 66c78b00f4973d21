"""Every task at every level: answers checked by another method, splits disjoint by content, counts exact."""

import ast
import math
import random
import re
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.errors import UserError
from alignment.reward_registry import reward_functions
from alignment.tasks.arithmetic import Arithmetic, Multiplication
from alignment.tasks.countdown import Countdown
from alignment.tasks.levels import ENUMERATED, SAMPLED, level_table, problems
from alignment.tasks.number_theory import MODULI, Gcd, Modular
from alignment.tasks.sequences import Counting, Reversal, Sorting
from alignment.tasks.task import SPLITS, Problem, Task, split_of, tasks
from alignment.types import keyed_seed

import rewards  # noqa: F401 # isort: skip - registers them

NAMES = tasks.names()
LEVELS = [(name, level) for name in NAMES for level in range(1, len(tasks.build(name).sizes) + 1)]
SMALL = {
    "arithmetic": Arithmetic(sizes=(7,), operators=("*", "-", "+")),
    "countdown": Countdown(sizes=(2,), largest=4),
    "counting": Counting(sizes=(3,)),
    "gcd": Gcd(sizes=(17,)),
    "modular": Modular(sizes=(1,)),
    "multiplication": Multiplication(sizes=(1,)),
    "reversal": Reversal(sizes=(3,), letters="abcd"),
    "sorting": Sorting(sizes=(3,), largest=5),
}


def drawn(task: Task, level: int, number: int = 200) -> list[Problem]:
    size = task.sizes[level - 1]
    return [task.draw(size, random.Random(keyed_seed("test", level, i))) for i in range(number)]


def integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def arithmetic(p: Problem) -> str:
    left, symbol, right = re.fullmatch(r"(\d+)([-+*])(\d+)=", p.prompt).groups()
    a, b = int(left), int(right)
    return str(sum([a] * b) if symbol == "*" else a + b if symbol == "+" else -(b - a))


def multiplication(p: Problem) -> str:
    a, b = integers(p.prompt)
    assert sum(integers(p.completion)[:1] + integers(p.completion)[1::2]) == a * b or b < 10, "the terms sum up"
    return str(sum([a] * b))


def sorting(p: Problem) -> str:
    numbers, ordered = integers(p.prompt), []
    while numbers:
        ordered.append(numbers.pop(numbers.index(min(numbers))))
    return " ".join(map(str, ordered))


def counting(p: Problem) -> str:
    symbol, text = re.fullmatch(r"(.) in (.+)=", p.prompt).groups()
    return str(len(re.findall(symbol, text)))


def gcd(p: Problem) -> str:
    a, b = integers(p.prompt)
    return str(max(d for d in range(1, min(a, b) + 1) if a % d == 0 and b % d == 0))


def reversal(p: Problem) -> str:
    return "".join(reversed(re.fullmatch(r"rev (.+)=", p.prompt)[1]))


def modular(p: Problem) -> str:
    a, b, m = integers(p.prompt)
    rest = a + b
    while rest >= m:
        rest -= m
    return str(rest)


def countdown(p: Problem) -> str:
    target, *numbers = integers(p.prompt)
    assert sorted(integers(p.answer)) == sorted(numbers) and target not in numbers
    assert re.fullmatch(r"[\d+\-*/()]+", p.answer)
    assert eval(p.answer) == target  # the tests' own text, and nothing but arithmetic
    return p.answer


BY_ANOTHER_WAY = {f.__name__: f for f in (arithmetic, multiplication, sorting, counting, gcd)}
BY_ANOTHER_WAY |= {f.__name__: f for f in (reversal, modular, countdown)}


def test_there_are_the_eight_tasks_and_each_is_a_task():
    assert NAMES == sorted(BY_ANOTHER_WAY) == sorted(SMALL)
    assert all(isinstance(tasks.build(name), Task) for name in NAMES)


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_answers_are_right_and_the_alphabet_suffices(name, level):
    task = tasks.build(name)
    for problem in drawn(task, level):
        assert problem.answer == BY_ANOTHER_WAY[name](problem), problem
        assert set(problem.prompt + problem.completion) <= set(task.alphabet)
        assert problem.prompt.endswith("=") and problem.completion.strip() == problem.completion != ""
    assert len(set(task.alphabet)) == len(task.alphabet)


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_the_own_reward_gives_1_to_the_completion_and_0_to_a_changed_one(name, level):
    task, rng = tasks.build(name), random.Random(0)
    reward = reward_functions.build(task.reward)
    rows = drawn(task, level, 60)

    def scores(completions: list[str]) -> list[float | None]:
        columns = {key: [row.columns[key] for row in rows] for key in rows[0].columns}
        judged = reward(
            prompts=[row.prompt for row in rows], completions=completions, answer=[r.answer for r in rows], **columns
        )
        return [score.value for score in judged]

    assert set(scores([row.completion for row in rows])) == {1.0}
    assert set(scores([changed(row.completion, rng) for row in rows])) == {0.0}
    assert set(scores([row.prompt for row in rows])) == {0.0}, "the question copied"
    assert set(scores([""] * len(rows))) == {0.0}


def changed(completion: str, rng: random.Random) -> str:
    """Its last character replaced by another digit or letter, brackets aside."""
    body = completion.rstrip(")")
    others = [c for c in ("0123456789" if body[-1].isdigit() else "abcdefghij") if c != body[-1]]
    return body[:-1] + rng.choice(others) + completion[len(body) :]


def test_a_constant_answer_is_never_worth_much():
    bound = {"counting": 1 / 6, "gcd": 0.25, "arithmetic": 0.101, "modular": 0.09, "multiplication": 0.063}
    for name in NAMES:
        for row in level_table(tasks.build(name)):
            assert row["floor"] <= bound.get(name, 0.02), (name, row)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_problems_is_what_enumeration_finds(name):
    task = SMALL[name]
    size, number = task.sizes[0], task.count(task.sizes[0])
    rng = random.Random(0)
    if number is None:
        assert name == "countdown"
        row = level_table(task)[0]
        assert not row["problems_exact"] and row["problems"] <= len(all_of_countdown()) == 35
        found = {task.draw(size, rng).prompt for _ in range(3000)}
        assert found == all_of_countdown()
        return
    assert number < 1500
    found = {task.draw(size, rng).prompt for _ in range(40 * number)}
    assert len(found) == number, "drawing often enough gives every problem"
    row = level_table(task)[0]
    assert (row["problems"], row["problems_exact"]) == (number, True)
    if hasattr(task, "space"):
        space = [p.prompt for p in task.space(size)]
        assert len(space) == number and set(space) == found
        answers = Counter(p.answer for p in task.space(size))
        assert row["floor_exact"] and row["floor"] == max(answers.values()) / number


def all_of_countdown() -> set[str]:
    """Every problem with two numbers up to 4, by trying all."""
    values = {(a, b): {a + b, a - b, b - a, a * b, a / b, b / a} for a, b in product(range(1, 5), repeat=2)}
    return {
        f"{int(value)}:{a} {b}="
        for (a, b), found in values.items()
        for value in found
        if value == int(value) and 1 <= value <= 99 and value not in (a, b)
    }


def test_known_counts():
    assert Arithmetic().count(69) == 4900 and Arithmetic(operators=("+", "-", "+")).count(9) == 200
    assert Sorting().count(3) == 100 * 99 * 98 and Reversal().count(8) == 10**8
    assert Gcd().count(2) == 3, "1 1, 1 2, 2 1; of 2 2 the divisor is above the root of 2"
    assert Multiplication().count(2) == 90**2


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 2**40), min_size=3, max_size=3),
    st.lists(st.integers(2, 6), min_size=3, max_size=3),
)
def test_splits_are_disjoint_by_content_whatever_the_seeds_and_sizes(name, seeds, sizes):
    contents, prompts = [], []
    for split, seed, size in zip(SPLITS, seeds, sizes, strict=True):
        task = tasks.build({"name": name, "sizes": [size * (10 if name in ("arithmetic", "gcd") else 1)]})
        some = [p for p, _ in zip(problems(task, 1, split, seed), range(40), strict=False)]
        assert len(some) > 3 and len({p.prompt for p in some}) == len(some)
        assert all(split_of(name, p) == split for p in some)
        contents.append({p.key for p in some})
        prompts.append({p.prompt for p in some})
    for sets in (contents, prompts):
        assert not sets[0] & sets[1] and not sets[1] & sets[2] and not sets[0] & sets[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_shares_of_the_splits(name):
    task = tasks.build(name)
    level = len(task.sizes)
    shares = Counter(split_of(name, p) for p in drawn(task, level, 4000))
    for split, share in {"train": 0.6, "demonstrations": 0.2, "eval": 0.2}.items():
        assert abs(shares[split] / 4000 - share) < 0.03, shares


MIRRORED = {
    "arithmetic": ("3+5=", "5+3="),
    "multiplication": ("3x5=", "5x3="),
    "sorting": ("sort 3 1 2=", "sort 2 1 3="),
    "gcd": ("gcd 12 4=", "gcd 4 12="),
    "reversal": ("rev abc=", "rev cba="),
    "modular": ("(3+5)%13=", "(5+3)%13="),
    "countdown": ("6:2 3=", "6:3 2="),
}


@pytest.mark.parametrize("name", MIRRORED)
def test_problems_that_give_each_other_away_share_a_key(name):
    task = SMALL[name]
    keys = {}
    rng = random.Random(1)
    for _ in range(20_000):
        problem = task.draw(task.sizes[0], rng)
        keys[problem.prompt] = problem.key
    one, other = MIRRORED[name]
    assert keys[one] == keys[other]


def test_a_difference_and_its_mirror_image_are_different_problems():
    keys = {p.prompt: p.key for p in Arithmetic(sizes=(5,), operators=("-",)).space(5)}
    assert keys["3-5="] != keys["5-3="]


GOLDEN = {
    "arithmetic": (["9+3=", "7+9="], ["29+59=", "85+90="]),
    "countdown": (["21:7 3=", "3:4 7="], ["85:5 8 3 6=", "72:3 6 9 4="]),
    "counting": (
        ["a in baaaaa=", "a in acabac="],
        ["b in bbbbbbbbbbbbbbbbbbbbbbab=", "b in babbbbbbbbcbccccabbbabab="],
    ),
    "gcd": (["gcd 26 2=", "gcd 12 22="], ["gcd 882 384=", "gcd 462 735="]),
    "modular": (["(50+49)%10=", "(16+10)%10="], ["(3086+8044)%19=", "(3723+7725)%10="]),
    "multiplication": (["2x7=", "5x2="], ["308x789=", "384x900="]),
    "reversal": (["rev efb=", "rev fja="], ["rev bfbiahac=", "rev bgcfibjf="]),
    "sorting": (
        ["sort 76 86 31=", "sort 43 25 46="],
        ["sort 84 3 48 43 21 35 95 98=", "sort 20 48 56 16 13 50 23 72="],
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_problems_are_the_same_on_every_machine(name):
    task = tasks.build(name)
    levels = (1, len(task.sizes))
    found = [[p.prompt for p, _ in zip(problems(task, n, "eval", 0), "12", strict=False)] for n in levels]
    assert tuple(found) == GOLDEN[name]


def test_hidden_difficulty_is_in_the_modulus_and_not_in_form_or_length():
    for level, size in enumerate(Modular().sizes, start=1):
        rows = drawn(Modular(), level, 2000)
        by_difficulty = {d: [p for p in rows if p.columns["hidden_difficulty"] == d] for d in MODULI}
        assert all(len(found) > 550 for found in by_difficulty.values())
        shapes = {d: {re.sub(r"\d", "9", p.prompt) for p in found} for d, found in by_difficulty.items()}
        assert all(shape == {f"({'9' * size}+{'9' * size})%99="} for shape in shapes.values())
        for difficulty, found in by_difficulty.items():
            assert {integers(p.prompt)[2] for p in found} == set(MODULI[difficulty])
            terms = [integers(p.prompt)[0] for p in found]
            assert abs(sum(terms) / len(terms) / (5.5 * 10 ** (size - 1)) - 1) < 0.1, "operands tell nothing"


def test_what_a_remainder_takes_grows_with_the_difficulty():
    numbers = range(10_000)
    assert all(n % m == n % 10 for n in numbers for m in MODULI[1])
    for modulus in MODULI[2]:
        last_two = all(n % modulus == n % 100 % modulus for n in numbers)
        pairs = all(n % modulus == (n // 100 + n % 100) % modulus for n in numbers)
        assert last_two or pairs, modulus
    for modulus in MODULI[3]:
        assert 100 % modulus not in (0, 1) and 1000 % modulus not in (0, 1), modulus


def test_long_multiplication_is_written_out():
    task = Multiplication(sizes=(3,))
    found = {p.prompt: p.completion for p in map(task.draw, [3] * 2000, map(random.Random, range(2000)))}
    for prompt, completion in found.items():
        a, b = integers(prompt)
        terms = [a * int(d) * 10**i for i, d in enumerate(reversed(str(b)))]
        assert completion == (f"{terms[0]}+{terms[1]}={terms[0] + terms[1]}+{terms[2]}={math.prod((a, b))}")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: Sorting(sizes=(3, 12), largest=10), "only 11 different numbers"),
        (lambda: Counting(symbols="aab"), "different visible characters"),
        (lambda: Reversal(letters="ab="), "none of them '='"),
        (lambda: Countdown(operators=("*",), limit=3).draw(4, random.Random(0)), "raise limit or allow more operators"),
    ],
)
def test_options_that_admit_no_problem_are_told(task, message):
    with pytest.raises(UserError, match=message):
        task()


def test_brackets_stand_where_they_are_needed_and_nowhere_else():
    rng = random.Random(3)
    for _ in range(3000):
        problem = Countdown().draw(4, rng)
        for i, c in enumerate(problem.answer):
            if c == "(":
                depth, j = 1, i
                while depth:
                    j += 1
                    depth += {"(": 1, ")": -1}.get(problem.answer[j], 0)
                bare = problem.answer[:i] + problem.answer[i + 1 : j] + problem.answer[j + 1 :]
                assert ast.dump(ast.parse(bare)) != ast.dump(ast.parse(problem.answer)), problem


def test_levels_that_are_few_are_listed_and_others_measured():
    first, second, third = level_table(Reversal())
    assert first["floor_exact"] and second["floor_exact"] and not third["floor_exact"]
    assert second["problems"] == ENUMERATED and third["floor"] >= 1 / SAMPLED
    assert set(first["example"]) == {"prompt", "answer", "completion"}
