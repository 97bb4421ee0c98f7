"""Heads with a noisy objective against naive float64 gradients, the law of the noise, and cases where the claim is false."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from dememo_jax import bounds, checkpoint, unlearn
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Guarantee, Heuristic
from dememo_jax.unlearn import headsums
from dememo_jax.unlearn import objective_perturbation as op

N, F, K, LAM = 400, 8, 3, 1e-3
KEY = jax.random.key(0)
HEAD = op.published_head(classes=K, lam=LAM, sigma=10.0)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    x = random.normal(size=(N, F)).astype(np.float32) * 0.6
    logits = x @ random.normal(size=(F, K)) * 2 + random.gumbel(size=(N, K))
    return x, logits.argmax(axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def fitted(rows):
    return HEAD.fit(KEY, *rows)


def gradient(state, x, y, keep):
    """Of the noisy objective, one example and class at a time, in float64."""
    w, total = np.asarray(state.params, np.float64), np.asarray(state.noise, np.float64).copy()
    for i in np.flatnonzero(keep):
        for k in range(K):
            s, row = 1.0 if y[i] == k else -1.0, x[i].astype(np.float64)
            total[:, k] += -s * row / (1 + np.exp(s * row @ w[:, k])) + LAM * w[:, k]
    return np.linalg.norm(total)


def refit(x, y, keep):
    """Without noise, by scikit-learn: C is 1 / (lam n)."""
    model = LogisticRegression(C=1 / (LAM * keep.sum()), fit_intercept=False, tol=1e-10, max_iter=5000)
    return np.stack([model.fit(x[keep].astype(np.float64), y[keep] == k).coef_[0] for k in range(K)], axis=1)


def noisy_refit(x, y, keep, noise):
    """The minimiser of the noisy objective by Newton's method in numpy, float64."""
    x, w, ridge = x[keep].astype(np.float64), np.zeros((F, K)), LAM * keep.sum()
    for _ in range(200):
        for k in range(K):
            p = 1 / (1 + np.exp(-x @ w[:, k]))
            slope = x.T @ (p - (y[keep] == k)) + ridge * w[:, k] + noise[:, k]
            w[:, k] -= 0.5 * np.linalg.solve((x.T * (p * (1 - p))) @ x + ridge * np.eye(F), slope)
    return w


# --- fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
def test_fit_without_noise_is_sklearns(rows, wide):
    x, y = rows
    if wide:  # far from the start a full Newton step would overshoot
        x = x * 30
    w = headsums.minimise(jnp.asarray(x), jnp.asarray(y), jnp.ones(N, bool), jnp.zeros((F, K)), LAM * N)
    np.testing.assert_allclose(w, refit(x, y, np.ones(N, bool)), atol=2e-4 * np.abs(w).max())


def test_fit_charges_the_gradient_it_stopped_at(rows, fitted):
    left = gradient(fitted, *rows, np.ones(N, bool))
    assert left <= float(fitted.spent) < 1e-3
    assert float(fitted.spent) < 1.01 * left
    np.testing.assert_allclose(fitted.params, noisy_refit(*rows, np.ones(N, bool), np.asarray(fitted.noise)), atol=1e-4)
    exact = np.linalg.norm(rows[0].astype(np.float64), 2)
    assert exact <= float(fitted.spectral) < exact * (1 + 1e-6)


def test_a_fit_without_some_rows_never_looks_at_them(rows):
    x, y = rows
    gone = np.arange(N) % 5 == 0
    poisoned = np.where(gone[:, None], np.nan, x)
    state = HEAD.fit(KEY, poisoned, np.where(gone, -1, y), np.flatnonzero(gone))
    np.testing.assert_allclose(state.params, noisy_refit(x, y, ~gone, np.asarray(state.noise)), atol=1e-4)


