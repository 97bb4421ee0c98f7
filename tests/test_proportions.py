"""Limits of proportions and of events against exact sums, exact fractions, and pairs of laws where the truth is known."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import optimize, stats

from dememo_jax import bounds
from dememo_jax.errors import BadInput

NAN = float("nan")
ENDS = ("lower", "upper")


# --- randomized Clopper and Pearson ------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 12), (12, 12), (3, 12), (95, 100)])
@pytest.mark.parametrize("side", ["lower", "upper", "two"])
def test_uniform_one_is_the_plain_limit(successes, trials, side):
    if side != "two":
        plain = bounds.clopper_pearson(successes, trials, 0.05, side=side)
        assert bounds.clopper_pearson(successes, trials, 0.05, side=side, uniform=1.0) == pytest.approx(plain, abs=1e-12)
        nearly = bounds.clopper_pearson(successes, trials, 0.05, side=side, uniform=1 - 1e-9)
        assert nearly == pytest.approx(plain, abs=1e-6)
    low, high = bounds.clopper_pearson(successes, trials, 0.05, side=side)
    limits = [bounds.clopper_pearson(successes, trials, 0.05, side=side, uniform=u) for u in (0.0, 0.1, 0.4, 0.8, 1.0)]
    assert all(low - 1e-12 <= a and b <= high + 1e-12 for a, b in limits)  # never wider
    assert any(a > low + 1e-3 or b < high - 1e-3 for a, b in limits)  # and narrower for some
    if side != "two":
        assert sorted(limits, reverse=True) == limits if side == "lower" else sorted(limits) == limits


@pytest.mark.parametrize("uniform", [0.02, 0.3, 0.9])
def test_limits_of_no_success_and_of_all(uniform):
    n, alpha = 20, 0.05
    none = max(0.0, 1 - ((1 - alpha) / (1 - uniform)) ** (1 / n))  # 1 - (1 - uniform) (1 - p)^n = alpha
    every = min(1.0, (alpha / uniform) ** (1 / n))  # uniform p^n = alpha
    low = {x: bounds.clopper_pearson(x, n, alpha, side="lower", uniform=uniform) for x in (0, n)}
    high = {x: bounds.clopper_pearson(x, n, alpha, side="upper", uniform=uniform) for x in (0, n)}
    assert low[0] == (pytest.approx(none, abs=1e-12), 1.0)
    assert low[n] == (pytest.approx(every, abs=1e-12), 1.0)
    assert high[n] == (0.0, pytest.approx(1 - none, abs=1e-12))
    assert high[0] == (0.0, pytest.approx(1 - every, abs=1e-12))


@pytest.mark.parametrize("side", ENDS)
def test_randomized_limits_cover_with_exactly_one_minus_alpha(side):
    n, alpha, grid = 6, 0.2, (np.arange(60) + 0.5) / 60
    end = ENDS.index(side)
    limit = np.array([[bounds.clopper_pearson(x, n, alpha, side=side, uniform=u)[end] for u in grid] for x in range(n + 1)])
    plain = np.array([bounds.clopper_pearson(x, n, alpha, side=side)[end] for x in range(n + 1)])
    excess = []
    for p in (0.03, 0.1, 0.27, 0.5, 0.61, 0.8, 0.93, 0.99):
        chance = stats.binom.pmf(np.arange(n + 1), n, p)
        right = limit <= p if side == "lower" else limit >= p
        assert chance @ right.mean(axis=1) == pytest.approx(1 - alpha, abs=0.5 / 60 + 1e-9)  # but for the grid
        excess.append(chance @ (plain <= p if side == "lower" else plain >= p) - (1 - alpha))
    assert min(excess) >= 0  # the plain ones hold too, but
    assert np.mean(excess) > 0.03  # cost more


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.85])
def test_randomized_limit_solves_its_equation(truth):
    n, alpha = 15, 0.1
    seen = 0
    for x in range(n + 1):
        tie = (alpha - stats.binom.sf(x, n, truth)) / stats.binom.pmf(x, n, truth)  # the uniform that puts the limit there
        if 0 < tie < 1:
            seen += 1
            assert bounds.clopper_pearson(x, n, alpha, side="lower", uniform=tie)[0] == pytest.approx(truth, abs=1e-9)
            assert bounds.clopper_pearson(n - x, n, alpha, side="upper", uniform=tie)[1] == pytest.approx(1 - truth, abs=1e-9)
            assert bounds.clopper_pearson(x, n, 2 * alpha, uniform=tie)[0] == pytest.approx(truth, abs=1e-9)
    assert seen == 1


def test_two_sided_randomized_limits_are_in_order_and_exact():
    n, alpha, grid = 5, 0.2, (np.arange(60) + 0.5) / 60
    both = np.array([[bounds.clopper_pearson(x, n, alpha, uniform=u) for u in grid] for x in range(n + 1)])
    assert (both[..., 0] <= both[..., 1]).all()
    for p in (0.005, 0.3, 0.5, 0.9, 0.995):
        right = ((both[..., 0] <= p) & (p <= both[..., 1])).mean(axis=1)
        assert stats.binom.pmf(np.arange(n + 1), n, p) @ right == pytest.approx(1 - alpha, abs=2 / 60)


@pytest.mark.parametrize("bad", [-0.01, 1.01, NAN])
def test_uniforms_outside_the_unit_interval(bad):
    with pytest.raises(BadInput, match="uniform"):
        bounds.clopper_pearson(1, 2, 0.1, uniform=bad)


# --- hypergeometric limits ---------------------------------------------------------------------------------------


def tail_at_most(count, total, truth, sampled):
    """P[at most `count` right among `sampled` of `total`, `truth` of them right], in exact fractions."""
    ways = sum(math.comb(truth, k) * math.comb(total - truth, sampled - k) for k in range(count + 1))
    return Fraction(ways, math.comb(total, sampled))


@pytest.mark.parametrize(("sampled", "total"), [(1, 1), (1, 9), (7, 20), (19, 20), (25, 60)])
@pytest.mark.parametrize("beta", [0.21, 0.011])
def test_hypergeometric_limits_cover_every_truth_and_no_more(sampled, total, beta):
    every = np.arange(sampled + 1)
    low, high = bounds.hypergeometric_limits(every, sampled, total, beta)
    least, most = np.round(low * total).astype(int), np.round(high * total).astype(int)
    np.testing.assert_allclose([low * total, high * total], [least, most], atol=1e-9)
    worst = 0.0
    for truth in range(total + 1):
        chance = stats.hypergeom.pmf(every, total, truth, sampled)
        misses = chance[most < truth].sum(), chance[least > truth].sum()
        assert max(misses) <= beta + 1e-12
        worst = max(worst, *misses)
    assert worst > 0.3 * beta or sampled != 25
    for count in every:  # one step further in would break beta
        assert tail_at_most(count, total, most[count], sampled) > beta
        assert most[count] == total - sampled + count or tail_at_most(count, total, most[count] + 1, sampled) <= beta
        wrong = sampled - count
        assert tail_at_most(wrong, total, total - least[count], sampled) > beta
        assert least[count] == count or tail_at_most(wrong, total, total - least[count] + 1, sampled) <= beta


def test_hypergeometric_limits_at_tiny_beta():
    low, high = bounds.hypergeometric_limits([3, 60], 100, 400, 1e-8)
    for limit, count in ((high, (3, 60)), (1 - low, (97, 40))):
        for share, right in zip(limit, count):
            truth = round(float(share) * 400)
            assert tail_at_most(right, 400, truth, 100) > 1e-8 >= tail_at_most(right, 400, truth + 1, 100)


def test_all_images_give_the_share_itself():
    counts = np.array([[0, 7], [31, 64]])
    low, high = bounds.hypergeometric_limits(counts, 64, 64, 1e-6)
    np.testing.assert_array_equal(low, counts / 64)
    np.testing.assert_array_equal(high, counts / 64)


@pytest.mark.parametrize(("truth", "tau", "images"), [(0.10, 0.15, 980), (0.10, 0.20, 320), (0.12, 0.15, 2370)])
def test_images_that_show_an_accuracy_lies_below_tau(truth, tau, images):
    def expected(sampled):  # the limit of a count that is what one expects
        return bounds.hypergeometric_limits([round(truth * sampled)], sampled, 10_000, 1e-6)[1][0]

    assert expected(round(images * 1.07)) <= tau < expected(round(images * 0.85))


@pytest.mark.parametrize(
    ("correct", "sampled", "total", "beta", "match"),
    [
        ([1], 0, 5, 0.1, "sampled"),
        ([1], 6, 5, 0.1, "sampled"),
        ([-1], 3, 5, 0.1, "counts"),
        ([4], 3, 5, 0.1, "counts"),
        ([1.5], 3, 5, 0.1, "whole"),
        ([NAN], 3, 5, 0.1, "whole"),
        ([1], 3, 5, 0.0, "beta"),
        ([1], 3, 5, 1.0, "beta"),
        ([1], 3, 5, NAN, "beta"),
    ],
)
def test_samples_that_make_no_sense(correct, sampled, total, beta, match):
    with pytest.raises(BadInput, match=match):
        bounds.hypergeometric_limits(correct, sampled, total, beta)


# --- the quantile of a sample ------------------------------------------------------------------------------------


def test_empirical_quantile_is_numpys_inverted_cdf():
    random = np.random.default_rng(0)
    for _ in range(50):
        scores, level = random.integers(0, 30, int(random.integers(1, 40))) / 8, random.uniform(0.01, 0.99)
        assert bounds.empirical_quantile(scores, level) == np.quantile(scores, level, method="inverted_cdf")


@pytest.mark.parametrize(
    ("n", "level", "rank"), [(10, 0.9, 9), (10, 0.3, 3), (10, 0.7, 7), (100, 0.29, 29), (10, 0.91, 10), (1, 0.1, 1)]
)
def test_empirical_quantile_at_exact_ranks(n, level, rank):
    assert bounds.empirical_quantile(np.arange(n, 0, -1), level) == rank


def test_empirical_quantile_refuses():
    for scores in ([], [NAN], [1.0, math.inf]):
        with pytest.raises(BadInput, match="finite"):
            bounds.empirical_quantile(scores, 0.5)
    with pytest.raises(BadInput, match="level"):
        bounds.empirical_quantile([1.0], 1.0)


# --- events under indistinguishable laws -------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "both", "paper"), [(0.5, 0.926, 0.579), (1.0, 0.878, 0.351), (3.0, 0.096, 0.048)])
def test_a_hundred_clean_reference_runs(epsilon, both, paper):
    p = bounds.clopper_pearson(100, 100, 0.01, side="lower")[0]
    assert p == pytest.approx(0.955, abs=5e-4)
    assert bounds.indistinguishable_event_bounds(p, epsilon, 1e-5)[0] == pytest.approx(both, abs=6e-4)
    assert math.exp(-epsilon) * (p - 1e-5) == pytest.approx(paper, abs=6e-4)  # the first term alone
    assert bounds.indistinguishable_event_bounds(0.5, epsilon, 1e-5)[0] >= math.exp(-epsilon) * (0.5 - 1e-5)


@pytest.mark.parametrize("p", [0.0, 0.003, 0.2, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize(("epsilon", "zeta"), [(0.0, 0.0), (0.0, 0.1), (0.3, 0.0), (1.0, 0.01), (3.0, 1e-5)])
def test_bounds_are_the_ends_of_what_the_definition_allows(p, epsilon, zeta):
    up = math.exp(epsilon)  # p' <= up p + zeta, p <= up p' + zeta, and both for the complement
    rows, limits = [[1], [-up], [-1], [up]], [up * p + zeta, zeta - p, up * (1 - p) + zeta - 1, up + zeta - (1 - p)]
    ends = [optimize.linprog([sign], A_ub=rows, b_ub=limits, bounds=[(0, 1)]).x[0] for sign in (1, -1)]
    found = bounds.indistinguishable_event_bounds(p, epsilon, zeta)
    assert found == pytest.approx(tuple(ends), abs=1e-9)
    mirror = bounds.indistinguishable_event_bounds(1 - p, epsilon, zeta)
    assert found == pytest.approx((1 - mirror[1], 1 - mirror[0]), abs=1e-12)


@pytest.mark.parametrize(("epsilon", "zeta"), [(0.5, 0.0), (2.0, 0.0), (1.0, 0.05)])
def test_randomized_response_attains_the_bounds(epsilon, zeta):
    lie = (1 - zeta) / (1 + math.exp(epsilon))  # the truth is shown with chance zeta, else lied about with odds e^-epsilon
    assert bounds.indistinguishable_event_bounds(lie, epsilon, zeta)[1] == pytest.approx(1 - lie, abs=1e-12)
    assert bounds.indistinguishable_event_bounds(1 - lie, epsilon, zeta)[0] == pytest.approx(lie, abs=1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 2.5])
def test_half_lines_attain_the_gaussian_bound(mu):
    for t in (-2.0, -0.3, 0.0, 1.4, 3.0):
        inside = stats.norm.cdf(t)  # theta <= t under N(0, 1); under N(mu, 1) and N(-mu, 1) the least and the most
        low, high = bounds.gdp_event_bounds(inside, mu)
        assert (low, high) == pytest.approx((stats.norm.cdf(t - mu), stats.norm.cdf(t + mu)), abs=1e-12)
        assert bounds.gdp_event_bounds(1 - inside, mu) == pytest.approx((1 - high, 1 - low), abs=1e-12)
        interval = stats.norm.cdf(abs(t)) - stats.norm.cdf(-abs(t))
        moved = stats.norm.cdf(abs(t) - mu) - stats.norm.cdf(-abs(t) - mu)
        low, high = bounds.gdp_event_bounds(interval, mu)
        assert low - 1e-12 <= moved <= high + 1e-12
    for p in (0.0, 1.0):
        assert bounds.gdp_event_bounds(p, mu) == (p, p)


@pytest.mark.parametrize(("mu", "epsilon"), [(0.5, 0.2), (1.0, 1.0), (1.5, 3.0)])
def test_gaussian_bound_is_the_best_of_all_epsilons(mu, epsilon):
    zeta = stats.norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * stats.norm.cdf(-epsilon / mu - mu / 2)
    for p in (0.01, 0.3, 0.7, 0.97):
        tight, loose = bounds.gdp_event_bounds(p, mu), bounds.indistinguishable_event_bounds(p, epsilon, zeta)
        assert loose[0] - 1e-12 <= tight[0] <= p <= tight[1] <= loose[1] + 1e-12
    touching = stats.norm.sf(epsilon / mu + mu / 2)  # where the ratio of the densities is e^epsilon the two meet
    for side, p in ((1, touching), (0, 1 - touching)):
        meet = bounds.gdp_event_bounds(p, mu)[side]
        assert bounds.indistinguishable_event_bounds(p, epsilon, zeta)[side] == pytest.approx(meet, abs=1e-9)


def test_events_that_make_no_sense():
    for p in (-0.1, 1.1, NAN):
        with pytest.raises(BadInput, match="p must"):
            bounds.indistinguishable_event_bounds(p, 1.0, 0.0)
        with pytest.raises(BadInput, match="p must"):
            bounds.gdp_event_bounds(p, 1.0)
    for bad in (-0.1, math.inf, NAN):
        with pytest.raises(BadInput, match="epsilon"):
            bounds.indistinguishable_event_bounds(0.5, bad, 0.0)
        with pytest.raises(BadInput, match="mu"):
            bounds.gdp_event_bounds(0.5, bad)
    for zeta in (-0.1, 1.0, NAN):
        with pytest.raises(BadInput, match="zeta"):
            bounds.indistinguishable_event_bounds(0.5, 1.0, zeta)
