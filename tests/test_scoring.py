"""Scoring on real processes: a failure is no wrong answer, costs its timeout and no more, and leaves nothing behind."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.errors import UserError
from alignment.reward_registry import RewardSpec, reward_functions
from alignment.scoring import Scorer, ScoringFailed, failed_share, refuse_failures
from alignment.types import Group, Prompt, Rollout, SamplingParams, Score
from rewards import ExactMatch

EXACT = RewardSpec("exact_match", function=ExactMatch())

# What the tests' reward functions do depends on the text of the completion.
LAB = """
    import asyncio, math, os, signal, subprocess, sys, time

    def act(text):
        if text == "raise":
            raise KeyError("no such thing")
        if text == "exit":
            sys.exit(3)
        if text == "die":
            os._exit(7)
        if text == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if text == "sleep":
            time.sleep(1000)
        if text == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if text == "spin":
            for number in range(1, 65):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError):
                    pass
            while True:
                pass
        if text == "regex":
            import re
            re.match("(a+)+$", "a" * 60 + "b")
        if text == "child":
            child = subprocess.Popen(["sleep", "987654"])
            with open(os.path.join(os.path.dirname(__file__), "children"), "a") as file:
                file.write(f"{child.pid}\\n")
            time.sleep(1000)
        if text == "flood":
            for _ in range(2000):
                print("x" * 10_000)
        if text == "allocate":
            bytearray(1 << 62)
        special = {"nan": math.nan, "inf": math.inf, "none": None, "text": "1.0", "huge": 10**400, "list": [1.0]}
        return special[text] if text in special else float(len(text))

    def reward(completions, **columns):
        return [act(text) for text in completions]

    async def waits(completions, **columns):
        async def one(text):
            await asyncio.sleep(1000 if text == "hang" else 0.01)
            return act(text)
        return await asyncio.gather(*map(one, completions))

    class Waits:
        async def __call__(self, completions, **columns):
            return [act(text) for text in completions]

    def short(completions, **columns):
        return [1.0]

    def long(completions, **columns):
        return [1.0] * (len(completions) + 1)

    def rank(completions, level, **columns):
        order = sorted(completions, key=len)
        [act(text) for text in completions]
        ranks = [float(order.index(text)) for text in completions]
        completions.sort()
        level[0].clear()
        return ranks

    def slow(completions, **columns):
        time.sleep(0.8)
        return [float(len(completions))] * len(completions)

    def process(completions, **columns):
        return [float(os.getpid())] * len(completions)

    def seen(prompts, completions, completion_ids, length_tokens, finish_reason, level, trainer_state, log_metric,
             log_extra, **columns):
        log_metric("m", 1.0)
        log_extra("c", completions)
        assert "prompt" not in columns and "completion" not in columns, columns
        assert completion_ids == [[5, 6, 7]] * len(completions), completion_ids
        assert (trainer_state.global_step, trainer_state.max_steps) == (4, 9)
        assert finish_reason == ["stop"] * len(completions)
        return [100.0 * level[0] + 10 * length_tokens[0] + len(prompts[0])] * len(completions)

    def strict(completions, level):
        return [float(n) for n in level]

    def scaled(completions, scale=1.0, **columns):
        return [scale * len(text) for text in completions]

    def make(base):
        def made(completions, **columns):
            return [base + len(text) for text in completions]
        return made

    def roles(completions, **columns):
        return [1.0 if c[0]["role"] == "assistant" and c[0]["content"] == "abc" else 0.0 for c in completions]
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    (tmp_path / "lab.py").write_text(textwrap.dedent(LAB))
    return tmp_path


