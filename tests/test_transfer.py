"""Transfer, coverage, plans and answers in worlds of one Gaussian direction, where every probability is known."""

import itertools
import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy import stats

from dememo_jax import bounds, certify, tree
from dememo_jax.errors import BadInput

PHI, Z, NAN = stats.norm.cdf, stats.norm.ppf, float("nan")
SIGMA, Q = 0.5, 0.9


def world(scores, sigma=SIGMA, groups=("all",), **more):
    scores = np.asarray(scores, np.float64)
    return certify.Draws(scores.reshape(len(scores), len(groups)), groups, sigma, **more)


def around(centre, draws, random):
    """Draws of the score u.(theta + kappa), where u.theta = centre."""
    return world(centre + SIGMA * random.normal(size=draws))


def grid(count, sigma=SIGMA):
    """Draws that lie as a Gaussian's quantiles do: the certificate without luck."""
    return world(sigma * Z((np.arange(count) + 0.5) / count))


def zeta_of(mu, epsilon):
    return float(PHI(-epsilon / mu + mu / 2) - math.exp(epsilon) * PHI(-epsilon / mu - mu / 2))


def misses_at_most(misses, alpha, runs):
    assert misses / runs <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / runs)


# --- the ball ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "published"), [(0.25, 0.849), (0.5, 0.783), (1.0, 0.611), (2.0, 0.236)])
def test_the_ball_pays_for_distance_and_attack_where_the_published_form_does_not(shift, published):
    eta = shift * SIGMA
    draws = grid(200_000)
    how = {"eta": (eta,), "epsilon": 1.0, "zeta": 1e-5, "q": Q}
    paper = certify.transfer_ball(draws, [eta] * 100, form="published", **how).certificate.rows[0]
    assert PHI((paper.upper - 2 * eta) / SIGMA) == pytest.approx(published, abs=0.03)  # nominal 0.9, at distance 2 eta
    assert paper.eta == eta
    if shift < 2:
        ours = certify.transfer_ball(draws, [eta] * 100, radius=eta, **how).certificate.rows[0]
        assert Q <= PHI((ours.upper - 2 * eta) / SIGMA) <= Q + 0.02
        assert Q <= PHI((2 * eta - ours.lower - 4 * eta) / SIGMA) <= Q + 0.02  # centre at -2 eta, seen from below
        assert (ours.eta, ours.shift) == (eta, pytest.approx(2 * shift))
        alone = certify.bound(draws, eta=(2 * eta,), q=Q).rows[0]
        assert (ours.upper, ours.lower, ours.level) == (alone.upper, alone.lower, alone.level)


def test_bounds_of_the_ball_hold_with_their_confidence():
    random, runs, radius, eta, misses = np.random.default_rng(1), 500, 0.1, 0.15, 0
    for _ in range(runs):
        found = certify.transfer_ball(around(0.0, 160, random), [0.05], radius=radius, eta=(eta,), epsilon=0.1, zeta=0.0,
                                      q=Q, alpha=0.1, side="upper")  # fmt: skip
        misses += PHI((found.certificate.rows[0].upper - radius - eta) / SIGMA) < Q
    misses_at_most(misses, 0.1, runs)
    assert misses > 0.02 * runs  # and without waste


def test_probability_of_the_ball_at_the_numbers_of_a_hundred_runs():
    draws = grid(2000)
    for epsilon, both, paper in ((0.5, 0.926, 0.579), (1.0, 0.878, 0.351), (3.0, 0.096, 0.048)):
        how = {"eta": (0.1,), "epsilon": epsilon, "zeta": 1e-5}
        ours = certify.transfer_ball(draws, np.full(100, 0.2), radius=0.2, **how)
        assert (ours.form, ours.successes, ours.references) == ("ball", 100, 100)
        assert ours.reference_probability == pytest.approx(0.955, abs=5e-4)
        assert ours.probability == pytest.approx(both, abs=6e-4)
        assert ours.confidence == pytest.approx(0.98)
        published = certify.transfer_ball(draws, np.full(100, 0.1), form="published", **how)
        assert published.form == "published"
        assert published.probability == pytest.approx(paper, abs=6e-4)
    assert ours.certificate.largest_eta[0] == pytest.approx(bounds.max_shift(2000, Q, 0.005) * SIGMA - 0.2)
    some = certify.transfer_ball(draws, [0.0, 0.2, 0.21, math.inf], radius=0.2, alpha=0.02, alpha_reference=0.03, **how)
    assert (some.successes, some.references, some.confidence) == (2, 4, pytest.approx(0.95))


