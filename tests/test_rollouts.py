"""Episodes, batches and evaluations, against a sampler that says what it is told to."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.collect import Collector, staleness
from alignment.curricula import DifficultyFilter, Uniform, select_prompts
from alignment.environments import Calculator, SingleTurn, Step
from alignment.errors import UserError
from alignment.evaluation.evaluate import summarise_evaluation
from alignment.metrics import Phases
from alignment.rollouts import Player, play
from alignment.types import (
    Completion,
    Context,
    Group,
    Prompt,
    Request,
    Rollout,
    SamplingParams,
    Score,
    TrainState,
    keyed_seed,
)

EOS = 0
PARAMS = SamplingParams(max_tokens=12, stop_ids=(EOS,))


class Letters:
    """A tokenizer: one token per character."""

    chat_template = None
    pad_token_id = eos_token_id = EOS

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(i) for i in ids if i != EOS)

    def get_vocab(self) -> dict[str, int]:
        return {}


@dataclass
class Scripted:
    """Answers with ``says(request)``, the last request first. A text without "." is cut off by its length.

    Each poll answers all that wait, and moves the version on.
    """

    says: Any
    name: str = "scripted"
    version: int = 0
    requests: list[Request] = field(default_factory=list)

    waiting: list[Request] = field(default_factory=list)

    def add(self, requests: Sequence[Request]) -> None:
        self.waiting += requests
        self.requests += reversed(requests)

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        asked, self.waiting = self.waiting, []
        answers = [self.answer(request) for request in reversed(asked)]
        self.version += bool(asked)
        return answers

    def answer(self, request: Request) -> Completion:
        text = self.says(request)
        ids = tuple(EOS if c == "." else ord(c) for c in text)[: request.params.max_tokens]
        reason = "stop" if ids[-1] == EOS else "length"
        return Completion(request.id, ids, (-1.0,) * len(ids), reason, ((self.version, 0),))

    def abort(self, ids: Collection[str]) -> None:
        self.waiting = [request for request in self.waiting if request.id not in ids]

    def close(self) -> None: ...


ALONE = SingleTurn()


def player(says, environment=ALONE, limit=20) -> Player:
    return Player(Scripted(says), Letters(), environment, limit)  # pyright: ignore


def prompt(text="p", **row) -> Prompt:
    return Prompt(text, {"prompt": text, **row})


def test_groups_come_in_the_order_of_their_prompts_whoever_finishes_first():
    groups = play(player(lambda r: f"{chr(r.prompt_ids[0])}."), [prompt("a"), prompt("b")], [7, 8], 2, PARAMS, 0)
    assert [g.uid for g in groups] == [7, 8]
    assert [[r.text for r in g.rollouts] for g in groups] == [["a", "a"], ["b", "b"]]
    assert [r.id for g in groups for r in g.rollouts] == ["7.0", "7.1", "8.0", "8.1"]


def test_random_numbers_depend_on_seed_uid_sample_and_turn_alone():
    def seeds(uids, samples, seed=0):
        sampler = player(lambda r: "[1+1].", Calculator(max_turns=2))
        play(sampler, [prompt()] * len(uids), uids, samples, PARAMS, seed)
        return {(r.id, len(r.prompt_ids)): r.seed for r in sampler.sampler.requests}  # pyright: ignore

    alone, together = seeds([3], 1), seeds([1, 2, 3], 4)
    assert len(alone) == 2 and alone.items() <= together.items()
    assert len(set(together.values())) == len(together) == 3 * 4 * 2, "each turn of each episode has its own"
    assert not set(seeds([3], 1, seed=1).values()) & set(alone.values())


def test_a_second_turn_follows_its_observation_with_versions_where_they_begin():
    turns = iter(["x[2*3].", "6."])
    (group,) = play(player(lambda r: next(turns), Calculator(result="={value};")), [prompt()], [0], 1, PARAMS, 0)
    (rollout,) = group.rollouts
    assert rollout.turns == (("assistant", 0, 7), ("observation", 7, 10), ("assistant", 10, 12))
    assert rollout.loss_mask == (True,) * 7 + (False,) * 3 + (True,) * 2
    assert rollout.behaviour_logp == (-1.0,) * 7 + (0.0,) * 3 + (-1.0,) * 2
    assert rollout.versions == ((0, 0), (1, 10))
    assert rollout.text == "6" and rollout.finish_reason == "stop"


def test_turns_of_one_policy_version_are_one_run():
    def says(request):
        return "x[2*3]." if len(request.prompt_ids) == 1 else "6."

    turns = [((5, 0), (6, 3)), ((6, 0), (7, 1))]

    class Drifting(Scripted):
        def answer(self, request):
            return replace(super().answer(request), versions=turns.pop(0))

    playing = replace(player(says, Calculator(result="={value};")), sampler=Drifting(says))
    (group,) = play(playing, [prompt()], [0], 1, PARAMS, 0)
    assert group.rollouts[0].versions == ((5, 0), (6, 3), (7, 11)), "the second turn begins at token 10, still in run 6"


def test_a_verdict_changes_nothing_else():
    rollout = play(player(lambda r: "yes."), [prompt()], [0], 1, PARAMS, 0)[0].rollouts[0]
    rollout = replace(rollout, source="replay", ratio_base="one", timings={"decode": 1.0})
    scores = {"right": Score(1.0)}
    assert rollout.judged(scores, 0.5) == replace(rollout, scores=scores, reward=0.5)


@pytest.mark.parametrize(("room", "turns"), [(9, 1), (10, 1), (11, 3)])
def test_an_observation_must_leave_room_for_a_token(room, turns):
    says = player(lambda r: "x[2*3]." if len(r.prompt_ids) == 1 else "6.", Calculator(result="={value};"))
    (group,) = play(says, [prompt()], [0], 1, replace(PARAMS, max_tokens=room), 0)
    assert len(group.rollouts[0].turns) == turns and group.rollouts[0].finish_reason == "length"
    assert len(group.rollouts[0].token_ids) <= room


@dataclass(frozen=True)
class Judge:
    """Scores each turn by whether it is right."""

    def reset(self, row: Mapping[str, Any]) -> tuple[Any, str]:
        return None, row["prompt"]

    def step(self, state: Any, completion: str) -> Step:
        return Step(state, "", True, {"right": Score(float(completion == "yes"))})


def test_a_completion_that_was_cut_short_is_judged_not_left_unscored():
    (group,) = play(player(lambda r: "yesyesyesyesyes", Judge()), [prompt()], [0], 1, PARAMS, 0)
    assert group.rollouts[0].finish_reason == "length"
    assert group.rollouts[0].scores == {"right": Score(0.0)}


def test_a_prompt_over_the_limit_is_named():
    with pytest.raises(UserError, match="prompt longer has 6 tokens, more than data.max_prompt_tokens"):
        play(player(lambda r: ".", limit=5), [prompt("longer")], [0], 1, PARAMS, 0)


class ByPassRate:
    """A scorer: the prompt's ``p`` is the share of its rollouts that are right."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def score(self, groups: Sequence[Group], *, step: int = 0, max_steps: int = 0) -> list[Group]:
        self.asked.append((step, max_steps))
        return [replace(g, rollouts=tuple(self._scored(g))) for g in groups]

    def _scored(self, group: Group) -> Iterable[Rollout]:
        right = group.prompt.row["p"] * len(group.rollouts)
        for i, rollout in enumerate(group.rollouts):
            value = float(i < right)
            yield replace(rollout, scores={"right": Score(value)}, reward=value)


