"""ROC, its area and small false-positive rates against scikit-learn, loops, binomial sums and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import optimize, special, stats
from sklearn import metrics

from dememo_jax import bounds
from dememo_jax.bounds.ranking import logit_limits
from dememo_jax.errors import BadInput

NAN = float("nan")


def tied(seed, shape, share=0.5, levels=8):
    """Scores on few levels, so that nearly all are tied, a little larger for members."""
    random = np.random.default_rng(seed)
    members = random.random(shape) < share
    return np.round(levels * (random.normal(size=shape) + 0.8 * members)) / levels, members


def gaussian(seed, inside, outside, shift):
    scores = np.random.default_rng(seed).normal(size=inside + outside)
    members = np.arange(inside + outside) < inside
    return scores + shift * members, members


def placements(scores, members):
    """Each cell's share of the other kind that it is right about, by loops."""
    other = {True: scores[~members], False: scores[members]}
    found = np.zeros(scores.shape)
    for cell in np.ndindex(scores.shape):
        score, member = scores[cell], bool(members[cell])
        right = sum(1.0 if (score > o) == member and score != o else 0.5 if score == o else 0.0 for o in other[member])
        found[cell] = right / len(other[member])
    return found


def spread(found, alpha, freedom):
    """The variance that limits amount to on the logit scale."""
    ends = special.logit([found.low, found.value, found.high])
    assert ends[1] == pytest.approx((ends[0] + ends[2]) / 2, abs=1e-9)
    reach = (ends[2] - ends[0]) / 2 / stats.t.ppf(1 - alpha / 2, freedom)
    return (reach * found.value * (1 - found.value)) ** 2


def coverage(found, truth):
    return float(np.mean([each.low <= truth <= each.high for each in found]))


# --- the curve ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 8, 10**6])
def test_roc_is_sklearns(levels):
    for seed, share in enumerate((0.5, 0.1, 0.9)):
        scores, members = tied(seed, 200, share, levels)
        for got, expected in zip(bounds.roc(scores, members), metrics.roc_curve(members, scores, drop_intermediate=False)):
            np.testing.assert_allclose(got, expected, atol=1e-12)


def test_roc_points_count_what_is_at_or_above_the_threshold():
    scores, members = tied(3, (12, 9))
    false, true, thresholds = bounds.roc(scores, members)
    np.testing.assert_array_equal(thresholds, np.append(np.inf, np.unique(scores)[::-1]))
    np.testing.assert_allclose(true, [(scores[members] >= t).mean() for t in thresholds], atol=1e-12)
    np.testing.assert_allclose(false, [(scores[~members] >= t).mean() for t in thresholds], atol=1e-12)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx(bounds.auc(scores, members).value, abs=1e-12)


# --- its area ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 8, 10**6])
def test_area_is_sklearns_and_a_double_loop(levels):
    for seed, share in enumerate((0.5, 0.1, 0.9)):
        scores, members = tied(seed, 120, share, levels)
        pairs = [(a > b) + (a == b) / 2 for a in scores[members] for b in scores[~members]]
        got = bounds.auc(scores, members).value
        assert got == pytest.approx(np.mean(pairs), abs=1e-12)
        assert got == pytest.approx(metrics.roc_auc_score(members, scores), abs=1e-12)
        grid = bounds.auc(scores.reshape(10, 12), members.reshape(10, 12)).value
        assert grid == pytest.approx(got, abs=1e-12)