def test_probability_of_the_ball_holds_end_to_end():
    random, runs, mu, radius, references = np.random.default_rng(2), 400, 0.5, 2.5, 80
    truth = PHI(radius - mu) - PHI(-radius - mu)  # reference N(0, 1), unlearned N(mu, 1)
    draws, stated = grid(2000), []
    for _ in range(runs):
        found = certify.transfer_ball(draws, abs(random.normal(size=references)), radius=radius, eta=(0.1,), epsilon=0.5,
                                      zeta=zeta_of(mu, 0.5), q=0.5, alpha_reference=0.1)  # fmt: skip
        stated.append(found.probability)
    misses_at_most(sum(p > truth for p in stated), 0.1, runs)
    assert max(stated) > truth - 0.15


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"radius": None}, "radius"),
        ({"radius": 0.0}, "radius"),
        ({"radius": NAN}, "radius"),
        ({"radius": 0.1, "form": "published"}, "published"),
        ({"form": "published", "eta": (0.1, 0.2), "radius": None}, "published"),
        ({"form": "other"}, "form"),
        ({"distances": []}, "distances"),
        ({"distances": [-0.1]}, "distances"),
        ({"distances": [NAN]}, "distances"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"zeta": 1.0}, "zeta"),
        ({"alpha_reference": 0.0}, "alpha"),
        ({"eta": (-0.3,)}, "eta"),
        ({"eta": (NAN,)}, "eta"),
        ({"uniform": 2.0}, "uniform"),
    ],
)
def test_balls_that_are_refused(how, match):
    how = {"distances": [0.1], "radius": 0.2, "eta": (0.1,), "epsilon": 1.0, "zeta": 0.0} | how
    with pytest.raises(BadInput, match=match):
        certify.transfer_ball(grid(100), how.pop("distances"), **how)


def test_negative_attacks_do_not_shrink_the_ball():
    with pytest.raises(BadInput, match="eta"):
        certify.transfer_ball(grid(100), [0.1], radius=0.2, eta=(-0.1,), epsilon=1.0, zeta=0.0)


def test_a_ball_too_large_for_the_draws_leaves_no_eta():
    found = certify.transfer_ball(grid(200), [0.1], radius=5.0, eta=(0.1,), epsilon=1.0, zeta=0.0)
    assert found.certificate.rows[0].upper is None
    assert found.certificate.largest_eta == (None,)


# --- the event ---------------------------------------------------------------------------------------------------

ETA, MU = 0.1, 0.7


def row_of(centre, draws, alpha, random, eta=ETA):
    return certify.bound(around(centre, draws, random), eta=(eta,), q=Q, alpha=alpha, side="upper").rows[0]


def bound_of(theta):
    """The bound of a model at theta with endless draws: it is at most tau for theta at most tau less this."""
    return theta + ETA + SIGMA * Z(Q)


@pytest.fixture(scope="module")
def template():
    return row_of(0.0, 300, 1e-9 + 0.01, np.random.default_rng(0))


def exact_rows(template, thetas):
    return [replace(template, upper=float(bound_of(theta)), alpha=1e-9) for theta in thetas]


def test_events_hold_end_to_end():
    random, runs, references, tau = np.random.default_rng(3), 60, 25, bound_of(1.2)
    truth = PHI(1.2 - MU)  # of the unlearned model's true bound, at most tau: the half-line attains mu-GDP
    confidence = 1 - 0.05 - references * 0.002
    gdp, event = [], []
    for _ in range(runs):
        rows = [row_of(theta, 250, 0.002, random) for theta in random.normal(size=references)]
        a = certify.transfer_gdp(rows, tau=tau, mu=MU, alpha_reference=0.05)
        b = certify.transfer_event(rows, tau=tau, epsilon=0.8, zeta=zeta_of(MU, 0.8), alpha_reference=0.05)
        assert a.confidence == b.confidence == pytest.approx(confidence)
        assert a.successes == sum(row.upper <= tau for row in rows)
        assert b.probability <= a.probability + 1e-12
        gdp.append(a.probability)
        event.append(b.probability)
    misses_at_most(sum(p > truth for p in gdp), 1 - confidence, runs)
    misses_at_most(sum(p > truth for p in event), 1 - confidence, runs)
    assert np.mean(gdp) > 0.1  # far from nothing, though few references and their noise cost much
    assert (certify.transfer_gdp(rows, tau=tau, mu=MU).form, b.form) == ("gdp", "event")