def collector(prompts, **changes) -> Collector:
    plain: dict[str, Any] = {
        "player": player(lambda r: "."),
        "scorer": ByPassRate(),
        "prompts": prompts,
        "curricula": (Uniform(), DifficultyFilter(low=0, high=1, max_refills=9)),
        "prompts_per_step": 3,
        "params": [PARAMS] * 4,
        "max_failed_share": 0.1,
        "seed": 0,
        "roles": {},
        "phases": Phases(),
        "steps": 50,
    }
    return Collector(**{**plain, **changes})


FRESH = TrainState(components={"curricula.0": {"epoch": 0, "cursor": 0}})
MIXED = [Prompt(str(i), {"prompt": "p", "p": p}) for i, p in enumerate([0.0, 0.5, 1.0, 0.25, 0.0, 0.75, 1.0, 0.5])]


def test_a_batch_is_refilled_in_launch_order_until_it_is_full():
    scorer = ByPassRate()
    sealed = collector(MIXED, scorer=scorer).collect(FRESH)
    assert len(sealed.groups) == 3 and all(0 < g.prompt.row["p"] < 1 for g in sealed.groups)
    assert [g.uid for g in sealed.sampled] == list(range(len(sealed.sampled)))
    kept = [g.uid for g in sealed.sampled if 0 < g.prompt.row["p"] < 1]
    assert [g.uid for g in sealed.groups] == kept
    assert sealed.dropped == {"difficulty_filter": len(sealed.sampled) - 3}
    assert sealed.state.launched == len(sealed.sampled)
    assert sealed.state.components["curricula.0"]["cursor"] == len(sealed.sampled) % len(MIXED)
    assert set(scorer.asked) == {(0, 50)}