def test_noise_has_its_law(rows):
    x, head = np.tile(rows[0], 10), op.published_head(classes=10, lam=LAM, sigma=10.0)  # 800 entries
    noise, other = (np.asarray(head.fit(jax.random.key(seed), x, rows[1]).noise, np.float64) for seed in (0, 1))
    drawn = np.concatenate([noise.ravel(), other.ravel()])
    square = np.square(drawn / 10.0).sum()
    assert stats.chi2.cdf(square, drawn.size) == pytest.approx(0.5, abs=0.499)
    for wrong in (0.9, 1.1):  # of the scale
        assert not 1e-3 < stats.chi2.cdf(square / wrong**2, drawn.size) < 1 - 1e-3
    assert stats.kstest(drawn / 10.0, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.14  # four standard deviations
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.45


# --- removal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("account", op.ACCOUNTS)
def test_a_sequence_of_removals(rows, fitted, account):
    x, y = rows
    head, state, keep = op.published_head(classes=K, lam=LAM, sigma=10.0, account=account), fitted, np.ones(N, bool)
    for turn, forget in enumerate(np.split(np.arange(24), 6)):
        before, old = noisy_refit(x, y, np.isin(np.arange(N), forget, invert=True) & keep, np.asarray(state.noise)), state
        asked = forget if turn % 2 else np.isin(np.arange(N), forget)  # indices or a mask
        state, update = head.remove(state, x, y, asked)
        keep[forget] = False
        left = gradient(state, x, y, keep)
        assert left <= float(state.spent) * (1 + 1e-9)
        assert left <= update.measured < left * 1.001
        assert update.nonlinear <= update.charged < 1.1 * update.nonlinear + 1e-5
        assert 5 * update.nonlinear < update.published
        if account == "bound":
            assert float(state.spent) == pytest.approx(float(old.spent) + update.charged, rel=1e-6)
            assert float(state.spent) < 30 * left  # the bound is not vacuous
        else:
            assert float(state.spent) == pytest.approx(update.measured, rel=1e-6)
        near, far = (np.linalg.norm(np.asarray(s.params) - before) for s in (state, old))
        assert near < 0.2 * far
    np.testing.assert_array_equal(np.asarray(state.removed), ~keep)
    assert head.claim(state).comparator == "retraining"


def test_removal_approaches_sklearns_refit_when_the_noise_is_small(rows):
    x, y = rows
    head = op.published_head(classes=K, lam=LAM, sigma=1e-2, epsilon=8.0, delta=0.1, budget="gaussian", account="measured")
    state = head.fit(KEY, x, y)
    keep = np.arange(N) != 7
    new, _ = head.remove(state, x, y, 7)
    target = refit(x, y, keep)
    assert np.linalg.norm(new.params - target) < 0.5 * np.linalg.norm(state.params - target)


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
    assert update.changed == 0
    assert "removed before" in update.note
    jax.tree.map(np.testing.assert_array_equal, same, second)


def test_a_spent_budget_refuses_and_says_so(rows, fitted):
    x, y = rows
    with pytest.raises(op.BudgetSpent, match=r"over the budget of 2\.28.*fresh key") as refused:
        HEAD.remove(fitted, x, y, np.arange(100))
    assert refused.value.needed > refused.value.budget == pytest.approx(2.2803, abs=1e-4)
    assert not np.asarray(fitted.removed).any()
    with pytest.raises(op.BudgetSpent, match="gradient norm"):
        op.published_head(classes=K, lam=LAM, sigma=1e-6).fit(KEY, x, y)
    with pytest.raises(BadInput, match="nothing is claimed"):
        HEAD.claim(fitted._replace(spent=jnp.float32(3.0)))


def test_other_data_than_the_states_are_refused(rows, fitted):
    with pytest.raises(BadInput, match="not the data"):
        HEAD.remove(fitted, rows[0][::-1], rows[1], [3])


# --- correction --------------------------------------------------------------------------------------------------


def corrected(rows):
    x, y = rows[0].copy(), rows[1].copy()
    x[10:13] = 0.5 * x[10:13][:, ::-1]
    y[12:15] = (y[12:15] + 1) % K
    return x, y


def test_second_order_correction(rows, fitted):
    new = corrected(rows)
    every = np.ones(N, bool)
    state, update = HEAD.correct(fitted, *rows, *new)
    assert update.changed == 5
    assert gradient(state, *new, every) <= float(state.spent)
    assert np.linalg.norm(new[0].astype(np.float64), 2) <= float(state.spectral)
    target = noisy_refit(*new, every, np.asarray(fitted.noise))
    near, far = (np.linalg.norm(s.params - target) for s in (state, fitted))
    assert near < 0.1 * far
    onwards, _ = HEAD.remove(state, *new, [12, 40])  # goes on from the corrected rows, not from the old ones
    assert gradient(onwards, *new, ~np.asarray(onwards.removed)) <= float(onwards.spent)
    with pytest.raises(BadInput, match="not the data"):
        HEAD.remove(state, *rows, [40])


def test_first_order_correction_costs_more_and_is_certified_where_it_fits(rows, fitted):
    roomy = op.published_head(classes=K, lam=LAM, sigma=100.0)  # the state is of less noise: only its account is asked
    new = corrected(rows)
    _, second = roomy.correct(fitted, *rows, *new)
    state, first = roomy.first_order(fitted, *rows, *new)
    left = gradient(state, *new, np.ones(N, bool))
    assert left <= float(state.spent) < 3 * left
    assert first.charged > 3 * second.charged
    tau = float(first.note.split()[-1])
    for other in (0.5 * tau, 1.5 * tau):  # the rate left out is the best there is
        assert roomy.first_order(fitted, *rows, *new, tau=other)[1].measured > first.measured
    with pytest.raises(op.BudgetSpent):
        op.published_head(classes=K, lam=LAM, sigma=1.0).first_order(fitted, *rows, *new)


# --- guarantees, bounds, states ----------------------------------------------------------------------------------


def test_the_claim_is_heuristic_in_type_and_words(fitted):
    got = HEAD.claim(fitted)
    assert isinstance(got, Heuristic)
    assert not isinstance(got, Guarantee)
    assert not hasattr(HEAD, "guarantee")
    assert (got.epsilon, got.delta, got.comparator) == (1.0, 1e-4, "retraining")
    assert "no guarantee" in unlearn.in_words(got)
    proved = Guarantee(1.0, 1e-5, 0.268, "retraining", ())
    with pytest.raises(BadInput, match="Heuristic"):
        unlearn.compose([proved, got])


def test_published_budget():
    assert bounds.removal_budget(1.0, 1e-4, 10.0) == pytest.approx(10 / np.sqrt(2 * np.log(15_000)))
    assert bounds.removal_budget(1.0, 1e-4, 10.0) == pytest.approx(2.28, abs=0.001)
    exact = bounds.removal_budget(1.0, 1e-4, 10.0, "gaussian") / 10.0
    assert bounds.gdp_delta(exact, 1.0) == pytest.approx(1e-4, rel=1e-3)
    with pytest.raises(BadInput, match="does not hold"):
        bounds.removal_budget(9.0, 1e-4, 10.0)
    assert bounds.removal_budget(9.0, 1e-4, 10.0, "gaussian") > 0


def test_residual_bounds_hold_and_are_near():
    """One feature, equal rows: the worst the remainder can be is reached at the steepest curvature."""
    worst = 0.0
    for z in np.linspace(-3, 3, 61):  # the logit of every row, before a small step
        n, step = 7, 0.01
        p, moved = (1 / (1 + np.exp(-v)) for v in (z, z + step))
        remainder = n * abs(moved - p - p * (1 - p) * step)
        bound = bounds.newton_residual(np.sqrt(n), np.full((n, 1), step))[0]
        assert remainder <= bound
        worst = max(worst, remainder / bound)
        published = bounds.published_residual(np.sqrt(n), np.full((n, 1), step), [step], 1.0)[0]
        assert published / bound == pytest.approx(3 * np.sqrt(3))
    assert worst > 0.98


def test_spectral_bound_is_not_below():
    for seed in range(20):
        x = np.random.default_rng(seed).normal(size=(50, 6))
        exact = np.linalg.norm(x, 2)
        assert exact <= bounds.spectral_above(x.T @ x, 50) < exact * (1 + 1e-9)


def test_state_survives_a_checkpoint(rows, fitted, tmp_path):
    state, _ = HEAD.remove(fitted, *rows, [1, 2])
    checkpoint.save(tmp_path, 0, state)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    restored = checkpoint.restore(tmp_path, 0, like).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    one, other = (HEAD.remove(s, *rows, [9])[0] for s in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_float64_leaves_less(rows, fitted):
    with jax.enable_x64(True):
        x = jnp.asarray(rows[0], jnp.float64)
        state = HEAD.fit(jax.random.key(0), x, rows[1])
        assert state.params.dtype == jnp.float64
        assert float(state.spent) < 1e-3 * float(fitted.spent)
        new, update = HEAD.remove(state, x, rows[1], [0])
        assert update.charged - update.nonlinear < 1e-7
        assert gradient(new, *rows, np.arange(N) > 0) <= float(new.spent)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"classes": 1}, "classes"),
        ({"lam": 0.0}, "lam"),
        ({"sigma": 0.0}, "sigma"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"delta": 1.0}, "delta"),
        ({"budget": "free"}, "budget must be one of"),
        ({"account": "none"}, "account"),
    ],
)
def test_bad_hyperparameters(arguments, match):
    with pytest.raises(BadInput, match=match):
        op.published_head(**{"classes": K, "lam": LAM, "sigma": 10.0} | arguments)


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
            HEAD.fit(KEY, *got)
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
        HEAD.fit(KEY, x, y, np.ones(N, bool))
    with pytest.raises(NonFinite, match="could not be inverted"):
        op.published_head(classes=K, lam=1e-30, sigma=10.0).fit(KEY, np.repeat(x[:, :1], F, axis=1), y)


