"""Mixers: gates and buffers by hand, and what a mixed batch's loss is made of."""

import json
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from alignment.algorithms.advantages import DrGrpo
from alignment.algorithms.aggregations import Constant, SequenceMean, TokenMean
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.mixers import Blend, Hpt, NoMix, Relift
from alignment.algorithms.objective import Objective, combine
from alignment.algorithms.policy_losses import Reinforce
from alignment.errors import UserError
from alignment.score import Score
from alignment.types import Context, Group, Prompt, Rollout, SamplingParams, Signals

AT = Context(step=3, seed=7)
NAN = math.nan


def rollout(name: str, reward: float | None, source: Literal["policy", "demonstration"] = "policy") -> Rollout:
    scores = {} if reward is None else {"match": Score(reward, "ok" if reward >= 1 else "wrong")}
    base = "self" if source == "demonstration" else "old"
    none = SamplingParams(1)
    return Rollout(
        name, name, (1,), (2,), (True,), (-0.5,), "", "stop", 0, "test", none, (), source, base, (), scores, reward
    )


def group(uid: int, *rewards: float | None) -> Group:
    prompt = Prompt(f"p{uid}", {"prompt": f"{uid}+1="})
    return Group(uid, prompt, tuple(rollout(f"p{uid}.{i}", reward) for i, reward in enumerate(rewards)))


def shown(*groups: Group) -> dict[str, list[Rollout]]:
    return {g.prompt.key: [rollout(f"{g.prompt.id}.shown", None, "demonstration")] for g in groups}


@pytest.mark.parametrize(("solved", "gate", "imitated"), [(0, 0, True), (1, 0, False), (2, 2, True), (3, 2, False)])
def test_the_gate_of_hpt(solved, gate, imitated):
    asked = group(0, *[1.0] * solved, *[0.0] * (8 - solved))
    [found] = Hpt(gate=gate).route(None, [asked], shown(asked), AT)["rl"]
    assert [r.source for r in found.rollouts] == (["demonstration"] if imitated else ["policy"] * 8)
    assert Hpt(gate=gate).route(None, [asked], {}, AT)["rl"] == [asked], "nothing to imitate"


def test_the_soft_gate_weighs_both_by_what_was_solved(make_batch):
    """The published table: 2 solved of 8 are (0.125, 0.5), 4 are (0.5, 0.125), 5 and more are rollouts alone."""
    mixer = Hpt(soft=((2, 0.125, 0.5), (4, 0.5, 0.125), (5, 1.0, 0.0)))
    assert [mixer.weights(n, 8) for n in (0, 1, 2, 3, 4, 5, 8)] == [
        (0.0, 1.0), (0.0, 1.0), (0.125, 0.5), (0.125, 0.5), (0.5, 0.125), (1.0, 0.0), (1.0, 0.0)
    ]  # fmt: skip
    groups = [group(0, 1.0, 1.0, 0.0), group(1, *[1.0] * 5)]
    routed = mixer.route(None, groups, shown(*groups), AT)["rl"]
    assert [[r.source for r in g.rollouts].count("demonstration") for g in routed] == [1, 0]
    rewards = [[1.0], [1.0], [0.0], [NAN], *[[1.0]] * 5]
    batch = make_batch(
        rewards, [1] * 9, groups=[0] * 4 + [1] * 5, sources=[*["policy"] * 3, "demonstration", *["policy"] * 5]
    )
    assert mixer.coefficients(None, batch).tolist() == [0.125, 0.125, 0.125, 0.5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("rewards", "imitated"),
    [
        ([0.0] * 6 + [1.0] * 2, True),
        ([0.0] * 5 + [1.0] * 3, False),
        ([0.0] * 4 + [1.0, None, None, None], True),  # one of five
        ([None] * 8, False),
    ],
)
def test_the_gate_by_share_counts_verdicts_alone(rewards, imitated):
    assert Hpt(gate_share=0.25).asks(group(0, *rewards)) is imitated


def test_the_gate_by_share_is_a_share_whatever_floats_make_of_it():
    assert 0.29 * 100 < 29
    assert Hpt(gate_share=0.29).teaches(29, 100) and not Hpt(gate_share=0.29).teaches(30, 100)


def test_a_group_without_a_verdict_is_left_as_it_is():
    asked = group(0, None, None)
    assert Hpt().route(None, [asked], shown(asked), AT)["rl"] == [asked]
    assert not Hpt(soft=((1, 1.0, 0.5),)).asks(asked)