def test_the_bound_on_refills_holds_and_then_says_what_to_do():
    hopeless = [replace(p, row={**p.row, "p": 0.0}) for p in MIXED]
    with pytest.raises(UserError, match=r"only 0 of the 3 groups .* after sampling 9 \(dropped: 9 by difficulty"):
        collector(hopeless, curricula=(Uniform(), DifficultyFilter(low=0, high=1, max_refills=2))).collect(FRESH)
    short = DifficultyFilter(low=0, high=1, max_refills=0, on_exhausted="short")
    sealed = collector(MIXED[:3], curricula=(Uniform(), short)).collect(FRESH)
    assert len(sealed.groups) == 1 and len(sealed.sampled) == 3
    with pytest.raises(UserError, match="only 0 of the 3 .*max_refills; on_exhausted 'short' needs one group"):
        collector(hopeless, curricula=(Uniform(), short)).collect(FRESH)
    with pytest.raises(UserError, match="only 1 of the 3 .*max_refills, or set its on_exhausted to 'short'"):
        collector(MIXED[:3], curricula=(Uniform(), replace(short, on_exhausted="error"))).collect(FRESH)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=12),
    st.integers(1, 6),
    st.sampled_from([(0.0, 1.0), (0.25, 0.75), (0.2, 0.8), (0.0, 0.5)]),
    st.integers(0, 4),
)
def test_filling_gives_exactly_a_batch_in_launch_order_and_never_samples_beyond_the_bound(right, size, band, refills):
    """A generator of known pass rates: prompts with so many of 8 rollouts right."""
    made = [Prompt(str(i), {"prompt": "p", "p": k / 8}) for i, k in enumerate(right)]
    rule = DifficultyFilter(*band, max_refills=refills)
    filling = collector(made, curricula=(Uniform(), rule), prompts_per_step=size, params=[PARAMS] * 8)
    try:
        sealed = filling.collect(FRESH)
    except UserError as error:
        sampled = int(re.findall(r"after sampling (\d+)", str(error))[0])
        order = [p.row["p"] for p in select_prompts([Uniform()], FRESH.components, made, sampled, Context(0, 0))[0]]
        assert sampled == (refills + 1) * size and sum(band[0] < p < band[1] for p in order) < size
        return
    assert len(sealed.groups) == size and len(sealed.sampled) <= (refills + 1) * size
    assert [g.uid for g in sealed.sampled] == list(range(len(sealed.sampled))), "all that was launched, in order"
    inside = [g.uid for g in sealed.sampled if band[0] < g.prompt.row["p"] < band[1]]
    assert [g.uid for g in sealed.groups] == inside, "every group of the band, in launch order, and no other"


def test_lockstep_collects_from_the_newest_state_when_it_is_asked():
    collecting = collector(MIXED)
    first = collecting.collect(FRESH)
    assert first.state.in_flight == [] and not collecting.player.playing
    newest = replace(first.state, step=1, components={"curricula.0": {"epoch": 5, "cursor": 0}})
    second = collecting.collect(newest)
    assert second.sampled[0].uid == first.state.launched
    assert second.state.components["curricula.0"]["epoch"] == 5


def test_staleness_counts_from_the_oldest_sampled_token():
    rollout = play(player(lambda r: "."), [prompt()], [0], 1, PARAMS, 0)[0].rollouts[0]
    group = Group(0, prompt(), (replace(rollout, versions=((4, 0), (6, 3))), replace(rollout, versions=((5, 0),))))
    assert staleness([group], 7) == 3
    assert staleness([], 7) == staleness([Group(0, prompt(), (replace(rollout, versions=()),))], 7) == 0


def test_unscored_rollouts_are_left_out_of_an_evaluation_and_counted():
    (group,) = play(player(lambda r: "."), [prompt()], [0], 4, PARAMS, 0)
    scores = [Score(1.0), Score(0.0, "wrong"), Score(None, "timeout"), Score(1.0)]
    judged = replace(
        group, rollouts=tuple(replace(r, scores={"a": s}) for r, s in zip(group.rollouts, scores, strict=True))
    )
    also_failed = replace(judged.rollouts[3], scores={"a": Score(1.0), "b": Score(None, "error")})
    judged = replace(judged, rollouts=(*judged.rollouts[:3], also_failed))
    found = summarise_evaluation([judged])
    assert (found.accuracy, found.problems, found.unscored) == (0.5, 1, 2)
    longer = replace(also_failed, token_ids=(*also_failed.token_ids, 7), finish_reason="length")
    same = summarise_evaluation([replace(judged, rollouts=(*judged.rollouts[:3], longer))])
    of_scored, tokens = ("length", "truncated", "reward/a"), {"prompt_tokens", "completion_tokens"}
    assert all(same.metrics[name] == found.metrics[name] for name in of_scored)
    assert set(found.metrics) == {*of_scored, *tokens}
    assert same.metrics["completion_tokens"] == found.metrics["completion_tokens"] + 1, "what it cost counts all"
    nothing = summarise_evaluation([replace(judged, rollouts=judged.rollouts[2:3])])
    assert nothing.accuracy != nothing.accuracy and nothing.problems == 0, "no verdict is no accuracy of 0"


def test_seeds_are_the_same_everywhere():
    assert keyed_seed(1, "a", 2) == 938383822073135179