# --- the claim is false: one feature, where everything can be computed ---------------------------------------------


class OneFeature:
    """One class of a head with one feature, as functions of the weight w: exact, by numpy alone."""

    def __init__(self, x, own, lam):
        self.x, self.own, self.lam = np.asarray(x, np.float64), np.asarray(own, np.float64), lam

    def gradient(self, w, keep):
        """Of the summed losses with the ridge; the noise at which w is the minimiser is minus this."""
        p = 0.5 * (1 + np.tanh(np.multiply.outer(w, self.x[keep]) / 2))
        return (p - self.own[keep]) @ self.x[keep] + self.lam * keep.sum() * w

    def newton(self, w, keep):
        """The published removal of the rows outside `keep` from the minimiser w of all."""
        p = 0.5 * (1 + np.tanh(np.multiply.outer(w, self.x[keep]) / 2))
        return w + self.gradient(w, ~keep) / ((p * (1 - p)) @ np.square(self.x[keep]) + self.lam * keep.sum())


def test_a_remaining_gradient_within_the_budget_does_not_make_the_claim_true():
    """Theorem 3 of Guo et al. as used, with no request refused: N = 2, epsilon 3, delta 0.01; the true delta is 0.0438."""
    sigma, epsilon, delta, x = 16.62, 3.0, 0.01, np.array([-9.65456, -10.72931])
    one, every, keep = OneFeature(x, [0, 0], 0.1763), np.ones(2, bool), np.array([False, True])
    w = np.sinh(np.linspace(-14, 14, 400_001)) / 500  # of all rows; b covers -420 .. 420
    b, after = -one.gradient(w, every), one.newton(w, keep)
    implied = -one.gradient(after, keep)  # the noise at which a retrained head would be the released one
    budget = bounds.removal_budget(epsilon, delta, sigma, "gaussian")
    assert np.abs(b - implied).max() < 0.43 * budget  # |U|, for every noise
    inside = (implied > 13.3) & (implied < 19.6)
    released = np.abs(np.diff(stats.norm.cdf(b / sigma)))[inside[1:]].sum()
    retrained = np.diff(stats.norm.cdf([13.3 / sigma, 19.6 / sigma]))[0]
    assert retrained == pytest.approx(0.0926, abs=2e-4)
    assert released == pytest.approx(0.00246, abs=2e-5)
    assert retrained - np.exp(epsilon) * released > 4 * delta  # the exact event's delta is larger than claimed

    head = op.published_head(
        classes=2, lam=0.1763, sigma=sigma, epsilon=epsilon, delta=delta, budget="gaussian", account="measured"
    )
    rows, labels = x[:, None], np.array([1, 1])
    other = OneFeature(x, [1, 1], 0.1763)
    with jax.enable_x64(True):  # the map above is what `remove` does, and the claim is handed out
        for w0, w1 in ((-1.0, 3.0), (-20.0, 0.5)):
            noise = jnp.asarray([[-one.gradient(w0, every), -other.gradient(w1, every)]])
            spectral = jnp.float32(np.linalg.norm(x) * 1.001)
            state = op.PublishedState(jnp.asarray([[w0, w1]]), noise, jnp.zeros(2, bool), jnp.float32(1e-6), spectral)
            new, _ = head.remove(state, rows, labels, [0])
            np.testing.assert_allclose(new.params[0], [one.newton(w0, keep), other.newton(w1, keep)], rtol=1e-9)
            assert isinstance(head.claim(new), Heuristic)


