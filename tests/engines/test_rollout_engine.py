"""The actor around an engine, without Ray and vLLM: what it does first, and how it tells that something broke."""

import threading
import time

import pytest

from alignment.engines import vllm_engine
from alignment.engines.rollout_engine import RolloutEngine
from alignment.types import Completion


class FakeEngine:
    """Finishes what it has at the next step."""

    def __init__(self, spec):
        self.pending, self.finished, self.version, self.asleep = [], [], 0, set()
        self.hang = threading.Event()
        self.hang.set()

    def add(self, requests):
        if None in requests:
            raise RuntimeError("no such request")
        self.pending += requests

    def step(self):
        self.hang.wait()
        if "bad" in self.pending:
            raise FloatingPointError("not finite")
        done, self.pending = self.pending, []
        return [Completion(id_, (1,), (0.0,), "stop", ((0, 0),)) for id_ in done]

    def abort(self, ids):
        self.pending = [id_ for id_ in self.pending if id_ not in ids]


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(vllm_engine, "VllmEngine", FakeEngine)
    made = RolloutEngine(None)  # pyright: ignore[reportArgumentType]
    yield made
    made.engine.hang.set()


def take(engine, timeout_s=20.0, step_s=60.0):
    return [completion.id for completion in engine.take(timeout_s, step_s)]


def test_what_is_submitted_is_taken_once_and_waiting_is_a_sign_of_life(engine):
    engine.submit(["a", "b"])
    assert take(engine) == ["a", "b"]
    assert take(engine, 0.01) == []


def test_no_step_while_it_has_no_weights_and_aborted_requests_never_come(engine):
    engine.call(lambda e: setattr(e, "version", None))
    engine.submit(["a", "b"])
    assert take(engine, 0.1) == []
    engine.abort(["a"])
    engine.call(lambda e: setattr(e, "version", 1))
    assert take(engine) == ["b"]


def test_a_request_that_it_cannot_take_is_told_by_take_and_not_lost(engine):
    engine.submit([None])
    with pytest.raises(RuntimeError, match="no such request"):
        take(engine)


def test_a_step_that_fails_is_told_by_take_and_none_follows(engine):
    engine.submit(["bad"])
    with pytest.raises(FloatingPointError, match="not finite"):
        take(engine)
    with pytest.raises(FloatingPointError, match="not finite"):
        take(engine)


def test_a_step_that_hangs_is_told_though_take_answers(engine):
    engine.engine.hang.clear()
    engine.submit(["a"])
    assert take(engine, 0.01) == [], "not yet"
    time.sleep(0.1)
    with pytest.raises(TimeoutError, match=r"one step of the engine has taken more than 0\.05 s"):
        take(engine, 0.01, step_s=0.05)
