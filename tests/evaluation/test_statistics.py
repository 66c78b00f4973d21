"""pass@k, maj@k, intervals and paired comparisons: by hand, against every subset, and by simulation."""

from itertools import combinations
from math import comb, sqrt
from statistics import NormalDist, fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.evaluation import statistics
from alignment.evaluation.forgetting import average_accuracy, forgetting_measure
from alignment.evaluation.statistics import (
    best_of_n,
    best_of_n_kl,
    compare,
    interval,
    maj_at_k,
    pass_at_k,
    powers_of_two,
    sign_flip_p,
    wilson,
)

A, B, C = "12", "7", "x"


def test_wilson_golden_numbers():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611252), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_intervals_count_problems_not_samples():
    right_or_wrong = [1.0] * 8 + [0.0] * 2
    assert interval(right_or_wrong) == wilson(8, 10)
    assert interval(right_or_wrong, samples=16) == wilson(8, 10), "samples that always agree add nothing"
    independent = interval([0.5] * 30, samples=4)
    assert independent == wilson(60, 120), "samples that vary as coins do count one by one"
    assert interval([1.0] * 100, samples=4) == pytest.approx(wilson(100, 100), abs=0.001), "alike, so far"
    assert interval([]) == (0.0, 1.0)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)  # of the 6 pairs, one has both wrong ones
    assert pass_at_k(16, 1, 16) == 1.0, "one correct of all 16; best of 16 draws with replacement would say 0.64"
    assert 1 - (1 - 1 / 16) ** 16 == pytest.approx(0.644, abs=1e-3)
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5), "no overflow"


@given(st.integers(1, 40), st.data())
def test_pass_at_k_identities(n, data):
    c = data.draw(st.integers(0, n))
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert values[0] == pytest.approx(c / n)
    assert values[-1] == float(c > 0)
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))
    for k, value in enumerate(values, 1):
        assert value == pytest.approx(1 - comb(n - c, k) / comb(n, k))


def test_best_of_n_by_hand():
    proxy, gold = [1.0, 2.0, 3.0], [0.3, 0.9, 0.6]
    assert best_of_n(proxy, gold, 1) == pytest.approx(fmean(gold))
    assert best_of_n(proxy, gold, 3) == pytest.approx(0.6)
    assert best_of_n(proxy, gold, 2) == pytest.approx(0.9 / 3 + 2 * 0.6 / 3)
    assert best_of_n(range(2048), range(2048), 1024) == pytest.approx(2049 * 1024 / 1025 - 1), "no overflow"
    assert best_of_n_kl(1) == 0 and best_of_n_kl(1024) == pytest.approx(5.9324, abs=1e-4)
    with pytest.raises(ValueError, match="k must be 1 to n"):
        best_of_n(proxy, gold, 4)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=7), st.data())
def test_best_of_n_against_every_subset(samples, data):
    n = data.draw(st.integers(1, len(samples)))
    best = [[g for p, g in chosen if p == max(chosen)[0]] for chosen in combinations(samples, n)]
    proxy, gold = zip(*samples, strict=True)
    assert best_of_n(proxy, gold, n) == pytest.approx(fmean(map(fmean, best)))


def test_pass_at_k_is_unbiased():
    generator = np.random.default_rng(0)
    for p, k in ((0.1, 4), (0.5, 2), (0.02, 8)):
        values = [pass_at_k(8, int(c), k) for c in generator.binomial(8, p, 20_000)]
        error = fmean(values) - (1 - (1 - p) ** k)
        assert abs(error) < 4 * np.std(values) / sqrt(len(values))