def test_refusing_by_the_noise_makes_the_claim_false():
    """Defaults, 10 of 60 rows forgotten, a fresh B where the request is refused: delta at least 0.073, claimed 1e-4."""
    random = np.random.default_rng(3)
    x, keep, sigma, epsilon, delta = 2 * random.normal(size=60), np.arange(60) >= 10, 10.0, 1.0, 1e-4
    head, budget = op.published_head(classes=2, lam=1e-3, sigma=sigma), bounds.removal_budget(epsilon, delta, sigma)
    w, grid = np.sinh(np.linspace(-14, 14, 20_001)) / 100, np.linspace(-60, 60, 1201)
    charge, implied = [], []  # of each class, on a grid of its noise
    for own in (np.zeros(60), np.ones(60)):  # all labelled 1
        one = OneFeature(x, own, 1e-3)
        b, after = -one.gradient(w, np.ones(60, bool)), one.newton(w, keep)
        moved = np.square(np.square(np.multiply.outer(after - w, x[keep]))).sum(axis=1)
        charge.append(np.interp(grid, b[::-1], (bounds.removal.THIRD / 2 * np.linalg.norm(x) * np.sqrt(moved))[::-1]))
        implied.append(np.interp(grid, b[::-1], -one.gradient(after, keep)[::-1]))
    edges = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]) / 2, [np.inf]])
    mass = np.multiply.outer(*[np.diff(stats.norm.cdf(edges / sigma))] * 2)
    refused = np.hypot(*np.meshgrid(*charge, indexing="ij")) > budget
    there = [np.interp(i, grid, c) for i, c in zip(implied, charge, strict=True)]
    event = np.hypot(*np.meshgrid(*there, indexing="ij")) > budget  # the released head's implied noise would be refused
    retrained = mass[refused].sum()
    released = mass[~refused & event].sum() + retrained * retrained  # a fresh B is in the event as often as a retrained one
    assert retrained == pytest.approx(0.101, abs=2e-3)
    assert retrained - np.exp(epsilon) * released > 0.07 > 500 * delta

    with jax.enable_x64(True):  # the library refuses where the grid says so
        rows, labels, seen = x[:, None], np.ones(60, int), set()
        for seed in (0, 3, 8, 16, 22):
            state = head.fit(jax.random.key(seed), rows, labels)
            needed = np.hypot(*(np.interp(b, grid, c) for b, c in zip(np.asarray(state.noise)[0], charge, strict=True)))
            try:
                got = head.remove(state, rows, labels, np.arange(10))[1].spent
            except op.BudgetSpent as error:
                got = error.needed
            assert got == pytest.approx(needed, rel=0.01)
            seen.add(got > budget)
        assert seen == {True, False}
