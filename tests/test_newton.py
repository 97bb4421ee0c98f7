"""Unlearning in one step against dense inverses, closed-form refits and plain loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dememo_jax import curvature, losses, models, tree, unlearn
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Dataset, Weights
from dememo_jax.unlearn import inverse

N, D, K, BATCH, DECAY, DAMPING = 30, 4, 3, 8, 0.02, 0.05  # 30 examples, 22 retained: blocks of 8 are padded
FORGET = np.arange(N) % 4 == 1
TIGHT = {"tolerance": 1e-7, "batch": BATCH, "block": 5}


def linear(params, x):
    return x @ params["w"]


def squared(logits, y):
    return 0.5 * (logits[:, 0] - y) ** 2


def concave(logits, y):
    return -squared(logits, y)


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    data = sets.make(rng.uniform(size=(N, D)).astype(np.float32), rng.integers(0, K, N))
    return data, {"w": jnp.asarray(rng.normal(size=(D, K)), jnp.float32)}


def by_hand(data, params):
    """Of every example of a linear softmax, in float64: gradients [N, P] and Hessians [N, P, P]."""
    x, y, w = (np.asarray(part, np.float64) for part in (data.x, data.y, params["w"]))
    z = x @ w
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    gradients = np.einsum("nd,nk->ndk", x, p - np.eye(K)[y.astype(int)]).reshape(len(x), -1)
    inner = [np.diag(row) - np.outer(row, row) for row in p]
    return gradients, np.stack([np.kron(np.outer(row, row), h) for row, h in zip(x, inner)])


def expected_direction(gradients, params, direction):
    everything, forgotten, retained = gradients.mean(axis=0), gradients[FORGET], gradients[~FORGET].mean(axis=0)
    return {
        "difference": everything - retained,
        "forget": forgotten.sum(axis=0) / N,
        "newton": -(retained + DECAY * np.asarray(params["w"], np.float64).ravel()),
    }[direction]


def step_of(result, params):
    return np.asarray(result.params["w"], np.float64).ravel() - np.asarray(params["w"], np.float64).ravel()


def poisoned(data, mask):
    return data._replace(x=jnp.where(mask[:, None], jnp.nan, data.x))


@pytest.mark.parametrize("direction", ["difference", "forget", "newton"])
@pytest.mark.parametrize("variant", ["fisher", "ggn", "hessian", "diagonal", "identity"])
def test_every_inverse_in_every_direction(toy, variant, direction):
    data, params = toy
    gradients, hessians = by_hand(data, params)
    over = np.ones(N, bool) if direction == "forget" else ~FORGET
    matrix = {
        "fisher": gradients[over].T @ gradients[over] / over.sum(),
        "diagonal": np.diag(np.square(gradients[over]).mean(axis=0)),
    }.get(variant, hessians[over].mean(axis=0))
    matrix = np.eye(D * K) if variant == "identity" else matrix + (DAMPING + DECAY) * np.eye(D * K)
    expected = 0.7 * np.linalg.solve(matrix, expected_direction(gradients, params, direction))
    how = TIGHT | {"alpha": 0.7, "variant": variant, "damping": DAMPING, "weight_decay": DECAY, "direction": direction}
    result = unlearn.influence(linear, params, data, FORGET, **how)
    np.testing.assert_allclose(step_of(result, params), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    length = np.linalg.norm(expected)
    assert result.length == pytest.approx(length, rel=1e-4)
    assert result.relative == pytest.approx(length / np.linalg.norm(np.asarray(params["w"])), rel=1e-4)
    assert (result.residual is None) == (variant in ("diagonal", "identity"))
    assert result.residual is None or result.residual < 1e-6
    assert result.warning is None
    assert variant == "identity" or f"{variant} of {over.sum()} examples + 0.07 I" == result.inverted


@pytest.mark.parametrize("variant", ["fisher", "ggn", "diagonal", "published"])
def test_newton_never_looks_at_the_forgotten(toy, variant):
    data, params = toy
    how = TIGHT | {"variant": variant, "damping": DAMPING, "direction": "newton"}
    clean = unlearn.influence(linear, params, data, FORGET, **how)
    dirty = unlearn.influence(linear, params, poisoned(data, FORGET), FORGET, **how)
    np.testing.assert_array_equal(clean.params["w"], dirty.params["w"])


def test_half_precision_weights_are_stepped_from_in_float32(toy):
    data, params = toy
    low = {"w": params["w"].astype(jnp.bfloat16)}
    same = {"w": low["w"].astype(jnp.float32)}
    how = TIGHT | {"variant": "ggn", "damping": DAMPING, "weight_decay": DECAY}
    short, full = (unlearn.influence(linear, start, data, FORGET, **how) for start in (low, same))
    assert short.params["w"].dtype == jnp.float32  # the length that is stated is that of the step
    assert short.length == full.length
    np.testing.assert_array_equal(short.params["w"], full.params["w"])


# --- refits in closed form ---------------------------------------------------------------------------------------


def ridge(data, mask):
    """The minimiser of the mean squared loss of the members + DECAY / 2 |w|^2, in float64."""
    x, y = np.asarray(data.x, np.float64)[mask], np.asarray(data.y, np.float64)[mask]
    return np.linalg.solve(x.T @ x / len(x) + DECAY * np.eye(D), x.T @ y / len(x))


@pytest.fixture(scope="module")
def regression():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, D))
    y = x @ rng.normal(size=D) + rng.normal(size=N)
    data = Dataset(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), jnp.arange(N))
    return data, {"w": jnp.asarray(ridge(data, np.ones(N, bool))[:, None], jnp.float32)}


@pytest.mark.parametrize("variant", ["hessian", "ggn"])
@pytest.mark.parametrize("direction", ["difference", "newton"])
def test_removal_from_a_quadratic_loss_is_the_refit(regression, variant, direction):
    data, params = regression
    how = TIGHT | {"variant": variant, "damping": 0.0, "weight_decay": DECAY, "direction": direction, "loss": squared}
    result = unlearn.influence(linear, params, data, FORGET, **how)
    refit = ridge(data, ~FORGET)
    assert np.abs(refit - np.asarray(params["w"])[:, 0]).max() > 0.05
    np.testing.assert_allclose(result.params["w"][:, 0], refit, atol=1e-5)


def test_only_newton_mends_what_was_not_stationary(regression):
    data, params = regression
    moved = {"w": params["w"] + 0.5}
    refit = ridge(data, ~FORGET)
    how = TIGHT | {"variant": "ggn", "damping": 0.0, "weight_decay": DECAY, "loss": squared}
    newton = unlearn.influence(linear, moved, data, FORGET, direction="newton", **how)
    np.testing.assert_allclose(newton.params["w"][:, 0], refit, atol=1e-5)
    difference = unlearn.influence(linear, moved, data, FORGET, direction="difference", **how)
    assert np.abs(difference.params["w"][:, 0] - refit).max() > 0.2


def test_logistic_regression_against_refits_of_sklearn():
    rng = np.random.default_rng(2)
    count, decay = 200, 0.01
    x = rng.normal(size=(count, D)).astype(np.float32)
    y = np.argmax(x @ rng.normal(size=(D, K)) + rng.gumbel(size=(count, K)), axis=1)
    forget = np.arange(count) % 10 == 0

    def fit(mask):
        head = LogisticRegression(C=1 / (decay * mask.sum()), fit_intercept=False, tol=1e-10, max_iter=1000)
        return head.fit(x[mask], y[mask]).coef_.T

    before, refit = fit(np.ones(count, bool)), fit(~forget)
    data, params = Dataset(jnp.asarray(x), jnp.asarray(y), jnp.arange(count)), {"w": jnp.asarray(before, jnp.float32)}
    away = np.linalg.norm(before - refit)

    def left(**how):
        result = unlearn.influence(
            linear, params, data, forget, damping=0.0, weight_decay=decay, tolerance=1e-6, variant="ggn", **how
        )
        return np.linalg.norm(np.asarray(result.params["w"]) - refit) / away

    # Second order in the share forgotten with the retained curvature, first order with that of all data.
    assert left(direction="newton") < 0.05
    assert left(direction="difference") < 0.05
    assert left(direction="forget") < 0.2
    assert left(direction="forget", alpha=-1.0) > 1.8  # the minus of the SoK's equation (8)


# --- the empirical Fisher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 7, 22])
def test_gram_matrix_does_not_depend_on_the_blocks(toy, block):
    data, params = toy
    retained = sets.select(data, ~FORGET)
    gradients = by_hand(retained, params)[0]
    found = jax.jit(lambda p, d: inverse.gram(linear, p, d, loss=losses.cross_entropy, block=block))(params, retained)
    np.testing.assert_allclose(found, gradients @ gradients.T, atol=1e-6)


def test_small_damping_is_paid_back_by_refinement(toy):
    data, params = toy
    gradients, _ = by_hand(data, params)
    matrix = gradients[~FORGET].T @ gradients[~FORGET] / (~FORGET).sum()
    for damping in (1e-3, 1e-4):
        expected = np.linalg.solve(matrix + damping * np.eye(D * K), expected_direction(gradients, params, "difference"))
        result = unlearn.influence(linear, params, data, FORGET, variant="fisher", damping=damping, batch=BATCH, block=5)
        np.testing.assert_allclose(step_of(result, params), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        assert result.warning is None


def test_samples_are_spread_evenly_or_drawn(toy):
    data, params = toy
    gradients, _ = by_hand(data, params)
    members = np.flatnonzero(~FORGET)
    rows = gradients[members[[0, 3, 6, 9, 12, 15, 18]]]  # floor(22 i / 7)
    expected = np.linalg.solve(rows.T @ rows / 7 + DAMPING * np.eye(D * K), expected_direction(gradients, params, "difference"))

    def run(key=None):
        return unlearn.influence(
            linear, params, data, FORGET, variant="fisher", damping=DAMPING, samples=7, key=key, batch=BATCH, block=5
        )

    result = run()
    np.testing.assert_allclose(step_of(result, params), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert result.inverted.startswith("fisher of 7 examples")
    first, again, other = (step_of(run(jax.random.key(seed)), params) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 * np.abs(first).max()


# --- the published recursion -------------------------------------------------------------------------------------


def recursion(gradients, v, samples):
    """Straight from the published order; also the auxiliary vector at the end."""
    o, k = gradients[0].copy(), v.copy()
    for g in gradients[1:]:
        t = o @ g
        k = k - (k @ g) / (samples + t) * o
        o = o - t / (samples + t) * o
    return k, o


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize(("samples", "used"), [(5, 7), (None, 22)])
def test_published_recursion_is_that_of_a_loop_and_no_inverse(toy, samples, used):
    data, params = toy
    gradients, _ = by_hand(data, params)
    v, retained = expected_direction(gradients, params, "difference"), gradients[~FORGET]
    expected, o = recursion(retained[:used], v, samples or 1000)
    result = unlearn.influence(linear, params, data, FORGET, alpha=2.0, variant="published", samples=samples, batch=BATCH)
    found = step_of(result, params) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-6 * np.abs(v).max())
    one_fewer, _ = recursion(retained[: used - 1], v, samples or 1000)
    assert np.abs(expected - one_fewer).max() > 1e-5 * np.abs(v).max()  # else the stop would not be tested
    assert cosine(o, retained[0]) == pytest.approx(1.0, abs=1e-12)
    assert abs(cosine(v - found, retained[0])) > 0.999
    assert result.residual is None
    assert "no inverse" in result.inverted


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_doubtful_steps_carry_a_warning(toy, regression):
    data, params = toy
    how = {"variant": "hessian", "damping": 1e-3, "batch": BATCH}
    rough = unlearn.influence(linear, params, data, FORGET, iterations=1, **how)
    assert rough.residual > 0.01
    assert "relative residual" in rough.warning
    data, params = regression
    saddle = unlearn.influence(linear, params, data, FORGET, loss=concave, **how)
    assert saddle.residual < 1e-3
    assert "saddle" in saddle.warning
    convex = unlearn.influence(linear, params, data, FORGET, loss=concave, **how | {"damping": 10.0})
    assert convex.warning is None


def test_steps_that_are_not_finite_are_refused(regression):
    _, params = regression
    # D_r is the four unit vectors times two, so the Hessian of the concave loss is -I, and damping 1 leaves nothing.
    x = jnp.concatenate([2 * jnp.eye(D), jnp.ones((1, D))])
    data = Dataset(x, jnp.arange(D + 1.0), jnp.arange(D + 1))
    forget = np.arange(D + 1) == D
    with pytest.raises(NonFinite, match="raise damping"):
        unlearn.influence(linear, params, data, forget, variant="hessian", damping=1.0, loss=concave)
    broken = data._replace(x=x.at[0, 0].set(jnp.nan))
    with pytest.raises(NonFinite, match="gradient at w is not finite"):
        unlearn.influence(linear, params, broken, forget, variant="hessian", damping=1.0, loss=squared)


@pytest.mark.parametrize(
    ("forget", "how", "message"),
    [
        (np.zeros(N, bool), {}, "forget set is empty"),
        (np.ones(N, bool), {}, "covers all data"),
        (FORGET[:-1], {}, "one entry an example"),
        (FORGET, {"alpha": np.inf}, "alpha must be finite"),
        (FORGET, {"damping": 0.0}, "needs damping > 0"),
        (FORGET, {"damping": 0.0, "variant": "diagonal"}, "needs damping > 0"),
        (FORGET, {"damping": -1.0, "variant": "ggn"}, "not negative"),
        (FORGET, {"damping": np.nan, "variant": "ggn"}, "must be finite"),
        (FORGET, {"weight_decay": -1.0}, "weight_decay"),
        (FORGET, {"samples": 23}, "samples=23 are more than the 22 examples"),
        (FORGET, {"samples": 31, "direction": "forget"}, "more than the 30 examples"),
        (FORGET, {"samples": 0}, "at least 1"),
        (FORGET, {"block": 0}, "block and batch"),
        (FORGET, {"iterations": 0}, "iterations"),
        (FORGET, {"variant": "kfac"}, "variant must be one of"),
        (FORGET, {"direction": "back"}, "direction must be one of"),
    ],
)
def test_bad_input(toy, forget, how, message):
    data, params = toy
    with pytest.raises(BadInput, match=message):
        unlearn.influence(linear, params, data, forget, **how)


# --- correcting features and labels ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corrected(regression):
    data, _ = regression
    rng = np.random.default_rng(3)
    x = jnp.where(FORGET[:, None], data.x + jnp.asarray(rng.normal(size=(N, D)), jnp.float32), data.x)
    return data._replace(x=x, y=jnp.where(FORGET, -data.y, data.y))


def test_second_order_correction_of_a_quadratic_loss_is_the_refit(regression, corrected):
    data, params = regression
    how = TIGHT | {"variant": "ggn", "damping": 0.0, "weight_decay": DECAY, "loss": squared}
    result = unlearn.correct(linear, params, data, corrected, FORGET, order=2, **how)
    refit = ridge(corrected, np.ones(N, bool))
    assert np.abs(refit - np.asarray(params["w"])[:, 0]).max() > 0.1
    np.testing.assert_allclose(result.params["w"][:, 0], refit, atol=1e-5)
    assert result.residual < 1e-6


def test_first_order_correction_by_hand(regression, corrected):
    data, params = regression
    w = np.asarray(params["w"], np.float64)[:, 0]

    def total(part):
        x, y = np.asarray(part.x, np.float64)[FORGET], np.asarray(part.y, np.float64)[FORGET]
        return x.T @ (x @ w - y)

    expected = -2e-3 * (total(corrected) - total(data))
    broken = [poisoned(part, ~FORGET) for part in (data, corrected)]  # rows that did not change are not looked at
    result = unlearn.correct(linear, params, *broken, FORGET, order=1, tau=2e-3, loss=squared, batch=BATCH)
    np.testing.assert_allclose(step_of(result, params), expected, rtol=1e-4, atol=1e-6)
    assert result.length == pytest.approx(np.linalg.norm(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "how", "message"),
    [
        (np.zeros(N, bool), {"tau": 1e-3}, "nothing to correct"),
        (FORGET[:-1], {"tau": 1e-3}, "boolean mask"),
        (FORGET, {}, "finite rate tau"),
        (FORGET, {"tau": np.nan}, "finite rate tau"),
        (FORGET, {"order": 2, "tau": 1.0}, "no rate"),
        (FORGET, {"order": 3}, "order must be 1 or 2"),
        (FORGET, {"order": 2, "variant": "fisher", "damping": 0.0}, "needs damping > 0"),
    ],
)
def test_bad_corrections(regression, corrected, changed, how, message):
    data, params = regression
    with pytest.raises(BadInput, match=message):
        unlearn.correct(linear, params, data, corrected, changed, loss=squared, **how)
    with pytest.raises(BadInput, match="one shape"):
        unlearn.correct(linear, params, data, sets.take(corrected, jnp.arange(5)), FORGET, tau=1e-3)


# --- a network with running statistics ---------------------------------------------------------------------------


@pytest.mark.slow
def test_frozen_statistics_travel_with_the_network(toy):
    data, _ = toy
    rng = np.random.default_rng(4)
    params = {"in": jnp.asarray(rng.normal(size=(D, 5)), jnp.float32), "out": jnp.asarray(rng.normal(size=(5, K)), jnp.float32)}
    network = models.from_apply(lambda key, x: params, lambda p, x: x)._replace(
        apply=lambda weights, x: jnp.tanh(x @ weights.params["in"] - weights.stats) @ weights.params["out"]
    )
    apply, params = models.freeze(network, Weights(params, jnp.arange(5.0)))
    result = unlearn.influence(apply, params, data, FORGET, variant="ggn", damping=0.1, direction="forget", batch=BATCH)

    @jax.jit
    def left(apply, params, forgotten, step):
        bent = curvature.ggn_product(apply, params, data, step)
        gradient = curvature.mean_gradient(apply, params, forgotten)
        wanted = jax.tree.map(lambda g: g * FORGET.mean(), gradient)
        rest = jax.tree.map(lambda b, s, w: b + 0.1 * s - w, bent, step, wanted)
        return tree.norm(rest) / tree.norm(wanted)

    step = jax.tree.map(jnp.subtract, result.params, params)
    assert float(left(apply, params, sets.select(data, FORGET), step)) < 1e-3
