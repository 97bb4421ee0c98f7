"""Certified heads against naive float64 minimisers, exact Gaussian trade-offs in one dimension, and the law of the noise."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.linear_model import LogisticRegression

from dememo_jax import bounds, checkpoint, unlearn
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Guarantee
from dememo_jax.unlearn import heads, headsums, output_noise

N, F, K, LAM = 400, 8, 3, 1e-3
KEY = jax.random.key(0)
HEAD = heads.certified_head(classes=K, lam=LAM, sigma=0.05)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    x = random.normal(size=(N, F)).astype(np.float32) * 0.6
    logits = x @ random.normal(size=(F, K)) * 2 + random.gumbel(size=(N, K))
    return x, logits.argmax(axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def fitted(rows):
    return HEAD.fit(*rows)


def minimiser(x, y, keep, lam, classes=K):
    """By Newton's method in numpy, float64, damped until the gradient is rounding."""
    x, y = np.asarray(x, np.float64)[keep], np.asarray(y)[keep]
    w, ridge = np.zeros((x.shape[1], classes)), lam * len(x)
    for k in range(classes):
        for _ in range(300):
            p = 0.5 * (1 + np.tanh(x @ w[:, k] / 2))
            slope = x.T @ (p - (y == k)) + ridge * w[:, k]
            step = np.linalg.solve((x.T * (p * (1 - p))) @ x + ridge * np.eye(x.shape[1]), slope)
            furthest = np.abs(x @ step).max()
            w[:, k] -= step * (np.log1p(furthest) / furthest if furthest > 1e-3 else 1.0)
            if np.abs(step).max() < 1e-15 * (1 + np.abs(w[:, k]).max()):
                break
    return w


# --- the promise in one dimension, with the settings in which the published claim is false ------------------------


def one_feature(name):
    """Rows, labels, forgotten, lam, epsilon, delta of tests/test_objective_perturbation.py."""
    if name == "selection":
        x = 2 * np.random.default_rng(3).normal(size=60)
        return x[:, None], np.ones(60, int), np.arange(10), 1e-3, 1.0, 1e-4
    return np.array([[-9.65456], [-10.72931]]), np.array([1, 1]), np.array([0]), 0.1763, 3.0, 0.01


def exact(x, own, lam):
    """The minimiser for one feature and class by bisection."""

    def slope(w):
        return float(x @ (0.5 * (1 + np.tanh(x * w / 2)) - own) + lam * len(x) * w)

    return optimize.brentq(slope, -1e4, 1e4, xtol=1e-15, rtol=1e-15)


def grid_delta(one, other, sigma, epsilon):
    """The exact delta of two releases of one weight, summed over the coarse grid they lie on."""
    width = bounds.fine_grid(sigma) * 2.0**bounds.grid.FINE
    low, high = (f(one, other) + side * 12 * sigma for f, side in ((min, -1), (max, 1)))
    edges = (np.arange(np.floor(low / width), np.ceil(high / width)) + 0.5) * width
    p, q = (np.diff(stats.norm.cdf(np.concatenate([[-np.inf], edges, [np.inf]]), w, sigma)) for w in (one, other))
    return np.maximum(p - np.exp(epsilon) * q, 0).sum(), np.maximum(q - np.exp(epsilon) * p, 0).sum()