def test_randomized_limits_make_the_stated_confidence_exact(template):
    random, runs, references, alpha, tau = np.random.default_rng(4), 800, 30, 0.2, bound_of(1.0)
    truth, misses, plain = PHI(1.0 - MU), 0, 0
    for _ in range(runs):
        rows = exact_rows(template, random.normal(size=references))
        how = {"tau": tau, "mu": MU, "alpha_reference": alpha}
        misses += certify.transfer_gdp(rows, uniform=random.random(), **how).probability > truth
        plain += certify.transfer_gdp(rows, **how).probability > truth
    slack = 4 * math.sqrt(alpha * (1 - alpha) / runs)
    assert alpha - slack <= misses / runs <= alpha + slack
    assert plain <= misses


def test_events_are_tight_where_the_density_ratio_is_e_to_the_epsilon(template):
    epsilon = 0.8
    edge = epsilon / MU + MU / 2  # there (epsilon, zeta) and mu-GDP say the same about theta <= edge
    rows = exact_rows(template, np.random.default_rng(5).normal(size=20_000))
    how = {"epsilon": epsilon, "zeta": zeta_of(MU, epsilon), "tau": bound_of(edge)}
    assert PHI(edge - MU) - 0.03 <= certify.transfer_event(rows, **how).probability <= PHI(edge - MU)
    assert PHI(edge - MU) - 0.03 <= certify.transfer_gdp(rows, tau=bound_of(edge), mu=MU).probability <= PHI(edge - MU)


def test_rows_and_answers_say_the_same():
    random, tau = np.random.default_rng(6), 1.2
    clouds = [around(centre, 300, random) for centre in [0.0] * 8 + [2.0] * 2]
    rows = [certify.bound(draws, eta=(ETA,), q=Q, alpha=0.01, side="upper").rows[0] for draws in clouds]
    found = [certify.answers(draws, tau=tau, eta=(ETA,), q=Q, alpha=0.01)[0] for draws in clouds]
    assert [a.verdict for a in found] == ["below"] * 8 + ["above"] * 2
    how = {"tau": tau, "epsilon": 0.1, "zeta": 0.0}
    by_rows, by_answers = certify.transfer_event(rows, **how), certify.transfer_event(found, **how)
    assert by_rows == by_answers
    assert (by_rows.successes, by_rows.references) == (8, 10)
    assert by_rows.confidence == pytest.approx(1 - 0.01 - 10 * 0.01)
    assert by_rows.reference_probability == bounds.clopper_pearson(8, 10, 0.01, side="lower")[0]
    assert certify.transfer_event(found, tau=tau - 0.1, epsilon=0.1, zeta=0.0).successes == 0  # asked at a larger tau
    assert certify.transfer_event(found, tau=tau + 0.1, epsilon=0.1, zeta=0.0).successes == 8
    assert certify.transfer_event([*rows[:5], *found[5:]], **how) == by_rows


def test_abstentions_count_against(template):
    silent = certify.bound(world(np.zeros(50)), eta=(ETA,), q=Q, side="upper").rows[0]
    undecided = certify.answers(world(np.zeros(20)), tau=9.0, eta=(ETA,), q=Q)[0]
    assert silent.upper is None
    assert undecided.verdict == "undecided"
    for abstaining in (silent, undecided):
        found = certify.transfer_event([template, template, abstaining], tau=99.0, epsilon=0.0, zeta=0.0)
        assert (found.successes, found.references) == (2, 3)
        assert found.confidence == pytest.approx(1 - 0.01 - 2 * template.alpha - abstaining.alpha)


def test_events_that_are_refused(template):
    how = {"tau": 1.0, "epsilon": 1.0, "zeta": 0.0}
    for other in ({"eta": 0.2}, {"q": 0.8}, {"group": "forget"}):
        with pytest.raises(BadInput, match="one group, q and eta"):
            certify.transfer_event([template, replace(template, **other)], **how)
    for other, match in (({"sigma": 0.2}, "sigma"), ({"fingerprint": (("data", "other"),)}, "data")):
        with pytest.raises(BadInput, match=match):
            certify.transfer_event([template, replace(template, **other)], **how)
    with pytest.raises(BadInput, match="at least one"):
        certify.transfer_event([], **how)
    with pytest.raises(BadInput, match="confidence"):
        certify.transfer_gdp([replace(template, alpha=0.1)] * 10, tau=1.0, mu=1.0)
    with pytest.raises(BadInput, match="mu"):
        certify.transfer_gdp([template], tau=1.0, mu=-1.0)
    with pytest.raises(BadInput, match="zeta"):
        certify.transfer_event([template], tau=1.0, epsilon=1.0, zeta=-0.1)