def test_as_many_demonstrations_as_asked_for():
    asked = group(0, 0.0)
    known = {key: rows * 3 for key, rows in shown(asked).items()}
    for wanted, found in ((1, 1), (2, 2), (9, 3)):
        [taught] = Hpt(demonstrations_per_prompt=wanted).route(None, [asked], known, AT)["rl"]
        assert len(taught.rollouts) == found


@pytest.mark.parametrize("aggregation", [Constant(7), SequenceMean(), TokenMean()])
def test_imitation_is_a_token_mean_beside_any_aggregation(make_batch, aggregation):
    batch = mixed(make_batch)
    alone = Objective.of(Algorithm(aggregation=aggregation, correction=None), {})
    scale_BT = alone.prepare(credit(batch, Algorithm(advantage=DrGrpo()), {})).scale_BT
    assert scale_BT is not None
    torch.testing.assert_close(scale_BT[4:], batch.loss_mask_BT[4:].float() / 6)
    torch.testing.assert_close(scale_BT[:4], aggregation.scale(batch.loss_mask_BT[:4]), msg="not diluted")


def test_rollouts_alone_are_what_they_were_bit_for_bit(make_batch):
    batch = mixed(make_batch).rows([0, 1, 2, 3])
    with_mixer, without = losses(batch, Hpt()), losses(batch, NoMix())
    assert with_mixer[0] == without[0] and torch.equal(with_mixer[1], without[1])


def test_a_prompt_has_either_an_rl_gradient_or_one_of_imitation(make_batch):
    """Of two prompts the failed one is replaced, and the gradient of the other is that of RL alone."""
    batch = mixed(make_batch)
    imitated_B = torch.tensor([False] * 4 + [True] * 2)
    _, whole_BT = losses(batch, Hpt(sft_coefficient=1.0))
    _, none_BT = losses(batch, Hpt(sft_coefficient=0.0))
    torch.testing.assert_close(whole_BT[~imitated_B], none_BT[~imitated_B], rtol=0, atol=0)
    assert not none_BT[imitated_B].any()


def test_a_soft_table_out_of_order_is_refused():
    with pytest.raises(UserError, match="must rise"):
        Hpt(soft=((4, 0.5, 0.1), (2, 0.1, 0.5)))


def mixed(make_batch):
    """Two groups of rollouts, one of them long, and two demonstrations of three tokens."""
    rewards = [[1.0], [0.0], [1.0], [1.0], [NAN], [NAN]]
    lengths = [2, 4, 1, 3, 3, 3]
    sources, bases = [*["policy"] * 4, *["demonstration"] * 2], [*["old"] * 4, *["self"] * 2]
    batch = make_batch(rewards, lengths, groups=[0, 0, 1, 1, 2, 3], sources=sources, bases=bases)
    return replace(batch, behaviour_logp_BT=torch.full(batch.ids_BT.shape, -1.0))


def losses(batch, mixer, parts=None):
    """The loss and the gradient of the log-probabilities, of the whole batch or of its parts one by one."""
    algorithm = Algorithm(advantage=DrGrpo(), policy_loss=Reinforce(), mixer=mixer, correction=None)
    objective = Objective.of(algorithm, {})
    prepared = objective.prepare(credit(batch, algorithm, {"mixer": {"step": 0}}))
    logp_BT = torch.full(batch.ids_BT.shape, -1.0, requires_grad=True)
    total, sums = torch.zeros(()), {}
    for rows in parts or [list(range(len(batch)))]:
        micro = prepared.rows(rows)
        width = micro.ids_BT.shape[1]
        loss, more = objective.loss(logp_BT[rows, :width], None, micro)
        total, sums = total + loss, combine(sums, more)
    return float(total.detach()), torch.autograd.grad(total, logp_BT)[0]


def test_the_loss_of_a_mixed_batch_is_that_of_its_rollouts_plus_c_times_that_of_its_demonstrations(make_batch):
    batch = mixed(make_batch)
    rl, _ = losses(batch.rows([0, 1, 2, 3]), Hpt())
    sft, of_sft = losses(batch.rows([4, 5]), Hpt())
    assert sft == pytest.approx(1.0), "a token mean of negative log-likelihoods"
    assert float(of_sft.sum()) == pytest.approx(-1.0)
    both, gradient_BT = losses(batch, Hpt(sft_coefficient=0.3))
    assert both == pytest.approx(rl + 0.3 * sft)
    _, alone_BT = losses(batch.rows([0, 1, 2, 3]), Hpt())
    torch.testing.assert_close(gradient_BT[:4], alone_BT, msg="demonstrations do not dilute")


