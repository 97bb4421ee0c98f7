"""Noise of releases: its law, and that its digits do not tell what it was added to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dememo_jax import data as sets
from dememo_jax import models, noise, tree, unlearn
from dememo_jax.types import Weights

KEY = jax.random.key(5)
RUNS, P = 100, 64


@pytest.fixture(scope="module")
def support():
    """All 2^23 values of `jax.random.normal` in float32, sorted."""
    bits = np.arange(2**23, dtype=np.uint32) | np.float32(1).view(np.uint32)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = np.maximum(low, (bits.view(np.float32) - 1) * (1 - low) + low)
    found = np.sort(np.float32(np.sqrt(2)) * np.asarray(jax.jit(jax.scipy.special.erfinv)(uniform)))
    drawn = np.asarray(jax.random.normal(KEY, (1000,)))
    assert np.isin(drawn, found).all()
    return found


def named(released, starts, sigma, support):
    """Which of two starts [2, P] each release [RUNS, P] is named to come from, by whether their differences are noise.

    Coordinate by coordinate: is there a value of the generator that makes this number out of that start, after rounding?
    """
    feasible = np.empty((2, RUNS), int)
    for number, start in enumerate(starts):
        near = np.searchsorted(support, (released - start) / np.float32(sigma))[..., None] + np.arange(-8, 8)
        tried = support[np.clip(near, 0, len(support) - 1)]
        feasible[number] = (start[:, None] + np.float32(sigma) * tried == released[..., None]).any(axis=-1).sum(axis=1)
    coin = np.arange(RUNS) % 2
    return np.where(feasible[0] == feasible[1], coin, feasible.argmax(axis=0))


def test_digits_do_not_name_the_start(support):
    model = models.from_apply(lambda key, x: jnp.zeros(P), lambda params, x: jnp.zeros((len(x), 2)) + params[:2])
    sigma = unlearn.calibrate(1.0, 1e-5, steps=1, lr=0.0, clip_init=0.1, clip_grad=0.0)
    method = unlearn.output_perturbation(model, clip_init=0.1, sigma=sigma)
    random = np.random.default_rng(0)
    starts = random.normal(size=(2, P)).astype(np.float32)
    starts *= np.float32(0.09) / np.linalg.norm(starts, axis=1, keepdims=True)
    truth = random.integers(0, 2, RUNS)
    each = jax.random.split(KEY, RUNS)
    given = jnp.asarray(starts[truth])

    bare = jax.jit(jax.vmap(lambda key, x: tree.add(x, tree.gaussian_like(key, x, sigma))))(each, given)
    right = (named(np.asarray(bare), starts, sigma, support) == truth).sum()
    assert right == RUNS  # the attack works on noise as it comes

    data, forget = sets.make(np.zeros((4, 2), np.float32), np.zeros(4, int)), np.arange(4) == 0

    def release(key, x):
        state = method.init(key, Weights(x, ()), data, forget)
        return method.step(key, state, data)[0].weights.params

    released = np.asarray(jax.jit(jax.vmap(release))(each, given))
    right = (named(released, starts, sigma, support) == truth).sum()
    print(f"named after: {right} of {RUNS}")
    assert 30 <= right <= 70  # chance is 50, with a standard deviation of 5
    cells = released / np.float32(noise.grid(sigma))
    np.testing.assert_array_equal(cells, np.round(cells))  # one grid for every start


def test_cells_are_full_in_the_tails_too(support):
    """How many values of the noise fall into one cell of the grid: thousands, where those of the usual generator are few."""
    cell = float(noise.grid(1.0))
    bits = np.arange(2**23, dtype=np.float64)
    for place in (0.5, 2.0, 4.0, 5.0):
        exponent = int(np.floor(-np.log2(stats.norm.sf(place)))) - 1
        probability = np.float32((1 + bits / 2**23) * 2.0 ** (-2 - exponent))
        size = -np.asarray(jax.jit(jax.scipy.special.ndtri)(probability))
        fine = len(np.unique(size[(size >= place) & (size < place + cell)]))
        coarse = ((support >= place) & (support < place + cell)).sum()
        assert fine > 5_000
        assert place < 4 or coarse < 15


def test_the_law():
    drawn = np.asarray(jax.jit(noise.standard, static_argnums=1)(KEY, (1_000_000,)), np.float64)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert stats.kstest(drawn[:1000] * 1.5, "norm").pvalue < 1e-6
    assert stats.kstest(drawn * 1.01, "norm").pvalue < 1e-6
    for far in (2, 3, 4):
        expected = 1e6 * stats.norm.sf(far)
        assert abs((drawn > far).sum() - expected) < 4 * np.sqrt(expected)
        assert abs((drawn < -far).sum() - expected) < 4 * np.sqrt(expected)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5e-3


@pytest.mark.parametrize("sigma", [1e-30, 3e-3, 1.0, 700.0])
def test_what_is_released(sigma):
    params = {"a": jnp.full(2000, 0.4), "b": jnp.zeros((2, 3), jnp.bfloat16)}
    released = jax.jit(noise.add)(KEY, params, sigma)
    assert {leaf.dtype for leaf in jax.tree.leaves(released)} == {jnp.dtype(jnp.float32)}
    step = float(noise.grid(sigma))
    assert sigma / 256 <= step <= sigma / 128 * (1 + 1e-6)
    assert np.log2(step) == round(np.log2(step))
    gone = np.asarray(released["a"], np.float64) - float(jnp.float32(0.4))
    if sigma > 1e-3:
        assert stats.kstest(gone / sigma, "norm").pvalue > 1e-3
        assert stats.kstest(gone / sigma / 1.5, "norm").pvalue < 1e-6
    assert np.isfinite(gone).all()


@pytest.mark.slow
def test_no_noise_rounds_nothing():
    params = jnp.asarray(np.random.default_rng(0).normal(size=100), jnp.float32)
    np.testing.assert_array_equal(noise.add(KEY, params, 0.0), params)
    assert np.isnan(noise.add(KEY, params.at[3].set(jnp.nan), 0.1)[3])


@pytest.mark.slow
def test_noise_of_float64():
    jax.config.update("jax_enable_x64", True)
    try:
        drawn = noise.standard(KEY, (20_000,), jnp.float64)
        assert drawn.dtype == jnp.float64
        assert stats.kstest(np.asarray(drawn), "norm").pvalue > 1e-3
        assert (np.asarray(drawn, np.float32) != np.asarray(drawn)).mean() > 0.99
        released = noise.add(KEY, {"wide": jnp.zeros(4, jnp.float64), "own": jnp.zeros(4, jnp.float32)}, 0.1)
        assert {name: str(leaf.dtype) for name, leaf in released.items()} == {"wide": "float64", "own": "float32"}
    finally:
        jax.config.update("jax_enable_x64", False)