@pytest.mark.parametrize("arguments", [(4, 2, 5), (4, 2, 0), (4, 5, 2), (0, 0, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(arguments):
    with pytest.raises(ValueError, match="k must be 1 to n"):
        pass_at_k(*arguments)


def test_maj_at_k_by_hand():
    verdicts = {A: True, B: False, C: False, None: False}

    def maj(answers, k):
        return maj_at_k(answers, [verdicts[a] for a in answers], k)

    assert maj([A, A, B], 3) == 1.0
    assert maj([A, B], 2) == 0.5, "a tie is split evenly"
    assert maj([A, B, C], 3) == pytest.approx(1 / 3)
    assert maj([A, None, None, None], 4) == 1.0, "samples without an answer do not vote"
    assert maj([None, None], 2) == 0.0, "nobody votes: wrong"
    assert maj([A, A, B, B], 3) == 0.5
    # The pairs of A, A, B, none: AA right; AB twice, half each; A with none twice, right; B with none, wrong.
    assert maj([A, A, B, None], 2) == pytest.approx((1 + 2 * 0.5 + 2) / 6)
    assert maj_at_k([A, A, A], [True, False, True], 3) == pytest.approx(2 / 3), "one text, verdicts that differ"


def vote(answers, correct):
    """What :func:`maj_at_k` says of one subset, written down plainly."""
    cast = [a for a in answers if a is not None]
    leading = [a for a in set(cast) if cast.count(a) == max(map(cast.count, cast))]
    return fmean(correct[a] for a in leading) if leading else 0.0


@given(st.lists(st.sampled_from([A, B, C, "0.5", None]), min_size=1, max_size=9), st.sets(st.sampled_from([A, B, C])))
def test_maj_at_k_is_the_mean_over_all_subsets(answers, right):
    verdicts = [a in right for a in answers]
    for k in range(1, len(answers) + 1):
        every = [vote(subset, {a: a in right for a in answers}) for subset in combinations(answers, k)]
        assert maj_at_k(answers, verdicts, k) == pytest.approx(fmean(every))
    assert maj_at_k(answers, verdicts, 1) == pytest.approx(fmean(verdicts))


def test_maj_at_k_of_many_samples_is_quick_and_exact():
    answers = [str(i // 2) for i in range(256)]
    assert maj_at_k(answers, [a == "0" for a in answers], 256) == pytest.approx(1 / 128)
    assert 0 < maj_at_k(answers, [a == "0" for a in answers], 32) < 1 / 32


def test_powers_of_two_end_with_all():
    assert [powers_of_two(n) for n in (1, 2, 3, 16, 20)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8, 16],
        [1, 2, 4, 8, 16, 20],
    ]


def coverage(true, scores, samples):
    """Share of intervals that hold the true value: binomial over all samples, normal over problems, ours."""
    hits = np.zeros(3)
    for row in scores:
        mean, n = row.mean(), len(row)
        naive, normal = 1.96 * sqrt(mean * (1 - mean) / (n * samples)), 1.96 * row.std(ddof=1) / sqrt(n)
        low, high = interval(row.tolist(), samples)
        hits += [abs(mean - true) <= naive, abs(mean - true) <= normal, low <= true <= high]
    return hits / len(scores)


def test_intervals_cover_as_often_as_they_say():
    """30 problems of very different difficulty, 16 samples each: a binomial over all samples holds half the time."""
    generator = np.random.default_rng(1)
    difficulty = generator.beta(0.3, 0.7, (600, 30))
    correct = generator.binomial(16, difficulty)
    naive, normal, ours = coverage(0.3, correct / 16, 16)
    assert naive < 0.6 and normal > 0.9 and 0.92 < ours <= 0.99
    every = generator.beta(0.3, 0.7, 200_000)
    for k in (4, 16):
        table = np.array([pass_at_k(16, c, k) for c in range(17)])
        assert 0.92 < coverage(fmean(1 - (1 - every) ** k), table[correct], 16 // k)[2] <= 0.99


@pytest.mark.parametrize(("problems", "share"), [(30, 0.01), (30, 0.05), (100, 0.02), (100, 0.2)])
def test_intervals_cover_where_each_problem_is_always_or_never_solved(problems, share):
    """Then samples say nothing new, and all problems at hand are often alike."""
    generator = np.random.default_rng(5)
    solved = (generator.random((400, problems)) < share) * 1.0
    assert coverage(share, solved, 16)[2] > 0.91
    assert interval([1.0] * 30, 16) == pytest.approx(wilson(30, 30), abs=0.01)
    low, high = zip(*(compare([0.0] * problems, row.tolist()).interval for row in solved), strict=True)
    assert np.mean((np.array(low) <= share) & (share <= np.array(high))) > 0.87


def test_intervals_cover_where_a_normal_one_shrinks_to_a_point():
    generator = np.random.default_rng(2)
    correct = generator.binomial(16, generator.beta(5, 5, (300, 30)))
    table, every = np.array([pass_at_k(16, c, 16) for c in range(17)]), generator.beta(5, 5, 200_000)
    _, normal, ours = coverage(fmean(1 - (1 - every) ** 16), table[correct], 1)
    assert normal < 0.2 and ours > 0.9


def test_intervals_of_majority_votes_cover():
    generator = np.random.default_rng(3)
    probability = generator.beta(1, 1, (200, 20))
    right = generator.random((200, 20, 8)) < probability[:, :, None]
    wrong = generator.integers(0, 3, right.shape)

    def votes(right, wrong, k):
        return maj_at_k([A if r else str(w) for r, w in zip(right, wrong, strict=True)], right.tolist(), k)

    scores = np.array([[votes(r, w, 4) for r, w in zip(*row, strict=True)] for row in zip(right, wrong, strict=True)])
    assert 0.9 < coverage(scores.mean(), scores, 8 // 4)[2] <= 1.0


def test_a_paired_comparison_by_hand():
    a, b = [1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0, 1.0]
    found = compare(a, b)
    assert (found.problems, found.a, found.b) == (5, 0.4, 0.8)
    assert found.difference == pytest.approx(0.4)
    assert (found.wins, found.ties, found.losses) == (3, 1, 1)
    assert found.p == pytest.approx(2 * (1 + 4) / 16), "McNemar's exact test on 3 against 1"
    # Agresti and Min (2005): half a problem in each cell, then the usual interval for paired proportions.
    gains, drops, n = 3.5, 1.5, 7
    centre = (gains - drops) / n
    half = NormalDist().inv_cdf(0.975) * sqrt((gains + drops) - (gains - drops) ** 2 / n) / n
    assert found.interval == pytest.approx((centre - half, centre + half))


def test_comparing_with_itself_finds_nothing_but_does_not_claim_certainty():
    found = compare([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.difference, found.p, found.ties) == (0.0, 1.0, 3)
    assert found.interval[0] < 0 < found.interval[1]
    with pytest.raises(ValueError, match="not 2 and 1 scores"):
        compare([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="not 0 and 0"):
        compare([], [])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_swapping_the_two_turns_a_comparison_around(pairs):
    a, b = [x / 4 for x, _ in pairs], [y / 4 for _, y in pairs]
    there, back = compare(a, b), compare(b, a)
    assert back.difference == pytest.approx(-there.difference)
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))
    assert (back.p, back.wins, back.losses) == (there.p, there.losses, there.wins)


def test_a_paired_interval_is_narrower_than_an_unpaired_one_and_covers():
    generator = np.random.default_rng(4)
    hits, paired, unpaired = 0, [], []
    every = generator.beta(0.3, 0.7, 200_000)
    true = float(np.mean(np.clip(every + 0.05, 0, 1) - every))
    for difficulty in generator.beta(0.3, 0.7, (300, 30)):
        a = generator.binomial(16, difficulty) / 16
        b = generator.binomial(16, np.clip(difficulty + 0.05, 0, 1)) / 16
        low, high = compare(a.tolist(), b.tolist()).interval
        hits += low <= true <= high
        paired.append(high - low)
        unpaired.append(2 * 1.96 * sqrt(a.var(ddof=1) / 30 + b.var(ddof=1) / 30))
    assert hits / 300 > 0.94, "what is added makes it wide where samples are many and differences small"
    assert fmean(paired) < fmean(unpaired) / 2


def test_random_flips_agree_with_all_flips(monkeypatch):
    differences = np.array([0.5, 0.25, -0.25, 0.75, 0.5, 0.25, -0.5, 0.25, 0.5, 0.0, 0.25, -0.25])
    exact = sign_flip_p(differences)
    monkeypatch.setattr(statistics, "EXACT_FLIPS", 0)
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.012)
    assert sign_flip_p(differences) == sign_flip_p(differences), "the same every time"
    monkeypatch.undo()
    assert sign_flip_p([1.0] * 40) < 1e-4 and sign_flip_p([0.0] * 40) == 1.0


def test_p_is_uniform_where_nothing_differs():
    generator = np.random.default_rng(5)
    found = [sign_flip_p(generator.integers(-4, 5, 10) / 4) for _ in range(400)]
    assert 0.02 < fmean(p <= 0.05 for p in found) < 0.08
    assert all(p > 0 for p in found)


def test_forgetting_golden_numbers():
    accuracy = [[0.8], [0.6, 0.9]]
    assert forgetting_measure(accuracy) == pytest.approx(-0.2) and average_accuracy(accuracy) == pytest.approx(0.75)
    assert forgetting_measure([[0.5], [0.1, 0.5], [0.7, 0.4, 0.9]]) == pytest.approx((0.2 - 0.1) / 2)
