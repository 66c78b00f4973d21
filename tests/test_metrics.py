"""Records and sinks: what is counted, what is written, and that it can be read again."""

import json
import math
from pathlib import Path
from typing import Literal

import pytest

from alignment.jsonl import to_json
from alignment.metrics import Phases, Record, Sink, Sinks, StageResult, build_result, entropy_change, summarise
from alignment.trackers import JsonlSink
from alignment.types import FinishReason, Group, Prompt, Rollout, SamplingParams, Score

Source = Literal["policy", "demonstration", "replay"]
HARD_TEXTS = [
    "\x00",
    "\u202eabc\u202c שלום مرحبا",
    "lone \ud800 surrogate",
    "a\u2028b\u2029c\x85d\r\n\x1ce",
    "日本語 😀",
    '"\\',
]


def rollout(i, *scores, tokens=3, finish: FinishReason = "stop", text="4", source: Source = "policy"):
    """One rollout whose reward is the sum of the values of ``scores``: ``(name, value, status)``."""
    values = [value for _, value, _ in scores if value is not None]
    return Rollout(
        id=f"r{i}",
        prompt_id="p",
        prompt_ids=(1, 2),
        token_ids=(3,) * tokens,
        loss_mask=(True,) * tokens,
        behaviour_logp=(-0.5,) * tokens,
        text=text,
        finish_reason=finish,
        seed=i,
        sampler="transformers",
        sampling=SamplingParams(8),
        versions=((0, 0),),
        source=source,
        scores={name: Score(value, status) for name, value, status in scores},
        reward=sum(values) if values and all(status not in ("error", "timeout") for _, _, status in scores) else None,
    )


def group(uid, *rollouts, prompt="1+1="):
    return Group(uid, Prompt(f"p{uid}", {"prompt": prompt, "answer": "2"}), rollouts)


GROUPS = [
    group(
        0,
        rollout(0, ("exact", 1.0, "ok"), ("short", 0.5, "ok"), tokens=2),
        rollout(1, ("exact", 0.0, "wrong"), ("short", None, "skipped"), tokens=6, finish="length"),
    ),
    group(
        1,
        rollout(2, ("exact", 0.0, "wrong"), ("short", 0.1, "ok"), tokens=4),
        rollout(3, ("exact", None, "timeout"), ("short", 0.3, "ok"), tokens=4),
    ),
]


def test_a_batch_is_summarised_over_what_applies():
    metrics = summarise(GROUPS, {"filter": 3, "stale": 1})
    assert metrics["reward"] == pytest.approx((1.5 + 0.0 + 0.1) / 3)
    mean = 1.6 / 3
    variance = ((1.5 - mean) ** 2 + mean**2 + (0.1 - mean) ** 2) / 3
    assert metrics["reward_std"] == pytest.approx(math.sqrt(variance))
    assert metrics["accuracy"] == pytest.approx(1 / 3), "a timeout is no wrong answer"
    assert metrics["reward/exact"] == pytest.approx(1 / 3)
    assert metrics["reward/short"] == pytest.approx(0.3), "a reward that does not apply is no 0"
    assert metrics["unscored"] == 0.25
    statuses = {"status/ok": 4, "status/wrong": 2, "status/skipped": 1, "status/timeout": 1}
    assert {k: v for k, v in metrics.items() if k.startswith("status/")} == statuses
    assert (metrics["length"], metrics["length_max"], metrics["completion_tokens"]) == (4.0, 6, 16)
    assert metrics["truncated"] == 0.25
    assert metrics["zero_variance"] == 0.5, "one scored rollout alone teaches nothing"
    assert (metrics["dropped_groups"], metrics["dropped/filter"], metrics["dropped/stale"]) == (4, 3, 1)
    assert (metrics["groups"], metrics["rollouts"]) == (2, 4)


def test_scores_on_a_scale_are_no_verdicts():
    scaled = [group(1, rollout(0, ("judge", 0.5, "ok")), rollout(1, ("judge", 3.5, "ok")))]
    assert math.isnan(summarise(scaled)["accuracy"]) and summarise(scaled)["reward/judge"] == 2.0