def total(params, data):
    return (params["w"] + data).sum(keepdims=True)


def test_rows_of_other_noise_data_or_metric_are_no_event():
    def certified(sigma=0.5, data=1.0, name="mean", ask=False):
        source = certify.cloud_of(total, {"w": np.zeros(2, np.float32)}, np.full(2, data, np.float32), jax.random.key(0),
                                  groups=("all",), sigma=sigma, name=name)  # fmt: skip
        draws = certify.draw(source, draws=150)
        return (certify.answers(draws, tau=50.0, eta=(0.1,)) if ask else certify.bound(draws, eta=(0.1,)).rows)[0]

    how = {"tau": 50.0, "epsilon": 1.0, "zeta": 0.0}
    assert "standard deviation 0.5" in certify.transfer_event([certified(), certified()], **how).statement
    for other, match in (({"sigma": 1.0}, "noise"), ({"data": 2.0}, "data"), ({"name": "other"}, "metric")):
        for ask in (False, True):
            with pytest.raises(BadInput, match=match):
                certify.transfer_gdp([certified(ask=ask), certified(ask=ask, **other)], tau=50.0, mu=1.0)


def test_rows_from_a_subset_of_the_images_cost_the_limits_too():
    draws = world(np.full(400, 0.125), images=((800, 10_000),))
    certificate = certify.bound(draws, eta=(ETA,), q=Q, alpha=0.02, side="upper")
    answer = certify.answers(draws, tau=0.5, eta=(ETA,), q=Q, alpha=0.02)[0]
    assert certificate.rows[0].upper <= 0.5
    for row in (certificate.rows[0], answer):
        found = certify.transfer_event([row], tau=0.5, epsilon=1.0, zeta=0.0, alpha_reference=0.01)
        assert found.confidence <= 1 - 0.01 - 0.02 + 1e-12


# --- the attack --------------------------------------------------------------------------------------------------


def test_attack_holds_with_its_confidence_and_is_tight():
    random, runs, references, alpha, epsilon = np.random.default_rng(7), 1500, 400, 0.1, 0.8
    edge = epsilon / MU + MU / 2
    truth = PHI(MU - edge)  # the attack adds a constant to theta; unlearned N(mu, 1)
    how = {"threshold": edge + 3, "epsilon": epsilon, "zeta": zeta_of(MU, epsilon), "alpha": alpha}
    found = [certify.transfer_attack(3 + random.normal(size=references), **how) for _ in range(runs)]
    misses = sum(one.probability < truth for one in found)
    misses_at_most(misses, alpha, runs)
    assert misses > 0.03 * runs
    exact = sum(
        certify.transfer_attack(3 + random.normal(size=100), uniform=random.random(), **how).probability < truth
        for _ in range(800)
    )
    assert exact / 800 == pytest.approx(alpha, abs=4 * math.sqrt(alpha * (1 - alpha) / 800))
    large = certify.transfer_attack(3 + random.normal(size=100_000), **how)
    assert truth <= large.probability <= truth + 0.02
    assert (large.form, large.references, large.confidence) == ("attack", 100_000, pytest.approx(0.9))


def test_attack_counts_what_exceeds_the_threshold():
    scores = [0.1, 0.2, 0.2, 0.3, 0.9]
    found = certify.transfer_attack(scores, threshold=0.2, epsilon=0.0, zeta=0.0)
    assert found.successes == 2
    assert found.probability == bounds.clopper_pearson(2, 5, 0.01, side="upper")[1]
    clean = certify.transfer_attack(np.zeros(1000), threshold=0.5, epsilon=0.5, zeta=1e-3)
    assert clean.probability == pytest.approx(math.exp(0.5) * (1 - 0.01 ** (1 / 1000)) + 1e-3)
    for bad in ([], [0.1, NAN], [math.inf]):
        with pytest.raises(BadInput, match="scores"):
            certify.transfer_attack(bad, threshold=0.5, epsilon=1.0, zeta=0.0)
    with pytest.raises(BadInput, match="alpha"):
        certify.transfer_attack([0.1], threshold=0.5, epsilon=1.0, zeta=0.0, alpha=0.0)


