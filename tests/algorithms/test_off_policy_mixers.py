"""LUFFY, SRFT, AMFT and GRAO: numbers by hand, and the gradients that the whole objective gives."""

import json
import math
from dataclasses import replace

import pytest
import torch

from alignment.algorithms.advantages import DrGrpo, Grpo
from alignment.algorithms.aggregations import SequenceMean, TokenMean
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.experimental_mixers import Amft, Grao, meta_gradient
from alignment.algorithms.objective import Objective, combine
from alignment.algorithms.off_policy_mixers import Luffy, Srft, sequence_entropy
from alignment.algorithms.policy_losses import Clip, Reinforce
from alignment.errors import UserError
from alignment.types import Signals
from tests.algorithms.test_mixers import AT, group, shown

LN = math.log


def objective_of(mixer, batch, logp_BT, *, parts=None, state=None, entropy_BT=None, **chosen):
    """Loss and gradient by the log-probabilities of a batch that is credited and learned from with ``mixer``."""
    algorithm = Algorithm(mixer=mixer, correction=None, **{"advantage": DrGrpo(), "policy_loss": Reinforce()} | chosen)
    if entropy_BT is not None:
        batch = replace(batch, entropy_BT=entropy_BT)
    objective = Objective.of(algorithm, {})
    prepared = objective.prepare(credit(batch, algorithm, {"mixer": state}))
    logp_BT = logp_BT.clone().requires_grad_()
    total, sums = torch.zeros(()), {}
    for rows in parts or [list(range(len(batch)))]:
        micro = prepared.rows(rows)
        loss, more = objective.loss(logp_BT[rows, : micro.ids_BT.shape[1]], None, micro)
        total, sums = total + loss, combine(sums, more)
    return float(total.detach()), torch.autograd.grad(total, logp_BT)[0]


def one_group(make_batch, rewards, bases, lengths=None, **more):
    """A group of rollouts and, after them, demonstrations of these ratio bases."""
    rollouts = len(rewards) - len(bases)
    sources = ["policy"] * rollouts + ["demonstration"] * len(bases)
    return make_batch(
        [[r] for r in rewards], lengths, [0] * len(rewards), sources=sources, bases=["old"] * rollouts + bases, **more
    )


# LUFFY


@pytest.mark.parametrize(
    ("p", "value", "derivative"),
    [(0.01, 0.090909, 8.264463), (0.1, 0.5, 2.5), (0.5, 0.833333, 0.277778), (1.0, 0.909091, 0.082645)],
)
@pytest.mark.parametrize("policy_loss", [Reinforce(), Clip()])
def test_the_shaping_of_luffy(make_batch, p, value, derivative, policy_loss):
    """Rewards 0, 0, 0 and 1 for the demonstration: its advantage is 0.75, and a quarter of the tokens is its own."""
    batch = one_group(make_batch, [0.0, 0.0, 0.0, 1.0], ["one"])
    logp_BT = torch.full((4, 2), LN(0.3))
    logp_BT[3] = LN(p)
    loss, gradient_BT = objective_of(Luffy(), batch, logp_BT, policy_loss=policy_loss)
    without, _ = objective_of(Luffy(), replace(batch, loss_mask_BT=batch.loss_mask_BT & False), logp_BT)
    assert without == 0.0
    own = objective_of(Luffy(), batch, logp_BT * torch.tensor([[1.0], [1.0], [1.0], [0.0]]), policy_loss=policy_loss)
    assert loss - own[0] == pytest.approx(-0.75 / 4 * (value - 1 / 1.1), abs=1e-6)
    assert gradient_BT[3, 1] == pytest.approx(-0.75 / 4 * derivative * p, rel=1e-5)  # by log p
    assert gradient_BT[0, 1] == pytest.approx(0.25 / 4, rel=1e-6), "rollouts have the recipe's loss"


def test_a_wrong_demonstration_is_pushed_down_by_luffy_and_no_clip_stops_it(make_batch):
    batch = one_group(make_batch, [1.0, 1.0, 1.0, 0.0], ["one"])
    _, gradient_BT = objective_of(Luffy(), batch, torch.full((4, 2), LN(0.1)), policy_loss=Clip())
    assert gradient_BT[3, 1] == pytest.approx(0.75 / 4 * 2.5 * 0.1, rel=1e-5)


def test_luffy_without_shaping_is_the_estimator_at_base_one(make_batch):
    batch = one_group(make_batch, [0.0, 1.0], ["one"])
    _, gradient_BT = objective_of(Luffy(shaping=None), batch, torch.full((2, 2), LN(0.2)))
    assert gradient_BT[1, 1] == pytest.approx(-0.5 / 2 * 0.2, rel=1e-5)


def test_luffys_demonstrations_join_every_group():
    asked = [group(0, 1.0, 0.0), group(1, 0.0)]
    known = {key: rows * 3 for key, rows in shown(asked[0]).items()}
    routed = Luffy(demonstrations_per_prompt=2).route(None, asked, known, AT)["rl"]
    assert [r.ratio_base for r in routed[0].rollouts] == ["old", "old", "one", "one"] and routed[1] == asked[1]


