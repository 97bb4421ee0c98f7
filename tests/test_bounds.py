"""Bounds against the standard library's normal law, exact fractions, scipy's tests and simulated coverage."""

import math
import signal
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from dememo_jax import bounds
from dememo_jax.errors import BadInput

PHI = NormalDist()


def ranks(n):
    return np.arange(1, n + 1)  # scores that name their own rank


def exact_rank(n, level, alpha):
    """The least k with P[Bin(n, level) >= k] <= alpha in exact arithmetic; None when even k = n fails."""
    level, alpha, tail, best = Fraction(level), Fraction(alpha), Fraction(0), None
    for k in range(n, 0, -1):
        tail += math.comb(n, k) * level**k * (1 - level) ** (n - k)
        if tail > alpha:
            break
        best = k
    return best


# --- the shift ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.001, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("shift", [0.0, 0.25, 1.0, 3.0])
def test_shifted_level_and_tail(q, shift):
    expected = PHI.cdf(PHI.inv_cdf(q) + shift)
    assert bounds.shifted_level(q, shift) == pytest.approx(expected, rel=1e-12)
    assert bounds.shifted_tail(q, shift) == pytest.approx(1 - expected, abs=1e-14)


def test_shifted_levels_of_the_table():
    found = [[bounds.shifted_level(q, shift) for shift in (0.25, 0.5, 1, 2)] for q in (0.9, 0.99)]
    np.testing.assert_allclose(found[0], [0.93718, 0.96259, 0.98874, 0.99948], atol=5e-6)
    np.testing.assert_allclose(found[1], [0.995007, 0.997646, 0.999560, 0.99999242], atol=5e-7)


@pytest.mark.parametrize("shift", [10.0, 20.0, 35.0])
def test_tail_is_exact_where_the_level_rounds_to_one(shift):
    z = PHI.inv_cdf(0.9) + shift
    assert bounds.shifted_level(0.9, shift) == 1.0
    assert bounds.shifted_tail(0.9, shift) == pytest.approx(math.erfc(z / math.sqrt(2)) / 2, rel=1e-9, abs=0.0)


@pytest.mark.parametrize("q", [0.6, 0.9])
@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_published_lower_level_is_the_printed_quantile(q, shift):
    printed = PHI.cdf(PHI.inv_cdf(q) - shift)  # the level of the paper's L; quantile_lower bounds quantile 1 - level
    assert 1 - bounds.published_lower_level(q, shift) == pytest.approx(printed, abs=1e-12)


# --- how many draws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "q", "expected"),
    [
        (0.01, 0.9, (71, 121, 407, 8_920)),
        (0.01, 0.99, (921, 1_954, 10_465, 607_533)),
        (0.001, 0.9, (107, 182, 611, 13_379)),
        (0.001, 0.99, (1_381, 2_931, 15_698, 911_299)),
    ],
)
def test_min_draws_of_the_table(alpha, q, expected):
    shifts = (0.25, 0.5, 1.0, 2.0)
    assert tuple(bounds.min_draws(bounds.shifted_level(q, s), alpha) for s in shifts) == expected
    tails = [bounds.shifted_tail(q, s) for s in shifts]
    assert tuple(bounds.min_draws(1 - tail, alpha, tail=tail) for tail in tails) == expected


@pytest.mark.parametrize(
    ("n", "alpha", "expected"),
    [
        (100, 0.01, (1.70, 1.17, 0.414, 0.0505, None)),
        (500, 0.01, (2.36, 1.83, 1.077, 0.714, 0.032)),
        (1_000, 0.01, (2.60, 2.08, 1.323, 0.960, 0.279)),
        (1_000, 0.001, (2.46, 1.94, 1.182, 0.818, 0.137)),
        (10_000, 0.01, (3.31, 2.79, 2.032, 1.669, 0.987)),
        (10_000, 0.001, (3.20, 2.67, 1.917, 1.554, 0.872)),
        (100_000, 0.001, (3.81, 3.29, 2.530, 2.167, 1.485)),
    ],
)
def test_max_shift_of_the_table(n, alpha, expected):
    for q, shift in zip((0.5, 0.7, 0.9, 0.95, 0.99), expected):
        found = bounds.max_shift(n, q, alpha)
        if shift is None:
            assert found is None
        else:
            assert found == pytest.approx(shift, abs=5.1e-3 if q < 0.9 else 5.1e-4)


def test_max_shift_is_the_edge_of_min_draws():
    for n, q, alpha in [(50, 0.7, 0.05), (400, 0.9, 0.01), (5_000, 0.95, 0.001)]:
        edge = bounds.max_shift(n, q, alpha)
        assert bounds.min_draws(bounds.shifted_level(q, edge * (1 - 1e-9)), alpha) == n
        assert bounds.min_draws(bounds.shifted_level(q, edge * (1 + 1e-6)), alpha) == n + 1