@pytest.mark.parametrize(("inside", "outside"), [(12, 12), (9, 31), (31, 9)])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_variance_is_delongs(inside, outside, alpha):
    scores, members = gaussian(5, inside, outside, 0.7)
    scores = np.round(4 * scores) / 4
    placed = placements(scores, members)
    delong = sum(placed[kind].var(ddof=1) / kind.sum() for kind in (members, ~members))
    few = min(inside, outside)
    got = spread(bounds.auc(scores, members, alpha=alpha), alpha, few - 1)
    if inside == outside:
        assert got == pytest.approx(delong, rel=1e-9)
    # The correction of the rarer kind may stand for both.
    assert delong * (1 - 1e-9) <= got <= delong * few / (few - 1)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_variance_of_clusters_is_that_of_all_pairs_with_a_row_or_a_column_in_common(alpha):
    random = np.random.default_rng(6)
    shape = M, N = (7, 9)
    members = np.indices(shape).sum(axis=0) % 2 == 0  # both kinds in every row and column
    gain = random.normal(size=(M, 1)) + random.normal(size=N)
    scores = random.normal(size=shape) + (0.5 + gain) * members
    found = bounds.auc(scores, members, alpha=alpha)
    sizes = np.where(members, members.sum(), (~members).sum())
    moved = (placements(scores, members) - found.value) / sizes
    total = 0.0
    for a in np.ndindex(shape):
        for b in np.ndindex(shape):
            weight = (a[0] == b[0]) * M / (M - 1) + (a[1] == b[1]) * N / (N - 1) - (a == b)
            total += weight * moved[a] * moved[b]
    assert total > 1.5 * (moved**2).sum()  # else the clusters would not matter
    assert spread(found, alpha, M - 1) == pytest.approx(total, rel=1e-9)


def test_clusters_never_do_better_than_independent_cells():
    # Member and non-member of a model rise and fall together: the formula for clusters falls below zero.
    scores = np.arange(6.0)[:, None] + np.array([0.0, 0.6])
    members = np.tile([False, True], (6, 1))
    placed = placements(scores, members)
    cells = sum(placed[kind].var(ddof=1) / 6 for kind in (members, ~members))
    assert spread(bounds.auc(scores, members), 0.05, 1) >= cells * (1 - 1e-9)


def test_area_of_gaussians():
    for seed, shift in enumerate((0.0, 0.5, 1.0, 2.0)):
        truth = stats.norm.cdf(shift / math.sqrt(2))
        found = bounds.auc(*gaussian(10 + seed, 3000, 2000, shift), alpha=1e-3)
        assert found.value == pytest.approx(truth, abs=0.025)
        assert found.low <= truth <= found.high < found.low + 0.07


@pytest.mark.parametrize(("alpha", "least", "most"), [(0.05, 0.935, 0.98), (0.2, 0.76, 0.86)])
def test_area_limits_cover(alpha, least, most):
    found = [bounds.auc(*gaussian(seed, 40, 60, 1.0), alpha=alpha) for seed in range(700)]
    truth = stats.norm.cdf(1 / math.sqrt(2))
    assert least <= coverage(found, truth) <= most
    for missed in ([f.low > truth for f in found], [f.high < truth for f in found]):
        assert 0.2 * alpha <= np.mean(missed) <= 0.8 * alpha  # both ends share the error


@pytest.mark.parametrize("few", [2, 3, 5])
def test_area_limits_cover_few_members(few):
    found = [bounds.auc(*gaussian(seed, few, 200, 0.0)) for seed in range(300)]
    assert coverage(found, 0.5) >= 0.92


def crossed(seed, models, examples):
    """How much membership lifts a score varies by model and by example: what cells of a row or column share."""
    random = np.random.default_rng(seed)
    members = random.random((models, examples)) < 0.5
    lift = 1.0 + 0.7 * random.normal(size=(models, 1)) + 0.7 * random.normal(size=examples)
    return random.normal(size=members.shape) + lift * members, members


def test_area_limits_cover_shared_rows_and_columns_where_independent_cells_do_not():
    truth = stats.norm.cdf(1 / math.sqrt(2 + 2 * 0.7**2))
    samples = [crossed(seed, 20, 50) for seed in range(400)]
    assert 0.91 <= coverage([bounds.auc(*each) for each in samples], truth) <= 0.985
    assert coverage([bounds.auc(*(part.ravel() for part in each)) for each in samples], truth) <= 0.7