def test_it_hangs_on_no_split(make_batch):
    batch = mixed(make_batch)
    whole = losses(batch, Hpt(sft_coefficient=0.3))
    for parts in ([[0, 4], [1, 5], [2, 3]], [[5], [4], [3], [2], [1], [0]]):
        split = losses(batch, Hpt(sft_coefficient=0.3), parts)
        assert split[0] == pytest.approx(whole[0], abs=1e-6)
        torch.testing.assert_close(split[1], whole[1])


def test_a_batch_of_demonstrations_alone_has_no_rl_term(make_batch):
    loss, gradient_BT = losses(mixed(make_batch).rows([4, 5]), Blend())
    assert loss == pytest.approx(1.0) and gradient_BT.isfinite().all()


def test_the_schedules_of_a_blend():
    linear = Blend(start=1.0, end=0.2, over_steps=4)
    assert [linear.coefficient(n) for n in (0, 1, 2, 4, 9)] == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])
    cosine = Blend(start=1.0, end=0.0, over_steps=2, shape="cosine")
    assert [cosine.coefficient(n) for n in (0, 1, 2)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)
    assert Blend(start=0.4).coefficient(50) == 0.4
    step = Blend(start=1.0, end=0.25, over_steps=3, shape="step")
    assert [step.coefficient(n) for n in (0, 2, 3, 9)] == [1.0, 1.0, 0.25, 0.25]


def test_a_blend_draws_other_demonstrations_at_each_step_and_the_same_again():
    groups = [group(i, 1.0) for i in range(8)]
    drawn = [
        [r.id for g in Blend(rows=3).route({"step": 0}, [], shown(*groups), Context(step, 0))["rl"] for r in g.rollouts]
        for step in (0, 1, 0)
    ]
    assert drawn[0] == drawn[2] != drawn[1] and len(set(drawn[0])) == 3


@pytest.mark.parametrize(
    ("rewards", "no_success", "all_zero"),
    [
        ([0.0] * 8, True, True),
        ([1.0] + [0.0] * 7, False, False),
        ([-1.0] * 8, True, False),
        ([0.0, -1.0] * 4, True, False),
        ([None] * 8, False, False),
    ],
)
def test_which_prompts_relift_keeps(rewards, no_success, all_zero):
    asked = group(0, *rewards)
    assert Relift(failed="no_success").asks(asked) is no_success
    assert Relift(failed="all_zero").asks(asked) is all_zero


def test_relift_takes_the_newest_failures_once_there_are_enough(make_batch):
    mixer, failed = Relift(batch_size=128), [group(i, 0.0, 0.0) for i in range(300)]
    signals = Signals(failed, make_batch([[0.0]], [1]), {}, None, AT)
    assert set(mixer.route(mixer.init(), failed, shown(*failed), AT)) == {"rl"}, "an empty buffer"
    state = json.loads(json.dumps(mixer.observe(mixer.init(), signals)))
    taught = mixer.route(state, [], shown(*failed), AT)["sft"]
    assert [g.prompt.id for g in taught] == [f"p{i}.shown" for i in range(128)], "one update, though there are more"
    after = mixer.observe(state, replace(signals, groups=[group(900, 0.0), group(901, 1.0)]))
    assert len(after["buffer"]) == 300 - 128 + 1 and after["used"] == 128
    assert after["buffer"][:2] == [group(900).prompt.key, failed[128].prompt.key]
    assert mixer.metrics(after) == {"buffer": 173.0, "used": 128.0}


def test_advantages_of_relifts_example(make_batch):
    """(1, 0, 0, 0, 0, 0, 0, 1) without std."""
    batch = make_batch([[1.0], *[[0.0]] * 6, [1.0]], [1] * 8, groups=[0] * 8)
    adv_BT = credit(batch, Algorithm(advantage=DrGrpo()), {}).adv_BT
    assert adv_BT is not None and adv_BT[:, 1].tolist() == [0.75, *[-0.25] * 6, 0.75]
