"""Definitions of benchmarks, on real rows where they are; which problems are taken; and scores from records by hand."""

import json

import pytest

from alignment.errors import UserError
from alignment.evaluation.benchmarks import STEP_BY_STEP, TaskBenchmark, benchmarks, choose
from alignment.evaluation.data import limited, named
from alignment.evaluation.results import accuracies, record, summarise
from alignment.scoring import Scorer
from alignment.tasks.task import split_of, tasks
from alignment.types import Group, Prompt, Score
from tests.evaluation.evaluated import rollout

FILES = {"gsm8k": "gsm8k/test.jsonl", "math500": "math500/test.jsonl", "olympiadbench": "olympiadbench/test.jsonl"}
ROWS = {"gsm8k": 1319, "math500": 500, "olympiadbench": 675}


def group(prompt, *rollouts):
    return Group(0, prompt, rollouts)


def scored(benchmark, prompt, *completions):
    """Status and answer of each completion by the benchmark's reward, in a scoring process."""
    with Scorer([benchmark.reward]) as scorer:
        (found,) = scorer.score([group(prompt, *(rollout(text) for text in completions))])
    return [(next(iter(r.scores.values())).status, next(iter(r.scores.values())).answer) for r in found.rollouts]


@pytest.mark.parametrize("name", FILES)
def test_definitions_read_the_real_rows_and_judge_them(name, real_data):
    (benchmark,) = choose([name], {name: str(real_data / FILES[name])})
    dataset = benchmark.load()
    assert len(dataset.prompts) == ROWS[name] and not dataset.bad
    assert all(p.row["prompt"].endswith(STEP_BY_STEP) and p.row["answer"] for p in dataset.prompts)
    assert STEP_BY_STEP.endswith("and put your final answer within \\boxed{}.")
    with Scorer([benchmark.reward]) as scorer:
        unusable = sum(fault is not None for fault in scorer.faults(dataset.prompts))
    assert unusable <= 2


def test_gsm8k_reads_a_box_or_what_is_last(real_data):
    (benchmark,) = choose(["gsm8k"], {"gsm8k": str(real_data / FILES["gsm8k"])})
    prompt = benchmark.load().prompts[0]  # #### 18
    completions = ["\\boxed{18}", "The answer is 18.", "a\n#### 18", "18 eggs, then 4", "\\boxed{4} and 18", "no idea"]
    right = ("ok", "18")
    wrong = ("wrong", "4")
    assert scored(benchmark, prompt, *completions) == [right, right, right, wrong, wrong, ("unparseable", None)]


def test_math500_wants_a_box_and_compares_expressions(real_data):
    (benchmark,) = choose(["math500"], {"math500": str(real_data / FILES["math500"])})
    prompt = benchmark.load().prompts[0]  # \left( 3, \frac{\pi}{2} \right)
    completions = ["so \\boxed{(3, \\pi/2)}", "\\boxed{(3, 90)}", "It is (3, \\pi/2)"]
    assert [status for status, _ in scored(benchmark, prompt, *completions)] == ["ok", "wrong", "unparseable"]


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_is_a_benchmark_of_held_out_problems_of_all_levels(name):
    (benchmark,) = choose([name])
    dataset = benchmark.load()
    task = tasks.build(name)
    rows = [p.row for p in dataset.prompts]
    assert {row["level"] for row in rows} == set(range(1, len(task.sizes) + 1))
    assert len({row["prompt"] for row in rows}) == len(rows) >= 200
    assert max(sum(row["level"] == level for row in rows) for level in {row["level"] for row in rows}) <= 100
    assert [p.row for p in benchmark.load().prompts] == rows, "the same problems each time"
    for level, size in enumerate(task.sizes, start=1):
        own = {row["prompt"] for row in rows if row["level"] == level}
        space = getattr(task, "space", None)
        if space is not None and (task.count(size) or 10**6) < 20_000:
            assert own <= {p.prompt for p in space(size) if split_of(name, p) == "eval"}
    demonstration = [row["completion"] for row in rows][-1]
    assert scored(benchmark, dataset.prompts[-1], demonstration, "junk")[0][0] == "ok"


def test_options_of_the_command_line_change_a_definition():
    gsm8k, gcd = choose(["gsm8k", "gcd"], samples=4, temperature=0.5, max_tokens=7)
    for one in (gsm8k, gcd):
        assert (one.samples, one.sampling.temperature, one.sampling.max_tokens) == (4, 0.5, 7)
    plain = choose(["math500"])[0]
    assert (plain.samples, plain.sampling.temperature, plain.sampling.top_p) == (4, 0.6, 0.95)
    assert choose(["gsm8k"])[0].sampling.temperature == 0 and choose(["gsm8k"])[0].samples == 1
    source = gsm8k.resolved()["source"]
    assert (source["path"], source["config"], source["split"], source["revision"]) == (
        "openai/gsm8k",
        "main",
        "test",
        None,
    )
    assert gsm8k.resolved()["reward"]["answer_in"] == "box_or_number"
    assert json.loads(json.dumps(gcd.resolved())) == gcd.resolved()
    easy = TaskBenchmark(tasks.build("gcd"), levels=(1,), size=5).data
    assert {p.row["level"] for p in easy.load(None).prompts} == {1}  # pyright: ignore[reportArgumentType]
    built = benchmarks.build({"name": "gsm8k", "samples": 2, "revision": "e53f048"})
    assert built.samples == 2 and built.data.revision == "e53f048"  # pyright: ignore[reportAttributeAccessIssue]