def test_min_draws_is_where_a_bound_first_exists():
    random = np.random.default_rng(0)
    ties = [(0.5, 0.125), (0.5, 0.5), (0.25, 0.0625), (0.75, 0.421875), (0.9, 0.729), (0.99, 0.9801), (0.1, 0.001)]
    for level, alpha in ties + list(zip(random.uniform(0.2, 0.998, 60), 10 ** random.uniform(-5, -0.1, 60))):
        n = bounds.min_draws(level, alpha)
        assert level**n <= alpha * (1 + 1e-12) < level ** (n - 1) * (1 + 1e-11)
        assert bounds.quantile_upper(ranks(n), level, alpha) == n  # the sample maximum
        if n > 1:
            assert bounds.quantile_upper(ranks(n - 1), level, alpha) is None


@pytest.mark.parametrize(("level", "alpha", "n"), [(0.5, 0.125, 3), (0.5, 0.5, 1), (0.25, 0.0625, 2), (0.75, 0.421875, 3)])
def test_min_draws_counts_exact_ties(level, alpha, n):
    assert bounds.min_draws(level, alpha) == n  # level**n equals alpha


def test_no_number_of_draws_makes_up_for_a_tail_that_underflows():
    tail = bounds.shifted_tail(0.9, 40.0)
    assert tail == 0.0
    assert bounds.min_draws(1.0, 0.01, tail=tail) is None
    assert bounds.quantile_upper(ranks(100), 1.0, 0.01, tail=tail) is None
    assert bounds.quantile_lower(ranks(100), 1.0, 0.01, tail=tail) is None


@pytest.mark.parametrize("shift", [8.5, 12.0, 35.0])
def test_min_draws_of_a_tiny_tail_is_prompt(shift):
    def too_late(*_):
        raise TimeoutError("min_draws counts down one draw at a time")

    tail = bounds.shifted_tail(0.9, shift)
    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    try:
        found = bounds.min_draws(1.0, 0.01, tail=tail)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert found == pytest.approx(math.log(100) / tail, rel=1e-9)


# --- order statistics --------------------------------------------------------------------------------------------


def test_rank_of_the_published_setting():
    etas = (0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 1.0)
    found = [bounds.quantile_upper(ranks(1_000), bounds.shifted_level(0.9, eta / 0.25), 0.01) for eta in etas]
    assert found == [923, 929, 950, 969, 983, 991, 997, 1000, None, None]


def test_rank_agrees_with_a_scan_of_the_binomial():
    random = np.random.default_rng(1)
    for _ in range(80):
        n, level, alpha = int(random.integers(1, 400)), random.uniform(0.05, 0.99), random.uniform(0.001, 0.4)
        k = np.arange(math.ceil(level * n), n + 1)
        good = k[stats.binom.cdf(k - 1, n, level) >= 1 - alpha]
        expected = float(good[0]) if good.size else None
        assert bounds.quantile_upper(ranks(n), level, alpha) == expected
        assert bounds.quantile_lower(ranks(n), level, alpha) == (None if expected is None else n + 1 - expected)


def test_rank_is_never_below_the_exact_one_at_ties():
    for level in (0.25, 0.5, 0.875):
        for n in range(1, 16):
            for k in range(1, n + 1):
                exact = sum(math.comb(n, i) * Fraction(level) ** i * (1 - Fraction(level)) ** (n - i) for i in range(k, n + 1))
                alpha = float(exact)
                if alpha < 1 and Fraction(alpha) == exact:  # P[Bin >= k] = alpha to the last bit, so k itself is sound
                    assert k == exact_rank(n, level, alpha)
                    # rounding inside scipy may cost a rank, it must never win one
                    assert bounds.quantile_upper(ranks(n), level, alpha) in (k, k + 1)


def test_quantile_lower_is_the_mirror_image():
    scores = np.random.default_rng(2).normal(size=300)
    for level in (0.5, 0.8, 0.97):
        low, high = bounds.quantile_lower(scores, level, 0.05), bounds.quantile_upper(-scores, level, 0.05)
        assert low == -high
        assert low in scores
        assert low < np.quantile(scores, 1 - level)


def test_order_and_shape_of_the_scores_do_not_matter():
    scores = np.random.default_rng(3).normal(size=200)
    assert bounds.quantile_upper(scores.reshape(20, 10), 0.9, 0.05) == bounds.quantile_upper(np.sort(scores)[::-1], 0.9, 0.05)


def test_coverage_is_paid_for_and_no_more():
    n, level, alpha, runs = 62, 0.9, 0.05, 1_500  # chances to miss 0.046 here, 0.123 one rank lower
    scores = np.sort(np.random.default_rng(4).random((runs, n)), axis=1)  # the level-quantile of U(0, 1) is the level
    upper = np.array([bounds.quantile_upper(row, level, alpha) for row in scores])
    rank = (scores < upper[:, None]).sum(axis=1)
    assert len(set(rank)) == 1
    one_lower = scores[np.arange(runs), rank - 1]
    slack = 3.5 * math.sqrt(alpha * (1 - alpha) / runs)
    assert (upper < level).mean() <= alpha + slack
    assert (one_lower < level).mean() > alpha + slack
    lower = np.array([bounds.quantile_lower(row, level, alpha) for row in scores])
    assert (lower > 1 - level).mean() <= alpha + slack


