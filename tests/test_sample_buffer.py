"""The selective sample buffer, and the archive that its groups lie in."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from alignment.archive import GroupArchive
from alignment.curricula import SampleBuffer
from alignment.errors import UserError
from alignment.types import Context
from tests.curricula_helpers import batch_of, group, prompts, signals

MADE = prompts(6)


def context(step: int, archive: GroupArchive, seed: int = 0) -> Context:
    return Context(step, seed, {}, archive.group)


@pytest.fixture
def archive(tmp_path) -> GroupArchive:
    return GroupArchive(tmp_path / "archive", MADE, 4)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, [0, 0.25, 0.75]), (0.0, [0, 0.5, 0.5]), (2.0, [0, 0.1, 0.9])])
def test_groups_are_drawn_by_their_mean_advantage(alpha, expected):
    assert SampleBuffer(alpha=alpha).weights([0.0, 1.0, 3.0]) == pytest.approx(expected)


def test_draws_follow_the_weights_without_replacement_and_hang_on_the_seed(archive):
    archive.add(0, [group(MADE[i], [1, 0], uid=i) for i in range(3)])
    state = {"entries": [[0, 0, 0, 1.0], [0, 1, 0, 3.0], [0, 2, 0, 4.0]]}
    buffer = SampleBuffer()
    first = Counter(buffer.replay(state, 1, context(1, archive, seed))[0].uid for seed in range(1000))
    assert [first[i] / 1000 for i in range(3)] == pytest.approx([0.125, 0.375, 0.5], abs=0.05)
    several = buffer.replay(state, 5, context(1, archive))
    assert sorted(g.uid for g in several) == [0, 1, 2], "no more than there are, each once"
    assert buffer.replay(state, 2, context(1, archive)) == buffer.replay(state, 2, context(1, archive))
    assert buffer.replay(state, 0, context(1, archive)) == [] == buffer.replay(buffer.init(), 3, context(1, archive))


def test_a_replayed_group_is_what_was_trained_on_under_ids_of_its_own(archive):
    kept = group(MADE[2], [1, None, 0], uid=7, version=3)
    archive.add(5, [group(MADE[1], [1, 0], uid=6), kept])
    (found,) = SampleBuffer().replay({"entries": [[5, 7, 3, 1.0]]}, 1, context(6, archive))
    assert found.uid == 7 and found.prompt is MADE[2]
    assert [replace(r, source="policy", id=r.id.removesuffix("@6")) for r in found.rollouts] == list(kept.rollouts)
    assert [(r.source, r.id) for r in found.rollouts] == [("replay", f"7/{i}@6") for i in range(3)]


def test_what_carried_an_advantage_is_remembered_with_its_mean():
    right, wrong, dropped = (group(MADE[i], [1, 0], uid=i, version=2) for i in range(3))
    batch = batch_of([right, wrong], [1.5, -0.5, 0.0, 0.0])
    state = SampleBuffer().observe(SampleBuffer().init(), signals([right, wrong, dropped], step=4, batch=batch))
    assert state == {"entries": [[4, 0, 2, 1.0]]} == json.loads(json.dumps(state))
    assert SampleBuffer().metrics(state) == {"groups": 1.0}


def test_age_counts_from_the_oldest_token_and_the_oldest_group_is_forgotten_first(archive):
    buffer, state = SampleBuffer(max_age=3, capacity=2), SampleBuffer().init()
    for step, version in ((4, 2), (5, 5)):
        found = group(MADE[step], [1, 0], uid=step, version=version)
        archive.add(step, [found])
        state = buffer.observe(state, signals([found], step=step, batch=batch_of([found], [1.0, -1.0])))
    assert [e[1] for e in state["entries"]] == [5], "at step 6 the other is 4 versions old"
    entries = {"entries": [[4, 4, 3, 1.0], [5, 5, 5, 1.0]]}
    assert sorted(g.uid for g in buffer.replay(entries, 9, context(6, archive))) == [4, 5]
    assert [g.uid for g in buffer.replay(entries, 9, context(7, archive))] == [5]
    many = [group(MADE[i], [1, 0], uid=i, version=9) for i in range(5)]
    state = buffer.observe(buffer.init(), signals(many, step=9, batch=batch_of(many, [1.0, -1.0] * 5)))
    assert [e[1] for e in state["entries"]] == [3, 4]


def test_the_archive_keeps_what_any_continued_run_may_ask_for(archive):
    for step in range(20):
        archive.add(step, [group(MADE[0], [1, 0], uid=step)])
    archive.prune([20, 9])
    assert sorted(archive._files()) == [5, 6, 7, 8, 16, 17, 18, 19]
    archive.prune([9])
    assert sorted(archive._files()) == [5, 6, 7, 8], "a run that goes on from an earlier step drops later ones"
    with pytest.raises(UserError, match=r"step_00000018.jsonl lacks group 18"):
        archive.group(18, 18)
    with pytest.raises(UserError, match="lacks group 3"):
        archive.group(5, 3)


def test_a_step_that_is_done_again_replaces_its_groups(archive):
    archive.add(3, [group(MADE[0], [1, 0], uid=1)])
    assert archive.group(3, 1).rewards == [1, 0]
    archive.add(3, [group(MADE[0], [0, 0], uid=1)])
    assert archive.group(3, 1).rewards == [0, 0]
