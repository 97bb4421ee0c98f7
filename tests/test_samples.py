"""Tests of two samples, and the epsilon they refute, against enumerations, loops, definitions and simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from dememo_jax import bounds
from dememo_jax.errors import BadInput, NonFinite

NAN = float("nan")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def coverage(found, truth):
    return float(np.mean([each.low <= truth <= each.high for each in found]))


def around(share, count, deviations=4.0):
    """How far a simulated share may lie from the true one."""
    return deviations * math.sqrt(share * (1 - share) / count)


# --- permutation tests -------------------------------------------------------------------------------------------


def lead(one, other):
    return float(one.mean() - other.mean())


@pytest.mark.parametrize("sizes", [(3, 3), (2, 4), (1, 5)])
def test_permutations_approach_the_enumeration(sizes):
    values = np.array([7.0, 3.0, 8.0, 2.0, 2.0, 12.0])
    n = sizes[0]

    def total(one, other):  # whole numbers, exact in any order
        return float(one.sum())

    splits = [values[list(chosen)].sum() for chosen in itertools.combinations(range(6), n)]
    found = bounds.permutation_test(total, values[:n], values[n:], draws=3000)
    share = np.mean(np.array(splits) >= found.value)
    assert found.value == values[:n].sum()
    assert found.p_value == pytest.approx(share, abs=around(share, 3000) + 1e-3)
    assert found.null == pytest.approx(np.mean(splits), abs=4 * np.std(splits) / math.sqrt(3000))
    assert found.draws == 3000


def test_equal_splits_are_ties_however_their_sums_round():
    one, other = np.array([0.6, 0.5, 0.4]), np.array([0.3, 0.2, 0.1])  # the largest lead of all twenty splits
    assert bounds.permutation_test(lead, one, other, draws=3000).p_value == pytest.approx(1 / 20, abs=around(1 / 20, 3000))


def test_p_values_of_one_law_are_uniform():
    runs, draws = 600, 19
    samples = np.random.default_rng(0).normal(size=(runs, 12))
    p_values = np.array(
        [bounds.permutation_test(lead, x[:5], x[5:], draws=draws, seed=i).p_value for i, x in enumerate(samples)]
    )
    counts = np.bincount(np.round(p_values * 20).astype(int), minlength=21)
    assert counts.sum() == runs
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-3
    assert np.mean(p_values <= 0.05) == pytest.approx(0.05, abs=around(0.05, runs))


def test_permutations_see_a_shift():
    p_values = [bounds.permutation_test(lead, normal(i, 10) + 2, normal(100 + i, 12), draws=99).p_value for i in range(30)]
    assert np.median(p_values) == 0.01
    assert bounds.permutation_test(lead, normal(0, 10) - 2, normal(100, 12), draws=99).p_value > 0.9


def test_relabelled_rows_stay_whole():
    rows = np.arange(24.0).reshape(8, 3)
    seen = []

    def remember(one, other):
        assert (one.shape, other.shape) == ((3, 3), (5, 3))
        seen.append(np.concatenate([one, other]))
        return 0.0

    found = bounds.permutation_test(remember, rows[:3], rows[3:], draws=20, seed=1)
    assert found.p_value == 1.0  # all reach it
    assert len(seen) == 21
    assert all(np.array_equal(each[np.argsort(each[:, 0])], rows) for each in seen)
    assert len({each.tobytes() for each in seen}) > 15
    assert bounds.permutation_test(lead, rows[:3], rows[3:], draws=50, seed=2) == bounds.permutation_test(
        lead, rows[:3], rows[3:], draws=50, seed=2
    )


def test_fewest_draws():
    assert (
        bounds.permutation_test(lambda one, other: float(one[0] == 0), np.arange(1), np.arange(1, 50), draws=1).p_value == 0.5
    )
    with pytest.raises(BadInput, match="draw"):
        bounds.permutation_test(lead, normal(0, 4), normal(1, 4), draws=0)


def test_a_statistic_that_is_no_number_is_no_discovery():
    try:
        found = bounds.permutation_test(lambda one, other: NAN, normal(0, 4), normal(1, 4))
    except (BadInput, NonFinite):
        return
    assert found.p_value == 1.0


# --- columns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "levels"), [(4, 5, 10**6), (7, 3, 10**6), (12, 15, 10**6), (12, 15, 2)])
def test_columns_are_scipys(n, m, levels):
    one, other = np.round(levels * (normal(2, n, 12) + 0.5)) / levels, np.round(levels * normal(3, m, 12)) / levels
    area, above, below = bounds.column_tests(one, other)
    for column, (a, b) in enumerate(zip(one.T, other.T)):
        pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
        assert area[column] == pytest.approx(np.mean(pairs), abs=1e-12)
        assert above[column] == pytest.approx(stats.mannwhitneyu(a, b, alternative="greater").pvalue, rel=1e-9)
        assert below[column] == pytest.approx(stats.mannwhitneyu(a, b, alternative="less").pvalue, rel=1e-9)
    assert area.shape == above.shape == below.shape == (12,)


def test_columns_of_few_rows_are_exact():
    one, other = normal(4, 3, 6) + 1, normal(5, 4, 6)
    area, above, below = bounds.column_tests(one, other)
    for column in range(6):
        both = np.concatenate([one[:, column], other[:, column]])
        places = []
        for chosen in itertools.combinations(range(7), 3):
            rest = np.delete(both, chosen)
            places.append(np.mean([x > y for x in both[list(chosen)] for y in rest]))
        assert above[column] == pytest.approx(np.mean(np.array(places) >= area[column] - 1e-9))
        assert below[column] == pytest.approx(np.mean(np.array(places) <= area[column] + 1e-9))
    swapped = bounds.column_tests(other, one)
    np.testing.assert_allclose(swapped, [1 - area, below, above])


def benjamini_hochberg(p_values, alpha):
    """The largest k whose k-th smallest is at most k alpha / N; all up to it stand."""
    ordered, cut = sorted(p_values), -1.0
    for k, p in enumerate(ordered, 1):
        if p <= k * alpha / len(ordered):
            cut = p
    return [p <= cut for p in p_values]


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
def test_discoveries_are_benjamini_and_hochbergs(alpha):
    seen = set()
    for seed in range(20):
        random = np.random.default_rng(seed)
        p_values = random.random(40) ** random.choice([1, 3, 8])
        p_values = np.round(p_values, 3) if seed % 2 else p_values
        found = bounds.discoveries(p_values, alpha)
        assert found.tolist() == benjamini_hochberg(p_values.tolist(), alpha)
        seen.add(int(found.sum()))
    assert len(seen) > 2


def test_false_discoveries_are_few():
    random = np.random.default_rng(6)
    true = np.arange(50) < 10
    p_values = stats.norm.sf(random.normal(size=(600, 50)) + 3 * true)
    found = np.array([bounds.discoveries(each, 0.2) for each in p_values])
    shares = (found & ~true).sum(axis=1) / np.maximum(1, found.sum(axis=1))
    assert shares.mean() == pytest.approx(0.2 * 40 / 50, abs=4 * shares.std() / math.sqrt(600))  # the theorem has equality
    assert found[:, true].mean() > 0.7
    for bad in (0.0, 1.0, NAN):
        with pytest.raises(BadInput, match="alpha"):
            bounds.discoveries([0.1], bad)


# --- the mean area -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_mean_area_is_a_loop(n, m, alpha):
    one, other = np.round(2 * normal(7, n, 5) + 0.7), np.round(2 * normal(8, m, 5))
    wins = [[[(x > y) + (x == y) / 2 for x, y in zip(a, b)] for b in other] for a in one]
    wins = np.array(wins).mean(axis=2)  # of each pair of rows
    found = bounds.mean_area(one, other, alpha=alpha)
    assert found.value == pytest.approx(wins.mean(), abs=1e-12)
    variance = wins.mean(axis=1).var(ddof=1) / n + wins.mean(axis=0).var(ddof=1) / m
    sides = wins.mean(axis=1), wins.mean(axis=0)
    shares = [side.var(ddof=1) / len(side) for side in sides]
    each = [min(len(side) - 1, 2 * len(side) / (stats.kurtosis(side, fisher=False) - 1)) for side in sides]
    freedom = min(n - 1, m - 1, sum(shares) ** 2 / sum(share**2 / df for share, df in zip(shares, each))) / 2
    reach = stats.t.ppf(1 - alpha / 2, max(1, freedom)) * math.sqrt(variance) / (found.value * (1 - found.value))
    ends = special.expit(special.logit(found.value) + np.array([-reach, reach]))
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-9)
    swapped = bounds.mean_area(other, one, alpha=alpha)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((1 - found.value, 1 - found.high, 1 - found.low))


def test_mean_area_of_one_column_is_the_area():
    one, other = normal(9, 8, 1) + 1, normal(10, 8, 1)
    area = bounds.auc(np.concatenate([one, other]).ravel(), np.arange(16) < 8)
    found = bounds.mean_area(one, other)
    assert found.value == pytest.approx(area.value, abs=1e-12)
    assert found.low < area.low < area.high < found.high  # with fewer degrees of freedom


def test_mean_area_near_one_with_few_rows():
    random, truth, misses, usual = np.random.default_rng(12), stats.norm.cdf(3 / math.sqrt(2)), 0, 0
    for _ in range(400):  # a truth of 0.983, 90 % of the variance common to a row
        one, other = (math.sqrt(0.9) * random.normal(size=(8, 1)) + math.sqrt(0.1) * random.normal(size=(8, 50)) for _ in "ab")
        found = bounds.mean_area(one + 3, other)
        misses += not found.low <= truth <= found.high
        wins = (one[:, None] + 3 > other[None]).mean(axis=2)
        variance = wins.mean(axis=1).var(ddof=1) / 8 + wins.mean(axis=0).var(ddof=1) / 8
        usual += not (plain := bounds.ranking.logit_limits(found.value, variance, 8, 0.05)).low <= truth <= plain.high
    assert misses / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)
    assert usual / 400 > 0.075  # what seven degrees of freedom would miss


@pytest.mark.parametrize(("alpha", "least", "most"), [(0.05, 0.925, 0.99), (0.2, 0.75, 0.89)])
def test_mean_area_covers_rows_that_share_an_effect(alpha, least, most):
    random = np.random.default_rng(11)
    # The model moves all of its columns alike.
    samples = [(random.normal(size=(n, 1)) + random.normal(size=(n, 20)) for n in (18, 24)) for _ in range(400)]
    samples = [(one + 1.0, other) for one, other in samples]
    truth = stats.norm.cdf(1 / 2)
    assert least <= coverage([bounds.mean_area(*each, alpha=alpha) for each in samples], truth) <= most
    inside = np.repeat([True, False], [18 * 20, 24 * 20])
    flat = [np.concatenate([part.ravel() for part in each]) for each in samples[:100]]
    assert coverage([bounds.auc(each, inside, alpha=alpha) for each in flat], truth) <= least - 0.3


def test_mean_area_of_rows_in_order():
    for n, m in ((1, 1), (5, 3), (3, 12)):
        one, other = np.arange(n)[:, None] + np.array([10.0, 20.0]), -np.arange(m)[:, None] - np.array([1.0, 2.0])
        exact = bounds.clopper_pearson(min(n, m), min(n, m), 0.05)[0]
        above, below = bounds.mean_area(one, other), bounds.mean_area(other, one)
        assert (above.value, above.low, above.high) == (1, pytest.approx(exact, abs=1e-9), 1)
        assert (below.value, below.low, below.high) == (0, 0, pytest.approx(1 - exact, abs=1e-9))
    alike = bounds.mean_area(np.ones((4, 3)), np.ones((5, 3)))
    assert (alike.value, alike.low, alike.high) == (0.5, 0, 1)
    with pytest.raises(BadInput, match="alpha"):
        bounds.mean_area(np.ones((4, 3)), np.ones((5, 3)), alpha=1.0)


# --- nearer to the first or to the second ------------------------------------------------------------------------


def squared_distance(one, other, bandwidth):
    """MMD^2, unbiased, by loops."""

    def kernel(a, b):
        return math.exp(-math.fsum((x - y) ** 2 for x, y in zip(a, b)) / bandwidth**2)

    def mean_within(rows):
        return np.mean([kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

    across = np.mean([kernel(a, b) for a in one for b in other])
    return mean_within(one) + mean_within(other) - 2 * across


def test_distances_are_loops():
    parts = [normal(12, 4, 3), normal(13, 5, 3) + 1, normal(14, 6, 3) - 1]
    found = bounds.relative_distance(*parts)
    rows = np.concatenate(parts)
    widths = [math.dist(a, b) for a, b in itertools.combinations(rows, 2)]
    assert found.bandwidth == pytest.approx(np.median(widths), abs=1e-9)
    firsts, seconds = (squared_distance(parts[0], part, found.bandwidth) for part in parts[1:])
    assert (found.to_first, found.to_second) == pytest.approx((firsts, seconds), abs=1e-9)
    variance = 0.0
    for kind in range(3):
        without = []
        for row in range(len(parts[kind])):
            left = [np.delete(part, row, axis=0) if kind == k else part for k, part in enumerate(parts)]
            near, far = (squared_distance(left[0], part, found.bandwidth) for part in left[1:])
            without.append(far - near)
        variance += (len(without) - 1) * np.var(without)
    assert found.z == pytest.approx((seconds - firsts) / math.sqrt(variance), rel=1e-6)
    assert (found.p_nearer_first, found.p_nearer_second) == pytest.approx((stats.norm.sf(found.z), stats.norm.cdf(found.z)))


def test_swapping_first_and_second():
    parts = [normal(15, 8, 4), normal(16, 9, 4) + 0.5, normal(17, 7, 4)]
    found, swapped = bounds.relative_distance(*parts), bounds.relative_distance(parts[0], parts[2], parts[1])
    assert (swapped.to_first, swapped.to_second, swapped.z) == pytest.approx((found.to_second, found.to_first, -found.z))
    assert (swapped.p_nearer_first, swapped.p_nearer_second) == pytest.approx((found.p_nearer_second, found.p_nearer_first))
    assert swapped.bandwidth == pytest.approx(found.bandwidth)
    equal = bounds.relative_distance(parts[0], parts[1], parts[1])
    assert equal.z == pytest.approx(0, abs=1e-6)
    assert equal.p_nearer_first == pytest.approx(0.5, abs=1e-6)


def test_distance_is_unbiased():
    found = [bounds.relative_distance(normal(i, 6, 2), normal(1000 + i, 6, 2), normal(2000 + i, 6, 2) + 3) for i in range(200)]
    near, far = np.array([(each.to_first, each.to_second) for each in found]).T
    assert near.mean() == pytest.approx(0, abs=4 * near.std() / math.sqrt(200))
    assert (near < 0).mean() > 0.3  # the biased one never is
    assert far.min() > 0.2


@pytest.mark.parametrize("offset", [2.0**10, 2.0**26])
def test_distances_do_not_see_what_all_scores_have_in_common(offset):
    parts = [np.round(1024 * (normal(18 + i, 5, 30) + shift)) / 1024 for i, shift in enumerate((0.0, 0.2, 0.5))]
    found, moved = bounds.relative_distance(*parts), bounds.relative_distance(*(part + offset for part in parts))
    assert vars(moved) == pytest.approx(vars(found), rel=1e-5)
    scaled = bounds.relative_distance(*(part * 8 for part in parts))
    assert (scaled.z, scaled.bandwidth) == pytest.approx((found.z, 8 * found.bandwidth))


def relatives(runs, shift, seed):
    """The sample lies `shift` from the middle of the first, at +1, and the second, at -1."""
    random = np.random.default_rng(seed)

    def rows(center):
        return random.normal(size=(20, 2)) + np.array([center, 0.0])

    return [bounds.relative_distance(rows(shift), rows(1.0), rows(-1.0)) for _ in range(runs)]


def test_level_as_far_from_first_as_from_second():
    found = relatives(250, 0.0, 21)
    z = np.array([each.z for each in found])
    assert 0.87 <= z.std() <= 1.13
    assert abs(z.mean()) <= 4 / math.sqrt(250)
    for p_values in ([each.p_nearer_first for each in found], [each.p_nearer_second for each in found]):
        assert 0.015 <= np.mean(np.array(p_values) <= 0.05) <= 0.1
        assert np.mean(np.array(p_values) <= 0.25) == pytest.approx(0.25, abs=around(0.25, 250))


@pytest.mark.parametrize(("shift", "side"), [(1.0, "p_nearer_first"), (-1.0, "p_nearer_second")])
def test_power_near_one_of_them(shift, side):
    found = relatives(30, shift, 22)
    other = {"p_nearer_first": "p_nearer_second", "p_nearer_second": "p_nearer_first"}[side]
    assert np.mean([getattr(each, side) <= 0.05 for each in found]) > 0.8
    assert all(getattr(each, other) > 0.5 for each in found)
    assert all((each.to_first < each.to_second) == (shift > 0) == (each.z > 0) for each in found)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_samples_that_do_not_fit(place):
    good = [normal(23 + i, 5, 3) for i in range(3)]
    for bad, match in (
        (good[place][:3], "four models"),
        (good[place][:, :2], "same examples"),
        (good[place][:, 0], "expected"),
        (np.full((4, 3), NAN), "finite"),
        (np.full((4, 3), math.inf), "finite"),
    ):
        with pytest.raises(BadInput, match=match):
            bounds.relative_distance(*(bad if i == place else part for i, part in enumerate(good)))


@pytest.mark.parametrize("examples", [1, 3, 100])
def test_models_that_are_all_the_same(examples):
    row = normal(26, examples)
    with pytest.raises(BadInput, match="same scores"):
        bounds.relative_distance(*(np.tile(row, (count, 1)) for count in (5, 6, 4)))


# --- epsilon of a test's rates -----------------------------------------------------------------------------------


def least_epsilon(tpr, fpr, delta):
    """By bisection of the definition."""

    def allowed(epsilon):
        up = math.exp(epsilon)
        return tpr <= up * fpr + delta and 1 - fpr <= up * (1 - tpr) + delta

    low, high = 0.0, 50.0
    if allowed(0.0):
        return 0.0
    if not allowed(high):
        return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if allowed(middle) else (middle, high)
    return high


@pytest.mark.parametrize("delta", [1e-5, 0.1, 0.5])
def test_epsilon_is_that_of_the_definition(delta):
    rates = np.array([0.0, 1e-6, 0.03, 0.2, 0.5, 0.72, 0.97, 1.0])
    tpr, fpr = np.meshgrid(rates, rates)
    found = bounds.rates_epsilon(tpr, fpr, delta)
    expected = [[least_epsilon(t, f, delta) for t, f in zip(*row)] for row in zip(tpr, fpr)]
    assert found.shape == tpr.shape
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found, bounds.rates_epsilon(1 - fpr, 1 - tpr, delta), rtol=1e-9, atol=1e-9)  # the other side
    assert np.isinf(found).any()
    assert (found == 0).any()


def test_epsilon_at_the_ends():
    for tpr, fpr, expected in ((1, 0, math.inf), (0, 0, 0), (1, 1, 0), (0, 1, 0), (0.5, 0, math.inf), (1, 0.5, math.inf)):
        for delta in (0.0, 0.01):
            assert bounds.rates_epsilon(tpr, fpr, delta) == expected
    assert bounds.rates_epsilon(0.01, 0.0, 0.01) == pytest.approx(0, abs=1e-12)  # delta pays for it
    assert bounds.rates_epsilon(0.9, 0.1, 0.0) == pytest.approx(math.log(9))
    assert bounds.rates_epsilon(1e-300, 1e-308, 0.0) == pytest.approx(8 * math.log(10))


@pytest.mark.parametrize(("mu", "delta"), [(0.5, 1e-2), (1.0, 1e-5), (3.0, 1e-3)])
def test_all_thresholds_of_two_gaussians_show_their_epsilon(mu, delta):
    thresholds = np.linspace(-10, 10 + mu, 20_001)
    found = bounds.rates_epsilon(stats.norm.sf(thresholds - mu), stats.norm.sf(thresholds), delta)
    assert found.max() == pytest.approx(bounds.gdp_epsilon(mu, delta), abs=1e-3)


# --- epsilon that samples refute ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.4])
@pytest.mark.parametrize(("n", "m"), [(40, 40), (25, 90), (91, 24)])
def test_limits_are_those_of_the_judging_half(alpha, n, m):
    delta, strong = 1e-3, 0
    for seed, shift in enumerate((0.0, 1.0, 2.0, -2.0, 4.0)):
        inside, outside = normal(30 + seed, n) + shift, normal(40 + seed, m)
        found = bounds.distinguish(inside, outside, delta=delta, alpha=alpha)
        sizes = n // 2, m // 2
        assert (found.samples, found.delta, found.confidence) == (sizes, delta, 1 - alpha)
        hits, alarms = (round(rate * size) for rate, size in zip((found.tpr, found.fpr), sizes))
        assert (hits / sizes[0], alarms / sizes[1]) == (found.tpr, found.fpr)
        tpr = bounds.clopper_pearson(hits, sizes[0], alpha / 2, side="lower")[0]
        fpr = bounds.clopper_pearson(alarms, sizes[1], alpha / 2, side="upper")[1]
        assert found.epsilon_low == pytest.approx(least_epsilon(tpr, fpr, delta), abs=1e-9)
        assert found.mu_low == pytest.approx(max(0.0, stats.norm.ppf(tpr) - stats.norm.ppf(fpr)), abs=1e-9)
        if found.mu_low > 0:
            assert bounds.gdp_delta(found.mu_low, found.epsilon_low_gdp) == pytest.approx(delta, rel=1e-3)
        point = least_epsilon(found.tpr, found.fpr, delta)
        assert found.epsilon == (None if math.isinf(point) else pytest.approx(point, abs=1e-9))
        tpr = bounds.clopper_pearson(hits, sizes[0], alpha / 2, side="upper")[1]
        fpr = bounds.clopper_pearson(alarms, sizes[1], alpha / 2, side="lower")[0]
        most = least_epsilon(tpr, fpr, delta)
        assert found.epsilon_high == (None if math.isinf(most) else pytest.approx(most, abs=1e-9))
        strong += found.epsilon_low > 0
    assert strong >= 1


def test_even_places_choose_and_odd_places_judge():
    inside, outside = np.tile([3.0, -3.0], 20), np.tile([-3.0, 3.0], 20)  # the halves contradict each other
    found = bounds.distinguish(inside, outside)
    assert (found.tpr, found.fpr, found.epsilon_low, found.mu_low, found.epsilon_low_gdp) == (0, 1, 0, 0, 0)
    chosen = normal(50, 60)
    one, other = chosen + 1, normal(51, 60)
    for seed in range(5):  # what the odd places hold does not move the rule
        judged = np.linspace(-4, 5, 30)
        one[1::2] = other[1::2] = judged
        first = bounds.distinguish(one, other)
        other[1::2] = normal(60 + seed, 30)
        assert bounds.distinguish(one, other).tpr == first.tpr
    assert 0 < first.tpr < 1


def test_either_side_may_be_the_larger():
    inside, outside = normal(52, 100) + 3, normal(53, 100)
    up, down = bounds.distinguish(inside, outside), bounds.distinguish(-inside, -outside)
    assert (up.tpr, up.fpr, up.epsilon_low) == pytest.approx((down.tpr, down.fpr, down.epsilon_low))
    assert up.epsilon_low > 1


@pytest.mark.parametrize("n", [4, 20, 64, 128])
def test_perfect_separation_is_worth_its_count(n):
    inside, outside, half = normal(54, n) + 100, normal(55, n), n // 2
    found = bounds.distinguish(inside, outside)
    low, high = bounds.clopper_pearson(half, half, 0.05)[0], bounds.clopper_pearson(0, half, 0.05)[1]
    most = max(0.0, math.log(low / high))
    assert (found.tpr, found.fpr, found.epsilon, found.epsilon_high) == (1, 0, None, None)
    assert found.epsilon_low == pytest.approx(most, abs=1e-3)
    assert found.mu_low == pytest.approx(max(0.0, 2 * stats.norm.ppf(low)), abs=1e-9)
    for seed in range(10):
        weaker = bounds.distinguish(normal(60 + seed, n) + seed, normal(80 + seed, n))
        assert weaker.epsilon_low <= most + 1e-12
    assert n != 64 or most == pytest.approx(2.1, abs=0.01)


def gaussians(mu, n, runs, delta, seed):
    random = np.random.default_rng(seed)
    return [bounds.distinguish(random.normal(size=n) + mu, random.normal(size=n), delta=delta) for _ in range(runs)]


@pytest.mark.parametrize(("mu", "delta"), [(0.5, 1e-2), (1.0, 1e-1), (2.0, 1e-5)])
def test_limits_of_two_gaussians_lie_below_the_truth(mu, delta):
    truth = bounds.gdp_epsilon(mu, delta)
    found = gaussians(mu, 200, 100, delta, 56)
    for below in (
        [each.epsilon_low <= truth for each in found],
        [each.mu_low <= mu for each in found],
        [each.epsilon_low_gdp <= truth * (1 + 1e-9) for each in found],
    ):
        assert np.mean(below) >= 0.95
    if mu == 2:
        assert all(each.epsilon_low > 0 for each in found)
        assert np.mean([each.mu_low for each in found]) > 1


def test_no_signal_refutes_nothing():
    found = gaussians(0.0, 100, 200, 1e-5, 58)
    assert np.mean([each.epsilon_low == 0 for each in found]) >= 0.95
    assert np.mean([each.mu_low == 0 for each in found]) >= 0.95
    assert np.mean([(each.epsilon or 1.0) > 0 for each in found]) > 0.3  # the point estimate is another matter


def test_randomized_response():
    random, truth = np.random.default_rng(59), math.log(3)  # the truth with 3/4, a lie with 1/4

    def answers(n):
        return bounds.distinguish(random.random(n) < 0.75, random.random(n) < 0.25)

    found = np.array([answers(400).epsilon_low for _ in range(200)])
    assert np.mean(found <= truth) >= 0.95
    assert found.mean() > 0.6
    large = answers(40_000)
    assert 0.93 * truth < large.epsilon_low <= truth * 1.01
    assert large.epsilon == pytest.approx(truth, abs=0.08)


def test_a_rare_tell_is_found():
    inside, outside = normal(60, 1000), normal(61, 1000)
    inside[np.random.default_rng(62).random(1000) < 0.15] += 50
    found = bounds.distinguish(inside, outside)
    assert (found.tpr, found.fpr) == (pytest.approx(0.15, abs=0.07), 0)
    assert found.epsilon_low > 2


GOOD = np.arange(8.0)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("bad", "match"), [(GOOD[:3], "four"), ([], "four"), ([1, 2, NAN, 3], "finite"), ([1, 2, -math.inf, 3], "finite")]
)
def test_statistics_that_make_no_sense(place, bad, match):
    with pytest.raises(BadInput, match=match):
        bounds.distinguish(*((bad, GOOD) if place == 0 else (GOOD, bad)))


def test_constant_statistics_and_levels_out_of_range():
    with pytest.raises(BadInput, match="constant"):
        bounds.distinguish(np.ones(8), np.ones(9))
    for bad in (0.0, 1.0, -0.1, NAN):
        with pytest.raises(BadInput, match="delta"):
            bounds.distinguish(GOOD, GOOD + 1, delta=bad)
        with pytest.raises(BadInput, match="alpha"):
            bounds.distinguish(GOOD, GOOD + 1, alpha=bad)
    assert bounds.distinguish([1, 1, 1, 1], [1, 1, 1, 0]).samples == (2, 2)  # constant halves are no reason to refuse
