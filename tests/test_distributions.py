"""Unlearned against retrained models: slow loops over published definitions, and limits that hold over repetitions."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from dememo_jax import audit, bounds
from dememo_jax.audit import distributions
from dememo_jax.errors import BadInput


def pair(seed, m, n, examples, shift=0.0, rows=0.0):
    """Scores of examples of their own, the unlearned shifted; `rows`: how much the scores of one model move together."""
    rng = np.random.default_rng(seed)
    offsets = 5 * rng.normal(size=examples)
    one, other = (offsets + rng.normal(size=(k, examples)) + rows * rng.normal(size=(k, 1)) for k in (m, n))
    return one + shift, other


# --- KLoM ---------------------------------------------------------------------------------------------------------


def slow_klom(unlearned, retrained, bins):
    found = []
    for one, other in zip(np.clip(unlearned, -100, 100).T, np.clip(retrained, -100, 100).T):
        ends = min(*one, *other), max(*one, *other)
        p, q = (np.histogram(part, bins=bins, range=ends)[0] / len(part) for part in (one, other))
        found.append(sum(a * math.log(a / max(b, 1e-5)) for a, b in zip(p, q) if a > 0))
    return np.array(found)


@pytest.mark.parametrize(("m", "n"), [(40, 40), (25, 60)])
@pytest.mark.parametrize("bins", [20, 7])
def test_klom_equals_histograms(m, n, bins):
    unlearned, retrained = pair(0, m, n, 12, shift=0.7)
    unlearned[:3, 0], retrained[:2, 1], unlearned[0, 2] = 150.0, -1e6, -101.0  # beyond the clip on either side
    got = audit.klom(unlearned, retrained, bins=bins)
    np.testing.assert_allclose(got, slow_klom(unlearned, retrained, bins), rtol=1e-12)
    if bins == 20:
        np.testing.assert_array_equal(audit.klom(unlearned, retrained), got)
    assert not np.allclose(got, audit.klom(retrained, unlearned), rtol=0.05)  # KL is not symmetric


def test_klom_at_its_ends():
    rng = np.random.default_rng(1)
    same = rng.normal(size=(30, 4))
    np.testing.assert_allclose(audit.klom(same, rng.permutation(same)), 0.0, atol=1e-12)
    constant = np.ones((5, 1))
    got = audit.klom(np.concatenate([constant, 101 * constant, 1e5 * constant], axis=1),
                     np.concatenate([0 * constant, 100 * constant, constant], axis=1))  # fmt: skip
    np.testing.assert_allclose(got, [math.log(1e5), 0.0, math.log(1e5)], rtol=1e-12)  # the floor; the clip makes them equal


def test_klom_of_one_law_is_a_bias_of_few_models():
    few, many = (audit.klom(*pair(2, m, m, 40)).mean() for m in (20, 400))
    assert few > 10 * many > 0


# --- epsilon-hat --------------------------------------------------------------------------------------------------


def slow_epsilon(one, other, delta):
    """One example, one rule after another. The published rules claim what is at or above a cut, or within two."""
    ranges = np.ptp(one), np.ptp(other)
    if min(ranges) < 0.01 * max(ranges):
        return 50.0
    positive, negative = (one, other) if np.median(one) >= np.median(other) else (other, one)
    values = sorted({*one, *other})
    cuts = [values[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(values)), values[-1] + 1]
    rules = [(positive >= cut, negative >= cut) for cut in cuts]
    for low, high in itertools.combinations(cuts, 2):
        inside = [(low <= part) & (part <= high) for part in (positive, negative)]
        rules += [tuple(inside), tuple(~part for part in inside)]
    best = 0.0
    for claimed in rules:
        fnr, fpr = 1 - np.mean(claimed[0]), np.mean(claimed[1])
        if fnr == 0 and fpr == 0:
            return 50.0
        if fnr == 0 or fpr == 0:
            continue
        for x, y in ((fpr, fnr), (fnr, fpr)):
            if 1 - delta - x > 0:
                best = max(best, math.log(1 - delta - x) - math.log(y))
    return min(best, 50.0)


@pytest.mark.parametrize("delta", [1e-5, 0.15])
@pytest.mark.parametrize(("m", "n"), [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("ties", [True, False])
def test_epsilon_points_equal_loops_over_all_rules(delta, m, n, ties):
    rng = np.random.default_rng(3)
    unlearned, retrained = rng.normal(size=(m, 60)), rng.normal(size=(n, 60)) * rng.uniform(0.3, 3, size=60)
    unlearned += rng.normal(size=60)
    if ties:
        unlearned, retrained = np.round(unlearned), np.round(retrained)
    slow = [slow_epsilon(unlearned[:, i], retrained[:, i], delta) for i in range(60)]
    got = audit.epsilon_points(unlearned, retrained, delta=delta)
    np.testing.assert_allclose(got, slow, rtol=1e-9, atol=1e-12)
    assert len(np.unique(got)) >= 4
    if delta == 1e-5:
        np.testing.assert_array_equal(audit.epsilon_points(unlearned, retrained), got)


def test_epsilon_points_block_by_block(monkeypatch):
    unlearned, retrained = pair(4, 8, 9, 30, shift=0.5)
    whole = audit.epsilon_points(unlearned, retrained)
    monkeypatch.setattr(distributions, "CELLS", 4 * 17 * 17)
    np.testing.assert_array_equal(audit.epsilon_points(unlearned, retrained), whole)


def test_epsilon_points_of_perfect_separation():
    low, middle = np.arange(6.0), np.arange(6.0) + 20
    around = np.array([0, 1, 2, 40, 41, 42.0])
    columns = [(low, middle), (middle, low), (around, middle), (middle, around)]
    one, other = (np.stack(part, axis=1) for part in zip(*columns))
    np.testing.assert_array_equal(audit.epsilon_points(one, other), 50.0)


@pytest.mark.parametrize(("width", "far"), [(0.0198, True), (0.0202, False)])
def test_epsilon_points_of_ranges_that_differ_a_hundredfold(width, far):
    wide = np.array([-1, -0.5, -0.25, 0, 0, 0.25, 0.5, 1])
    narrow = width * np.array([-0.5, -0.25, 0, 0, 0.25, 0.5])
    for one, other in ((wide, narrow), (narrow, wide)):
        got = audit.epsilon_points(one[:, None], other[:, None])
        assert got == 50.0 if far else 0 < got < 5


def test_forgetting_quality_by_hand():
    points = [0, 0.49, 0.5, 1.2, 4.99, 5.0, 50.0]
    assert audit.forgetting_quality(points, 65) == pytest.approx((1 + 1 + 1 / 2 + 1 / 4 + 2**-9 + 0 + 0) / 7)  # log 64 = 4.2
    assert audit.forgetting_quality([2.9, 3.0], 9) == pytest.approx(2**-5 / 2)  # log 8 = 2.1
    assert audit.forgetting_quality(np.zeros(3), 40) == 1


def test_epsilon_hat_is_made_of_its_parts():
    unlearned, retrained = pair(5, 20, 26, 6, shift=np.array([0, 0, 0, 1, 3, -3]))
    unlearned, retrained = (np.append(part, np.full((len(part), 1), 2.0), axis=1) for part in (unlearned, retrained))
    got = audit.epsilon_hat(unlearned, retrained, delta=1e-3, alpha=0.1)
    np.testing.assert_array_equal(got.examples, audit.epsilon_points(unlearned, retrained, delta=1e-3))
    judged = [bounds.distinguish(unlearned[:, i], retrained[:, i], delta=1e-3, alpha=0.1) for i in range(6)]
    assert got.low == (*(each.epsilon_low for each in judged), 0.0)
    assert got.high == (*(each.epsilon_high for each in judged), 0.0)
    together = [bounds.distinguish(unlearned[:, i], retrained[:, i], delta=1e-3, alpha=0.1 / 7) for i in range(6)]
    assert got.largest_low == max(each.epsilon_low for each in together)
    assert 0 < got.largest_low < max(got.low)
    assert got.score == audit.forgetting_quality(got.examples, 20)
    assert (got.delta, got.confidence, got.examples[-1]) == (1e-3, 0.9, 0.0)


def test_epsilon_hat_of_honest_retraining_is_not_above_0():
    points, shown = [], []
    for seed in range(8):
        found = audit.epsilon_hat(*pair(300 + seed, 40, 40, 25))
        assert found.largest_low == 0
        points += found.examples
        shown += [low > 0 for low in found.low]
    assert np.mean(shown) < 0.03
    assert np.mean(points) > 1  # what the limits are for


@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_epsilon_hat_stays_below_the_truth(mu):
    truth, found = bounds.gdp_epsilon(mu, 0.05), []
    for seed in range(3):
        found.append(audit.epsilon_hat(*pair(400 + seed, 64, 64, 40, shift=mu), delta=0.05))
    assert np.mean([low > truth for each in found for low in each.low]) <= 0.05
    assert sum(each.largest_low > truth for each in found) == 0
    assert np.median([point for each in found for point in each.examples]) > truth


def test_epsilon_hat_sees_a_large_shift():
    found = audit.epsilon_hat(*pair(6, 64, 64, 20, shift=4.0))
    assert 1 < min(found.low) <= max(found.low) < 2.15  # 64 models cannot show more
    assert 1 < found.largest_low <= max(found.low)
    assert found.score < 0.02


def test_epsilon_hat_covers_an_exact_epsilon():
    """Two values, which any rule tells apart with rates 3/4 and 1/4: log 3, and the rule cannot be chosen wrongly."""
    rng = np.random.default_rng(7)
    one, other = rng.uniform(size=(60, 100)) < 0.75, rng.uniform(size=(60, 100)) < 0.25
    found = audit.epsilon_hat(one, other, delta=1e-9)
    assert np.mean(np.array(found.low) > math.log(3)) <= 0.05
    assert np.mean([high is not None and high < math.log(3) for high in found.high]) <= 0.05
    assert np.mean(np.array(found.low) > 0) > 0.8
    assert found.largest_low < math.log(3)


# --- both sides ---------------------------------------------------------------------------------------------------


def by_hand(p_values, alpha):
    """Benjamini and Hochberg: share of the p-values that stand."""
    ordered = np.sort(p_values)
    passing = np.flatnonzero(ordered <= alpha * np.arange(1, len(ordered) + 1) / len(ordered))
    return (passing.max(initial=-1) + 1) / len(ordered)


def test_two_sided_equals_loops():
    unlearned, retrained = pair(8, 15, 22, 40, shift=np.repeat([0.8, -0.6, 0.0], [10, 15, 15]))
    unlearned, retrained = np.round(unlearned, 1), np.round(retrained, 1)
    got = audit.two_sided(unlearned, retrained, alpha=0.1)
    for share, side in ((got.under, "greater"), (got.over, "less")):
        p_values = [mannwhitneyu(x, y, alternative=side).pvalue for x, y in zip(unlearned.T, retrained.T)]
        assert share == by_hand(np.array(p_values), 0.1)
        assert 0 < share < 0.4
    pairs = (unlearned[:, None] > retrained) + (unlearned[:, None] == retrained) / 2
    assert got.area.value == pytest.approx(pairs.mean())
    assert audit.two_sided(unlearned, retrained).area.low < got.area.low < got.area.value < got.area.high


def test_two_sided_tells_the_directions_apart():
    shifts = 1.2 * np.ones(60)
    up, down, both = (audit.two_sided(*pair(9, 32, 24, 60, shift=shift))
                      for shift in (shifts, -shifts, shifts * np.repeat([1, -1], 30)))  # fmt: skip
    assert up.under > 0.8
    assert up.over == 0
    assert up.area.low > 0.7
    assert down.over > 0.8
    assert down.under == 0
    assert down.area.high < 0.3
    assert 0.3 < both.under <= 0.5
    assert 0.3 < both.over <= 0.5
    assert both.area.low < 0.5 < both.area.high
    expected = norm.cdf(1.2 / math.sqrt(2))
    assert up.area.low < expected < up.area.high
    assert down.area.value == pytest.approx(1 - expected, abs=0.05)


@pytest.mark.parametrize("rows", [0.0, 1.0])
def test_two_sided_of_honest_retraining(rows):
    """Also where all scores of a model move together, and examples are no independent cases."""
    found = [audit.two_sided(*pair(500 + seed, 24, 32, 25, rows=rows)) for seed in range(80)]
    assert sum(each.area.low <= 0.5 <= each.area.high for each in found) >= 72
    assert np.mean([each.under for each in found]) < 0.02
    assert np.mean([each.over for each in found]) < 0.02
    assert np.mean([each.under + each.over == 0 for each in found]) > 0.85
    assert np.mean([each.area.high - each.area.low for each in found]) < (0.3 if rows else 0.1)


def test_a_constant_example_is_no_discovery():
    unlearned, retrained = pair(10, 12, 14, 5, shift=3.0)
    unlearned[:, 2], retrained[:, 2] = 1.0, 1.0
    found = audit.two_sided(unlearned, retrained)
    assert (found.under, found.over) == (0.8, 0.0)


# --- one number of all examples -----------------------------------------------------------------------------------


def test_joint_epsilon_equals_log_ratios_by_hand():
    unlearned, retrained = pair(11, 33, 41, 7, shift=0.8)
    fit, rest = (
        [part[::4] for part in (unlearned, retrained)],
        [np.delete(part, np.s_[::4], 0) for part in (unlearned, retrained)],
    )
    sums = []
    for part in rest:
        sums.append(np.zeros(len(part)))
        for i in range(7):
            deviations = np.concatenate([each[:, i] - each[:, i].mean() for each in fit])
            sd = math.sqrt(np.mean(deviations**2))
            densities = [norm.logpdf(part[:, i], each[:, i].mean(), sd) for each in fit]
            sums[-1] += densities[0] - densities[1]
    slow = bounds.distinguish(*sums, delta=1e-3, alpha=0.1)
    got = audit.joint_epsilon(unlearned, retrained, delta=1e-3, alpha=0.1)
    assert dataclasses.asdict(got) == dataclasses.asdict(slow)
    assert got.samples == (12, 15)
    assert got.epsilon_low > 0
    usual = audit.joint_epsilon(unlearned, retrained)
    assert (usual.delta, usual.confidence) == (1e-5, 0.95)


@pytest.mark.parametrize("rows", [0.0, 1.0])
def test_joint_epsilon_of_honest_retraining_is_0(rows):
    lows = [audit.joint_epsilon(*pair(600 + seed, 32, 40, 20, rows=rows)).epsilon_low for seed in range(100)]
    assert np.mean(np.array(lows) > 0) <= 0.05


def test_joint_epsilon_adds_up_what_single_examples_do_not_show():
    for seed in range(4):
        unlearned, retrained = pair(700 + seed, 64, 64, 400, shift=0.25)  # 5-GDP together
        assert audit.joint_epsilon(unlearned, retrained).epsilon_low > 0.3
        assert audit.epsilon_hat(unlearned[:, :60], retrained[:, :60]).largest_low == 0


@pytest.mark.parametrize("fitted", ["honestly", "to noise", "to a few examples", "with rows swapped"])
def test_joint_epsilon_holds_whatever_the_fitting_models_are(fitted):
    """Shifted by d, N independent examples are d sqrt(N)-GDP together."""
    delta, d, examples, lows = 0.05, 0.2, 16, []
    truth = bounds.gdp_epsilon(d * math.sqrt(examples), delta)
    for seed in range(60):
        unlearned, retrained = pair(800 + seed, 64, 64, examples, shift=d)
        rng = np.random.default_rng(seed)
        if fitted == "to noise":
            unlearned[::4], retrained[::4] = 50 * rng.normal(size=(2, 16, examples))
        elif fitted == "to a few examples":
            unlearned[::4, 3:], retrained[::4, 3:] = 1e6, 1e6
            retrained[:4, 3] = 0
        elif fitted == "with rows swapped":
            unlearned[::4], retrained[::4] = retrained[::4].copy(), unlearned[::4].copy()
        lows.append(audit.joint_epsilon(unlearned, retrained, delta=delta).epsilon_low)
    assert np.mean(np.array(lows) > truth) <= 0.05


def test_joint_epsilon_does_not_mind_which_kind_was_fitted():
    for seed in range(5):
        unlearned, retrained = pair(900 + seed, 48, 48, 50, shift=0.7)
        straight = audit.joint_epsilon(unlearned, retrained)
        unlearned[::4], retrained[::4] = retrained[::4].copy(), unlearned[::4].copy()
        crossed = audit.joint_epsilon(unlearned, retrained)
        assert crossed.epsilon_low == pytest.approx(straight.epsilon_low, rel=0.2)
        assert straight.epsilon_low > 0.5


# --- everything ---------------------------------------------------------------------------------------------------


def test_compare_says_what_the_single_tests_say():
    unlearned, retrained = pair(12, 14, 18, 12, shift=0.6)
    got = audit.compare(unlearned, retrained, pair(12, 10, 10, 12)[0] + 3, delta=1e-4, alpha=0.1, fprs=(0.1, 0.02),
                        draws=19, seed=3)  # fmt: skip
    assert (got.models, got.examples) == ((14, 18), 12)
    assert got.two_sided == audit.two_sided(unlearned, retrained, alpha=0.1)
    assert got.epsilon == audit.epsilon_hat(unlearned, retrained, delta=1e-4, alpha=0.1)
    assert got.joint == audit.joint_epsilon(unlearned, retrained, delta=1e-4, alpha=0.1)
    scores = np.concatenate(audit.u_lira(unlearned, retrained))
    members = np.repeat([True, False], [7, 9])[:, None] & np.ones((1, 12), bool)
    assert got.u_lira == bounds.auc(scores, members, alpha=0.1)
    assert got.u_lira_tpr == tuple(bounds.tpr_at(scores, members, fpr, alpha=0.1) for fpr in (0.1, 0.02))
    everyone = np.concatenate(audit.u_lira(unlearned, retrained, fit="others"))
    kinds = np.repeat([True, False], [14, 18])[:, None] & np.ones((1, 12), bool)
    assert (got.u_lira_all.value, got.u_lira_all.draws) == (bounds.auc(everyone, kinds).value, 19)
    each = audit.klom(unlearned, retrained)
    assert (got.klom.value, got.klom.draws) == (each.mean(), 19)
    assert got.klom_95 == np.percentile(each, 95)
    assert got.klom == bounds.permutation_test(lambda x, y: audit.klom(x, y).mean(), unlearned, retrained, draws=19, seed=3)
    assert got.quality.value == pytest.approx(1 - got.epsilon.score)
    assert got.quality.draws == 19
    assert got.relative == bounds.relative_distance(unlearned, retrained, pair(12, 10, 10, 12)[0] + 3)


def test_compare_passes_honest_retraining():
    found = []
    for seed in range(10):
        found.append(audit.compare(*pair(1000 + seed, 20, 24, 12), draws=39))
        assert found[-1].relative is None
        assert found[-1].epsilon.largest_low == found[-1].joint.epsilon_low == 0
        assert all(point.low <= point.fpr <= point.high for point in found[-1].u_lira_tpr)
    assert sum(each.two_sided.under + each.two_sided.over == 0 for each in found) >= 7
    for name in ("klom", "quality", "u_lira_all"):
        p_values = [getattr(each, name).p_value for each in found]
        assert sum(p_value > 0.05 for p_value in p_values) >= 8
    for areas in ([each.two_sided.area for each in found], [each.u_lira for each in found]):
        assert sum(area.low <= 0.5 <= area.high for area in areas) >= 8


def test_compare_fails_a_shift():
    for seed in range(3):
        retrained, other = pair(1200 + seed, 24, 30, 12)
        found = audit.compare(other + 1.5, retrained, retrained[::2] + 1.6, draws=99)
        assert found.klom.p_value == found.quality.p_value == found.u_lira_all.p_value == 0.01
        assert found.klom.null < found.klom.value
        assert found.two_sided.under > 0.9
        assert found.two_sided.area.low > 0.7
        assert found.u_lira.low > 0.7
        assert found.u_lira_tpr[0].tpr > 0.1
        assert found.joint.epsilon_low > 0.3
        assert found.epsilon.score < 0.1
        assert found.relative.p_nearer_second < 0.01
        assert audit.compare(other, retrained, retrained[::2] + 1.6, draws=1).relative.p_nearer_first < 0.01


def test_p_values_of_compare_are_uniform():
    found = [audit.compare(*pair(1100 + seed, 8, 10, 4), draws=9) for seed in range(40)]
    for name in ("klom", "quality", "u_lira_all"):
        p_values = [getattr(each, name).p_value for each in found]
        assert np.mean(np.array(p_values) <= 0.2) < 0.4  # 0.2 and three standard errors
        assert 0.4 < np.mean(p_values) < 0.75  # a score with many ties comes out too large, which is safe


def test_identical_samples():
    same = pair(13, 16, 16, 5)[0]
    found = audit.compare(same, same.copy(), draws=9)
    assert found.klom.value == found.epsilon.largest_low == found.joint.epsilon_low == 0
    assert found.two_sided.area.value == 0.5


# --- bad input ----------------------------------------------------------------------------------------------------

ONE, OTHER = pair(14, 12, 10, 4)
BROKEN = ONE.copy()
BROKEN[2, 1] = np.nan
ALL = [audit.klom, audit.epsilon_points, audit.epsilon_hat, audit.two_sided, audit.joint_epsilon, audit.compare]


@pytest.mark.parametrize("test", ALL, ids=lambda test: test.__name__)
@pytest.mark.parametrize(
    ("unlearned", "retrained", "match"),
    [
        (ONE, OTHER[:, 1:], "same examples"),
        (ONE[0], OTHER[0], "same examples"),
        (ONE[:, :0], OTHER[:, :0], "same examples"),
        (BROKEN, OTHER, "finite"),
        (OTHER, np.where(np.isnan(BROKEN), np.inf, BROKEN), "finite"),
        (np.full((9, 2), 3.0), np.full((8, 2), 3.0), "all scores are 3"),
        (ONE[:0], OTHER, "models"),
        (ONE, OTHER[:0], "models"),
    ],
)
def test_refuses(test, unlearned, retrained, match):
    with pytest.raises(BadInput, match=match):
        test(unlearned, retrained)


@pytest.mark.parametrize(
    ("test", "least", "match"),
    [
        (audit.two_sided, 2, "two models or more"),
        (audit.epsilon_hat, 4, "four models or more"),
        (audit.joint_epsilon, 8, "eight models or more"),
        (audit.compare, 8, "eight models or more"),
    ],
)
def test_refuses_too_few_models(test, least, match):
    test(ONE[:least], OTHER[:least])
    for sizes in ((least, least - 1), (least - 1, least)):
        with pytest.raises(BadInput, match=match):
            test(ONE[: sizes[0]], OTHER[: sizes[1]])


@pytest.mark.parametrize("how", [{"alpha": 0.0}, {"alpha": 1.0}, {"delta": 1.5}, {"delta": -0.1}])
def test_refuses_bad_levels(how):
    for test in (audit.epsilon_hat, audit.joint_epsilon, audit.compare):
        with pytest.raises(BadInput, match=next(iter(how))):
            test(ONE, OTHER, **how)
    if "alpha" in how:
        with pytest.raises(BadInput, match="alpha"):
            audit.two_sided(ONE, OTHER, **how)


def test_refuses_a_single_bin():
    with pytest.raises(BadInput, match="at least two bins"):
        audit.klom(ONE, OTHER, bins=1)
