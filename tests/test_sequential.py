"""The sequential quantile test against integrals of the likelihood ratio, all binary paths, and simulated ones."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate

from dememo_jax import bounds
from dememo_jax.errors import BadInput

NAN = float("nan")


def ratio(n, k, tail, *, below):
    """The likelihood ratio against P[exceeds] = tail, averaged over a uniform alternative by adaptive quadrature."""
    low, high = (0.0, tail) if below else (tail, 1.0)
    peak = [min(max(k / n, low), high)]

    def integrand(p):
        return (p / tail) ** k * ((1 - p) / (1 - tail)) ** (n - k)

    return integrate.quad(integrand, low, high, points=peak, epsabs=0, epsrel=1e-9)[0] / (high - low)


def evidence(exceeds, level, alpha, spare=0.0):
    """The e-values for "below" and "above" after every draw, by quadrature; the first spends just enough on k = 0."""
    tail, n_min = 1 - level, math.ceil(math.log(alpha * (1 - spare)) / math.log(level) - 1e-9)
    flat = ratio(n_min, 0, tail, below=True)
    weight = (1 / alpha - flat) / (level**-n_min - flat)
    below, above = [], []
    for n in range(1, len(exceeds) + 1):
        k = int(np.sum(exceeds[:n]))
        below.append(weight * (level**-n if k == 0 else 0.0) + (1 - weight) * ratio(n, k, tail, below=True))
        above.append(ratio(n, k, tail, below=False))
    return np.array(below), np.array(above)


def paths(p, count, length, seed):
    return np.random.default_rng(seed).random((count, length)) < p


# --- without an exceedance: the floor of any method --------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "shift", "alpha", "needed"),
    [
        (0.9, 0.25, 0.01, 71),
        (0.9, 0.5, 0.001, 182),
        (0.9, 2.0, 0.01, 8_920),
        (0.99, 0.25, 0.01, 921),
        (0.99, 0.5, 0.001, 2_931),
        (0.5, 0.0, 0.125, 3),  # level**n equals alpha to the last bit
        (0.5, 0.0, 0.5, 1),
        (0.75, 0.0, 0.421875, 3),
        (0.9, 0.0, 0.729, 3),  # and but for rounding
    ],
)
def test_zero_exceedances_stop_at_the_fewest_draws(q, shift, alpha, needed):
    level = q if shift == 0 else bounds.shifted_level(q, shift)
    found = bounds.quantile_test(np.zeros(needed + 20, bool), level, alpha)
    assert (found.verdict, found.stopped, found.draws_needed) == ("below", needed, needed)
    at = bounds.quantile_test(np.zeros(needed, bool), level, alpha)
    assert (at.verdict, at.stopped, at.exceedances) == ("below", needed, 0)
    assert at.log_evidence == pytest.approx(-math.log(alpha), abs=1e-9)  # reached, with nothing to spare
    early = bounds.quantile_test(np.zeros(needed - 1, bool), level, alpha)
    assert (early.verdict, early.stopped, early.draws, early.draws_needed) == ("undecided", None, needed - 1, needed)


def test_levels_that_round_to_one():
    tail = bounds.shifted_tail(0.99, 3.0)
    needed = bounds.min_draws(1 - tail, 0.5, tail=tail)
    found = bounds.quantile_test(np.zeros(1000, bool), 1.0, 0.5, tail=1e-3)
    assert (found.verdict, found.stopped) == ("below", math.ceil(math.log(2) / -math.log1p(-1e-3)))
    assert bounds.quantile_test(np.zeros(1000, bool), 1 - tail, 0.5, tail=tail).draws_needed == needed > 1_000_000
    never = bounds.quantile_test([False, True], 1.0, 0.01, tail=0.0)
    assert (never.verdict, never.stopped, never.draws, never.exceedances, never.draws_needed) == ("undecided", None, 2, 1, None)


# --- it is what it says it is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "alpha", "spare"), [(0.9, 0.05, 0.0), (0.7, 0.1, 0.0), (0.9, 0.05, 0.5), (0.6, 0.01, 0.2)])
def test_evidence_is_the_integral_of_the_likelihood_ratio(level, alpha, spare):
    for seed, p in enumerate((0.02, 1 - level, 0.6)):
        exceeds = paths(p, 1, 48, seed)[0]
        below, above = evidence(exceeds, level, alpha, spare)
        best = np.log(np.maximum.accumulate(below))
        for n in (1, 2, 7, 20, 33, 48):
            found = bounds.quantile_test(exceeds[:n], level, alpha, spare=spare)
            assert found.log_evidence == pytest.approx(best[n - 1], abs=1e-6)
            first = {name: np.flatnonzero(e[:n] >= 1 / alpha * (1 - 1e-9)) for name, e in (("below", below), ("above", above))}
            crossed = sorted((hits[0] + 1, name) for name, hits in first.items() if hits.size)
            assert (found.stopped, found.verdict) == (crossed[0] if crossed else (None, "undecided"))
            assert (found.draws, found.exceedances) == (n, exceeds[:n].sum())


@pytest.mark.slow
@pytest.mark.parametrize(("level", "alpha", "spare"), [(0.7, 0.2, 0.0), (0.7, 0.2, 0.6), (0.5, 0.125, 0.0)])
def test_errors_over_all_paths_are_at_most_alpha(level, alpha, spare):
    length = 10
    every = np.array(list(itertools.product((False, True), repeat=length)))
    verdicts = np.array([bounds.quantile_test(path, level, alpha, spare=spare).verdict for path in every])
    ones = every.sum(axis=1)

    def chance(verdict, p):
        return float(np.sum((p**ones * (1 - p) ** (length - ones))[verdicts == verdict]))

    tail = 1 - level
    assert 0.25 * alpha <= chance("below", tail) <= alpha * (1 + 1e-9)
    assert 0.25 * alpha <= chance("above", tail) <= alpha * (1 + 1e-9)
    aboves, belows = (
        [chance("above", tail * part) for part in (1, 0.8, 0.5)],
        [chance("below", tail + (1 - tail) * part) for part in (0, 0.2, 0.5)],
    )
    assert aboves == sorted(aboves, reverse=True)  # the boundary is the worst of each
    assert belows == sorted(belows, reverse=True)
    if not spare:  # the path without exceedances has nearly all of it
        assert chance("below", tail) >= level ** bounds.min_draws(level, alpha) * (1 - 1e-9)


# --- simulated: ever wrong, however often one looks --------------------------------------------------------------


def verdicts(p, count, length, seed, level, alpha, **how):
    return [bounds.quantile_test(path, level, alpha, **how) for path in paths(p, count, length, seed)]


@pytest.mark.parametrize("spare", [0.0, 0.5])
def test_ever_wrong_with_at_most_alpha(spare):
    level, alpha, runs = 0.9, 0.05, 1200
    limit = alpha + 4 * math.sqrt(alpha * (1 - alpha) / runs)
    found = verdicts(0.1, runs, 300, 11, level, alpha, spare=spare)
    shares = {name: np.mean([f.verdict == name for f in found]) for name in ("below", "above")}
    assert 0.01 <= shares["below"] <= limit
    assert shares["above"] <= limit
    worse = verdicts(0.15, 500, 300, 12, level, alpha, spare=spare)  # P[exceeds] > tail: "below" is wrong
    assert np.mean([f.verdict == "below" for f in worse]) <= 0.02
    better = verdicts(0.06, 500, 300, 13, level, alpha, spare=spare)  # P[exceeds] < tail: "above" is wrong
    assert np.mean([f.verdict == "above" for f in better]) <= 0.02


def test_power():
    low = verdicts(0.01, 100, 600, 14, 0.9, 0.01)
    assert all(f.verdict == "below" for f in low)
    clean = [f.stopped for f in low if f.stopped == 44]
    assert len(clean) == pytest.approx(100 * 0.99**44, abs=20)  # those without an exceedance in the first 44 draws
    high = verdicts(0.5, 100, 200, 15, 0.9, 0.01)
    assert all(f.verdict == "above" and f.stopped < 60 for f in high)


def test_verdicts_do_not_depend_on_when_one_looks():
    decided = set()
    for seed, p in enumerate((0.0, 0.01, 0.03, 0.1, 0.2, 0.5)):
        exceeds = paths(p, 1, 500, 20 + seed)[0]
        whole = bounds.quantile_test(exceeds, 0.9, 0.05)
        for n in list(range(1, 80, 3)) + [whole.stopped or 500, max(1, (whole.stopped or 500) - 1), 499]:
            part = bounds.quantile_test(exceeds[:n], 0.9, 0.05)
            if whole.stopped is not None and whole.stopped <= n:
                assert (part.verdict, part.stopped) == (whole.verdict, whole.stopped)
            else:
                assert (part.verdict, part.stopped) == ("undecided", None)
        decided.add(whole.verdict)
        reversed_later = np.concatenate([exceeds[: whole.stopped], ~exceeds[whole.stopped :]]) if whole.stopped else exceeds
        assert bounds.quantile_test(reversed_later, 0.9, 0.05).stopped == whole.stopped
    assert decided >= {"below", "above"}


def test_the_first_verdict_stands():
    high, low = np.ones(10, bool), np.zeros(600, bool)
    for exceeds, verdict in (((high, low), "above"), ((low[:60], np.ones(600, bool)), "below")):
        found = bounds.quantile_test(np.concatenate(exceeds), 0.9, 0.05)
        assert found.verdict == verdict
        assert found.stopped <= len(exceeds[0])
    found = bounds.quantile_test(np.concatenate([high, low]), 0.9, 0.05)
    assert found.log_evidence > -np.log(0.05)  # "below" crossed too, but later


def test_spare_buys_runs_with_exceedances():
    stops = {}
    for spare in (0.0, 0.1, 0.5, 0.8):
        needed = bounds.min_draws(0.9, 0.01 * (1 - spare))
        clean = bounds.quantile_test(np.zeros(200, bool), 0.9, 0.01, spare=spare)
        assert (clean.stopped, clean.draws_needed) == (needed, needed)
        assert bounds.quantile_test(np.zeros(needed - 1, bool), 0.9, 0.01, spare=spare).verdict == "undecided"
        stops[spare] = bounds.quantile_test(np.arange(400) == 5, 0.9, 0.01, spare=spare).stopped
    assert stops[0.8] <= stops[0.5] < stops[0.1] < stops[0.0]
    assert bounds.min_draws(0.9, 0.01 * 0.5) < stops[0.5] < 150


def test_the_fewest_draws_of_a_large_spare():
    found = bounds.quantile_test(np.zeros(200, bool), 0.9, 0.01, spare=0.9)
    assert found.stopped == found.draws_needed


def test_no_draws_decide_nothing():
    found = bounds.quantile_test([], 0.9, 0.05)
    assert (found.verdict, found.stopped, found.draws, found.exceedances, found.draws_needed) == ("undecided", None, 0, 0, 29)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 1.1, NAN])
def test_what_is_refused(bad):
    with pytest.raises(BadInput, match="level"):
        bounds.quantile_test([False], bad, 0.1)
    with pytest.raises(BadInput, match="alpha"):
        bounds.quantile_test([False], 0.9, bad)
    if bad != 0.0:
        with pytest.raises(BadInput, match="spare"):
            bounds.quantile_test([False], 0.9, 0.1, spare=bad)
        with pytest.raises(BadInput, match="tail"):
            bounds.quantile_test([False], 0.9, 0.1, tail=bad)