def test_coverage_of_discrete_scores():
    n, level, alpha, runs = 120, 0.85, 0.1, 1_000
    truth = stats.binom.ppf(level, 10, 0.3)  # ties abound: accuracy over ten examples
    scores = np.random.default_rng(5).binomial(10, 0.3, (runs, n))
    misses = np.mean([bounds.quantile_upper(row, level, alpha) < truth for row in scores])
    assert misses <= alpha + 3.5 * math.sqrt(alpha * (1 - alpha) / runs)
    assert bounds.quantile_upper(np.full(n, 0.1), level, alpha) == 0.1
    assert bounds.quantile_lower(np.full(n, 0.1), level, alpha) == 0.1


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_corrected_lower_level_holds_with_q_and_the_published_one_with_one_minus_q(shift):
    q, sigma, draws = 0.9, 0.3, 40_000
    random = np.random.default_rng(6)
    centred = sigma * random.normal(size=draws)  # A(theta) = u . theta, the metric that attains the theorem
    attacked = centred - shift * sigma  # v = -eta u
    corrected = bounds.quantile_lower(centred, bounds.shifted_level(q, shift), 0.01)
    published = bounds.quantile_lower(centred, bounds.published_lower_level(q, shift), 0.01)
    upper = bounds.quantile_upper(centred, bounds.shifted_level(q, shift), 0.01)
    assert q - 0.002 <= (attacked >= corrected).mean() <= q + 0.02
    assert (attacked >= published).mean() == pytest.approx(1 - q, abs=0.02)
    assert q - 0.002 <= (centred + shift * sigma <= upper).mean() <= q + 0.02


# --- proportions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 30), (480, 1000)])
@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_clopper_pearson_against_scipy(successes, trials, alpha):
    for side, alternative in (("two", "two-sided"), ("lower", "greater"), ("upper", "less")):
        expected = stats.binomtest(successes, trials, alternative=alternative).proportion_ci(1 - alpha, method="exact")
        assert bounds.clopper_pearson(successes, trials, alpha, side=side) == pytest.approx(tuple(expected), abs=1e-9)


def test_clopper_pearson_limit_of_a_hundred_out_of_a_hundred():
    assert bounds.clopper_pearson(100, 100, 0.01, side="lower") == (pytest.approx(0.01 ** (1 / 100)), 1.0)


# --- what is refused ---------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 1.1, NAN])
def test_probabilities_outside_the_open_interval(bad):
    calls = (
        lambda: bounds.shifted_level(bad, 0.5),
        lambda: bounds.shifted_tail(bad, 0.5),
        lambda: bounds.published_lower_level(bad, 0.5),
        lambda: bounds.min_draws(bad, 0.1),
        lambda: bounds.min_draws(0.9, bad),
        lambda: bounds.max_shift(10, bad, 0.1),
        lambda: bounds.max_shift(10, 0.9, bad),
        lambda: bounds.quantile_upper([1.0, 2.0], bad, 0.1),
        lambda: bounds.quantile_upper([1.0, 2.0], 0.9, bad),
        lambda: bounds.quantile_lower([1.0, 2.0], 0.9, bad),
        lambda: bounds.clopper_pearson(1, 2, bad),
    )
    for call in calls:
        with pytest.raises(BadInput, match="strictly between 0 and 1"):
            call()


@pytest.mark.parametrize("bad", [-1e-9, -1.0, NAN])
def test_shifts_that_are_not_lengths(bad):
    for fn in (bounds.shifted_level, bounds.shifted_tail, bounds.published_lower_level):
        with pytest.raises(BadInput, match="shift"):
            fn(0.9, bad)


@pytest.mark.parametrize("scores", [[], [1.0, NAN], [1.0, math.inf], [-math.inf]])
def test_scores_that_are_empty_or_not_finite(scores):
    for fn in (bounds.quantile_upper, bounds.quantile_lower):
        with pytest.raises(BadInput, match="finite"):
            fn(scores, 0.9, 0.1)


def test_counts_that_make_no_sense():
    with pytest.raises(BadInput, match="draws"):
        bounds.max_shift(0, 0.9, 0.1)
    for tail in (-0.1, 1.0, NAN):
        with pytest.raises(BadInput, match="tail"):
            bounds.min_draws(0.9, 0.1, tail=tail)
    for successes, trials in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(BadInput, match="successes"):
            bounds.clopper_pearson(successes, trials, 0.1)
    with pytest.raises(BadInput, match="side"):
        bounds.clopper_pearson(1, 2, 0.1, side="left")