@pytest.mark.parametrize("name", ["selection", "theorem 3"])
def test_the_promise_is_kept_exactly_where_the_published_claim_is_not(name):
    x, y, forget, lam, epsilon, delta = one_feature(name)
    keep = np.isin(np.arange(len(x)), forget, invert=True)
    best = np.array([exact(x[keep, 0], y[keep] == k, lam) for k in (0, 1)])
    paths, largest, edge = set(), 0.0, 0.9 * bounds.gdp_mu(epsilon, delta)
    with jax.enable_x64(True):
        free = heads.certified_head(classes=2, lam=lam, sigma=1.0, epsilon=epsilon, delta=delta, steps=1)
        left = free.remove(free.fit(x, y), x, y, forget)[1].tried  # by one Newton step, at most
        for sigma in (0.99 * left / edge, 1.01 * left / edge, 10 * left / edge):
            head = heads.certified_head(classes=2, lam=lam, sigma=sigma, epsilon=epsilon, delta=delta, steps=1)
            state, update = head.remove(head.fit(x, y), x, y, forget)
            retrained = head.fit(x, y, forget)
            released, _ = head.release(KEY, state)
            paths.add(update.path)
            promised = released.guarantee
            for target in (best, retrained.params[0]):
                mu = np.linalg.norm(state.params[0] - target) / sigma
                assert mu <= promised.mu
                assert bounds.gdp_delta(mu, epsilon) <= delta
                for one, other in zip(state.params[0], target, strict=True):
                    assert max(grid_delta(one, other, sigma, epsilon)) <= delta
            largest = max(largest, np.linalg.norm(state.params[0] - best) / (sigma * promised.mu))
    assert paths == {"newton", "refit"}  # whichever way was taken
    assert largest < 0.9
    if name == "theorem 3":  # a Newton step that leaves something to hide
        assert largest > 0.05


def test_a_distance_that_is_used_up_and_noise_that_is_too_small():
    """Rows so short that the ridge is all the curvature: the bound is attained, and noise 1.5 times too small fails."""
    random = np.random.default_rng(1)
    x, y = 0.02 * random.normal(size=(50, 1)), random.integers(0, 2, 50)
    other, epsilon, delta = np.where(np.arange(50)[:, None] < 10, x + 0.3, x), 1.0, 1e-4
    with jax.enable_x64(True):
        free = heads.certified_head(classes=2, lam=0.1, sigma=1e3, epsilon=epsilon, delta=delta)
        tau = 0.5 / (0.1 * 50)  # half a Newton step
        left = free.first_order(free.fit(x, y), x, y, other, y, tau=tau)[1].distance
        sigma = left / (0.9 * bounds.gdp_mu(epsilon, delta)) * 1.001
        head = heads.certified_head(classes=2, lam=0.1, sigma=sigma, epsilon=epsilon, delta=delta)
        start = head.fit(x, y)
        state, update = head.first_order(start, x, y, other, y, tau=tau)
        assert update.path == "first_order"
        assert head.distance(state) == pytest.approx(0.9 * sigma * bounds.gdp_mu(epsilon, delta), rel=0.01)
        true = np.linalg.norm(state.params - minimiser(other, y, np.ones(50, bool), 0.1, 2))
        assert 0.9 * update.distance < true <= update.distance
        assert bounds.gdp_delta(true / sigma, epsilon) < delta < bounds.gdp_delta(1.5 * true / sigma, epsilon)
        tight = heads.certified_head(classes=2, lam=0.1, sigma=sigma / 1.5, epsilon=epsilon, delta=delta)
        assert tight.first_order(tight.fit(x, y), x, y, other, y, tau=tau)[1].path == "refit"


# --- distances ----------------------------------------------------------------------------------------------------


def test_distances_hold_against_the_minimiser_over_many_problems():
    """Rows of every length, few and many, separable or not, float32; mu = distance / sigma from the definition."""
    random, paths = np.random.default_rng(5), set()
    for trial in range(24):
        lam, scale = 10 ** random.uniform(-3, 0), 10 ** random.uniform(-1, 1)
        x = (scale * random.normal(size=(60, 3)) + random.normal(size=3)).astype(np.float32)
        y = (x @ random.normal(size=(3, 2)) + (trial % 2) * random.gumbel(size=(60, 2))).argmax(axis=1)
        head = heads.certified_head(classes=2, lam=lam, sigma=10 ** random.uniform(-3, 1), steps=1 + trial % 3)
        state = head.fit(x, y)
        for turn in range(2):
            keep = ~state.removed
            best = minimiser(x, y, keep, lam, 2)
            assert np.linalg.norm(state.params - best) <= head.distance(state) + 1e-12 * np.linalg.norm(best)
            rows, w = x[keep].astype(np.float64), state.params
            slope = rows.T @ (1 / (1 + np.exp(-rows @ w)) - (y[keep, None] == np.arange(2))) + lam * keep.sum() * w
            assert np.linalg.norm(slope) / (lam * keep.sum()) <= head.distance(state)
            if turn == 0:
                state, update = head.remove(state, x, y, random.permutation(60)[: random.integers(1, 59)])
                paths.add(update.path)
                assert update.distance == head.distance(state) <= update.allowed
    assert paths == {"newton", "refit"}


