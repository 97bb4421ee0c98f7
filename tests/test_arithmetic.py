"""What a network multiplies: types, operations and weights of its traced program, against counts by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dememo_jax import adapters, arithmetic, models, nets

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def traced(net, x=X):
    """Products of a Linen network whose weights are known by shape alone."""
    model = models.from_linen(net)
    weights = jax.eval_shape(model.init, KEY, x)
    stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), weights.stats)
    return arithmetic.products(
        lambda params, x: model.apply(weights._replace(params=params, stats=stats), x), weights.params, x
    )


def test_operations_are_those_of_the_shapes():
    assert arithmetic.flops(traced(nets.mlp(5, (7,)))) == 2 * 2 * (192 * 7 + 7 * 5)
    full = traced(nets.resnet18(10), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    stem, first = 3 * 64 * 9 * 32**2, 4 * 64 * 64 * 9 * 32**2
    halved = 64 * 128 * 9 * 16**2 + 3 * 128 * 128 * 9 * 16**2 + 64 * 128 * 16**2  # the same in each later stage
    assert arithmetic.flops(full) == 2 * (stem + first + 3 * halved + 512 * 10)


def test_programs_inside_of_programs():
    def network(params, x):
        def body(carry, w):
            return jax.checkpoint(lambda a: jnp.tanh(a @ w))(carry), None

        x, _ = jax.lax.scan(body, x, params["stack"])
        x = jax.lax.cond(x.sum() > 0, lambda a: a @ params["head"], lambda a: a[:, :3], x)
        return x + params["added"] + jax.nn.softmax(x @ x.T) @ x

    params = {"stack": jnp.zeros((5, 4, 4)), "head": jnp.zeros((4, 3)), "added": jnp.zeros((2, 3))}
    found = arithmetic.products(network, params, jnp.zeros((2, 4)))
    assert arithmetic.flops(found) == 2 * (5 * 2 * 4 * 4 + 2 * 4 * 3 + 2 * 2 * 3 + 2 * 2 * 3)
    assert frozenset().union(*(product.parameters for product in found)) == {"stack", "head"}


def test_weights_are_what_activations_are_multiplied_by():
    def network(params, x):
        direction = params["v"] / jnp.linalg.norm(params["v"])  # weight normalisation
        rows = params["table"][jnp.arange(3) + x.sum().astype(int)]
        query = (x @ (params["g"] * direction)).reshape(-1, 2, 2) + params["bias"]
        return query.reshape(-1, 4) + params["position"] + rows.sum()

    shapes = {"v": (5, 4), "g": (4,), "table": (9, 2), "bias": (2, 2), "position": (1, 4)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    found = arithmetic.products(network, params, jnp.zeros((3, 5)))
    assert frozenset().union(*(product.parameters for product in found)) == {"v", "g", "table"}


def test_adapters_are_weights():
    model = models.from_linen(nn.Dense(4))
    adapted = adapters.lora(model, model.init(KEY, jnp.zeros((1, 6))), rank=2)
    weights = adapted.init(KEY, jnp.zeros((1, 6)))
    found = arithmetic.products(*models.freeze(adapted, weights), jnp.zeros((1, 6)))
    assert {"kernel/down", "kernel/up"} <= frozenset().union(*(product.parameters for product in found))


def test_types_of_the_factors_and_not_of_the_result():
    def share(net, dtype):
        return arithmetic.share(traced(net), dtype)

    assert share(nets.cnn(3, (4,)), jnp.float32) == 1
    assert share(nets.cnn(3, (4,), dtype=jnp.bfloat16), jnp.bfloat16) == pytest.approx(
        1 - 2 * 4 * 3 / (2 * (64 * 27 * 4 + 4 * 3))
    )
    assert arithmetic.share([], jnp.float32) == 1


def test_nnx_and_products_that_may_be_rounded():
    model = models.from_nnx(lambda rngs: nnx.Linear(6, 3, rngs=rngs))
    weights = model.init(KEY, jnp.zeros((1, 6)))
    (own,) = arithmetic.products(*models.freeze(model, weights), jnp.zeros((1, 6)))
    assert (own.parameters, own.full) == ({"kernel"}, True)
    (rounded,) = arithmetic.products(lambda p, x: jnp.matmul(x, p, precision="default"), jnp.zeros((6, 3)), jnp.zeros((1, 6)))
    assert not rounded.full
