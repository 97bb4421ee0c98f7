"""Diagonal, trace, layer blocks and eigenpairs against dense matrices and the variances that theory predicts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh

from dememo_jax import curvature, losses
from dememo_jax import data as sets
from dememo_jax.errors import BadInput

KEY = jax.random.key(0)
LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
P = 10


def matrix(seed=0):
    half = np.random.default_rng(seed).normal(size=(P, P))
    return half + half.T + np.diag(np.arange(P) * 3.0)


def operator(dense):
    """A matrix in the order of `ravel_pytree` as an operator on trees like LIKE."""
    _, restore = ravel_pytree(LIKE)

    def product(vectors):
        rows = jax.vmap(lambda one: ravel_pytree(one)[0])(vectors)
        return jax.vmap(restore)(rows @ jnp.asarray(dense, jnp.float32))

    return product


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def test_diagonal_is_exact_from_one_probe_of_a_diagonal_matrix():
    found = curvature.diagonal(operator(np.diag(np.arange(P) - 3.0)), LIKE, KEY, probes=1)
    np.testing.assert_array_equal(flat(found.value), np.arange(P) - 3.0)
    assert np.isinf(flat(found.error)).all()  # one probe cannot tell
    np.testing.assert_array_equal(flat(curvature.diagonal(operator(np.eye(P)), LIKE, KEY, probes=8).error), 0.0)


@pytest.mark.slow
def test_errors_are_what_theory_predicts():
    dense, probes = matrix(), 4000
    off = dense - np.diag(np.diag(dense))
    found = jax.jit(lambda key: curvature.diagonal(operator(dense), LIKE, key, probes=probes, width=100))(KEY)
    predicted = np.sqrt((off**2).sum(axis=1) / probes)
    np.testing.assert_allclose(flat(found.error), predicted, rtol=0.1)  # Gaussian probes would add 2 H_ii^2
    assert (np.abs(flat(found.value) - np.diag(dense)) < 5 * predicted).all()
    found = curvature.trace(operator(dense), LIKE, KEY, probes=probes, width=100)
    predicted = np.sqrt(2 * (off**2).sum() / probes)
    np.testing.assert_allclose(found.error, predicted, rtol=0.1)
    assert abs(float(found.value) - np.trace(dense)) < 5 * predicted


@pytest.mark.slow
def test_four_times_the_probes_halve_the_error():
    few, many = (flat(curvature.diagonal(operator(matrix()), LIKE, KEY, probes=n, width=50).error) for n in (500, 2000))
    np.testing.assert_allclose(few / many, 2.0, rtol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2, 4, 6, 9])
def test_width_changes_nothing(width):
    alone = curvature.diagonal(operator(matrix()), LIKE, KEY, probes=6, width=1)
    found = curvature.diagonal(operator(matrix()), LIKE, KEY, probes=6, width=width)
    np.testing.assert_allclose(flat(found.value), flat(alone.value), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(flat(found.error), flat(alone.error), rtol=1e-4, atol=1e-5)


def test_layer_blocks():
    dense, random = matrix(), np.random.default_rng(1)
    vectors = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), LIKE)
    v, edges = flat(vectors), [0, 6, 10]
    parts = [np.where((np.arange(P) >= a) & (np.arange(P) < b), v, 0) for a, b in itertools.pairwise(edges)]
    truth = np.array([part @ dense @ part for part in parts])
    for width in (1, 2, 4):
        np.testing.assert_allclose(flat(curvature.exact_layer_blocks(operator(dense), vectors, width=width)), truth, rtol=1e-5)
    probes = 2000
    found = curvature.layer_blocks(operator(dense), vectors, KEY, probes=probes, width=100)
    predicted = abs(parts[0] @ dense @ parts[1]) / np.sqrt(probes)
    np.testing.assert_allclose(flat(found.error), predicted, rtol=0.05)
    assert (np.abs(flat(found.value) - truth) < 5 * predicted).all()


def test_exact_diagonal_and_matrix():
    dense = matrix()
    for width in (3, 64):
        np.testing.assert_allclose(
            flat(curvature.exact_diagonal(operator(dense), LIKE, width=width)), np.diag(dense), rtol=1e-5
        )
        np.testing.assert_allclose(curvature.dense(operator(dense), LIKE, width=width), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["largest", "magnitude"])
def test_top_eigenpairs_against_scipy(which):
    dense = matrix() - 20 * np.eye(P)  # the largest and the largest in magnitude differ
    linear = LinearOperator((P, P), matvec=lambda v: dense @ v)
    values = np.sort(eigsh(linear, k=3, which="LA" if which == "largest" else "LM", return_eigenvectors=False))
    found = jax.jit(lambda key: curvature.top_eigenpairs(operator(dense), LIKE, key, count=3, which=which))(KEY)
    np.testing.assert_allclose(np.sort(found.values), values, rtol=1e-4)
    assert float(found.residuals.max()) < 1e-2
    for i in range(3):
        vector = flat(jax.tree.map(lambda leaf, i=i: leaf[i], found.vectors))
        np.testing.assert_allclose(np.linalg.norm(vector), 1.0, rtol=1e-4)
        np.testing.assert_allclose(dense @ vector, float(found.values[i]) * vector, atol=5e-3)


def test_eigenpairs_where_the_krylov_space_is_used_up():
    ones = curvature.top_eigenpairs(operator(np.eye(P)), LIKE, KEY, count=4)
    np.testing.assert_allclose(ones.values, 1.0, rtol=1e-5)
    rank_one = np.outer(np.arange(P), np.arange(P)) / 10.0
    found = curvature.top_eigenpairs(operator(rank_one), LIKE, KEY, count=2)
    np.testing.assert_allclose(found.values, [28.5, 0.0], atol=1e-3)


def test_few_steps_have_residuals_that_say_so():
    dense = np.diag(np.linspace(1, 2, P))
    found = curvature.top_eigenpairs(operator(dense), LIKE, KEY, count=1, steps=3)
    error = 2 - float(found.values[0])
    assert 1e-4 < error <= float(found.residuals[0])


# --- of a network ------------------------------------------------------------------------------------------------


def network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


@pytest.fixture(scope="module")
def toy():
    random = np.random.default_rng(0)
    params = {"in": random.normal(size=(3, 3)), "out": random.normal(size=(3, 2))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return params, sets.make(random.uniform(size=(11, 3)).astype(np.float32), random.integers(0, 2, 11))


@pytest.mark.slow
@pytest.mark.parametrize("of", ["hessian", "ggn"])
def test_operator_against_a_dense_matrix(toy, of):
    params, data = toy
    start, restore = ravel_pytree(params)
    if of == "hessian":
        truth = jax.hessian(lambda w: losses.cross_entropy(network(restore(w), data.x), data.y).mean())(start)
    else:
        jacobian = np.asarray(jax.jacfwd(lambda w: network(restore(w), data.x))(start))
        p = np.asarray(jax.nn.softmax(network(params, data.x)))
        truth = np.mean([j.T @ (np.diag(q) - np.outer(q, q)) @ j for j, q in zip(jacobian, p)], axis=0)
    product = curvature.operator(network, params, data, of=of, batch=4)
    np.testing.assert_allclose(curvature.dense(product, params), truth, atol=2e-6)
    np.testing.assert_allclose(flat(curvature.exact_diagonal(product, params)), np.diag(truth), atol=2e-6)
    block, kept = curvature.restricted(product, params, [False, True])
    assert [leaf.shape for leaf in kept] == [(3, 2)]
    np.testing.assert_allclose(curvature.dense(block, kept), truth[9:, 9:], atol=2e-6)


def test_operator_with_a_mask_and_as_an_argument(toy):
    params, data = toy
    mask = np.arange(11) % 2 == 0
    part = sets.select(data, mask)
    traced = jax.jit(lambda product: curvature.dense(product, params))
    found = traced(curvature.operator(network, params, data, mask=mask, batch=4))
    np.testing.assert_allclose(found, traced(curvature.operator(network, params, part, batch=4)), atol=1e-6)


def test_bad_input(toy):
    params, data = toy
    refused = functools.partial(pytest.raises, BadInput)
    with refused(match="'hessian' or 'ggn'"):
        curvature.operator(network, params, data, of="fisher")
    with refused(match=r"10 parameters are too many"):
        curvature.exact_diagonal(operator(np.eye(P)), LIKE, most=9)
    with refused(match="at least one probe"):
        curvature.trace(operator(np.eye(P)), LIKE, KEY, probes=0)
    with refused(match="1 to 10 eigenpairs"):
        curvature.top_eigenpairs(operator(np.eye(P)), LIKE, KEY, count=11)
    with refused(match="'largest' or 'magnitude'"):
        curvature.top_eigenpairs(operator(np.eye(P)), LIKE, KEY, which="smallest")