def test_the_measured_residual_is_near_the_gradient(rows, fitted):
    x, y = rows
    state, update = HEAD.remove(fitted, x, y, np.arange(24))
    keep = np.arange(N) >= 24
    slope = np.zeros((F, K))
    for i in np.flatnonzero(keep):
        for k in range(K):
            s, row = 1.0 if y[i] == k else -1.0, x[i].astype(np.float64)
            slope[:, k] += -s * row / (1 + np.exp(s * row @ state.params[:, k])) + LAM * state.params[:, k]
    left = np.linalg.norm(slope)
    assert left <= float(state.residual) < left + 1e-8
    assert update.distance == pytest.approx(left / (LAM * keep.sum()), rel=1e-3)
    assert bounds.minimiser_distance(0.3, 6.0) == pytest.approx(0.05)
    with pytest.raises(BadInput, match="convexity"):
        bounds.minimiser_distance(0.3, 0.0)


@pytest.mark.parametrize("wide", [False, True])
def test_fit_is_sklearns(rows, wide):
    x, y = rows
    if wide:  # far from the start a full Newton step would overshoot
        x = x * 30
    state = HEAD.fit(x, y)
    for k in range(K):
        model = LogisticRegression(C=1 / (LAM * N), fit_intercept=False, tol=1e-10, max_iter=5000)
        own = model.fit(x.astype(np.float64), y == k).coef_[0]
        np.testing.assert_allclose(state.params[:, k], own, atol=2e-4 * np.abs(own).max())


# --- requests ----------------------------------------------------------------------------------------------------


def test_a_sequence_of_removals(rows, fitted):
    x, y = rows
    state, keep = fitted, np.ones(N, bool)
    for turn, forget in enumerate(np.split(np.arange(24), 4)):
        asked = forget if turn % 2 else np.isin(np.arange(N), forget)  # indices or a mask
        old, (state, update) = state, HEAD.remove(state, x, y, asked)
        keep[forget] = False
        best = minimiser(x, y, keep, LAM)
        assert (update.path, update.changed, update.already) == ("newton", 6, 0)
        assert np.linalg.norm(state.params - best) < 0.2 * np.linalg.norm(old.params - best)
    np.testing.assert_array_equal(state.removed, ~keep)


def test_more_steps_come_nearer_and_a_large_request_is_met_by_a_fit(rows, fitted):
    x, y = rows
    near = []
    for steps in (1, 2, 3):
        head = heads.certified_head(classes=K, lam=LAM, sigma=1e-4, steps=steps)
        state, update = head.remove(head.fit(x, y), x, y, np.arange(100))
        near.append(update.tried)
        assert update.distance <= update.allowed
        if update.path == "refit":
            np.testing.assert_array_equal(state.params, head.fit(x, y, np.arange(100)).params)
            assert update.tried > update.allowed
    assert near[0] > 10 * near[1] > 100 * near[2]
    assert near[0] > update.allowed  # so that one step was not enough
    head = heads.certified_head(classes=K, lam=LAM, sigma=1e3)
    roomy = head.remove(head.fit(x, y), x, y, np.arange(100))[1]
    assert (roomy.path, roomy.steps) == ("newton", 1)  # enough is enough, but one step is always taken


def test_removed_rows_are_never_looked_at_again(rows, fitted):
    x, y = rows
    first, _ = HEAD.remove(fitted, x, y, [3, 5])
    second, update = HEAD.remove(first, x, y, [5, 8])
    assert (update.changed, update.already) == (1, 1)
    assert "1 of 2 had been removed before" in update.note
    poisoned = x.copy()
    poisoned[[3, 5]] = np.nan
    again, _ = HEAD.remove(first, poisoned, y, [5, 8])
    jax.tree.map(np.testing.assert_array_equal, again, second)
    same, update = HEAD.remove(second, poisoned, y, [3])
    assert (update.changed, update.path) == (0, "nothing")
    assert "removed before" in update.note
    jax.tree.map(np.testing.assert_array_equal, same, second)
    gone = np.arange(N) % 5 == 0
    alone = HEAD.fit(np.where(gone[:, None], np.nan, x), np.where(gone, -1, y), np.flatnonzero(gone))
    np.testing.assert_allclose(alone.params, minimiser(x, y, ~gone, LAM), atol=1e-4)


