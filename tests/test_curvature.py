"""Curvature products over a data set against dense matrices and loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dememo_jax import curvature, losses
from dememo_jax import data as sets
from dememo_jax.errors import BadInput

N, D, H, K, BATCH = 11, 4, 3, 3, 4  # 11 examples in blocks of 4: the last one is padded
MASK = np.arange(N) % 3 != 1  # 7 members, of which the last block holds 3


def network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"]


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(D, H)), "out": rng.normal(size=(H, K)), "bias": rng.normal(size=K)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    data = sets.make(rng.uniform(size=(N, D)).astype(np.float32), rng.integers(0, K, N))
    vector = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    poisoned = data._replace(x=jnp.where(MASK[:, None], data.x, jnp.nan))
    return params, data, vector, poisoned


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


@pytest.fixture(scope="module")
def truth(toy):
    """Of every example, in float64: gradients [N, P], and Hessian and Gauss-Newton matrices [N, P, P]."""
    params, data, _, _ = toy
    with jax.enable_x64(True):
        start, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params))
        x, y = jnp.asarray(np.asarray(data.x), jnp.float64), jnp.asarray(np.asarray(data.y))

        def logits(w):
            return network(unravel(w), x)

        def each(w):
            return losses.cross_entropy(logits(w), y)

        derivatives = jax.jit(lambda w: (jax.jacrev(each)(w), jax.hessian(each)(w), jax.jacfwd(logits)(w), logits(w)))
        gradients, hessians, jacobian, z = map(np.asarray, derivatives(start))
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    inner = [np.diag(row) - np.outer(row, row) for row in p]  # of softmax cross-entropy, by hand
    return gradients, hessians, np.stack([j.T @ h @ j for j, h in zip(jacobian, inner)])


def test_hvp_of_a_scalar_function(toy):
    params, _, vector, _ = toy

    def objective(p):
        return (p["in"] ** 3).sum() + 2.0 * p["bias"].sum() ** 2

    found = curvature.hvp(objective, params, vector)
    np.testing.assert_allclose(found["in"], 6 * params["in"] * vector["in"], rtol=1e-5)
    np.testing.assert_allclose(found["bias"], np.full(K, 4 * float(vector["bias"].sum())), rtol=1e-5)
    np.testing.assert_array_equal(found["out"], 0)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function])
def test_masked_means_against_dense_matrices(toy, truth, wrap):
    params, _, vector, poisoned = toy
    gradients, hessian, ggn = truth[0][MASK], truth[1][MASK].mean(axis=0), truth[2][MASK].mean(axis=0)
    how = {"batch": BATCH}
    mask = jnp.asarray(MASK)
    found = wrap(lambda p, d, m: curvature.mean_gradient(network, p, d, mask=m, **how))(params, poisoned, mask)
    np.testing.assert_allclose(flat(found), gradients.mean(axis=0), atol=1e-6)
    for product, matrix in ((curvature.hessian_product, hessian), (curvature.ggn_product, ggn)):
        found = wrap(lambda p, d, v, m, product=product: product(network, p, d, v, mask=m, **how))(
            params, poisoned, vector, mask
        )
        np.testing.assert_allclose(flat(found), matrix @ flat(vector), atol=3e-6)
    found = wrap(lambda p, d, m: curvature.fisher_diagonal(network, p, d, mask=m, **how))(params, poisoned, mask)
    np.testing.assert_allclose(flat(found), np.square(gradients).mean(axis=0), atol=1e-6)


def test_products_differ_where_the_network_is_curved(truth):
    hessian, ggn = truth[1].mean(axis=0), truth[2].mean(axis=0)
    assert np.abs(hessian - ggn).max() > 1e-3  # else the test above could not tell them apart
    assert np.linalg.eigvalsh(hessian)[0] < -1e-4
    assert np.linalg.eigvalsh(ggn)[0] > -1e-9


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_whole_set_does_not_depend_on_the_blocks(toy, truth, batch):
    params, data, vector, _ = toy
    gradients, hessian = truth[0], truth[1].mean(axis=0)
    np.testing.assert_allclose(
        flat(curvature.mean_gradient(network, params, data, batch=batch)), gradients.mean(axis=0), atol=1e-6
    )
    found = curvature.hessian_product(network, params, data, vector, batch=batch)
    np.testing.assert_allclose(flat(found), hessian @ flat(vector), atol=3e-6)
    np.testing.assert_allclose(
        curvature.slopes(network, params, data, vector, batch=batch), gradients @ flat(vector), atol=5e-6
    )
    weights = np.random.default_rng(1).normal(size=N).astype(np.float32)
    found = curvature.weighted_gradient(network, params, data, jnp.asarray(weights), batch=batch)
    np.testing.assert_allclose(flat(found), gradients.T @ weights, atol=5e-6)


def test_gradients_of_single_examples(toy, truth):
    params, data, _, _ = toy
    rows = curvature.example_gradients(network, params, data)
    assert rows["in"].shape == (N, D, H)
    joined = np.concatenate([np.asarray(leaf).reshape(N, -1) for leaf in jax.tree.leaves(rows)], axis=1)
    np.testing.assert_allclose(joined, truth[0], atol=1e-6)


def test_another_loss_has_another_gauss_newton_matrix(toy):
    params, data, vector, _ = toy

    def quartic(logits, y):
        return (logits**4).sum(axis=-1) / 12  # Hessian diag(z^2)

    found = curvature.ggn_product(network, params, data, vector, loss=quartic, batch=BATCH)
    _, unravel = ravel_pytree(params)
    jacobian = np.asarray(jax.jacfwd(lambda w: network(unravel(w), data.x))(ravel_pytree(params)[0]), np.float64)
    z = np.asarray(network(params, data.x), np.float64)
    matrix = np.mean([j.T @ np.diag(row**2) @ j for j, row in zip(jacobian, z)], axis=0)
    np.testing.assert_allclose(flat(found), matrix @ flat(vector), rtol=1e-4, atol=1e-4)


def test_total_visits_every_member_once_and_no_other(toy):
    visited = functools.partial(
        curvature.total, lambda block, real: jnp.where(real, block, 0).sum(), jnp.arange(N), batch=BATCH
    )
    blocks = functools.partial(curvature.total, lambda block, real: jnp.ones(()), jnp.arange(N), batch=BATCH)
    assert float(visited()) == sum(range(N))
    assert float(blocks()) == 3
    for members in ([7], [0, 3, 4, 9], [1, 2, 5, 6, 10]):
        mask = jnp.zeros(N, bool).at[jnp.asarray(members)].set(True)
        assert float(visited(mask=mask)) == sum(members)
        assert float(blocks(mask=mask)) == -(-len(members) // BATCH)


def test_half_precision_params_are_summed_in_float32(toy):
    params, data, _, _ = toy
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    many = jax.tree.map(lambda part: jnp.repeat(part, 100, axis=0), data)

    def constant(p, x):
        return jnp.zeros((len(x), K), jnp.bfloat16) + p["bias"]

    def loss(logits, y):
        return logits.sum(axis=-1)

    # 1,100 equal summands one by one: bfloat16 would stop counting at 256.
    found = curvature.mean_gradient(constant, low, many, loss=loss, batch=1)
    assert found["bias"].dtype == jnp.float32  # nor is the mean rounded
    np.testing.assert_array_equal(np.asarray(found["bias"], np.float32), 1.0)


@pytest.mark.parametrize(
    ("mask", "batch", "message"),
    [
        (np.zeros(N, bool), 4, "mask is empty"),
        (np.ones(N - 1, bool), 4, "one entry an example"),
        (np.ones(N, int), 4, "boolean"),
        (None, 0, "at least one example"),
    ],
)
def test_bad_input(toy, mask, batch, message):
    params, data, _, _ = toy
    with pytest.raises(BadInput, match=message):
        curvature.mean_gradient(network, params, data, mask=mask, batch=batch)
