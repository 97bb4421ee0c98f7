"""64-bit mode: everything about curvature and sharpness runs with float32 and with float64 weights, and says the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import curvature, sharpness
from dememo_jax import data as sets

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(8, 4)).astype(np.float32), np.arange(8) % 3
BASE = {"a": RANDOM.normal(size=(4, 3)), "b": RANDOM.normal(size=(3, 3))}


@pytest.fixture
def wide():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def curved(dtype):
    params, data, key = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), BASE), sets.make(X, Y, box=None), jax.random.key(0)
    given = apply, params, data
    product = curvature.operator(*given, batch=4)
    mask = jnp.arange(8) < 5
    return {
        "operator": product(jax.tree.map(lambda leaf: leaf[None], params)),
        "ggn operator": curvature.operator(*given, of="ggn", batch=4)(jax.tree.map(lambda leaf: leaf[None], params)),
        "trace": curvature.trace(product, params, key, probes=4),
        "diagonal": curvature.diagonal(product, params, key, probes=4),
        "layer_blocks": curvature.layer_blocks(product, params, key, probes=2),
        "exact_diagonal": curvature.exact_diagonal(product, params),
        "exact_layer_blocks": curvature.exact_layer_blocks(product, params),
        "dense": curvature.dense(product, params),
        "top_eigenpairs": curvature.top_eigenpairs(product, params, key, steps=21).values,
        "mean_loss": curvature.mean_loss(*given, mask=mask, batch=4),
        "mean_gradient": curvature.mean_gradient(*given, mask=mask, batch=4),
        "weighted_gradient": curvature.weighted_gradient(*given, jnp.arange(8.0), batch=4),
        "slopes": curvature.slopes(*given, params, batch=4),
        "hessian_product": curvature.hessian_product(*given, params, batch=4),
        "ggn_product": curvature.ggn_product(*given, params, batch=4),
        "fisher_diagonal": curvature.fisher_diagonal(*given, batch=4),
        "example_gradients": curvature.example_gradients(*given),
    }


def sharp(dtype):
    params, data, key = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), BASE), sets.make(X, Y, box=None), jax.random.key(0)
    ways = jax.tree.map(lambda leaf: jnp.asarray(np.ones((2, *leaf.shape)) / 10, dtype), BASE)
    points = [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf * i**0.5, dtype), BASE) for i in range(3)]
    points[1]["b"] = points[1]["b"] + 1
    metric = sharpness.loss_and_accuracy(apply, batch=4)
    found = {
        "plane": sharpness.plane(metric, params, data, ways, (0.0, 1.0), (0.0,)).values,
        "line": sharpness.line(metric, params, data, ways, (0.0, 1.0), width=2).values,
        "trajectory": np.abs(sharpness.trajectory(points).points),
        "directions": [leaf.shape for leaf in jax.tree.leaves(sharpness.random_directions(key, params))],
    }
    solvers = {
        "ball": {"rounds": 2}, "normalized": {"rounds": 2}, "one_step": {}, "hvp": {}, "diagonal": {"probes": 0},
        "sampled": {"solver": "diagonal", "probes": 2}, "hvp sampled": {"solver": "hvp", "probes": 2},
        "side by side": {"solver": "normalized", "rounds": 2, "width": 2},
    }  # fmt: skip
    for name, how in solvers.items():
        found[name] = sharpness.sal(*(apply, params, data), **{"solver": name, "batch": 4, **how}).value
    return found


def test_the_exact_diagonal_of_float64(wide):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), BASE)
    found = sharpness.sal(apply, params, sets.make(X, Y, box=None), solver="diagonal", probes=0)
    assert all(np.isfinite(value).all() for value in found.value.values())


@pytest.mark.slow
@pytest.mark.parametrize("measure", [curved, sharp])
def test_float32_and_float64_in_64_bit_mode(wide, measure):
    low, high = measure(jnp.float32), measure(jnp.float64)
    for name, value in high.items():
        jax.tree.map(lambda a, b, name=name: np.testing.assert_allclose(a, b, 2e-3, 2e-4, err_msg=name), low[name], value)
    if measure is curved:
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(high)} == {"float64"}
        kinds = {name: {str(leaf.dtype) for leaf in jax.tree.leaves(value)} for name, value in low.items()}
        assert kinds == {name: {"float32"} for name in low}