def test_nearly_nothing_is_left(rows, fitted):
    x, y = rows
    state, update = HEAD.remove(fitted, x, y, np.arange(1, N))
    best = minimiser(x, y, np.arange(N) == 0, LAM)
    assert np.linalg.norm(state.params - best) <= update.distance <= update.allowed
    with pytest.raises(BadInput, match="every example would be removed"):
        HEAD.remove(state, x, y, [0])


def test_other_data_than_the_states_are_refused(rows, fitted):
    with pytest.raises(BadInput, match="not the data"):
        HEAD.remove(fitted, rows[0][::-1], rows[1], [3])
    with pytest.raises(BadInput, match="not the data"):
        HEAD.correct(fitted, rows[0][::-1], rows[1], *corrected(rows))


def test_large_sums_of_float32_rows():
    """Newton's method with float32 systems goes on to where float64 gradients end: a distance float32 weights do not have."""
    random = np.random.default_rng(2)
    x = np.concatenate([30 * random.normal(size=(20_000, 3)), np.ones((20_000, 1))], axis=1).astype(np.float32)
    y = (x[:, 0] + 20 * random.normal(size=20_000) > 0).astype(int)
    head = heads.certified_head(classes=2, lam=1e-4, sigma=1e-4)
    state, update = head.remove(head.fit(x, y), x, y, np.arange(200))
    assert update.distance <= update.allowed < 3e-5
    assert np.linalg.norm(state.params - minimiser(x, y, np.arange(20_000) >= 200, 1e-4, 2)) <= update.distance


# --- correction --------------------------------------------------------------------------------------------------


def corrected(rows):
    x, y = rows[0].copy(), rows[1].copy()
    x[10:13] = 0.5 * x[10:13][:, ::-1]
    y[12:15] = (y[12:15] + 1) % K
    return x, y


def test_second_order_correction(rows, fitted):
    new = corrected(rows)
    state, update = HEAD.correct(fitted, *rows, *new)
    best = minimiser(*new, np.ones(N, bool), LAM)
    assert (update.changed, update.path) == (5, "newton")
    assert np.linalg.norm(state.params - best) <= update.distance
    assert np.linalg.norm(state.params - best) < 0.1 * np.linalg.norm(fitted.params - best)
    onwards, last = HEAD.remove(state, *new, [12, 40])  # goes on from the corrected rows, not from the old ones
    keep = np.isin(np.arange(N), [12, 40], invert=True)
    assert np.linalg.norm(onwards.params - minimiser(*new, keep, LAM)) <= last.distance
    with pytest.raises(BadInput, match="not the data"):
        HEAD.remove(state, *rows, [40])


def test_first_order_correction_leaves_more(rows, fitted):
    roomy, new = heads.certified_head(classes=K, lam=LAM, sigma=100.0), corrected(rows)
    start = roomy.fit(*rows)
    _, second = roomy.correct(start, *rows, *new)
    state, first = roomy.first_order(start, *rows, *new)
    assert first.path == "first_order"
    assert np.linalg.norm(state.params - minimiser(*new, np.ones(N, bool), LAM)) <= first.distance
    assert first.distance > 3 * second.distance
    tau = float(first.note.split()[-1])
    for other in (0.5 * tau, 1.5 * tau):  # the rate left out is the best there is
        assert roomy.first_order(start, *rows, *new, tau=other)[1].distance > first.distance
    assert HEAD.first_order(fitted, *rows, *new)[1].path == "refit"  # less noise than that hides


# --- releases ----------------------------------------------------------------------------------------------------


