"""Decodings: golden numbers, identities, and what the first-order rule gets wrong."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignment.algorithms.decodings import (
    BestOfN,
    ChunkRerank,
    Emulated,
    Plain,
    ValueAugmented,
    best_of_n_kl,
    choose,
    decodings,
    emulate,
    tilt_logits,
)
from alignment.algorithms.values import generalised
from alignment.errors import UserError
from alignment.types import Rollout, SamplingParams

P0 = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
Q = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
ALL = torch.tensor([[0, 1, 2]])


def tilted(q=Q, beta=1.0, candidates=ALL, temperature=1.0, **options):
    """Probabilities after the tilt, of :data:`P0`."""
    values = q[..., None] if q.dim() == 2 else q
    betas = torch.tensor([beta] if isinstance(beta, list) else [[beta]], dtype=torch.float64)
    logits = tilt_logits(P0.log(), candidates, values.gather(1, _places(candidates, values)), betas, **options)
    return (logits / temperature).softmax(-1)


def _places(candidates, values):
    return candidates[..., None].expand(*candidates.shape, values.shape[-1])


def near(found, *wanted):
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=torch.float64), atol=2e-6, rtol=0)


def test_targets_of_td_lambda():
    # Three decisions; the value of the state before sampled token t stands at t - 1.
    values = torch.tensor([[0.1, 0.2, 0.3, 0.0]])
    mask = torch.tensor([[False, True, True, True]])
    for lam, wanted in ((0, (0.2, 0.3, 1)), (0.5, (0.425, 0.65, 1)), (0.95, (0.92675, 0.965, 1)), (1, (1, 1, 1))):
        found = generalised(values, torch.ones(1), None, mask, torch.zeros(1, dtype=torch.bool), lam=lam)
        near(found.target_BT[:, :3], *wanted)


def test_a_completion_of_one_token_trains_the_state_before_it_and_the_terminal_one():
    mask = torch.tensor([[False, True]])
    found = generalised(torch.zeros(1, 2), torch.tensor([0.7]), None, mask, torch.zeros(1, dtype=torch.bool))
    near(found.target_BT, 0.7, 0.7)


def test_tilted_distribution_and_that_a_constant_does_not_matter():
    near(tilted(), 0.179000, 0.291944, 0.529056)
    for options in ({"centre": False}, {"q": Q + 5}, {"q": Q + 5, "centre": False}):
        near(tilted(**options), 0.179000, 0.291944, 0.529056)


def test_the_tail_has_the_mean_value_of_the_candidates():
    near(tilted(candidates=ALL[:, :2]), 0.303909, 0.495666, 0.200425)
    near(tilted(candidates=ALL[:, :2], centre=False), 0.329927, 0.538101, 0.131971)


def test_beta_0_and_a_single_candidate_change_no_bit():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    values = torch.randn(5, 20, 2, generator=torch.Generator().manual_seed(1))
    candidates = logits.topk(20).indices
    assert torch.equal(tilt_logits(logits, candidates, values, torch.zeros(5, 2)), logits)
    assert torch.equal(tilt_logits(logits, candidates[:, :1], values[:, :1], torch.full((5, 2), 3.0)), logits)


def test_two_models_add_up_and_equal_one_after_the_other():
    other = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64)
    near(tilted(torch.stack([Q, other], -1), [1.0, 0.5]), 0.294753, 0.176852, 0.528396)
    first = tilt_logits(P0.log(), ALL, Q[..., None], torch.ones(1, 1, dtype=torch.float64))
    second = tilt_logits(first, ALL, other[..., None], torch.full((1, 1), 0.5, dtype=torch.float64))
    near(second.softmax(-1), 0.294753, 0.176852, 0.528396)


def test_kl_to_the_policy():
    mu = tilted()
    log_z = (P0 * Q.exp()).sum().log()
    mean = (mu * Q).sum()
    near(torch.stack([mean - log_z, mean, log_z]), 0.322834, 1.350056, 1.027222)
    near((mu * (mu / P0).log()).sum(), 0.322834)


def test_with_values_of_the_policy_the_rule_is_first_order_and_not_the_optimum():
    # Token A earns 1 or 0 with equal chance, token B 0.5 for sure.
    even = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    beta = 2.0
    ours = tilt_logits(even.log(), torch.tensor([[0, 1]]), q[..., None], torch.full((1, 1), beta)).softmax(-1)
    near(ours, 0.5, 0.5)
    soft = torch.tensor([[(0.5 + 0.5 * math.exp(beta)), math.exp(beta / 2)]], dtype=torch.float64).log()
    near((even.log() + soft).softmax(-1), 0.606776, 0.393224)


def test_temperature_divides_the_tilt_too():
    near(tilted(temperature=0.5), 0.080673, 0.214594, 0.704733)


def test_importance_weights_of_the_policy_over_the_tilted_distribution():
    mu = tilted()
    near(P0 / mu, 2.793296, 1.027596, 0.378031)
    near((P0 / mu).clamp(max=2), 2, 1.027596, 0.378031)
    near((mu * P0 / mu).sum(), 1)


def emulated(tuned, base, strength, policy=(0.6, 0.4), **options):
    def logs(rows):
        return torch.tensor(rows, dtype=torch.float64).log()

    strengths = torch.tensor([strength], dtype=torch.float64)
    return emulate(logs([policy]), logs([[t] for t in tuned]), logs([[b] for b in base]), strengths, **options)


def test_emulated_fine_tuning():
    ft, base = (0.9, 0.1), (0.5, 0.5)
    near(emulated([ft], [base], [1.0]).softmax(-1), 0.931034, 0.068966)
    near(emulated([ft], [(0.6, 0.4)], [1.0]).softmax(-1), *ft)
    assert torch.equal(emulated([ft], [base], [0.0]), torch.tensor([[0.6, 0.4]], dtype=torch.float64).log())
    near(emulated([ft], [base], [0.5]).softmax(-1), 0.818182, 0.181818)
    near(emulated([ft, (0.2, 0.8)], [base, base], [0.5, 0.5]).softmax(-1), 0.692308, 0.307692)


def test_emulated_deltas_are_the_implicit_reward_of_dpo():
    # What the deltas add to a sequence's score is the sum of log pi_tuned - log pi_base over its tokens.
    g = torch.Generator().manual_seed(0)
    policy, tuned, base = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(3))
    token = torch.arange(5)
    found = emulate(policy, tuned[None], base[None], torch.ones(5, 1)) - policy
    reward = sum((m.log_softmax(-1)[range(5), token] * s).sum() for m, s in ((tuned, 1), (base, -1)))
    torch.testing.assert_close(found[range(5), token].sum(), reward)


def test_emulated_keeps_to_the_nucleus():
    found = emulated([(0.01, 0.99)], [(0.5, 0.5)], [1.0], policy=(0.9, 0.1), top_p=0.85)
    near(found.softmax(-1), 1, 0)


def test_emulated_leaves_rows_alone_that_not_all_models_have():
    logs = {n: torch.randn(1, 1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (2, 3, 4)}
    for policy, tuned, base in ((4, 2, 3), (2, 4, 3), (3, 3, 2)):
        found = emulate(logs[policy][0], logs[tuned], logs[base], torch.ones(1, 1))
        delta = logs[tuned].log_softmax(-1)[0, :, :2] - logs[base].log_softmax(-1)[0, :, :2]
        torch.testing.assert_close(found[:, :2], logs[policy][0][:, :2] + delta)
        assert torch.equal(found[:, 2:], logs[policy][0][:, 2:])


def test_choose_draws_from_the_softmax_of_values_over_beta():
    values = torch.tensor([1.0, 2.0, 3.0])
    grid = [(i + 0.5) / 2000 for i in range(2000)]
    chosen = torch.tensor([choose(values, 1.0, uniform) for uniform in grid]).bincount(minlength=3) / 2000
    torch.testing.assert_close(chosen, torch.tensor([0.090031, 0.244728, 0.665241]), atol=6e-4, rtol=0)
    # 2.06e-9 and 4.54e-5 before 0.9999546
    assert [choose(values, 0.1, uniform) for uniform in (2.0e-9, 2.1e-9, 4.53e-5, 4.55e-5)] == [0, 1, 1, 2]
    assert choose(values, 1.0, 1 - 1e-16) == 2
    assert [choose(values, beta, 0.0) for beta in (None, 0.0)] == [2, 2]
    assert choose(torch.tensor([1.0, 4.0, 4.0]), None, 0.9) == 1
    assert choose(values[:1], 1.0, 0.7) == 0


def test_the_best_of_k_uniform_numbers_and_the_bound_of_its_kl():
    numbers = torch.rand(20000, 10, generator=torch.Generator().manual_seed(0))
    for n, wanted in ((1, 0.5), (2, 0.6667), (4, 0.8), (10, 0.9091)):
        best = numbers[:, :n].gather(1, torch.tensor([[choose(row, None, 0.0)] for row in numbers[:, :n]]))
        assert abs(float(best.mean()) - wanted) < 0.01
    assert round(best_of_n_kl(4), 6) == 0.636294 and best_of_n_kl(1) == 0


def test_components_from_recipes():
    one = decodings.build({"name": "value_augmented", "models": "critic", "beta": 2})
    assert isinstance(one, ValueAugmented) and one.addresses == ("critic",) and one.tilt == (2.0,)
    two = decodings.build({"name": "value_augmented", "models": ["a", "b"], "beta": [1, 0.5], "top_k": 5})
    assert two.tilt == (1.0, 0.5) and decodings.build(decodings.dump(two)) == two
    pair = decodings.build({"name": "emulated", "tuned": "a", "base": "b"})
    assert isinstance(pair, Emulated) and pair.addresses == ("a", "b") and pair.tilt == (1.0,)
    best = decodings.build({"name": "best_of_n", "model": "a", "beta": 0.1})
    assert isinstance(best, BestOfN) and best.tilt == () and best.addresses == ("a",)
    assert isinstance(decodings.build({"name": "chunk_rerank", "model": "a"}), ChunkRerank)
    assert decodings.build("plain") == Plain() and Plain().tilt == Plain().addresses == ()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "value_augmented", "models": ["a", "b"], "beta": [1]}, "beta has 1 numbers for 2 value models"),
        ({"name": "value_augmented", "models": []}, "there are no value models"),
        ({"name": "value_augmented", "models": "a", "beta": math.inf}, "give finite numbers"),
        ({"name": "emulated", "tuned": ["a", "b"], "base": "c"}, "2 tuned models and 1 base models"),
        ({"name": "emulated", "tuned": "a", "base": "c", "strength": [1, 2]}, "strength has 2 numbers for 1 pairs"),
        ({"name": "best_of_n", "model": "a", "n": 0}, "greater than or equal to 1"),
    ],
)
def test_components_refuse(wrong, message):
    with pytest.raises((UserError, ValidationError), match=message):
        decodings.build(wrong)


def test_a_rollout_remembers_its_tilt():
    params = SamplingParams(4, stop_ids=(1,), tilt=(1.0, 0.5))
    rollout = Rollout("r", "p", (1,), (2,), (True,), (-0.1,), "x", "stop", 0, "transformers", params, ((0, 0),))
    assert Rollout.from_json(rollout.to_json()) == rollout
    older = rollout.to_json()
    del older["sampling"]["tilt"]
    assert Rollout.from_json(older).sampling.tilt == ()