def test_area_limits_cover_a_few_members_that_all_models_share():
    def once(seed):
        random = np.random.default_rng(seed)
        scores = random.normal(size=50) + 0.3 * random.normal(size=(30, 50))
        return bounds.auc(scores, np.broadcast_to(np.arange(50) < 2, scores.shape))

    assert coverage([once(seed) for seed in range(200)], 0.5) >= 0.88


def test_perfect_order_says_no_more_than_its_disjoint_pairs():
    for inside, outside in ((1, 9), (6, 3), (20, 20)):
        scores = np.arange(inside + outside)
        few = min(inside, outside)
        top, bottom = (bounds.auc(scores, scores >= outside), bounds.auc(-scores, scores >= outside))
        assert (top.value, top.high, bottom.value, bottom.low) == (1, 1, 0, 0)
        exact = bounds.clopper_pearson(few, few, 0.05)[0]
        assert (top.low, 1 - bottom.high) == pytest.approx((exact, exact), abs=1e-9)


def test_perfect_order_counts_clusters_of_the_rarer_kind():
    members = np.zeros((8, 20), bool)
    members[::2, :5] = members[1::2, 5:] = True  # each row and each column has both kinds: eight independent pairs
    assert bounds.auc(members.astype(float), members).low == pytest.approx(0.025 ** (1 / 8), abs=1e-9)
    few = np.broadcast_to(np.arange(20) < 3, (8, 20))  # three examples are the members of all models
    assert bounds.auc(few.astype(float), few).low <= 0.025 ** (1 / 3) + 1e-9


def test_area_sees_only_the_order():
    scores, members = tied(7, (9, 14))
    found = bounds.auc(scores, members)
    random = np.random.default_rng(8)
    rows, columns = random.permutation(9), random.permutation(14)
    for same in (
        bounds.auc(np.exp(scores), members),
        bounds.auc(-scores, ~members),
        bounds.auc(scores.T, members.T),
        bounds.auc(scores[rows][:, columns], members[rows][:, columns]),
    ):
        assert (same.value, same.low, same.high) == pytest.approx((found.value, found.low, found.high), abs=1e-12)
    mirrored = bounds.auc(-scores, members)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((1 - found.value, 1 - found.high, 1 - found.low))