def test_where_base_and_advantage_of_the_estimator_are_equal_so_are_gradients(make_batch):
    """At ``pi_old = pi`` clip, ratio and REINFORCE are one, and a demonstration of base ``self`` is its likelihood."""
    batch = one_group(make_batch, [1.0, 0.0, 0.0], ["self"], [2, 3, 4])
    logp_BT = -torch.rand((3, 5), generator=torch.Generator().manual_seed(0)) - 0.1
    old = replace(batch, old_logp_BT=logp_BT.clone())
    found = [
        objective_of(Srft(), old, logp_BT, policy_loss=x, entropy_BT=logp_BT * 0)[1] for x in (Reinforce(), Clip())
    ]
    torch.testing.assert_close(found[0], found[1])
    _, alone = objective_of(Srft(), batch.rows([2]), logp_BT[2:], entropy_BT=logp_BT[2:] * 0)
    likelihood = -batch.loss_mask_BT[2:].float() / 4  # the token mean of -log p
    torch.testing.assert_close(alone, 0.5 * likelihood)
    torch.testing.assert_close(found[0][2:], alone, msg="and rollouts do not dilute it")


# SRFT


@pytest.mark.parametrize(("entropy", "sft", "rl"), [(0, 0.5, 0.1), (1, 0.183940, 0.271828), (2, 0.067668, 0.738906)])
def test_the_coefficients_of_srft(make_batch, entropy, sft, rl):
    batch = one_group(make_batch, [1.0, 0.0, math.nan, 1.0], ["self", "one"], [2, 2, 2, 2])
    batch = replace(batch, entropy_BT=torch.full((4, 3), float(entropy)))
    assert Srft().coefficients(None, batch).tolist() == pytest.approx([rl, 1.0, sft, 1.0], rel=1e-5)
    credited = credit(batch, Algorithm(advantage=DrGrpo(), mixer=Srft()), {})
    assert credited.adv_BT is not None
    assert credited.adv_BT[:, 1].tolist() == pytest.approx([1.0, -1.0, 1.0, 1 / 3]), "judged among (1, 0, 1)"


def test_entropies_are_means_over_each_sequence(make_batch):
    mask = [[False, True, False, True], [False, True, True, False]]
    entropy_BT = torch.tensor([[9.0, 1.0, 9.0, 3.0], [9.0, 0.5, 1.5, math.nan]])
    batch = make_batch([[1.0], [0.0]], [3, 3], mask=mask, entropy_BT=entropy_BT)
    assert sequence_entropy(batch).tolist() == [2.0, 1.0]


def test_srft_shows_each_demonstration_twice():
    asked = group(0, 1.0, 0.0)
    [routed] = Srft().route(None, [asked], shown(asked), AT)["rl"]
    assert [(r.source, r.ratio_base) for r in routed.rollouts[2:]] == [
        ("demonstration", "self"),
        ("demonstration", "one"),
    ]


def test_none_of_them_hangs_on_the_split(make_batch):
    batch = one_group(make_batch, [1.0, 0.0, 0.5, 1.0, 1.0], ["self", "one"], [3, 1, 4, 2, 2])
    logp_BT = -torch.rand((5, 5), generator=torch.Generator().manual_seed(1)) - 0.1
    for mixer, state in ((Luffy(), None), (Srft(), None), (Amft(), {"mu": 0.3}), (Grao(statistics="all"), None)):
        whole = objective_of(mixer, batch, logp_BT, state=state, entropy_BT=-logp_BT)
        for parts in ([[4, 1], [3, 2, 0]], [[i] for i in range(5)]):
            split = objective_of(mixer, batch, logp_BT, state=state, entropy_BT=-logp_BT, parts=parts)
            assert split[0] == pytest.approx(whole[0], abs=1e-6)
            torch.testing.assert_close(split[1], whole[1])
        order = [3, 0, 4, 2, 1]
        other = objective_of(mixer, batch.rows(order), logp_BT[order], state=state, entropy_BT=-logp_BT[order])
        torch.testing.assert_close(other[1], whole[1][order])


# AMFT


def test_the_meta_gradient_is_the_derivative_of_the_utility():
    """``L_SFT = (t - 1)^2 / 2``, ``L_RL = (t + 1)^2 / 2``, ``L_val = (t - 1/2)^2 / 2`` at 0 with rate 0.1."""
    val, sft, rl = torch.tensor([-0.5]), torch.tensor([-1.0]), torch.tensor([1.0])
    found = meta_gradient(val, sft, rl, 0.1)
    assert found == pytest.approx(0.1)

    def utility(mu: float) -> float:
        theta = -0.1 * ((1 - mu) * 1.0 + mu * -1.0)
        return -0.5 * (theta - 0.5) ** 2

    assert found == pytest.approx((utility(0.5 + 1e-5) - utility(0.5 - 1e-5)) / 2e-5, rel=1e-5)
    assert meta_gradient(val, sft, sft, 0.1) == 0.0 == meta_gradient(val, sft, sft, 0.1, cosine=True)
    assert meta_gradient(val * 1e-9, sft, rl, 1e-6, cosine=True) == pytest.approx(1.0)