def test_demonstrations_do_not_count_as_rollouts():
    shown = group(2, rollout(9, ("exact", 1.0, "ok"), source="demonstration"), *GROUPS[1].rollouts)
    assert summarise([GROUPS[0], shown])["accuracy"] == summarise(GROUPS)["accuracy"]
    assert summarise([GROUPS[0], shown])["rollouts"] == 4


def test_means_over_nothing_are_nan_and_written_as_null():
    metrics = summarise([])
    assert math.isnan(metrics["reward"])
    assert metrics["completion_tokens"] == 0
    assert json.loads(to_json(metrics))["reward"] is None


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_any_text_survives_json_lines(text):
    line = to_json({text: [text]})
    assert len(line.splitlines()) == 1, "every way to split lines agrees"
    assert json.loads(line.encode().decode()) == {text: [text]}


def test_json_is_strict():
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    value = {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1, 2.5), "path": Path("x")}
    plain = {"a": None, "b": [None, {"c": None}], "d": [1, 2.5], "path": "x"}
    assert json.loads(to_json(value), parse_constant=refuse) == plain


def test_metrics_reach_the_file_at_once_one_object_per_line(tmp_path):
    sink = JsonlSink()
    sink.start({"folder": tmp_path})
    sink.log(Record(4, "rl", 1, 9, {"reward": 0.5, "kl": math.nan, "groups": 3}))
    sink.log(Record(4, "rl", 1, 9, {"accuracy": 0.25}, "eval"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]  # before close
    assert all(line.pop("time") > 1.7e9 for line in lines)
    assert lines == [
        {"step": 4, "stage": "rl", "stage_step": 1, "kind": "train", "reward": 0.5, "kl": None, "groups": 3},
        {"step": 4, "stage": "rl", "stage_step": 1, "kind": "eval", "accuracy": 0.25},
    ]
    with pytest.raises(ValueError, match="may not be called step"):
        sink.log(Record(5, "rl", 2, 9, {"step": 1.0}))
    sink.close()
    sink.close()


@pytest.mark.parametrize(("resumed_from", "expected"), [(2, [1, 2, 3]), (None, [3])])
def test_steps_that_are_run_again_are_not_in_the_file_twice(tmp_path, resumed_from, expected):
    sink = JsonlSink()
    sink.start({"folder": tmp_path})
    for step in (1, 2, 3, 4):
        sink.log(Record(step, "rl", step, 9, {}))
        sink.rollouts(step, "rl", GROUPS[:1])
    sink.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "re')  # a kill in the middle of a line
    again = JsonlSink()
    again.start({"folder": tmp_path, "resumed_from": resumed_from})
    again.log(Record(3, "rl", 3, 9, {}))
    again.rollouts(3, "rl", GROUPS[:1])
    again.close()
    for name in ("metrics", "rollouts"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == expected


def test_rollouts_are_written_in_full_whatever_they_say(tmp_path):
    groups = [group(i, rollout(i, ("exact", 1.0, "ok"), text=text), prompt=text) for i, text in enumerate(HARD_TEXTS)]
    sink = JsonlSink(rollout_groups=len(groups))
    sink.start({"folder": tmp_path})
    sink.rollouts(10, "rl", groups)
    sink.close()
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_bytes().splitlines()]
    assert [line["prompt"] for line in lines] == HARD_TEXTS
    first = lines[0]
    assert (first["step"], first["group"], first["id"], first["columns"]) == (10, 0, "p0", {"answer": "2"})
    assert first["rollouts"] == [
        {
            "id": "r0",
            "text": "\x00",
            "reward": 1.0,
            "correct": True,
            "scores": {"exact": {"value": 1.0, "status": "ok", "detail": ""}},
            "tokens": 3,
            "finish_reason": "stop",
            "source": "policy",
            "versions": [[0, 0]],
        }
    ]


def test_which_groups_are_written_depends_on_step_and_groups_alone(tmp_path):
    def chosen(name, groups, step):
        sink = JsonlSink(rollout_groups=3)
        (tmp_path / name).mkdir()
        sink.start({"folder": tmp_path / name})
        sink.rollouts(step, "rl", groups)
        sink.close()
        return [json.loads(line)["group"] for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]

    groups = [group(i, rollout(i)) for i in range(40)]
    first = chosen("a", groups, 10)
    assert first == sorted(first)
    assert len(first) == 3
    assert chosen("b", groups[::-1], 10) == first
    assert chosen("c", groups, 20) != first


class Recorder:
    """A user's own sink; it needs no base class."""

    def __init__(self, calls, fail=False):
        self.calls, self.fail = calls, fail

    def start(self, run):
        self.calls.append(("start", run["name"]))

    def log(self, record):
        self.calls.append(("log", record.step))

    def rollouts(self, step, stage, groups):
        self.calls.append(("rollouts", len(groups)))

    def finish(self, result):
        self.calls.append(("finish", result["status"]))

    def close(self):
        self.calls.append(("close", self.fail))
        if self.fail:
            raise OSError("disk")


def test_several_sinks_are_one_and_all_are_closed():
    calls = []
    assert isinstance(Sinks([]), Sink)
    with pytest.raises(OSError, match="disk"), Sinks([Recorder(calls), Recorder(calls, fail=True)]) as sinks:
        sinks.start({"name": "x"})
        sinks.log(Record(1, "rl", 1, 2, {}))
        sinks.rollouts(1, "rl", GROUPS)
        sinks.finish({"status": "complete"})
    both = [("start", "x"), ("log", 1), ("rollouts", 2), ("finish", "complete")]
    assert calls[:8] == [call for call in both for _ in range(2)]
    assert sorted(calls[8:]) == [("close", False), ("close", True)]


def test_what_is_no_sink_is_refused_at_once():
    with pytest.raises(TypeError, match="object is no sink: it needs start, log, rollouts, finish and close"):
        Sinks([object()])  # pyright: ignore[reportArgumentType]


def test_phases_add_up_and_start_again():
    now = 0.0

    def advance(seconds):
        nonlocal now
        now += seconds

    phases = Phases(clock=lambda: now)
    for seconds in (1.0, 2.0):
        with phases("sample"):
            advance(seconds)
    with pytest.raises(KeyError), phases("update"):
        advance(4.0)
        raise KeyError
    with phases("evaluate"):
        advance(10.0)
    advance(0.5)
    metrics = phases.flush(tokens=15, rollouts=30, groups=0)
    assert metrics == {
        "time/sample": 3.0,
        "time/update": 4.0,
        "time/evaluate": 10.0,
        "time/total": 17.5,
        "tokens_per_s": 2.0,
        "rollouts_per_s": 4.0,
    }
    advance(1.0)
    assert phases.flush() == {"time/total": 1.0}


def test_the_result_holds_what_programs_ask_for(tmp_path):
    before = {"accuracy": 0.5, "interval": [0.4, 0.6], "n": 100}
    after = {"accuracy": 0.9, "interval": [0.83, 0.95], "n": 100}
    result = build_result(
        status="complete",
        stages=[StageResult("rl", "online", 150, 61.23456, {"rewards": 1200}, before, after)],
        before=before,
        after=after,
        best={"step": 150, "accuracy": 0.9},
        folder=tmp_path,
        files={"metrics.jsonl": "one line per step"},
    )
    assert json.loads(json.dumps(result)) == result
    assert result["eval"] == {"before": before, "after": after}
    assert result["stages"] == [
        {
            "name": "rl",
            "stage": "online",
            "steps": 150,
            "seconds": 61.235,
            "labels": {"rewards": 1200},
            "eval": {"before": before, "after": after},
        }
    ]
    assert result["folder"] == str(tmp_path)


def test_the_change_of_the_entropy_is_that_to_the_next_batch_beside_what_was_predicted():
    first, counters = entropy_change({"verdicts/rl": 3.0}, "rl", {"entropy": 2.0, "entropy_predicted": -0.1})
    assert first == {} and counters["verdicts/rl"] == 3.0
    found, counters = entropy_change(counters, "rl", {"entropy": 1.5, "entropy_predicted": 0.3})
    assert found == {"entropy_change": -0.5, "entropy_change_predicted": -0.1}
    assert entropy_change(counters, "rl", {"loss": 1.0}) == ({}, counters), "an update of a critic alone"
    assert entropy_change(counters, "later", {"entropy": 9.0, "entropy_predicted": 0.0})[0] == {}