def test_attack_threshold_must_be_a_number():
    with pytest.raises(BadInput, match="threshold"):
        certify.transfer_attack([0.9] * 10, threshold=NAN, epsilon=0.1, zeta=0.0)


# --- how far other weights lie -----------------------------------------------------------------------------------


def trees():
    random = np.random.default_rng(8)
    shapes = {"conv": {"w": (3, 4)}, "dense": {"b": (5,), "w": (4, 5)}}
    one = {a: {b: random.normal(size=s).astype(np.float32) for b, s in leaf.items()} for a, leaf in shapes.items()}
    two = {a: {b: w + 0.1 * random.normal(size=w.shape).astype(np.float32) for b, w in leaf.items()} for a, leaf in one.items()}
    return one, two


def length(one, two, scale=lambda name: 1.0):
    parts = {f"{a}/{b}": two[a][b].astype(np.float64) - one[a][b] for a in one for b in one[a]}
    return math.sqrt(sum(float(np.sum((move / scale(name)) ** 2)) for name, move in parts.items()))


def held(eta):
    """A certificate at sigma 0.2 and q 0.8 that has its bounds up to eta."""
    depth = certify.bound(replace(grid(100, 0.2), sigma=0.2), eta=(0.01,), q=0.8)
    return replace(depth, rows=tuple(replace(row, eta=eta) for row in depth.rows))


def test_rows_that_abstained_cover_nothing():
    one = {"w": np.zeros(3, np.float32)}
    far, near = {"w": np.full(3, 0.5, np.float32)}, {"w": np.full(3, 0.01, np.float32)}
    draws = replace(grid(300, 0.1), sigma=0.1)
    depth = certify.bound(draws, eta=(0.05, 1.0))
    assert [row.upper is None for row in depth.rows] == [False, True]
    found = certify.coverage(one, {"far": far, "near": near}, sigma=0.1, certificate=depth)
    assert [each.covered for each in found] == [False, True]
    assert [each.beyond for each in found] == pytest.approx([0.5 * math.sqrt(3) - 0.05, 0.0])
    silent = certify.coverage(one, {"same": one}, sigma=0.1, certificate=certify.bound(draws, eta=(1.0,)))[0]
    assert not silent.covered
    said = certify.coverage(one, {"same": one}, sigma=0.1)[0]
    assert (said.covered, said.beyond, said.distance) == (None, None, 0.0)
    for bad, match in (({"sigma": 0.2}, "sigma"), ({"sigma": 0.1, "q": 0.8}, "q = 0.8")):
        with pytest.raises(BadInput, match=match):
            certify.coverage(one, {"far": far}, certificate=depth, **bad)


def test_coverage_is_the_distance_in_units_of_eta():
    one, two = trees()
    far = length(one, two)
    near, same = certify.coverage(one, {"near": two, "same": one}, sigma=0.2, certificate=held(far * 1.01), q=0.8, alpha=0.05)
    assert (near.name, near.covered, near.beyond) == ("near", True, 0.0)
    assert (near.distance, near.l2, near.shift) == pytest.approx((far, far, far / 0.2))
    assert near.draws_needed == bounds.min_draws(bounds.shifted_level(0.8, near.shift), 0.05)
    assert (same.distance, same.covered, same.draws_needed) == (0.0, True, bounds.min_draws(0.8, 0.05))
    out = certify.coverage(one, {"out": two}, sigma=0.2, certificate=held(far * 0.75), q=0.8)[0]
    assert not out.covered
    assert out.beyond == pytest.approx(far * 0.25)
    run = certify.coverage(one, {"run": trees()[1]}, sigma=far / 50)[0]
    assert run.shift == pytest.approx(50)
    assert run.draws_needed is None  # no float64 count covers an independent run


def test_coverage_with_scales_of_their_own():
    one, two = trees()
    scales = tree.scales(one, 0.3, relative=True)
    flat = {f"{a}/{b}": float(scales[a][b]) for a in scales for b in scales[a]}
    assert len(set(flat.values())) == 3
    found = certify.coverage(one, {"two": two}, sigma=scales)[0]
    assert (found.distance, found.shift) == pytest.approx((length(one, two, flat.get),) * 2)
    assert found.l2 == pytest.approx(length(one, two))