def test_only_a_release_carries_a_guarantee(rows, fitted):
    """No function but `release` takes a key or returns a Guarantee; decisions come before any noise."""
    assert not hasattr(HEAD, "guarantee")
    takes = {name: list(inspect.signature(getattr(HEAD, name)).parameters) for name in HEAD._fields}
    assert [name for name, arguments in takes.items() if "key" in arguments] == ["release"]
    released, _ = HEAD.release(KEY, fitted)
    got = released.guarantee
    assert isinstance(got, Guarantee)
    assert (got.epsilon, got.comparator) == (pytest.approx(1.0, rel=1e-4), "retraining")
    assert got.mu == pytest.approx(0.26805, abs=1e-5)
    assert bounds.gdp_delta(got.mu, 1.0) == pytest.approx(1e-5, rel=1e-3)
    assert "mu = 0.268" in unlearn.in_words(got)
    heads_ = (HEAD.release(jax.random.key(seed), fitted)[0].params for seed in range(40))
    moved = np.stack([np.asarray(params, np.float64) - fitted.params for params in heads_])
    assert 0.9 < moved.std() / 0.05 < 1.1  # the noise is on it, at its scale: 960 numbers, four standard deviations


def test_releases_compose_and_end(rows, fitted):
    """k of 4 releases: mu sqrt(k / 4) by the definition, fresh noise each, also under one key."""
    head = heads.certified_head(classes=K, lam=LAM, sigma=0.1, epsilon=2.0, delta=1e-6, releases=4)
    state, heads_, mus = head.fit(*rows), [], []
    for turn in range(4):
        released, state = head.release(KEY, state)
        heads_.append(np.asarray(released.params))
        mus.append(released.guarantee.mu)
        state, update = head.remove(state, *rows, [turn])
        assert int(state.releases) == turn + 1
        assert update.allowed == pytest.approx(0.9 * 0.1 * bounds.gdp_mu(2.0, 1e-6) / 2)
    np.testing.assert_allclose(mus, bounds.gdp_mu(2.0, 1e-6) * np.sqrt(np.arange(1, 5) / 4))
    assert released.guarantee.epsilon == pytest.approx(2.0, rel=1e-4)
    assert np.abs(np.diff(heads_, axis=0)).max(axis=(1, 2)).min() > 0.1
    with pytest.raises(BadInput, match="releases"):
        head.release(KEY, state)


def test_requests_that_depend_on_a_released_head_are_covered():
    """Two releases; who sees the first asks for Newton's correction only where it looks retrained. Exactly, by quadrature."""
    random = np.random.default_rng(1)
    x, y, epsilon, delta = 0.02 * random.normal(size=(50, 1)), random.integers(0, 2, 50), 1.0, 1e-4
    other, again = (np.where(np.arange(50)[:, None] < count, x + 0.3, x) for count in (10, 11))
    with jax.enable_x64(True):
        settings = {"classes": 2, "lam": 0.1, "epsilon": epsilon, "delta": delta, "releases": 2}
        free, tau = heads.certified_head(sigma=1e3, **settings), 0.5 / (0.1 * 50)  # half a Newton step
        left = free.first_order(free.fit(x, y), x, y, other, y, tau=tau)[1].distance
        sigma = 1.001 * left / (0.9 * bounds.gdp_mu(epsilon, delta) / np.sqrt(2))
        head = heads.certified_head(sigma=sigma, **settings)
        first, update = head.first_order(head.fit(x, y), x, y, other, y, tau=tau)
        assert update.path == "first_order"
        nearer = head.correct(first, other, y, again, y)[0]
        promised = head.release(KEY, head.release(KEY, first)[1])[0].guarantee
    every = np.ones(50, bool)
    stays = np.linalg.norm(first.params - minimiser(other, y, every, 0.1, 2)) / sigma
    moves = np.linalg.norm(nearer.params - minimiser(again, y, every, 0.1, 2)) / sigma

    def hockey(mu, e):  # of N(mu, 1) against N(0, 1) at any real epsilon
        return stats.norm.sf(e / mu - mu / 2) - np.exp(e) * stats.norm.sf(e / mu + mu / 2)

    t = np.linspace(-10, 10, 400_001)  # the first release, along the difference, in sigma
    ratio = stays * t - stays**2 / 2
    second = np.where(t > stays / 2, hockey(stays, epsilon - ratio), hockey(max(moves, 1e-9), epsilon - ratio))
    exact_delta = np.trapezoid(stats.norm.pdf(t) * np.exp(ratio) * second, t)
    assert stays > 0.8 * bounds.gdp_mu(epsilon, delta) / np.sqrt(2)
    assert 0 < exact_delta <= delta
    assert promised.epsilon == pytest.approx(epsilon, rel=1e-4)
    assert hockey(np.sqrt(2) * stays * 1.5, epsilon) > delta  # and is not with noise 1.5 times too small


