"""The flight recorder keeps all of a step, the last few steps, and never a damaged file unnoticed."""

import json
from dataclasses import fields, replace

import pytest
import torch

from alignment.algorithms.aggregations import TokenMean
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.objective import Objective
from alignment.errors import UserError
from alignment.flight import FlightRecorder, Watched, load_flight, recorded_steps
from tests.recorded import record_step, sampled_batch


@pytest.fixture
def credited():
    batch = sampled_batch()
    return replace(batch, adv_BT=torch.where(batch.loss_mask_BT, 0.5, 0.0), reward_B=batch.rewards_BK[:, 0])


def record(folder, batch, *steps, keep=3, states=None):
    recorder = FlightRecorder(folder, keep)
    for step in steps:
        recorder.record(batch, Objective.of(Algorithm(), {}), states or {}, 1, step)


def test_every_tensor_and_name_of_a_batch_comes_back(tmp_path, credited):
    record(tmp_path, credited, 7, states={"kl": {"coefficient": 0.1, "seen": [1, 2]}})
    flight = load_flight(tmp_path, 7)
    for f in fields(credited):
        was, now = getattr(credited, f.name), getattr(flight.batch, f.name)
        if isinstance(was, torch.Tensor):
            assert now.dtype == was.dtype, f.name
            assert torch.equal(now.nan_to_num(9.5), was.nan_to_num(9.5)), f.name
        else:
            assert now == was, f.name
    assert (flight.step, flight.stage) == (7, 1)
    assert flight.states == {"kl": {"coefficient": 0.1, "seen": [1, 2]}}


def test_the_last_steps_are_kept_and_those_that_a_resumed_run_redoes_are_not(tmp_path, credited):
    record(tmp_path, credited, 1, 2, 3, 4, 5)
    assert recorded_steps(tmp_path) == [3, 4, 5]
    record(tmp_path, credited, 4)
    assert recorded_steps(tmp_path) == [3, 4]
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_a_step_that_is_not_there_is_answered_with_those_that_are(tmp_path, credited):
    with pytest.raises(UserError, match="no step is recorded"):
        load_flight(tmp_path / "flight", 3)
    record(tmp_path, credited, 11, 12)
    with pytest.raises(UserError, match=r"no step 3; recorded steps: 11, 12 \(run\.flight_steps"):
        load_flight(tmp_path, 3)


def test_a_damaged_file_is_named(tmp_path, credited):
    record(tmp_path, credited, 11)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"step_00000011\.safetensors is damaged"):
        load_flight(tmp_path, 11)


def test_a_crash_while_writing_leaves_the_older_file(tmp_path, credited, monkeypatch):
    record(tmp_path, credited, 11)
    before = next(tmp_path.iterdir()).read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("alignment.durable.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, replace(credited, step=99), 11)
    monkeypatch.undo()
    assert (tmp_path / "step_00000011.safetensors").read_bytes() == before
    assert recorded_steps(tmp_path) == [11]


def test_the_log_probabilities_of_each_update_are_kept(tmp_path):
    algorithm = Algorithm(epochs=2, minibatches=2)
    record_step(tmp_path, algorithm)
    flight = load_flight(tmp_path, 7)
    assert flight.logp_from == "update"
    assert len(flight.updates) == 4
    assert all(len(update.calls) > 1 for update in flight.updates), "the micro-batches are small enough to be several"
    for epoch in (flight.updates[:2], flight.updates[2:]):
        assert sorted(torch.cat([u.rows for u in epoch]).tolist()) == list(range(16))
        for update in epoch:
            rows = [row for call in update.calls for row in call.rows.tolist()]
            assert sorted(rows) == sorted(set(update.rows.tolist()) - {2}), "all but the row that is not trained on"
    old_BT, mask_BT = flight.batch.old_logp_BT, flight.batch.loss_mask_BT
    assert old_BT is not None
    moved = []
    for update in flight.updates:
        gaps = []
        for call in update.calls:
            width = call.logp_BT.shape[1]
            gap_BT = (call.logp_BT - old_BT[call.rows, :width]).abs()
            gaps.append(gap_BT[mask_BT[call.rows, :width]].max().item())
        moved.append(max(gaps))
    assert moved[0] < 1e-5, "the first update starts from the old policy"
    assert min(moved[1:]) > 1e-3, "the later ones do not"


def test_watching_changes_nothing_for_the_learner(tmp_path):
    algorithm = Algorithm(epochs=2)
    plain = record_step(tmp_path / "a", algorithm, watched=False)
    assert record_step(tmp_path / "b", algorithm, watched=True) == plain
    assert load_flight(tmp_path / "a", 7).logp_from == "old_logp"


def test_rows_that_share_a_key_are_not_confused(tmp_path, credited):
    twice = replace(credited, key_B=torch.zeros_like(credited.key_B))
    objective = Watched(Objective.of(Algorithm(aggregation=TokenMean()), {}))
    objective.loss(torch.full(twice.ids_BT.shape, -1.0), None, objective.prepare(twice))
    FlightRecorder(tmp_path, 1).record(twice, objective, {}, 0, 1)
    assert load_flight(tmp_path, 1).logp_from == "behaviour_logp"


def test_the_header_is_strict_json_that_other_tools_can_read(tmp_path, credited):
    record(tmp_path, credited, 5)
    raw = (tmp_path / "step_00000005.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    about = json.loads(header["__metadata__"]["flight"], parse_constant=lambda name: pytest.fail(name))
    assert about["batch"]["objectives"] == ["exact", "short"]