def test_coverage_of_some_leaves_only():
    one, two = trees()
    fixed = {"conv": one["conv"], "dense": two["dense"]}
    found = certify.coverage(one, {"held": fixed, "all": two}, sigma=0.2, certificate=held(100.0), q=0.8, only="dense")
    assert found[0].distance == found[0].l2 == pytest.approx(length(one, fixed))
    assert found[0].covered
    assert (found[1].distance, found[1].shift, found[1].beyond) == (math.inf,) * 3
    assert (found[1].covered, found[1].draws_needed) == (False, None)
    assert found[1].l2 == pytest.approx(length(one, two))
    zero = tree.scales(one, 0.2, only="dense/w")
    one_leaf = {**one, "dense": {**one["dense"], "w": two["dense"]["w"]}}
    by_tree = certify.coverage(one, {"all": two, "one leaf": one_leaf}, sigma=zero)
    assert [math.isinf(c.distance) for c in by_tree] == [True, False]


def test_a_cloud_that_is_covered_is_bounded_there():
    direction = {"a": np.array([0.6, -0.3]), "b": np.array([0.5])}  # score = direction . theta
    scales = {"a": 0.2, "b": 0.05}
    spread = math.sqrt(sum(float(np.sum((direction[k] * scales[k]) ** 2)) for k in scales))
    centre, shift = {"a": np.zeros(2), "b": np.zeros(1)}, 0.8
    worst = {k: shift * scales[k] ** 2 * direction[k] / spread for k in scales}
    depth = certify.bound(replace(grid(20_000, spread), sigma=None), eta=(shift + 1e-9,), q=Q, side="upper")
    lying, row = certify.coverage(centre, {"worst": worst}, sigma=scales, certificate=depth, q=Q)[0], depth.rows[0]
    assert lying.covered
    assert lying.shift == pytest.approx(shift)
    moved = sum(float(direction[k] @ worst[k]) for k in scales)
    assert Q <= PHI((row.upper - moved) / spread) <= Q + 0.02


def test_coverage_refuses_other_structures():
    one, two = trees()
    for other in ({"conv": two["conv"]}, {**two, "dense": {**two["dense"], "b": np.zeros(4)}}, {**two, "more": np.zeros(1)}):
        with pytest.raises(BadInput, match="structure"):
            certify.coverage(one, {"other": other}, sigma=0.2)
    with pytest.raises(BadInput, match="no leaf"):
        certify.coverage(one, {"two": two}, sigma=0.2, only="norm")


@pytest.mark.parametrize("sigma", [-0.2, 0.0, {"conv": {"w": 0.2}, "dense": {"b": 0.2}}])
def test_coverage_refuses_scales_that_are_none(sigma):
    one, two = trees()
    with pytest.raises(BadInput, match=r"sigma|scale"):
        certify.coverage(one, {"two": two}, sigma=sigma)


# --- plans -------------------------------------------------------------------------------------------------------

ALONE = {"side": "upper", "simultaneous": False, "groups": 1}


@pytest.mark.parametrize(
    ("alpha", "q", "expected"),
    [
        (0.01, 0.9, (71, 121, 407, 8_920)),
        (0.01, 0.99, (921, 1_954, 10_465, 607_533)),
        (0.001, 0.9, (107, 182, 611, 13_379)),
        (0.001, 0.99, (1_381, 2_931, 15_698, 911_299)),
    ],
)
def test_plans_of_the_first_table(alpha, q, expected):
    found = certify.plan(sigma=0.25, eta=np.array([0.25, 0.5, 1, 2]) * 0.25, q=q, alpha=alpha, **ALONE)
    assert tuple(row.needed for row in found.rows) == expected
    assert found.draws_needed == max(expected)
    assert (found.draws, found.certified, found.largest_eta, found.seconds) == (None, None, (), None)


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
def test_plans_of_the_second_table(n, alpha, expected):
    qs = (0.5, 0.7, 0.9, 0.95, 0.99)
    found = certify.plan(sigma=2.0, eta=(0.1,), q=qs, alpha=alpha, draws=n, **ALONE)
    for q, largest, shift in zip(qs, found.largest_eta, expected):
        if shift is None:
            assert largest is None
        else:
            assert largest / 2 == pytest.approx(shift, abs=5.1e-3 if q < 0.9 else 5.1e-4)
    scaled = certify.plan(sigma=None, eta=(0.1,), q=qs, alpha=alpha, draws=n, **ALONE)
    assert scaled.largest_eta[1] * 2 == pytest.approx(found.largest_eta[1])
    assert scaled.radius != found.radius


