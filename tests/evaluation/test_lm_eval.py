"""Our GSM8K against lm-eval's own task, filters and metric, on stored completions of many styles to real problems.

Where the two disagree is written down below, by style, with the reason; everywhere else every single verdict is equal.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from alignment.evaluation.benchmarks import choose
from alignment.scoring import Scorer
from alignment.types import Group, Prompt
from tests.evaluation.evaluated import rollout

lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "alignment-rl[eval]"')
PROBLEMS = 40


def gold(row):
    return row["answer"].rpartition("#### ")[2]


def plain(row):
    return gold(row).replace(",", "")


def wrong(row):
    return str(int(plain(row)) + 1)


def reasoning(row):
    return row["answer"].rpartition("####")[0].strip()


STYLES = {
    "gold solution": lambda r: r["answer"],
    "hash": lambda r: f"So it is.\n#### {plain(r)}",
    "hash, commas": lambda r: f"#### {int(plain(r)):,}",
    "hash, full stop": lambda r: f"#### {plain(r)}.",
    "hash, dollar": lambda r: f"#### ${plain(r)}",
    "hash, decimals": lambda r: f"#### {plain(r)}.00",
    "hash, unit": lambda r: f"#### {plain(r)} apples",
    "hash, wrong": lambda r: f"#### {wrong(r)}",
    "hash, minus": lambda r: f"#### -{plain(r)}",
    "hash, twice": lambda r: f"#### {wrong(r)}\nNo, I forgot one.\n#### {plain(r)}",
    "hash, more after it": lambda r: f"#### {plain(r)}\n\nQ: What are 3 and 4? A: 7",
    "answer is": lambda r: f"{reasoning(r)}\nThe answer is {plain(r)}.",
    "answer is, dollar": lambda r: f"The answer is ${int(plain(r)):,}.",
    "answer is, unit": lambda r: f"The answer is {plain(r)} dollars.",
    "answer is, wrong": lambda r: f"The answer is {wrong(r)}.",
    "answer is, dots": lambda r: f"The answer is {plain(r)}...",
    "answer is, more after it": lambda r: f"The answer is {plain(r)}. I checked it 3 times.",
    "answer is, bold": lambda r: f"The answer is **{plain(r)}**.",
    "answer is, bold sentence": lambda r: f"**The answer is {plain(r)}**",
    "answer is, heading": lambda r: f"{reasoning(r)}\n\n**Final Answer:** {plain(r)}",
    "answer is, quotes": lambda r: f'The answer is "{plain(r)}".',
    "answer is, code": lambda r: f"The answer is `{plain(r)}`.",
    "answer is, fraction": lambda r: f"The answer is {2 * int(plain(r))}/2.",
    "box": lambda r: f"{reasoning(r)} It is $\\boxed{{{plain(r)}}}$.",
    "box, dollar": lambda r: f"It is \\boxed{{\\${plain(r)}}}",
    "box, commas": lambda r: f"It is \\boxed{{{int(plain(r)):,}}}.",
    "box, wrong": lambda r: f"It is \\boxed{{{wrong(r)}}}.",
    "box, then words": lambda r: f"\\boxed{{{plain(r)}}}, which took 99 steps",
    "box, the second": lambda r: f"\\boxed{{{wrong(r)}}} no, wait: \\boxed{{{plain(r)}}}",
    "box, not closed": lambda r: f"It is \\boxed{{{plain(r)}",
    "tag": lambda r: f"<answer>{plain(r)}</answer>",
    "last number": lambda r: f"With 2 and 3 it makes {plain(r)} in all",
    "last number, wrong": lambda r: f"It makes {plain(r)}, not {wrong(r)}",
    "one number": lambda r: plain(r),
    "cut off": lambda r: reasoning(r),
    "junk": lambda r: "I do not know, sorry",
    "question": lambda r: r["question"],
    "nothing": lambda r: "",
}

NO_HASHES = "strict-match reads nothing but what follows '#### '"
STRICT = {
    "hash, dollar": "its pattern admits no $ after '#### '",
    "hash, decimals": "it compares texts: 18.00 is not 18",
    "hash, twice": "it reads the first answer, we the last",
    **{style: NO_HASHES for style in STYLES if style.startswith(("answer is", "box", "tag")) and "wrong" not in style},
    **dict.fromkeys(("last number", "one number", "cut off", "question"), NO_HASHES),
}
del STRICT["box, not closed"]  # both of us read nothing
FLEXIBLE = {
    "hash, decimals": "it compares texts: 18.00 is not 18",
    "hash, more after it": "it reads the last number of the whole text, we what follows '####'",
    "answer is, dots": "'18...' is a number to its pattern, and loses one dot only",
    "answer is, more after it": "it reads the last number of the whole text, we what follows 'the answer is'",
    "answer is, fraction": "it reads 36/2 as 2, we as 18",
    "box": "the '$.' after the box is a number to its pattern",
    "box, then words": "it reads the last number of the whole text, we the box",
    "box, not closed": "a box that was cut off may hold half a number: we read no answer",
    "cut off": "it compares texts: 16.00 is not 16",
}
"""Styles in which we and a filter of lm-eval disagree, and why. To us the completion is right and to lm-eval wrong,
except for ``box, not closed``."""
SOMETIMES = {"cut off", "question"}
"""Styles in which the problem decides: few solutions end with decimals, and hardly a question with its answer."""


@pytest.fixture(scope="module")
def verdicts(real_data, tmp_path_factory):
    """For each style, one ``(ours, strict-match, flexible-extract)`` for each problem."""
    rows = [json.loads(line) for line in (real_data / "gsm8k" / "test.jsonl").open(encoding="utf-8")][:PROBLEMS]
    stored = [{**row, "style": style, "completion": write(row)} for row in rows for style, write in STYLES.items()]
    theirs = by_lm_eval(stored, tmp_path_factory.mktemp("lm_eval"))
    found = defaultdict(list)
    for row, ours, strict, flexible in zip(stored, by_us(stored), *theirs, strict=True):
        found[row["style"]].append((ours, strict, flexible))
    return dict(found)


def by_us(stored):
    (benchmark,) = choose(["gsm8k"])
    groups = [
        Group(0, Prompt("0", {"prompt": row["question"], "answer": row["answer"]}), (rollout(row["completion"]),))
        for row in stored
    ]
    with Scorer([benchmark.reward]) as scorer:
        return [bool(group.rollouts[0].correct) for group in scorer.score(groups)]


def by_lm_eval(stored, folder):
    """Verdicts of lm-eval's ``gsm8k``, its prompt and filters and metric unchanged, on local rows without examples."""
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Stored(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [request.doc["completion"] for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stored))
    own = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = {k: v for k, v in yaml.safe_load(own.read_text()).items() if k not in ("dataset_name", "tag")}
    files = {split: str(folder / "rows.jsonl") for split in ("train", "test")}
    task |= {"task": "gsm8k_local", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "num_fewshot": 0}
    (folder / "gsm8k_local.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(Stored(), tasks=["gsm8k_local"], task_manager=manager, bootstrap_iters=0)
    assert found is not None
    verdicts = {"strict-match": {}, "flexible-extract": {}}
    for sample in found["samples"]["gsm8k_local"]:
        verdicts[sample["filter"]][sample["doc_id"]] = bool(sample["exact_match"])
    return [[by_row[i] for i in range(len(stored))] for by_row in verdicts.values()]


@pytest.mark.parametrize(("index", "listed"), [(1, STRICT), (2, FLEXIBLE)], ids=["strict-match", "flexible-extract"])
def test_verdicts_differ_where_it_is_written_down_and_nowhere_else(verdicts, index, listed):
    differing = {style: [v for v in found if v[0] != v[index]] for style, found in verdicts.items()}
    assert {style for style, found in differing.items() if found} == listed.keys()
    for style in listed:
        assert {v[0] for v in differing[style]} == {style != "box, not closed"}, style
        if style not in SOMETIMES:
            # Not all: the last of "3 times" is right where the answer is 3.
            assert len(differing[style]) >= 0.9 * PROBLEMS, style


def test_how_often_they_agree(verdicts):
    def rate(styles, index):
        found = [v for style in styles for v in verdicts[style]]
        return sum(v[0] == v[index] for v in found) / len(found)

    hashes = [style for style in STYLES if style.startswith(("gold", "hash"))]
    assert rate(hashes, 1) == pytest.approx(8 / 11)
    assert rate(STYLES, 2) > 0.75
    plain_ones = [style for style in STYLES if style not in FLEXIBLE]
    assert len(plain_ones) == 29 and rate(plain_ones, 2) == 1.0
    assert all(all(v) for v in verdicts["gold solution"]) and not any(any(v) for v in verdicts["junk"])


def test_no_wrong_answer_is_right_to_us(verdicts):
    for style in (
        "hash, wrong",
        "hash, minus",
        "answer is, wrong",
        "box, wrong",
        "last number, wrong",
        "junk",
        "nothing",
    ):
        assert not any(ours for ours, _, _ in verdicts[style]), style