def test_the_controller_of_amft(make_batch):
    mixer = Amft(target_entropy=1.0)
    assert mixer.moved(0.8, 0.5, 0.1) == pytest.approx(0.80026)
    assert mixer.moved(0.94, 1e3) == 0.95 and mixer.moved(0.06, -1e3) == 0.05
    batch = one_group(make_batch, [1.0, 0.0, math.nan], ["self"])
    batch = replace(batch, entropy_BT=torch.tensor([[0.0, 1.25], [0.0, 1.75], [0.0, 99.0]]))
    signals = Signals([], batch, {}, None, AT)
    moved = mixer.observe(mixer.init(), signals)
    assert moved["mu"] == pytest.approx(0.8 + 5e-4 * 0.5), "an entropy above the target asks for more imitation"
    printed = Amft(target_entropy=1.0, sign="printed")
    assert printed.observe(printed.init(), signals)["mu"] == pytest.approx(0.8 - 5e-4 * 0.5)
    first = json.loads(json.dumps(Amft().observe(Amft().init(), signals)))
    assert first == {"mu": 0.8, "target": 1.5} and Amft().metrics(first) == {"mu": 0.8, "target_entropy": 1.5}


def test_the_ends_of_amft_are_rl_and_imitation_alone(make_batch):
    batch = one_group(make_batch, [1.0, 0.0, math.nan], ["self"], [2, 1, 3])
    logp_BT, no = torch.full((3, 4), -1.0), torch.zeros(3, 4)
    rl, sft = (objective_of(Amft(), batch, logp_BT, state={"mu": mu}, entropy_BT=no)[1] for mu in (0.0, 1.0))
    assert not rl[2].any() and rl[:2].any() and sft[2].any() and not sft[:2].any()
    torch.testing.assert_close(sft[2], -batch.loss_mask_BT[2].float() / 3)
    both = objective_of(Amft(), batch, logp_BT, state={"mu": 0.3}, entropy_BT=no)[1]
    torch.testing.assert_close(both, 0.7 * rl + 0.3 * sft)


def test_a_start_outside_the_bounds_is_refused():
    with pytest.raises(UserError, match=r"start \(0.99\) must lie from low \(0.05\) to high \(0.95\)"):
        Amft(start=0.99)


# GRAO

GOLDEN = [1.0, 0.0, 1.0, 0.0, 1.0]
MEANS = [-0.5, -2.0, -1.0, -1.5, -1.2]


def published(statistics: str, beta: float = 0.5, lam: float = 0.6) -> float:
    """The objective as the text has it, term by term."""
    rewards, means = torch.tensor(GOLDEN, dtype=torch.float64), torch.tensor(MEANS, dtype=torch.float64)
    among = rewards[:4] if statistics == "rollouts" else rewards
    adv = (rewards - among.mean()) / among.std(correction=0)
    explore, align = adv[:4] * means[:4], adv[:4] * (means[:4] - means[4])
    return float((explore + beta * adv[4] * means[4] + lam * align).mean())


@pytest.mark.parametrize(("statistics", "golden"), [("rollouts", 0.2), ("all", 0.587878)])
def test_the_objective_of_grao(make_batch, statistics, golden):
    batch = one_group(make_batch, GOLDEN, ["self"], [2, 1, 4, 3, 2])
    logp_BT = torch.tensor(MEANS)[:, None].expand(5, 5)
    assert published(statistics) == pytest.approx(golden, abs=1e-6)
    chosen = {"aggregation": SequenceMean(), "advantage": Grpo()}
    loss, gradient_BT = objective_of(Grao(statistics=statistics), batch, logp_BT, **chosen)
    assert -loss == pytest.approx(golden, abs=1e-6)
    terms = {"rollouts": 1.6 * 0.5 - 0.6, "all": 1.6 * 0.765466 + 0.65 * 0.816497 * -1.2}[statistics]
    assert -loss == pytest.approx(terms, abs=1e-5)
    of_y = {"rollouts": 0.5, "all": 0.65 * 0.816497}[statistics]
    assert float(gradient_BT[4].sum()) == pytest.approx(-of_y, abs=1e-5)


def test_a_group_of_equal_rewards_teaches_grao_nothing(make_batch):
    batch = one_group(make_batch, [1.0, 1.0, 1.0], ["self"])
    for statistics in ("rollouts", "all"):
        loss, gradient_BT = objective_of(Grao(statistics=statistics), batch, torch.full((3, 2), -1.0))
        assert loss == 0.0 and not gradient_BT.any()


def test_grao_leaves_out_what_is_unscored(make_batch):
    scored = [True, True, False, True]
    batch = one_group(make_batch, [1.0, 0.0, math.nan, 1.0], ["self"], scored=scored)
    found = objective_of(Grao(), batch, torch.full((4, 2), -1.0), aggregation=TokenMean())[1]
    assert found[2].tolist() == [0.0, 0.0] and found.isfinite().all()
