"""reasoning-gym: every task that may be named is scored as it should be; the others are refused, with the reason."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.data.reasoning_gym import ReasoningGym as Source
from alignment.data.reasoning_gym_tasks import ALLOWED, EXCLUDED, make, refusal
from alignment.data.sources import sources
from alignment.errors import UserError
from alignment.reward_registry import RewardSpec
from alignment.scoring import Scorer
from alignment.types import Prompt
from rewards import ReasoningGym

HERE = Path()


@pytest.fixture(scope="module")
def loaded():
    return {task: Source(task, "train", size=2).load(HERE).prompts for task in ALLOWED}


def judge(rows, completions):
    columns = {name: [row[name] for row in rows] for name in ("task", "entry")}
    return ReasoningGym()(prompts=[row["prompt"] for row in rows], completions=completions, **columns)


def test_every_task_of_the_package_is_allowed_or_excluded_for_one_reason():
    from reasoning_gym.factory import DATASETS

    excluded = [name for names in EXCLUDED.values() for name in names]
    assert len(set(excluded)) == len(excluded) and not set(excluded) & set(ALLOWED)
    assert sorted([*excluded, *ALLOWED]) == sorted(DATASETS), "a newer reasoning-gym: judge its new tasks first"
    assert list(ALLOWED) == sorted(ALLOWED) and len(ALLOWED) == 69


def test_the_own_answer_scores_1(loaded):
    for task, prompts in loaded.items():
        rows = [json.loads(json.dumps(p.row)) for p in prompts]
        assert [s.value for s in judge(rows, [row["completion"] for row in rows])] == [1.0, 1.0], task
        assert [s.value for s in judge(rows, [f"\n {row['completion']} \n" for row in rows])] == [1.0, 1.0], task
        assert ReasoningGym().check(rows) == [None, None], task


HOSTILE = {
    "nothing": "",
    "space": " \n",
    "junk": "foo bar baz",
    "0": "0",
    "1": "1",
    "nan": "nan",
    "inf": "inf",
    "none": "None",
    "empty list": "[]",
    "mapping": '{"a": 1}',
    "huge": "1e999999999",
    "tiny": "1e-999999999",
    "digits": "9" * 5000,
    "power": "9**9**9",
    "deep": "[" * 5000,
    "code": "__import__('os').abort()",
    "call": "[open('/proc/self/nothing', 'w')]",
    "zero byte": "\x00",
    "unicode": "²①٣",
    "long": "a " * 20_000,
}


def test_nothing_else_scores_1_and_nothing_fails(loaded):
    """True exceptions: a constant that equals the answer, as a text or as the number that the task asks for."""
    for task, prompts in loaded.items():
        rows = [p.row for p in prompts]
        for row, other in zip(rows, reversed(rows), strict=True):
            hostile = {**HOSTILE, "question": row["prompt"], "another's": other["answer"]}
            for name, score in zip(hostile, judge([row] * len(hostile), list(hostile.values())), strict=True):
                assert score.status in ("ok", "wrong", "unparseable"), (task, name, score)
                same = hostile[name] == row["answer"] or is_same_number(hostile[name], row["answer"])
                assert score.value == 0.0 or same, (task, name, row["answer"], score)


def is_same_number(text: str, answer: str) -> bool:
    try:
        return abs(float(text) - float(answer)) < 1e-2
    except ValueError:
        return False


def test_a_partial_mark_is_no_mark():
    entry = {"question": "?", "answer": "abcdef", "metadata": {}, "config": {}}
    row = {"prompt": "?", "task": "caesar_cipher", "entry": entry}
    assert make("caesar_cipher", {}).score_answer("abcdef and more", entry) > 0
    right, more = judge([row, row], ["abcdef", "abcdef and more"])
    assert (right.value, more.value, more.status) == (1.0, 0.0, "wrong")


def test_the_answer_may_stand_in_tags():
    prompt = Source("chain_sum", "train", size=1).load(HERE).prompts[0]
    answer = prompt.row["answer"]
    given = [
        f"<answer>1</answer> so <answer> {answer}\n</answer>",
        f"{answer}",
        f"<answer>{answer}",
        "<answer></answer>",
    ]
    columns = {"task": ["chain_sum"] * 4, "entry": [prompt.row["entry"]] * 4}
    scores = ReasoningGym(answer_in="tags")(prompts=[""] * 4, completions=given, **columns)
    assert [s.status for s in scores] == ["ok", "unparseable", "unparseable", "unparseable"]
    assert [s.value for s in scores] == [1.0, 0.0, 0.0, 0.0] and scores[0].answer == answer


CODE = """
import hashlib, json, sys
from alignment.data.reasoning_gym_tasks import make
items = [make(task, {}, 3_000_000, 100)[i] for task in sys.argv[1:] for i in range(4)]
sys.stdout.write(hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest())
"""


def test_problems_do_not_hang_on_the_hash_seed_of_the_process():
    found = set()
    tasks = [task for task in ALLOWED if task not in ("sudoku", "quantum_lock", "advanced_geometry")]  # slow ones
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CODE, *tasks]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        found.add(done.stdout[-64:])  # some print when they make a problem
    items = [make(task, {}, 3_000_000, 100)[i] for task in tasks for i in range(4)]
    assert found == {hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()}


@pytest.mark.parametrize("task", ["chain_sum", "maze", "spell_backward"])
def test_splits_and_seeds_share_no_question(task):
    loads = [
        {p.row["prompt"] for p in Source(task, split, size=60, seed=seed).load(HERE).prompts}
        for split, seed in (("train", 0), ("train", 1), ("demonstrations", 0), ("eval", 0), ("eval", 1))
    ]
    train, evaluation = loads[0] | loads[1], loads[3] | loads[4]
    assert all(len(load) == 60 for load in loads), "no question twice"
    assert not train & loads[2] and not train & evaluation and not loads[2] & evaluation
    assert len(loads[0] & loads[1]) < 20 and len(loads[3] & loads[4]) < 20, "seeds next to each other are not shifted"


def test_nothing_is_printed(capfd):
    prompts = (
        Source("bf", "train", size=3).load(HERE).prompts + Source("tower_of_hanoi", "train", size=1).load(HERE).prompts
    )
    judge([p.row for p in prompts], ["Move disk 1 from Peg 9 to Peg 8"] * 4)
    assert capfd.readouterr().out == ""


def test_fewer_problems_are_the_first_of_more():
    more = Source("products", "train", size=30).load(HERE)
    assert Source("products", "train", size=20).load(HERE).prompts == more.prompts[:20]
    assert more.origin == "reasoning_gym/products" and more.prompts[0].id.startswith("reasoning_gym/products/")


def test_a_task_with_few_problems_says_how_many_it_gave():
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert len(Source("chain_sum", "eval", size=20, config=config).load(HERE).prompts) == 20
    with pytest.raises(
        UserError, match=r"chain_sum gave \d+ different problems for split 'eval' in 7,000 draws, fewer"
    ):
        Source("chain_sum", "eval", size=100, config=config).load(HERE)


def test_the_largest_seed_works_for_every_task():
    for task in ALLOWED:
        assert Source(task, "train", size=1, seed=4_000).load(HERE).prompts


@pytest.mark.parametrize("reason", EXCLUDED)
def test_an_excluded_task_is_refused_with_the_reason(reason):
    for task in EXCLUDED[reason]:
        with pytest.raises(ValueError, match=reason.replace("?", r"\?")):
            sources.build({"name": "reasoning_gym", "task": task, "split": "train"})
        row = {"prompt": "?", "task": task, "entry": {"question": "?", "answer": "1", "metadata": {}}}
        (fault,) = ReasoningGym().check([row])
        assert fault is not None and reason in fault
        with pytest.raises(UserError, match="cannot be used"):
            make(task, {})


def test_other_mistakes_are_told():
    assert "not one of the reasoning-gym tasks" in str(refusal("chainsum")) and refusal(["gcd"]) is not None
    with pytest.raises(UserError, match=r"gcd has no option 'seed' \(options: .*min_numbers"):
        Source("gcd", "train", config={"seed": 3}).load(HERE)
    with pytest.raises(UserError, match=r"gcd refuses {'min_numbers': 0}"):
        Source("gcd", "train", config={"min_numbers": 0}).load(HERE)
    with pytest.raises(ValueError, match="size"):
        sources.build({"name": "reasoning_gym", "task": "gcd", "split": "train", "size": 0})
    faults = ReasoningGym().check([{"prompt": "x"}, {"task": "gcd"}, {"task": "gcd", "entry": {"question": 1}}])
    assert all(faults) and "not one of" in faults[0] and "'entry' must hold" in faults[1] == faults[2]
    entry = make("gcd", {}, 0, 1)[0]
    (fault,) = ReasoningGym().check([{"task": "gcd", "entry": {**entry, "answer": "x"}}])
    assert fault is None, "the scorer compares with the row's answer"


def test_without_the_package_the_extra_is_named(monkeypatch):
    from alignment.data import reasoning_gym_tasks

    reasoning_gym_tasks._made.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(UserError, match=r'pip install "alignment-rl\[reasoning-gym\]"'):
        Source("gcd", "train").load(HERE)
    row = {"task": "gcd", "entry": {"question": "?", "answer": "1", "metadata": {}}}
    (fault,) = ReasoningGym().check([row])
    assert fault is not None and "reasoning-gym is not installed" in fault


def test_rows_are_checked_in_the_scoring_workers():
    good = Source("maze", "train", size=1).load(HERE).prompts[0]
    bad = Prompt("x", {"prompt": "?", "task": "countdown", "entry": {}})
    with Scorer([RewardSpec("rg", function=ReasoningGym())], timeout_s=60) as scorer:
        fine, told = scorer.faults([good, bad])
    assert fine is None and told is not None and "its scorer runs the completion as Python" in told


def test_a_scorer_that_fails_is_an_error_and_not_a_zero():
    broken = {"question": "?", "answer": None, "metadata": None}
    (score,) = judge([{"prompt": "?", "task": "leg_counting", "entry": broken}], ["12"])
    assert (score.value, score.status) == (None, "error") and "the scorer of leg_counting failed" in score.detail