@pytest.fixture
def scorer(lab: Path) -> Iterator[Callable[..., Scorer]]:
    made: list[Scorer] = []

    def make(*specs: RewardSpec | str, **options: Any) -> Scorer:
        known = [RewardSpec(s, function=f"lab.{s}") if isinstance(s, str) else s for s in specs]
        made.append(Scorer(known, **{"timeout_s": 1.0, "sys_path": [str(lab)], **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def group(texts: Sequence[str], uid: int = 0, prompt: Any = "say", **row: Any) -> Group:
    def rollout(i: int, text: str) -> Rollout:
        sampling = SamplingParams(8)
        mask = (True, True, False)
        fields = {"loss_mask": mask, "behaviour_logp": (0.0,) * 3, "seed": i, "sampler": "s", "versions": ((0, 0),)}
        return Rollout(
            f"{uid}/{i}", f"p{uid}", (1,), (5, 6, 7), text=text, finish_reason="stop", sampling=sampling, **fields
        )

    return Group(uid, Prompt(f"p{uid}", {"prompt": prompt, **row}), tuple(rollout(i, t) for i, t in enumerate(texts)))


def verdicts(scored: Group, column: str = "reward") -> list[tuple[float | None, str]]:
    return [(r.scores[column].value, r.scores[column].status) for r in scored.rollouts]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pids: Sequence[int], within_s: float = 5.0) -> bool:
    until = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


def pids_of(scorer: Scorer) -> list[int]:
    return [w.process.pid for w in scorer._pool._workers]


def children(of: int | None = None) -> set[int]:
    """Every process below this one, or below another."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, front = set(), {of or os.getpid()}
    while front:
        front = {pid for pid, parent in parents.items() if parent in front} - found
        found |= front
    return {pid for pid in found if alive(pid)}


@pytest.mark.parametrize(
    ("culprit", "status", "detail"),
    [
        ("die", "error", "exit code 7"),
        ("segfault", "error", "SIGSEGV"),
        ("sleep", "timeout", "no answer within 1 s"),
        ("stop", "timeout", "no answer within 1 s"),
        ("spin", "timeout", "no answer within 1 s"),
        ("regex", "timeout", "no answer within 1 s"),
    ],
)
def test_only_the_culprit_is_lost_with_its_worker(
    scorer: Callable[..., Scorer], culprit: str, status: str, detail: str
) -> None:
    with scorer("reward") as it:
        it.check()
        started = time.monotonic()
        (scored,) = it.score([group(["a", "bb", culprit, "ccc"])])
        took_s = time.monotonic() - started
        assert verdicts(scored) == [(1.0, "ok"), (2.0, "ok"), (None, status), (3.0, "ok")]
        assert detail in scored.rollouts[2].scores["reward"].detail
        assert [r.reward for r in scored.rollouts] == [1.0, 2.0, None, 3.0]
        assert not scored.rollouts[2].scored and scored.rollouts[0].scored
        assert took_s < 1.0 + 5.0
        assert verdicts(it.score([group(["four"])])[0]) == [(4.0, "ok")], "the pool goes on"


def test_what_a_function_may_get_wrong(scorer: Callable[..., Scorer]) -> None:
    expected = {
        "raise": ("error", "KeyError: 'no such thing' (lab.py:"),
        "exit": ("error", "SystemExit: 3"),
        "allocate": ("error", "MemoryError"),
        "nan": ("error", "returned nan"),
        "inf": ("error", "returned inf"),
        "huge": ("error", "OverflowError"),
        "text": ("error", "returned str, not a number"),
        "list": ("error", "returned list, not a number"),
        "none": ("skipped", ""),
    }
    with scorer("reward", timeout_s=5.0) as it:
        it.check()
        worker = pids_of(it)
        (scored,) = it.score([group(["a", *expected, "bb"])])
        assert pids_of(it) == worker, "nobody had to be killed"
    assert verdicts(scored) == [(1.0, "ok"), *((None, status) for status, _ in expected.values()), (2.0, "ok")]
    for rollout, (status, detail) in zip(scored.rollouts[1:-1], expected.values(), strict=True):
        assert detail in rollout.scores["reward"].detail, rollout.text
        assert rollout.reward is None and not rollout.scored, status


def test_several_culprits_cost_one_timeout(scorer: Callable[..., Scorer]) -> None:
    groups = [group(["a", "sleep", "bb", "sleep"], 0), group(["ccc", "sleep", "sleep", "sleep"], 1), group(["a"], 2)]
    with scorer("reward", timeout_s=10.0) as it:
        it.check()
        started = time.monotonic()
        scored = it.score(groups)
        took_s = time.monotonic() - started
    assert [verdicts(g) for g in scored] == [
        [(1.0, "ok"), (None, "timeout"), (2.0, "ok"), (None, "timeout")],
        [(3.0, "ok"), *[(None, "timeout")] * 3],
        [(1.0, "ok")],
    ]
    assert took_s < 10.0 + 20.0, "one after the other they would take 50 s and more"


def test_a_reward_that_always_hangs_is_given_up(scorer: Callable[..., Scorer]) -> None:
    groups = [group(["sleep"] * 8, uid) for uid in range(12)]
    with scorer("reward", RewardSpec("scaled", function="lab.scaled")) as it:
        it.check()
        started = time.monotonic()
        scored = it.score(groups)
        took_s = time.monotonic() - started
    assert {v for g in scored for v in verdicts(g)} == {(None, "timeout")}
    assert {v for g in scored for v in verdicts(g, "scaled")} == {(5.0, "ok")}
    assert "not tried after" in scored[-1].rollouts[-1].scores["reward"].detail
    assert took_s < 48.0, "one after the other they would take 96 s, and here there are two at a time at least"


def test_a_slow_function_is_cut_short_once_only(scorer: Callable[..., Scorer]) -> None:
    with scorer("slow", timeout_s=2.0) as it:  # 0.8 s for a call, a quarter of the timeout is 0.5 s
        first = it.score([group(["a", "b"])])
        second = it.score([group(["a", "b"])])
    assert verdicts(first[0], "slow") == [(1.0, "ok")] * 2
    assert verdicts(second[0], "slow") == [(2.0, "ok")] * 2


@pytest.mark.parametrize("name", ["short", "long"])
def test_wrong_length_is_an_error_of_every_completion(scorer: Callable[..., Scorer], name: str) -> None:
    with scorer(name) as it:
        (scored,) = it.score([group(["a", "bb"])])
    assert verdicts(scored, name) == [(None, "error")] * 2
    assert "values for 2 completions" in scored.rollouts[0].scores[name].detail


@pytest.mark.parametrize("name", ["waits", "Waits"])
def test_async_functions(scorer: Callable[..., Scorer], name: str) -> None:
    with scorer(name) as it:
        (scored,) = it.score([group(["a", "none", "raise", "bb"])])
    assert verdicts(scored, name) == [(1.0, "ok"), (None, "skipped"), (None, "error"), (2.0, "ok")]


def test_async_hang(scorer: Callable[..., Scorer]) -> None:
    with scorer("waits") as it:
        (scored,) = it.score([group(["a", "hang"])])
    assert verdicts(scored, "waits") == [(1.0, "ok"), (None, "timeout")]


def test_group_level_sees_everything_and_fails_whole(scorer: Callable[..., Scorer]) -> None:
    texts = [["ccc", "a", "bb"], ["a", "die", "bb"], ["raise", "b"]]
    with scorer(RewardSpec("rank", function="lab.rank", group_level=True), "scaled") as it:
        scored = it.score([group(t, uid, level=[1]) for uid, t in enumerate(texts)])
    assert verdicts(scored[0], "rank") == [(2.0, "ok"), (0.0, "ok"), (1.0, "ok")]
    assert verdicts(scored[1], "rank") == [(None, "error")] * 3
    assert verdicts(scored[2], "rank") == [(None, "error")] * 2
    untouched = [[(float(len(text)), "ok") for text in group] for group in texts]
    assert [verdicts(g, "scaled") for g in scored] == untouched, "rank sorted and cleared what it was given"


def test_reward_is_the_weighted_sum_of_what_applies(scorer: Callable[..., Scorer]) -> None:
    scaled = RewardSpec("scaled", 0.5, "lab.scaled", {"scale": 10})
    with scorer(RewardSpec("reward", 2.0, "lab.reward"), scaled) as it:
        (scored,) = it.score([group(["abc", "none", "nan"])])
        (nothing,) = it.score([group([])])
    assert [r.reward for r in scored.rollouts] == [2 * 3 + 0.5 * 30, 0.5 * 40, None]
    assert list(scored.rollouts[0].scores) == ["reward", "scaled"], "the recipe's order: the first counts as accuracy"
    assert nothing.rollouts == ()


def test_unscored_when_nothing_applies(scorer: Callable[..., Scorer]) -> None:
    with scorer("reward") as it:
        (scored,) = it.score([group(["none"])])
    assert scored.rollouts[0].reward is None and not scored.rollouts[0].scored
    assert failed_share([scored]) == 0.0


def test_environment_scores_count_by_declared_weight() -> None:
    given = {"tool": Score(1.0), "extra": Score(5.0)}
    bare = group(["3", "4"], answer="3")
    rollouts = tuple(replace(r, scores=given) for r in bare.rollouts)
    specs = [EXACT, RewardSpec("tool", 0.25), RewardSpec("gone")]
    with Scorer(specs) as it:
        (scored,) = it.score([Group(0, bare.prompt, rollouts)])
    assert [r.reward for r in scored.rollouts] == [1.25, 0.25]
    assert list(scored.rollouts[0].scores) == ["exact_match", "tool", "gone"]  # "extra" is not listed
    assert scored.rollouts[0].scores["gone"].status == "skipped"
    with Scorer(specs[1:]) as it:  # no function, no process
        assert it.score([Group(0, bare.prompt, rollouts)])[0].rollouts[0].reward == 0.25
        assert pids_of(it) == []


def test_what_functions_are_given(scorer: Callable[..., Scorer]) -> None:
    with scorer("seen", "strict") as it:
        (scored,) = it.score([group(["a", "bb"], level=3, completion="not this")], step=4, max_steps=9)
    assert [r.scores["seen"] for r in scored.rollouts] == [Score(300.0 + 20 + 3)] * 2
    assert verdicts(scored, "strict") == [(3.0, "ok")] * 2, "without **columns it gets what it names"


def test_options_make_or_complete_a_function(scorer: Callable[..., Scorer]) -> None:
    made = RewardSpec("made", function="lab.make", options={"base": 10})
    scaled = RewardSpec("scaled", function="lab.scaled", options={"scale": 3})
    with scorer(made, scaled) as it:
        (scored,) = it.score([group(["abc"], scale="a column of that name")])
    assert [s.value for s in scored.rollouts[0].scores.values()] == [13.0, 9.0]


def test_chat_prompts_give_chat_completions(scorer: Callable[..., Scorer]) -> None:
    chat = group(["abc", "no"], prompt=[{"role": "user", "content": "hi"}], answer="abc")
    with scorer("roles", EXACT) as it:
        (scored,) = it.score([chat])
    assert verdicts(scored, "roles") == verdicts(scored, "exact_match")[:1] + [(0.0, "ok")]
    assert verdicts(scored, "exact_match") == [(1.0, "ok"), (0.0, "wrong")]


def test_flood_of_output_is_harmless(scorer: Callable[..., Scorer], capfd: pytest.CaptureFixture[str]) -> None:
    with scorer("reward") as it:
        (scored,) = it.score([group(["flood", "a"])])
    assert verdicts(scored) == [(5.0, "ok"), (1.0, "ok")]
    assert capfd.readouterr().out == ""


def test_off_the_main_thread(scorer: Callable[..., Scorer]) -> None:
    results: list[Group] = []
    with scorer("reward") as it:
        thread = threading.Thread(target=lambda: results.extend(it.score([group(["a", "spin", "die"])])))
        thread.start()
        thread.join(30)
        assert verdicts(results[0]) == [(1.0, "ok"), (None, "timeout"), (None, "error")]
        assert verdicts(it.score([group(["bb"])])[0]) == [(2.0, "ok")], "workers outlive the thread that started them"


def test_close_ends_what_another_thread_is_scoring(scorer: Callable[..., Scorer]) -> None:
    before = children()
    with ThreadPoolExecutor(1) as threads:
        with scorer("reward", timeout_s=1000.0, workers=2) as it:
            it.check()
            scoring = threads.submit(it.score, [group(["sleep"]), group(["sleep"])])
            while not any(w.calls for w in it._pool._workers):
                time.sleep(0.01)
        with pytest.raises(UserError, match="scoring was stopped"):
            scoring.result()
    assert gone(sorted(children() - before), 1.0)


def test_many_groups_over_several_workers_keep_their_places(scorer: Callable[..., Scorer]) -> None:
    texts = [["x" * ((7 * g + i) % 13) for i in range(8)] for g in range(60)]
    texts[1][3] = "die"  # the calls that were sent along with this one are made again
    with scorer("scaled", "reward", workers=2) as it:
        scored = it.score([group(t, uid) for uid, t in enumerate(texts)])
        assert len(pids_of(it)) <= 2
    lengths: list[list[float | None]] = [[float(len(t)) for t in ts] for ts in texts]
    assert [[v for v, _ in verdicts(g, "scaled")] for g in scored] == lengths
    lengths[1][3] = None
    assert [[v for v, _ in verdicts(g, "reward")] for g in scored] == lengths


def test_workers_are_reused_and_replaced_when_they_died_idle(scorer: Callable[..., Scorer]) -> None:
    with scorer("process") as it:
        runs = [it.score([group(["a", "b"])])[0].rollouts[0].reward for _ in range(2)]
        assert runs[0] == runs[1] == pids_of(it)[0] != os.getpid()
        os.kill(pids_of(it)[0], signal.SIGKILL)
        assert gone([int(runs[0] or 0)])
        (scored,) = it.score([group(["a"])])
        assert scored.rollouts[0].scores["process"].status == "ok"
        assert scored.rollouts[0].reward != runs[0]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_close_and_errors_leave_no_process(scorer: Callable[..., Scorer], lab: Path) -> None:
    before = children()
    with scorer("reward", workers=2) as it:
        it.score([group(["child", "a"]), group(["spin", "a"])])
        assert len(pids_of(it)) <= 2
        assert len(children() - before) <= 2
        started = [int(pid) for pid in (lab / "children").read_text().split()]
        assert len(started) == 2 and gone(started), "what a killed reward had started went with it"
    assert gone(sorted(children() - before), 1.0)
    with pytest.raises(KeyboardInterrupt), scorer("reward", timeout_s=60.0) as it:
        threading.Timer(0.8, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        it.score([group(["sleep"])])
    assert gone(sorted(children() - before), 1.0)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_score_leaves_a_scorer_that_works(scorer: Callable[..., Scorer]) -> None:
    with scorer("reward", timeout_s=60.0) as it:
        it.check()
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            it.score([group(["sleep", "a"])])
        assert verdicts(it.score([group(["bb"])])[0]) == [(2.0, "ok")]


def test_workers_die_with_their_parent(lab: Path) -> None:
    script = f"""
        import sys, threading
        sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
        import test_scoring as t
        def score(text):
            scorer = t.Scorer([t.RewardSpec("reward", function="lab.reward")], timeout_s=600.0, sys_path=[{str(lab)!r}])
            scorer.check()
            print(str(t.pids_of(scorer)[0]) + "\\n", end="", flush=True)  # one write: the threads share a pipe
            scorer.score([t.group([text])])
            threading.Event().wait()
        for text in ("a", "spin", "regex", "child"):
            threading.Thread(target=score, args=[text]).start()
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(4)]
    time.sleep(0.5)  # they are in their loops by then
    pids = sorted(children(of=parent.pid))
    assert len(pids) == 5 and all(map(alive, pids)), "four workers and what one of them started"
    parent.kill()
    parent.wait()
    assert gone(pids)


def test_out_of_memory_takes_the_scorer_first(scorer: Callable[..., Scorer]) -> None:
    with scorer("reward") as it:
        it.check()
        assert Path(f"/proc/{pids_of(it)[0]}/oom_score_adj").read_text().strip() == "1000"


@pytest.mark.parametrize(
    ("source", "function", "told"),
    [
        (
            "import nowhere_to_be_found",
            "broken.f",
            r"'r' \(broken.f\).*ModuleNotFoundError.*nowhere_to_be_found.*broken.py:1",
        ),
        ("def g(): pass", "broken.f", r"AttributeError.*has no attribute 'f'"),
        ("1 / 0", "broken.f", r"ZeroDivisionError"),
        ("import os; os._exit(5)", "broken.f", r"'r' \(broken.f\).*exit code 5"),
        ("import sys; sys.exit('bye')", "broken.f", r"SystemExit: bye"),
        ("f = 3", "broken.f", r"not callable"),
        ("", "no_such_module.f", r"No module named 'no_such_module'"),
    ],
)
def test_what_cannot_be_loaded_is_named_at_the_start(
    scorer: Callable[..., Scorer], lab: Path, source: str, function: str, told: str
) -> None:
    (lab / "broken.py").write_text(source)
    with scorer(RewardSpec("r", function=function)) as it, pytest.raises(UserError, match=told):
        it.check()
    with scorer("reward", plugins=["broken"]) as it:
        if source.startswith(("def", "f =")) or not source:
            it.check()
        else:
            with pytest.raises(UserError, match="plugin 'broken'"):
                it.score([group(["a"])])


def test_a_hidden_module_is_named(scorer: Callable[..., Scorer], lab: Path) -> None:
    (lab / "rewards.py").write_text("def mine(completions, **columns): return [1.0] * len(completions)")
    with scorer(RewardSpec("r", function="rewards.mine")) as it, pytest.raises(UserError, match="is hidden by"):
        it.check()
    with scorer(EXACT) as it:
        assert it.score([group(["3"], answer="3")])[0].rollouts[0].reward == 1.0


def test_registered_plugin(scorer: Callable[..., Scorer], lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
        from dataclasses import dataclass
        from alignment.reward_registry import reward_functions, texts

        @reward_functions.register("counts_for_test", source="this test")
        @dataclass(frozen=True)
        class Counts:
            letter: str = "a"

            def __call__(self, prompts, completions, **columns):
                return [float(text.count(self.letter)) for text in texts(completions)]
    """
    (lab / "counting_plugin.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(lab))
    importlib.import_module("counting_plugin")
    spec = RewardSpec("bs", function=reward_functions.build({"name": "counts_for_test", "letter": "b"}))
    with scorer(spec, plugins=["counting_plugin"]) as it:
        assert verdicts(it.score([group(["abba", "a"])])[0], "bs") == [(2.0, "ok"), (0.0, "ok")]


def test_missing_columns_are_told_before_anything_is_scored(scorer: Callable[..., Scorer]) -> None:
    with scorer("strict", RewardSpec("exact_match", function=ExactMatch("gold"))) as it:
        it.check(["prompt", "level", "gold", "more"])
        with pytest.raises(UserError, match="'strict' needs the column 'level'"):
            it.check(["prompt", "gold"])
        with pytest.raises(UserError, match="'exact_match' needs the column 'gold', which the row of prompt 'p1'"):
            it.score([group(["a"], 0, level=1, gold="a"), group(["a"], 1, level=1)])
        with pytest.raises(UserError, match="prompt 'p0'.*JSON.*type set"):
            it.score([group(["a"], 0, level=1, gold="a", more={1, 2})])
        with pytest.raises(UserError, match="'length_tokens'.*rename"):
            it.check(["prompt", "level", "gold", "length_tokens"])


def test_refuse_failures_says_what_and_why(scorer: Callable[..., Scorer]) -> None:
    with scorer("reward") as it:
        scored = it.score([group(["raise", "a", "b", "c"], 7), group(["nan", "a", "b", "c"], 8)])
    assert failed_share(scored) == 0.25
    refuse_failures(scored, 0.25)
    with pytest.raises(ScoringFailed, match=r"2 of 8 rollouts \(25%\).*10%.*reward: 2 error.*'7/0'.*KeyError"):
        refuse_failures(scored, 0.1)
    assert failed_share([]) == 0.0


CHECKS = """
    import os, time
    from dataclasses import dataclass
    from alignment.reward_registry import reward_functions
    from alignment.score import Score

    @reward_functions.register("checks_for_test", source="this test")
    @dataclass(frozen=True)
    class Checks:
        prepared: str = ""

        def prepare(self):
            open(self.prepared, "a").write("once ")

        def check(self, rows):
            told = []
            for row in rows:
                if row["answer"] == "sleep":
                    time.sleep(1000)
                if row["answer"] == "die":
                    os._exit(7)
                if row["answer"] == "raise":
                    raise KeyError("no such thing")
                told.append(f"{row['answer']} is bad" if row["answer"] == "bad" else None)
            return told[:-1] if "short" in [row["answer"] for row in rows] else told

        def __call__(self, prompts, completions, **columns):
            assert os.path.exists(self.prepared)
            values = {"right": Score(1.0, answer="3"), "lost": Score(None, "error", "why", "4"), "none": None}
            return [values[text] for text in completions]
"""


@pytest.fixture
def checks(scorer: Callable[..., Scorer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scorer]:
    (tmp_path / "checking_plugin.py").write_text(textwrap.dedent(CHECKS))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("checking_plugin")
    spec = RewardSpec("c", function=module.Checks(str(tmp_path / "prepared")))
    with scorer(EXACT, spec, plugins=["checking_plugin"], timeout_s=3.0) as it:
        yield it
    sys.modules.pop("checking_plugin")
    reward_functions._entries.pop("checks_for_test")


def prompts(answers: Sequence[str]) -> list[Prompt]:
    return [Prompt(f"p{i}", {"prompt": "q", "answer": answer}) for i, answer in enumerate(answers)]


def test_rows_are_checked_in_the_workers(checks: Scorer, tmp_path: Path) -> None:
    answers = ["fine"] * 200
    answers[3], answers[70], answers[71], answers[130], answers[199] = "bad", "raise", "die", "sleep", "bad"
    started = time.monotonic()
    told = checks.faults(prompts(answers))
    assert time.monotonic() - started < 3.0 + 10.0
    assert {i: fault for i, fault in enumerate(told) if fault} == {
        3: "reward 'c': bad is bad",
        70: told[70],
        71: "reward 'c': the process ended with exit code 7",
        130: "reward 'c': no answer within 3 s",
        199: "reward 'c': bad is bad",
    }
    assert "KeyError: 'no such thing' (checking_plugin.py" in str(told[70])
    assert checks.faults([]) == []
    assert "check returned 0 values for 1 rows" in str(checks.faults(prompts(["short"]))[0])
    assert set((tmp_path / "prepared").read_text().split()) == {"once"}


def test_answers_reach_the_scores(checks: Scorer) -> None:
    (scored,) = checks.score([group(["right", "lost", "none"], answer="right")])
    assert [r.scores["c"] for r in scored.rollouts] == [
        Score(1.0, "ok", "", "3"),
        Score(None, "error", "why", "4"),
        Score(None, "skipped"),
    ]
    assert [r.scores["exact_match"].answer for r in scored.rollouts] == ["right", "lost", "none"]


def test_without_a_check_no_row_has_a_fault(scorer: Callable[..., Scorer]) -> None:
    with scorer("reward", EXACT) as it:
        assert it.faults(prompts(["a", "b"])) == [None, None]
        assert pids_of(it) and all(w.needs is None for w in it._pool._workers), "nobody was waited for"


def test_workers_do_not_import_torch(scorer: Callable[..., Scorer], lab: Path) -> None:
    (lab / "look.py").write_text(
        "import sys\ndef heavy(completions, **c): return [float(len({'torch', 'numpy', 'trl'} & sys.modules.keys()))]"
    )
    with scorer(RewardSpec("r", function="look.heavy"), EXACT) as it:
        (scored,) = it.score([group(["a"], answer="a")])
    assert scored.rollouts[0].scores["r"].value == 0.0


def test_from_a_recipe(lab: Path) -> None:
    recipe: Any = SimpleNamespace(
        reward_specs=[RewardSpec("reward", function="lab.reward"), RewardSpec("rank", function="lab.scaled")],
        scoring=SimpleNamespace(workers=2, timeout_s=5.0),
        plugins=["lab"],
        plugin_folders=(lab,),
        folder=lab,
        run=SimpleNamespace(folder=str(lab / "run")),
    )
    with Scorer.from_recipe(recipe) as it:
        it.check()
        assert len(pids_of(it)) == 2
        assert it.score([group(["ab"])])[0].rollouts[0].reward == 4.0


def test_mistakes_in_arguments() -> None:
    with pytest.raises(ValueError, match="two rewards are called 'exact_match'"):
        Scorer([EXACT, EXACT])
    with pytest.raises(ValueError, match="workers >= 1"):
        Scorer([], workers=0)
    with pytest.raises(ValueError, match="timeout_s > 0, not 1 and nan"):
        Scorer([], timeout_s=float("nan"))