def test_plans_split_alpha_over_every_statement():
    shifts = (0.25, 0.5, 1.0, 2.0)
    for many, expected in ((10, (107, 182, 611, 13_379)), (26, (122, 207, 695, 15_230)), (100, (142, 242, 814, 17_839))):
        for shift, needed in zip(shifts, expected):
            assert certify.plan(sigma=1.0, eta=(shift,), groups=many, side="upper").draws_needed == needed
            assert certify.plan(sigma=1.0, eta=(shift,), groups=many // 2, side="both").draws_needed == needed
    pue = certify.plan(sigma=1.0, eta=np.linspace(0.1, 2, 26), draws=1000, side="upper")
    assert pue.largest_eta[0] == pytest.approx(1.135, abs=5e-4)
    assert pue.certified == sum(np.linspace(0.1, 2, 26) <= pue.largest_eta[0])
    half = certify.plan(sigma=1.0, eta=(0.5,), alpha=0.02, subset=True, **ALONE)
    assert (half.draws_needed, half.rows[0].alpha) == (121, 0.01)


def test_plans_and_certificates_agree():
    for side in ("upper", "lower", "both"):
        asked = {"eta": (0.3, 0.6), "q": (0.8, 0.95), "alpha": 0.02, "side": side}
        planned = certify.plan(sigma=SIGMA, groups=2, draws=150, **asked)
        bounded = certify.bound(world(np.zeros((150, 2)), groups=("a", "b")), **asked)
        assert [r.draws_needed for r in bounded.rows] == 2 * [r.needed for r in planned.rows]
        done = [r.reason is None for r in bounded.rows]
        assert done == 2 * [r.needed <= 150 for r in planned.rows]
        assert 0 < sum(done) / 2 == planned.certified < 4
        assert bounded.largest_eta == planned.largest_eta


def test_plans_refuse_and_time():
    how = {"sigma": 1.0, "eta": (1.0, 2.0), "alpha": 0.01, **ALONE}
    with pytest.raises(BadInput, match=r"406 draws.*407 would do"):
        certify.plan(draws=406, refuse=True, **how)
    with pytest.raises(BadInput, match="no count would do"):
        certify.plan(draws=10**6, refuse=True, **(how | {"eta": (60.0,)}))
    found = certify.plan(draws=407, refuse=True, seconds_per_draw=0.5, **how)
    assert (found.certified, found.draws_needed, found.seconds, found.seconds_needed) == (1, 8_920, 203.5, 4460.0)
    assert certify.plan(draws=406, **how).certified == 0
    never = certify.plan(draws=407, seconds_per_draw=0.5, **(how | {"eta": (1.0, 60.0)}))
    assert (never.certified, never.draws_needed, never.seconds, never.seconds_needed) == (1, None, 203.5, None)
    wrong = {"sigma": 0.0, "eta": (0.0,), "q": 1.0, "alpha": 0.0, "draws": 0, "side": "left", "form": "x"}
    for bad in [{name: value} for name, value in wrong.items()] + [{"eta": ()}]:
        with pytest.raises(BadInput, match=next(iter(bad))):
            certify.plan(**(how | bad))


# --- answers -----------------------------------------------------------------------------------------------------


def test_answers_are_the_test_of_every_row_at_its_share_of_alpha():
    random = np.random.default_rng(9)
    draws = world(SIGMA * random.normal(size=(400, 2)) + [0.0, 0.4], groups=("retain", "forget"))
    found = certify.answers(draws, tau=1.0, eta=(0.05, 0.2), q=(0.7, 0.9), alpha=0.02)
    asked = [(g, q, eta) for g in ("retain", "forget") for q in (0.7, 0.9) for eta in (0.05, 0.2)]
    assert [(a.group, a.q, a.eta) for a in found] == asked
    for a in found:
        column = draws.scores[:, draws.groups.index(a.group)]
        test = bounds.quantile_test(column > 1.0, bounds.shifted_level(a.q, a.eta / SIGMA), 0.02 / 8)
        assert (a.verdict, a.stopped, a.exceedances, a.draws_needed) == (
            test.verdict, test.stopped, test.exceedances, test.draws_needed)  # fmt: skip
        assert (a.tau, a.alpha, a.draws) == (1.0, 0.0025, 400)
    assert len({a.verdict for a in found}) > 1
    assert all(a.alpha == 0.02 for a in certify.answers(draws, tau=1.0, eta=(0.05, 0.2), alpha=0.02, simultaneous=False))
    fewer = certify.answers(world(np.zeros(100)), tau=1.0, eta=(0.1,), alpha=0.02, spare=0.5)[0]
    assert fewer.stopped == bounds.min_draws(bounds.shifted_level(0.9, 0.2), 0.01)


def test_answers_at_tau_itself_are_below():
    assert certify.answers(world(np.full(200, 0.5)), tau=0.5, eta=(0.1,))[0].exceedances == 0
    assert certify.answers(world(np.full(200, 0.5)), tau=0.5 - 1e-9, eta=(0.1,))[0].verdict == "above"


def test_answers_are_wrong_with_at_most_alpha():
    random, runs, alpha, eta = np.random.default_rng(10), 500, 0.1, 0.1
    edge = eta + SIGMA * Z(Q)  # the bound with endless draws
    found = {shift: [] for shift in (-0.02, 0.02)}
    for shift in found:
        for _ in range(runs):
            draws = around(0.0, 120, random)
            found[shift].append(certify.answers(draws, tau=edge + shift, eta=(eta,), q=Q, alpha=alpha)[0].verdict)
    misses_at_most(found[-0.02].count("below"), alpha, runs)
    misses_at_most(found[0.02].count("above"), alpha, runs)
    assert found[-0.02].count("below") > 0.01 * runs


def test_answers_from_a_subset_of_the_images():
    draws = world(np.full(300, 0.1), images=((1000, 10_000),))
    # Of draws 255 .. 510 all together 1 / 90 of the half of alpha that pays for images.
    limit = bounds.hypergeometric_limits([100], 1000, 10_000, 0.005 / 90 / 256)[1][0]
    how = {"eta": (0.1,), "alpha": 0.01}
    below, above = (certify.answers(draws, tau=limit + move, **how)[0] for move in (1e-6, -1e-6))
    assert (below.verdict, below.exceedances) == ("below", 0)
    assert below.stopped == bounds.min_draws(bounds.shifted_level(0.9, 0.2), 0.005)  # half of alpha pays for the limits
    assert above.exceedances == 300 - 255
    whole = world(np.full(300, 0.1), images=((1000, 1000),))
    assert certify.answers(whole, tau=0.1, eta=(0.1,))[0].verdict == "below"


def test_looks_at_a_subset_of_the_images_share_one_chance_of_failing():
    random = np.random.default_rng(11)
    draws = world(random.integers(0, 60, 300) / 100, images=((100, 1000),))
    how = {"tau": 0.5, "eta": (0.1,), "q": 0.5}
    looks = [replace(draws, scores=draws.scores[:count]) for count in (50, 120, 300)]
    found = [certify.answers(look, **how)[0] for look in looks]
    for earlier, later in itertools.pairwise(found):  # what was said stays, however many draws follow
        assert earlier.verdict == "undecided" or (later.verdict, later.stopped) == (earlier.verdict, earlier.stopped)
    rest = certify.answers(replace(looks[1], scores=looks[1].scores[50:], start=50), **how)[0]
    assert found[0].exceedances + rest.exceedances == found[1].exceedances  # a draw's limit depends on its number alone
    paid = np.concatenate([np.full(2**k, 1 / ((k + 1) * (k + 2)) / 2**k) for k in range(20)])
    assert certify.question._image_betas(draws) == pytest.approx(paid[:300])
    assert paid.sum() == pytest.approx(1 - 1 / 21)


def test_answers_refuse():
    draws = world(np.zeros(10))
    for bad in ({"tau": NAN}, {"tau": math.inf}, {"eta": ()}, {"q": 0.0}, {"alpha": 1.0}, {"spare": 1.0}):
        with pytest.raises(BadInput, match=next(iter(bad))):
            certify.answers(draws, **({"tau": 1.0, "eta": (0.1,)} | bad))
    with pytest.raises(BadInput, match="draws"):
        certify.answers(world(np.zeros((0, 1))), tau=1.0, eta=(0.1,))


def test_answers_refuse_scores_that_are_no_numbers():
    with pytest.raises(BadInput, match="finite"):
        certify.answers(world(np.full(200, NAN)), tau=1.0, eta=(0.1,))
