"""NTGA: the kernel against finite networks, the gradient against differences, and what the noise does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import data as sets
from dememo_jax import sources
from dememo_jax.errors import BadInput
from dememo_jax.protect import tangent

W, B = tangent.WEIGHT_STD, tangent.BIAS_STD
RADIUS = 0.2


@pytest.fixture(scope="module")
def digits():
    train, test = sources.load("digits")
    return sets.make(np.asarray(train.x)[:300], np.asarray(train.y)[:300]), test


@pytest.fixture(scope="module")
def protected(digits):
    method = tangent.ntga(radius=RADIUS, steps=5, block=150, validation=100, rate=100.0)
    state, step = method.init(jax.random.key(0), digits[0]), jax.jit(method.step)
    history = []
    for t in range(5):
        state, info = step(jax.random.key(t), state, digits[0])
        history.append(float(info["loss"]))
    return state, history


def empirical(x, width, depth, seed):
    """Gram matrix of the parameter gradients of one finite network in the NTK parametrisation."""
    sizes = [x.shape[1], *[width] * depth, 1]
    to = jax.random.split(jax.random.key(seed), len(sizes))
    params = [(jax.random.normal(k, (n, m)), jax.random.normal(jax.random.fold_in(k, 1), (m,)))
              for k, n, m in zip(to, sizes, sizes[1:])]  # fmt: skip

    def output(params, row):
        for i, (weight, bias) in enumerate(params):
            row = W / np.sqrt(len(weight)) * row @ weight + B * bias
            row = jax.scipy.special.erf(row) if i < depth else row
        return row[0]

    rows = [part.reshape(len(x), -1) for part in jax.tree.leaves(jax.vmap(jax.grad(output), (None, 0))(params, x))]
    return sum(part @ part.T for part in rows)


@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kernel_is_that_of_wide_networks(depth):
    x = jax.random.uniform(jax.random.key(3), (4, 6)) * jnp.asarray([[1.0], [0.2], [1.0], [2.0]])
    network = jax.jit(lambda seed: empirical(x, 1500, depth, seed))
    found = np.mean([network(seed) for seed in range(16)], axis=0)
    exact = np.asarray(tangent.erf_ntk(x, x, depth=depth))
    np.testing.assert_allclose(found, exact, rtol=0.04)
    for wrong in ({"depth": depth + 1}, {"weight_std": W * 1.1}, {"bias_std": B * 1.3}):
        assert np.abs(np.asarray(tangent.erf_ntk(x, x, **{"depth": depth, **wrong})) / exact - 1).max() > 0.08


def test_kernel_is_symmetric_and_positive(digits):
    x = digits[0].x.reshape(300, -1)
    gram = np.asarray(jax.jit(tangent.erf_ntk)(x, x), np.float64)
    np.testing.assert_allclose(gram, gram.T, rtol=1e-5)
    assert np.linalg.eigvalsh(gram).min() > -1e-5 * np.trace(gram)
    np.testing.assert_allclose(tangent.erf_ntk(x[:5], x[:9]), gram[:5, :9], rtol=1e-5)


def exact_flow(gram, y, span):
    values, vectors = np.linalg.eigh(gram)
    return vectors @ ((-np.expm1(-span * values) / values)[:, None] * (vectors.T @ y))


@pytest.mark.parametrize(
    "values", [(1.0, 1.0, 1.0, 1.0), (1e-4, 1e-4, 3.0, 900.0), (0.5, 0.5001, 2.0, 2.02), (40.0, 40.3, 80.0, 1e-6)]
)
def test_flow_and_its_derivative_hold_for_equal_eigenvalues(values):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    gram, y, turn = (basis * values) @ basis.T, rng.normal(size=(4, 2)), rng.normal(size=(4, 4))
    turn = turn + turn.T
    as_jax = [jnp.asarray(part, jnp.float32) for part in (gram, y, turn)]
    found, slope = jax.jvp(lambda g: tangent.flow(g, as_jax[1], 1.5), (as_jax[0],), (as_jax[2],))
    np.testing.assert_allclose(found, exact_flow(gram, y, 1.5), rtol=1e-3, atol=1e-4)
    h = 1e-6 if min(values) > 1e-3 else 1e-7
    differences = (exact_flow(gram + h * turn, y, 1.5) - exact_flow(gram - h * turn, y, 1.5)) / (2 * h)
    np.testing.assert_allclose(slope, differences, rtol=2e-3, atol=2e-3)


def test_gradient_by_the_images_is_that_of_differences():
    rng = np.random.default_rng(2)
    x, seen = rng.uniform(size=(8, 5)), rng.uniform(size=(6, 5)).astype(np.float32)
    x[1] = x[0]  # two equal images of different classes
    y = np.eye(3)[rng.integers(0, 3, 8)]
    weight, turn = rng.normal(size=(6, 3)), rng.normal(size=x.shape)

    def value(x):
        return (tangent.predict(x, jnp.asarray(y, x.dtype), jnp.asarray(seen, x.dtype), time=2000.0) * weight).sum()

    slope = float((jax.jit(jax.grad(value))(jnp.asarray(x, jnp.float32)) * turn).sum())
    with jax.enable_x64(True):
        wide = [float(jax.jit(value)(jnp.asarray(x + s * 1e-5 * turn))) for s in (1, -1)]
    assert slope == pytest.approx((wide[0] - wide[1]) / 2e-5, rel=2e-3)


def test_rows_that_are_not_real_are_not_there(digits):
    x, seen = digits[0].x[:20].reshape(20, -1), digits[1].x[:7].reshape(7, -1)
    y, real = jax.nn.one_hot(digits[0].y[:20], 10), jnp.arange(20) < 15
    learned = jax.jit(tangent.predict)
    found = learned(x, y * real[:, None], seen, real=real)
    np.testing.assert_allclose(found, learned(x[:15], y[:15], seen), rtol=1e-3, atol=1e-5)


def test_training_on_the_noise_teaches_less(digits, protected):
    train, test = digits
    state, history = protected
    assert history[-1] > history[0]
    order = np.asarray(jax.random.permutation(state.order, 300))
    rng = np.random.default_rng(0)
    random = sets.perturb(train, state.perturbation._replace(delta=jnp.asarray(RADIUS * rng.choice([-1, 1], train.x.shape))))
    seen = test.x.reshape(len(test.y), -1)

    learned = jax.jit(partial(tangent.predict, time=6400.0))

    def accuracy(data):
        scores = []
        for at in np.split(order, 2):
            part = sets.take(data, jnp.asarray(at))
            out = learned(part.x.reshape(150, -1), jax.nn.one_hot(part.y, 10), seen)
            scores.append((out.argmax(-1) == test.y).mean())
        return float(np.mean(scores))

    clean, noisy, poisoned = accuracy(train), accuracy(random), accuracy(sets.perturb(train, state.perturbation))
    print(f"clean {clean:.3f}, random signs {noisy:.3f}, ntga {poisoned:.3f}, losses {history}")
    assert poisoned < noisy - 0.1
    assert poisoned < clean - 0.1


def test_noise_keeps_to_radius_box_and_mask(digits, protected):
    train, state = digits[0], protected[0]
    delta = np.asarray(state.perturbation.delta)
    assert np.abs(delta).max() <= RADIUS + 1e-6
    moved = np.asarray(train.x) + delta
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    assert (delta != 0).any(axis=(1, 2, 3)).all()
    small = sets.make(np.asarray(train.x)[:41], np.asarray(train.y)[:41])  # 3 blocks of 14: one place is padding
    mask = np.arange(41) % 3 > 0
    method = tangent.ntga(radius=RADIUS, block=14, validation=20, depth=2)
    start, step = method.init(jax.random.key(0), small, mask), jax.jit(method.step)
    found = step(jax.random.key(1), start, small)[0].perturbation
    np.testing.assert_array_equal((np.asarray(found.delta) != 0).any(axis=(1, 2, 3)), mask)
    again = step(jax.random.key(1), start, small)[0].perturbation
    np.testing.assert_array_equal(found.delta, again.delta)
    other = step(jax.random.key(2), start, small)[0].perturbation
    assert (np.asarray(found.delta) != np.asarray(other.delta)).any()


def test_published_form_is_one_step_of_the_whole_radius(digits):
    small = sets.make(np.asarray(digits[0].x)[:40], np.asarray(digits[0].y)[:40])
    method = tangent.ntga(radius=RADIUS, block=20, validation=20, depth=1, form="published")
    step = jax.jit(method.step)
    once = step(jax.random.key(1), method.init(jax.random.key(0), small), small)[0]
    twice = step(jax.random.key(1), once, small)[0]
    np.testing.assert_array_equal(once.perturbation.delta, twice.perturbation.delta)
    x, delta = np.asarray(small.x), np.asarray(once.perturbation.delta)
    inner = (x > RADIUS) & (x < 1 - RADIUS)
    np.testing.assert_allclose(np.abs(delta[inner]), RADIUS, rtol=1e-5)
    first = tangent.ntga(radius=RADIUS, stride=RADIUS, block=20, validation=20, depth=1)
    same = jax.jit(first.step)(jax.random.key(1), first.init(jax.random.key(0), small), small)[0]
    np.testing.assert_array_equal(same.perturbation.delta, delta)


@pytest.mark.parametrize(
    "wrong", [{"radius": 0.0}, {"radius": 1.5}, {"radius": float("nan")}, {"block": 1}, {"validation": 0}, {"stride": -1.0},
              {"steps": 0}, {"form": "other"}, {"time": 0.0}, {"ridge": 0.0}]
)  # fmt: skip
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(BadInput):
        tangent.ntga(**wrong)