def test_noise_has_its_law():
    """20,000 weights: the variance, the shape and the pairs; a scale 1.1 times off is seen."""
    sigma, params = 0.3, np.linspace(-5, 5, 20_000).reshape(100, 200)
    moved = (output_noise.perturbed(KEY, params, sigma) - params) / sigma
    square, count = np.square(moved).sum(), moved.size
    assert 1e-3 < stats.chi2.cdf(square, count) < 1 - 1e-3
    for wrong in (1 / 1.1, 1.1, 1.5):
        assert not 1e-6 < stats.chi2.cdf(square / wrong**2, count) < 1 - 1e-6
    assert stats.kstest(moved.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(moved[:, 1:].ravel(), moved[:, :-1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(moved[1:].ravel(), moved[:-1].ravel())[0, 1]) < 0.03


def test_noise_is_a_rounded_gaussian_to_the_last_cell():
    """The number of 63-bit words that lead to each multiple, by bisection, against the normal distribution."""
    sigma = 0.7
    fine = bounds.fine_grid(sigma)
    assert sigma * 2.0**-33 < fine <= sigma * 2.0**-32
    total = 0.0
    for at in np.concatenate([[0.001, 0.02], np.arange(0.1, 8.6, 0.25)]):  # in sigma; the coarse cells' width is 2^-10
        multiple = round(at * sigma / fine)
        low, high = 0, 2**63 - 1  # words count from the tail: the first has the largest multiple
        while high - low > 1:
            middle = (low + high) // 2
            beyond = bounds.normal_multiples(np.array([middle], np.uint64), sigma)[0] >= multiple
            low, high = (middle, high) if beyond else (low, middle)
        expected = 2 * stats.norm.sf((multiple - 0.5) * fine / sigma)
        total = max(total, abs((low + 1) / 2.0**63 - expected))
        assert (low + 1) / 2.0**63 == pytest.approx(expected, rel=1e-3 if at > 6 else 1e-9)
    assert total < 1e-15  # so that 2^14 cells make less than 1e-11 in all, and 1e-12 where the mass is


def test_a_release_does_not_name_its_weights(fitted):
    """Two candidates for the weights, known exactly: each is possible for every coordinate of what was released."""
    sigma = 0.05
    width = bounds.fine_grid(sigma) * 2.0**bounds.grid.FINE
    other = fitted.params + 1e-4
    for seed in range(5):
        out = output_noise.perturbed(jax.random.key(seed), fitted.params, sigma)
        np.testing.assert_array_equal(out / width, np.rint(out / width))  # a grid that depends on sigma alone
    fine = bounds.fine_grid(sigma)
    for start in (fitted.params, other):  # and on it every cell within 8 sigma is reached from both
        ends = (out + np.multiply.outer([-0.5, 0.5], np.full(out.shape, width)) - start) / fine
        assert (np.floor(ends[1]) - np.ceil(ends[0]) > 2**20).all()
    with pytest.raises(BadInput, match="sigma"):
        output_noise.perturbed(KEY, np.array([1.0]), 1e-10)


def test_the_state_of_another_head_is_not_released(rows, fitted):
    for other in ({"lam": 2 * LAM}, {"sigma": 0.04}, {"epsilon": 2.0}, {"delta": 1e-6}, {"releases": 2}):
        head = heads.certified_head(**{"classes": K, "lam": LAM, "sigma": 0.05} | other)
        for use, arguments in ((head.release, (KEY, fitted)), (head.distance, (fitted,)), (head.remove, (fitted, *rows, [1]))):
            with pytest.raises(BadInput, match="other settings"):
                use(*arguments)
    with pytest.raises(BadInput, match="by hand"):
        HEAD.release(KEY, fitted._replace(residual=np.asarray(1e3)))
    with pytest.raises(BadInput, match="sigma of"):
        heads.certified_head(classes=K, lam=LAM, sigma=1e-13).fit(*rows)


def test_state_survives_a_checkpoint(rows, fitted, tmp_path):
    state, _ = HEAD.remove(fitted, *rows, [1, 2])
    checkpoint.save(tmp_path, 0, state)
    restored = checkpoint.restore(tmp_path, 0, state).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert np.asarray(restored.params).dtype == np.float64
    one, other = (HEAD.remove(s, *rows, [9])[0] for s in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_linear(fitted, rows):
    params = jnp.asarray(fitted.params, jnp.float32)
    np.testing.assert_allclose(heads.linear(params, rows[0][:5]), rows[0][:5] @ np.asarray(params), rtol=1e-4, atol=1e-5)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"classes": 1}, "classes"),
        ({"lam": 0.0}, "lam"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": np.nan}, "sigma"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"delta": 1.0}, "delta"),
        ({"releases": 0}, "releases"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_hyperparameters(arguments, match):
    with pytest.raises(BadInput, match=match):
        heads.certified_head(**{"classes": K, "lam": LAM, "sigma": 10.0} | arguments)


def test_bad_data(rows, fitted):
    x, y = rows
    broken = x.copy()
    broken[17, 2] = np.inf
    for got, match in (
        ((x, np.where(y == 2, 3, y)), "labels must lie in 0..2"),
        ((x, y.astype(np.float32)), "whole numbers"),
        ((x, y[1:]), "one an example"),
        ((broken, y), "row 17"),
        ((x.astype(np.float16), y), "float32"),
        ((x[:, 0], y), "N, F"),
    ):
        with pytest.raises(BadInput, match=match):
            HEAD.fit(*got)
    for forget, match in (
        ([N], f"example {N} does not exist"),
        ([-1], "example -1"),
        (np.ones(N, bool), "every example would be removed"),
        (np.ones(N - 1, bool), "one entry an example"),
        ([0.5], "whole numbers"),
    ):
        with pytest.raises(BadInput, match=match):
            HEAD.remove(fitted, x, y, forget)
    with pytest.raises(BadInput, match="as in the fit"):
        HEAD.remove(fitted, x[1:], y[1:], [0])
    with pytest.raises(BadInput, match="nothing to correct"):
        HEAD.correct(fitted, x, y, x, y)
    with pytest.raises(BadInput, match="tau"):
        HEAD.first_order(fitted, x, y, *corrected(rows), tau=-1.0)
    with pytest.raises(BadInput, match="every example is removed"):
        HEAD.fit(x, y, np.ones(N, bool))
    with pytest.raises(NonFinite, match="could not be inverted"):
        heads.certified_head(classes=K, lam=1e-30, sigma=10.0).fit(np.repeat(x[:, :1], F, axis=1), y)


def test_newton_steps_that_do_not_help_are_not_taken(rows, fitted):
    """Of a minimiser nothing can be improved; a request of a row that weighs nothing leaves it where it is."""
    x, y = rows
    problem = headsums.Problem(jnp.asarray(x), jnp.asarray(y), np.ones(N, bool), LAM * N)
    point = headsums.measured(problem, minimiser(x, y, np.ones(N, bool), LAM))
    after = headsums.descend(problem, point, target=0.0, most=10)
    assert after.residual <= point.residual


def test_zeros_and_ones_are_no_indices_and_releases_are_counted():
    """Rows 0 and 1 would go, and the release would promise that all of the class did."""
    x, y = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2
    head = unlearn.certified_head(classes=2, lam=0.1, sigma=0.1)
    state = head.fit(x, y)
    with pytest.raises(BadInput, match="named twice"):
        head.remove(state, x, y, (y == 1).astype(int))
    with pytest.raises(BadInput, match="releases"):
        unlearn.certified_head(classes=2, lam=0.1, sigma=0.1, releases=1.5)