def test_settings_change_any_option_of_a_benchmark():
    settings = {
        "gsm8k": {"revision": "e53f048", "samples": 2, "temperature": 1.0, "top_p": 0.5},
        "gcd": {"levels": [1]},
    }
    gsm8k, gcd = choose(["gsm8k", "gcd"], settings=settings, max_tokens=9)
    found = gsm8k.resolved()
    assert (found["source"]["revision"], found["samples"]) == ("e53f048", 2)
    assert (found["sampling"]["top_p"], found["sampling"]["max_tokens"]) == (0.5, 9)
    assert {p.row["level"] for p in gcd.load().prompts} == {1} and gcd.resolved()["source"]["levels"] == [1]
    assert choose(["gsm8k"], settings={"gsm8k": {"samples": 1}})[0].samples == 1


def test_the_bare_question_is_right_where_its_last_number_is_the_answer(real_data):
    """What reading the last number costs: a model that repeats the question gets 2.1 %."""
    (benchmark,) = choose(["gsm8k"], {"gsm8k": str(real_data / FILES["gsm8k"])})
    rows = [p.row for p in benchmark.load().prompts]
    questions = [row["question"] for row in rows]
    reward = benchmark.reward.function
    assert reward is not None
    scores = reward(prompts=[row["prompt"] for row in rows], completions=questions, answer=[r["answer"] for r in rows])
    assert sum(score.value for score in scores) == 28 and len(scores) == 1319  # pyright: ignore


def test_samples_that_would_all_be_equal_are_refused():
    with pytest.raises(UserError, match="gsm8k: 3 samples at temperature 0 are all the same"):
        choose(["gsm8k"], samples=3)


def test_problems_are_named_by_what_they_say_and_a_larger_limit_adds():
    prompts = [Prompt(str(i), {"prompt": text}) for i, text in enumerate("abcdefghab")]
    names = [p.id for p in named(prompts)]
    assert len(set(names)) == 10 and names[8] == f"{names[0]}-1"
    assert [p.id for p in named(prompts[::-1])][0] == names[1], "the place in the file has no part in it"
    everything = named(prompts)
    chosen = [{p.id for p in limited(everything, n)} for n in range(1, 11)]
    assert [len(c) for c in chosen] == list(range(1, 11))
    assert all(a < b for a, b in zip(chosen, chosen[1:], strict=False))
    assert limited(everything, None) == everything and limited(everything, 99) == everything
    order = [everything.index(p) for p in limited(everything, 5)]
    assert order == sorted(order)


def lines(*problems):
    """Records of problems, each a list of ``(status, answer)``; ``ok`` is right, ``error`` has no verdict."""
    found = []
    for i, samples in enumerate(problems):
        values = {"ok": 1.0, "wrong": 0.0, "unparseable": 0.0}
        rollouts = [rollout("ab", Score(values.get(status), status, answer=answer)) for status, answer in samples]
        found.append(record(group(Prompt(str(i), {"prompt": "?", "answer": "1"}), *rollouts)))
    return found


def test_scores_by_hand():
    right, wrong, other, nothing = ("ok", "1"), ("wrong", "2"), ("wrong", "3"), ("unparseable", None)
    found = summarise(lines([right, wrong, wrong, nothing], [right, right, wrong, other]), 4)
    values = {name: score["value"] for name, score in found["scores"].items()}
    assert values == pytest.approx(
        {
            "avg@4": 0.375,
            "pass@1": 0.375,
            "pass@2": (0.5 + 5 / 6) / 2,
            "pass@4": 1.0,
            "maj@1": 0.375,
            # Pairs of 1, 2, 2, none: 12 12 halves, 1- wins; of 1, 1, 2, 3: 11 wins, four halves.
            "maj@2": ((0.5 + 0.5 + 1) / 6 + (1 + 4 * 0.5) / 6) / 2,
            "maj@4": 0.5,
        }
    )
    assert (found["problems"], found["samples"], found["unscored"]) == (2, 4, 0)
    assert found["unparseable"] == 1 / 8 and found["truncated"] == 0 and found["length"] == 2
    assert found["statuses"] == {"ok": 3, "unparseable": 1, "wrong": 4}


def test_samples_without_a_verdict_are_counted_and_in_no_score():
    right, wrong, failed, skipped = ("ok", "1"), ("wrong", "2"), ("error", None), ("skipped", None)
    records = lines([right, failed], [wrong, right], [failed, skipped])
    found = summarise(records, 2)
    assert found["unscored"] == 3
    scores = found["scores"]
    assert (scores["avg@2"]["value"], scores["avg@2"]["problems"]) == (0.75, 2)
    assert (scores["pass@2"]["value"], scores["pass@2"]["problems"]) == (1.0, 1), "two verdicts are needed"
    assert accuracies(records) == {"0": 1.0, "1": 0.5}
    nothing = summarise(lines([failed]), 1)
    assert nothing["scores"]["avg@1"]["problems"] == 0
    assert nothing["scores"]["avg@1"]["value"] != nothing["scores"]["avg@1"]["value"], "no verdict is no 0"
    assert nothing["scores"]["avg@1"]["interval"] == [0.0, 1.0]


def test_there_is_no_majority_where_the_reward_does_not_say_what_it_read():
    scores = summarise(lines([("ok", None), ("wrong", None)]), 2)["scores"]
    assert "pass@2" in scores and not any(name.startswith("maj") for name in scores)