def test_what_is_not_counted_takes_no_part():
    scores, members = tied(9, 90)
    counted = np.random.default_rng(10).random(90) < 0.6
    broken = np.where(counted, scores, NAN)
    assert bounds.auc(broken, members, counted=counted) == bounds.auc(scores[counted], members[counted])
    assert bounds.tpr_at(broken, members, 0.2, counted=counted) == bounds.tpr_at(scores[counted], members[counted], 0.2)
    scores, members = tied(11, (8, 12))
    counted = np.ones((8, 12), bool)
    counted[[2, 5]] = counted[:, [0, 7]] = False
    broken, part = np.where(counted, scores, NAN), np.ix_(counted[:, 1], counted[0])
    for got, expected in (
        (bounds.auc(broken, members, counted=counted), bounds.auc(scores[part], members[part])),
        (bounds.tpr_at(broken, members, 0.2, counted=counted), bounds.tpr_at(scores[part], members[part], 0.2)),
    ):
        assert vars(got) == pytest.approx(vars(expected), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_logit_limits(alpha):
    for value in (0.02, 0.5, 0.9):
        tight = logit_limits(value, 1e-8, 5, alpha)
        expected = stats.t.ppf(1 - alpha / 2, 4) * 1e-4
        assert (value - tight.low, tight.high - value) == pytest.approx((expected, expected), rel=2e-2)
        wide = logit_limits(value, 0.01 * value, 5, alpha)
        assert 0 <= wide.low < value < wide.high <= 1
        assert special.logit(wide.high) + special.logit(wide.low) == pytest.approx(2 * special.logit(value), abs=1e-6)
    for many in (1, 7):
        one, none = logit_limits(1.0, 0.0, many, alpha), logit_limits(0.0, 0.1, many, alpha)
        assert (one.low, one.high) == (pytest.approx((alpha / 2) ** (1 / many)), 1.0)
        assert (none.low, none.high) == (0.0, pytest.approx(1 - (alpha / 2) ** (1 / many)))
    assert vars(logit_limits(0.5, 0.0, 1, alpha)) == {"value": 0.5, "low": 0.0, "high": 1.0}


# --- the true-positive rate at a false-positive rate -------------------------------------------------------------


def binomial_limits(scores, members, fpr, alpha):
    """The four statements by sums of binomials and a root search instead of beta quantiles."""
    inside, outside = scores[members], np.sort(scores[~members])[::-1]
    n, m, each = len(inside), len(outside), alpha / 4
    low, high = 0.0, 1.0
    above = [i for i in range(m) if stats.binom.cdf(i, m, fpr) <= each]
    if above:
        k = int((inside > outside[above[-1]]).sum())
        low = optimize.brentq(lambda p: stats.binom.sf(k - 1, n, p) - each, 0, 1) if k else 0.0
    below = [j for j in range(1, m + 1) if stats.binom.sf(j - 1, m, fpr) <= each]
    if below:
        k = int((inside >= outside[below[0] - 1]).sum())
        high = optimize.brentq(lambda p: stats.binom.cdf(k, n, p) - each, 0, 1) if k < n else 1.0
    return low, high


@pytest.mark.parametrize("fpr", [0.001, 0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("alpha", [0.05, 0.4])
def test_limits_are_four_binomial_statements(fpr, alpha):
    for seed, (n, m) in enumerate(((30, 80), (60, 20), (5, 300))):
        for levels in (2, 10**6):
            scores, members = gaussian(20 + seed, n, m, 1.0)
            scores = np.round(levels * scores) / levels
            found = bounds.tpr_at(scores, members, fpr, alpha=alpha)
            assert (found.low, found.high) == pytest.approx(binomial_limits(scores, members, fpr, alpha), abs=1e-9)


@pytest.mark.parametrize("levels", [1, 8, 10**6])
def test_rate_is_the_largest_of_the_curve_within_the_false_positive_rate(levels):
    for seed in range(3):
        scores, members = tied(30 + seed, 150, levels=levels)
        false, true, _ = metrics.roc_curve(members, scores, drop_intermediate=False)
        m = int((~members).sum())
        for fpr in (1 / m, 0.02, 5 / m, 0.1, 0.3, 20 / m, 0.9, (m - 1) / m):
            found = bounds.tpr_at(scores, members, fpr)
            assert found.tpr == pytest.approx(true[false <= fpr + 1e-9].max(), abs=1e-12)
            assert found.low <= found.tpr <= found.high
            assert (found.fpr, found.nonmembers) == (fpr, m)


@pytest.mark.parametrize(("fpr", "outside"), [(0.29, 100), (0.57, 100), (0.58, 100)])
def test_rates_whose_product_rounds_down(fpr, outside):
    allowed = round(fpr * outside)
    assert fpr * outside < allowed
    scores, members = np.arange(outside + 10.0), np.ones(outside + 10, bool)
    members[10:] = False
    scores[:10] = outside + 10 - allowed - 0.5  # above all non-members but those that the rate allows
    assert bounds.tpr_at(scores, members, fpr).tpr == 1


@pytest.mark.parametrize("needed", [4, 10, 49, 100, 103, 1000])
def test_no_rate_without_enough_nonmembers(needed):
    fpr = 1 / needed
    scores, members = gaussian(40, 50, needed, 6.0)
    found = bounds.tpr_at(scores, members, fpr)
    assert (found.needed, found.nonmembers) == (needed, needed)
    assert found.tpr > 0.9
    few = bounds.tpr_at(scores[:-1], members[:-1], fpr)
    assert (few.tpr, few.needed, few.nonmembers) == (None, needed, needed - 1)
    assert few.low == 0  # (1 - fpr)^m > alpha / 4
    assert bounds.tpr_at(scores, members, 0.3 / needed + 1e-9).needed == math.ceil(needed / 0.3 - 1e-3)


def test_limits_that_nothing_supports():
    scores, members = gaussian(41, 40, 200, 8.0)
    for fpr, m, supported in ((0.05, 85, False), (0.05, 86, True)):  # 0.95^86 <= 0.05 / 4 < 0.95^85
        found = bounds.tpr_at(scores[: 40 + m], members[: 40 + m], fpr)
        assert found.low == (pytest.approx(0.0125 ** (1 / 40), abs=1e-9) if supported else 0)
        assert found.high == 1
    for m, supported in ((6, False), (7, True)):  # 0.5^7 <= 0.05 / 4 < 0.5^6
        found = bounds.tpr_at(-scores[: 40 + m], members[: 40 + m], 0.5)
        assert found.high == (pytest.approx(1 - 0.0125 ** (1 / 40), abs=1e-9) if supported else 1)
        assert (found.tpr, found.low) == (0, 0)


@pytest.mark.parametrize("fpr", [1e-9, 1 - 1e-9, 1 - 1e-12])
def test_false_positive_rates_near_the_ends(fpr):
    found = bounds.tpr_at(*gaussian(42, 30, 30, 1.0), fpr)
    assert 0 <= found.low <= found.high <= 1


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.3])
def test_rate_of_gaussians(fpr):
    truth = stats.norm.cdf(1.5 + stats.norm.ppf(fpr))
    found = bounds.tpr_at(*gaussian(43, 4000, 4000, 1.5), fpr)
    assert found.tpr == pytest.approx(truth, abs=0.05)
    assert found.low <= truth <= found.high < found.low + 0.16


@pytest.mark.parametrize(("alpha", "most"), [(0.05, 0.37), (0.5, 0.22)])
def test_rate_limits_cover(alpha, most):
    found = [bounds.tpr_at(*gaussian(seed, 200, 300, 1.0), 0.1, alpha=alpha) for seed in range(250)]
    assert coverage(found, stats.norm.cdf(1 + stats.norm.ppf(0.1))) >= 1 - alpha - 4 * math.sqrt(alpha * (1 - alpha) / 250)
    assert np.mean([each.high - each.low for each in found]) <= most
    wrong = stats.norm.cdf(1 + stats.norm.ppf(0.1)) - 0.25
    assert coverage(found, wrong) <= 0.05


def test_rate_limits_cover_shared_rows_where_independent_cells_do_not():
    def once(seed, flat):
        random = np.random.default_rng(seed)
        members = random.random((12, 100)) < 0.5
        lift = 1.0 + 1.5 * random.normal(size=(12, 1)) + 0.3 * random.normal(size=100)
        scores = random.normal(size=members.shape) + lift * members
        return bounds.tpr_at(*((scores.ravel(), members.ravel()) if flat else (scores, members)), 0.1)

    truth = stats.norm.cdf((1 + stats.norm.ppf(0.1)) / math.sqrt(1 + 1.5**2 + 0.3**2))
    found = [once(seed, False) for seed in range(150)]
    assert coverage(found, truth) >= 0.93
    assert np.mean([each.high - each.low for each in found]) < 0.6
    assert coverage([once(seed, True) for seed in range(100)], truth) <= 0.7


def test_clusters_that_all_fall_alike_count_once():
    members = np.zeros((8, 20), bool)
    members[:, ::2] = True
    scores = members + np.random.default_rng(3).random((8, 20)) / 1000  # all members above all non-members
    found = bounds.tpr_at(scores, members, 0.5)
    assert (found.tpr, found.high) == (1, 1)
    assert found.low == pytest.approx(0.0125 ** (1 / 8), abs=1e-9)


def test_one_row_is_a_list():
    scores, members = tied(44, 200)
    for shape in ((1, 200), (200, 1)):
        grid = scores.reshape(shape), members.reshape(shape)
        assert bounds.auc(*grid) == bounds.auc(scores, members)
        assert bounds.tpr_at(*grid, 0.1) == bounds.tpr_at(scores, members, 0.1)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_what_passes_the_check():
    scores, members, counted = bounds.check_scores([1, 2, 2], [True, False, True])
    assert (scores.dtype, members.dtype, counted.dtype) == (np.float64, bool, bool)
    assert counted.all()
    np.testing.assert_array_equal(scores, [1, 2, 2])


HALF = np.arange(6) % 2 == 0


@pytest.mark.parametrize(
    ("scores", "members", "counted", "match"),
    [
        (np.arange(5.0), HALF, None, "shape"),
        (np.zeros((2, 3, 1)), np.zeros((2, 3, 1), bool), None, "scores must be"),
        (1.0, True, None, "scores must be"),
        (np.arange(6.0).reshape(2, 3), HALF, None, "shape"),
        (np.arange(6.0), HALF, np.ones(5, bool), "counted"),
        (np.arange(6.0), HALF, np.ones(6), "counted must be boolean"),
        (np.arange(6.0), HALF.astype(int), None, "members must be boolean"),
        (np.ones(6), HALF, None, "constant"),
        (np.arange(6.0), HALF, np.arange(6) == 2, "member"),
        (np.where(HALF, 1.0, 2.0), HALF, HALF, "member"),
        ([1, 2, 2, 2, 2, 2], HALF, np.arange(6) > 0, "constant"),
        ([0, 1, 2, 3, 4, NAN], HALF, None, "finite"),
        ([0, 1, 2, 3, 4, math.inf], HALF, None, "finite"),
        (np.arange(6.0), np.ones(6, bool), None, "member"),
        (np.arange(6.0), np.zeros(6, bool), None, "member"),
        (np.zeros(0), np.zeros(0, bool), None, "member"),
        (np.zeros((0, 3)), np.zeros((0, 3), bool), None, "member"),
    ],
)
def test_scores_that_make_no_sense(scores, members, counted, match):
    calls = [bounds.check_scores, bounds.auc, lambda *args, **how: bounds.tpr_at(*args, 0.1, **how)]
    for call in calls:
        with pytest.raises(BadInput, match=match):
            call(scores, members, counted=counted)
    if counted is None:
        with pytest.raises(BadInput, match=match):
            bounds.roc(scores, members)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 1.1, NAN])
def test_rates_outside_the_unit_interval(bad):
    with pytest.raises(BadInput, match="false-positive rate"):
        bounds.tpr_at(np.arange(6.0), HALF, bad)
    with pytest.raises(BadInput, match="alpha"):
        bounds.tpr_at(np.arange(6.0), HALF, 0.5, alpha=bad)
    with pytest.raises(BadInput, match="alpha"):
        bounds.auc(np.arange(6.0), HALF, alpha=bad)


def test_rank_correlation_by_hand():
    x, y = [1.0, 5.0, 2.0, 9.0, 3.0], [10.0, 30.0, 50.0, 40.0, 20.0]
    gaps = np.argsort(np.argsort(x)) - np.argsort(np.argsort(y))
    found, p = bounds.rank_correlation(x, y)
    assert found == pytest.approx(1 - 6 * (gaps**2).sum() / (5 * 24))
    assert 0 < p < 1
    assert bounds.rank_correlation([1, 2], [3, 4]) == (None, None)
    assert bounds.rank_correlation([1, 1, 1], [3, 4, 5]) == (None, None)
    with pytest.raises(BadInput, match="one length"):
        bounds.rank_correlation([1, 2, 3], [1, 2])
