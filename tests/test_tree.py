"""Trees against flat numpy vectors, Gaussian noise against its law, keys against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dememo_jax import keys, tree

KEY = jax.random.key(7)
RANDOM = np.random.default_rng(0)
TREE = {"a": RANDOM.normal(size=(3, 4)).astype(np.float32), "b": [RANDOM.normal(size=5).astype(np.float32)]}
CENTRE = jax.tree.map(lambda leaf: 0.1 * leaf + np.float32(0.3), TREE)


def flat(t):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(t)])


def test_size_norm_distance_and_add():
    assert tree.size(TREE) == 17
    assert tree.norm(TREE) == pytest.approx(np.linalg.norm(flat(TREE)), rel=1e-6)
    assert tree.distance(TREE, CENTRE) == pytest.approx(np.linalg.norm(flat(TREE) - flat(CENTRE)), rel=1e-6)
    np.testing.assert_allclose(flat(tree.add(TREE, CENTRE)), flat(TREE) + flat(CENTRE), rtol=1e-6)


def test_norm_accumulates_in_float32():
    found = tree.norm(jnp.ones(4_107, jnp.bfloat16))  # a bfloat16 sum would be 4096, and its root 64
    assert found == pytest.approx(np.sqrt(4_107), rel=1e-6)
    assert found.dtype == jnp.float32


def test_norm_of_what_is_not_a_number():
    assert np.isnan(tree.norm(jnp.array([np.nan, 1.0])))  # a distance of zero would pass for weights at the anchor
    assert np.isinf(tree.norm(jnp.array([np.inf, 1.0])))


def test_gradient_of_the_norm():
    grad = jax.jit(jax.grad(tree.norm))
    assert not flat(grad(jax.tree.map(np.zeros_like, TREE))).any()  # zero, not NaN
    np.testing.assert_allclose(flat(grad(TREE)), flat(TREE) / np.linalg.norm(flat(TREE)), rtol=1e-5)


def test_projections_land_at_the_radius_on_the_ray():
    offset = flat(TREE) - flat(CENTRE)
    length = np.linalg.norm(offset)
    ball, sphere = jax.jit(tree.project_ball), jax.jit(tree.project_sphere)
    for radius in (0.0, 0.01, 0.5 * length):  # from outside both go to the same nearest point
        expected = flat(CENTRE) + offset * radius / length
        np.testing.assert_allclose(flat(ball(TREE, CENTRE, radius)), expected, atol=1e-6)
        np.testing.assert_allclose(flat(sphere(TREE, CENTRE, radius)), expected, atol=1e-6)
    for radius in (1.5 * length, 40.0):  # from inside the ball leaves the bits alone, the sphere pushes out
        jax.tree.map(np.testing.assert_array_equal, ball(TREE, CENTRE, radius), TREE)
        expected = flat(CENTRE) + offset * radius / length
        np.testing.assert_allclose(flat(sphere(TREE, CENTRE, radius)), expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, ball(CENTRE, CENTRE, 1.0), CENTRE)
    jax.tree.map(np.testing.assert_array_equal, sphere(CENTRE, CENTRE, 1.0), CENTRE)  # no direction to go


def test_gaussian_like_has_the_law_of_each_leaf():
    like = {"a": jnp.zeros(100_000), "b": jnp.zeros((100, 1_000)), "c": jnp.zeros(5)}
    drawn = jax.jit(tree.gaussian_like)(KEY, like, {"a": 0.3, "b": 2.0, "c": 0.0})
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, like)
    a, b = (np.asarray(drawn[name], np.float64).ravel() for name in "ab")
    for sample, scale in ((a, 0.3), (b, 2.0)):
        assert stats.kstest(sample, "norm", (0, scale)).pvalue > 1e-3
        for wrong in (0.95, 1.05):
            assert stats.kstest(sample, "norm", (0, wrong * scale)).pvalue < 1e-6
        assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02  # 0.003 is one standard deviation
    assert not np.any(drawn["c"])


def test_gaussian_like_keeps_to_its_keys():
    like = (jnp.zeros(6), jnp.zeros((2, 3), jnp.bfloat16))
    drawn = tree.gaussian_like(KEY, like, 0.5)
    assert drawn[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(drawn[0], 0.5 * jax.random.normal(jax.random.fold_in(KEY, 0), (6,)))
    np.testing.assert_array_equal(drawn[1], 0.5 * jax.random.normal(jax.random.fold_in(KEY, 1), (2, 3), jnp.bfloat16))
    np.testing.assert_array_equal(drawn[0], tree.gaussian_like(KEY, like, 0.5)[0])
    assert np.all(drawn[0] != tree.gaussian_like(jax.random.key(8), like, 0.5)[0])


def test_gaussian_like_of_a_single_array_and_scales_of_its_shape():
    scale = jnp.arange(4.0)
    expected = scale * jax.random.normal(jax.random.fold_in(KEY, 0), (4,))
    np.testing.assert_array_equal(tree.gaussian_like(KEY, jnp.zeros(4), scale), expected)


def test_keys_are_fold_ins():
    def same(a, b):
        return np.array_equal(jax.random.key_data(a), jax.random.key_data(b))

    assert same(keys.at(KEY, 5), jax.random.fold_in(KEY, 5))
    assert same(keys.named(KEY, "123456789"), jax.random.fold_in(KEY, 0xCBF43926))  # the check value of CRC-32
    assert not same(keys.named(KEY, "draw"), keys.named(KEY, "step"))
