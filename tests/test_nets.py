"""Reference networks: parameter counts in closed form, shapes of every stage, and forward passes written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import nets

KEY = jax.random.key(0)


def count(variables):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))


def shapes(net, x):
    """Variables and intermediate outputs of a network, as shapes only."""

    def trace(x):
        variables = net.init(KEY, x)
        return variables, net.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])

    variables, (logits, outputs) = jax.eval_shape(trace, jax.ShapeDtypeStruct(x, jnp.float32))
    return variables, logits, outputs["intermediates"]


def image(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def norm(x, params, stats, epsilon=1e-5):
    return (x - stats["mean"]) / jnp.sqrt(stats["var"] + epsilon) * params["scale"] + params["bias"]


def randomised(net, x):
    """Variables of the network's shapes, every weight and statistic random and none at its initial value."""
    random = np.random.default_rng(1)

    def draw(path, leaf):
        low = 0.1 if path[-1].key == "var" else -0.6
        return random.uniform(low, 0.6, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(net.init, KEY, x))


def same(net, by_hand, variables, x):
    def both(variables, x):
        return net.apply(variables, x), by_hand(variables["params"], variables.get("batch_stats"), x)

    np.testing.assert_allclose(*jax.jit(both)(variables, x), rtol=1e-4, atol=1e-5)


def test_resnet18_is_the_one_of_the_papers():
    variables, logits, outputs = shapes(nets.resnet18(10), (2, 32, 32, 3))
    assert count(variables) == 11_173_962
    assert logits.shape == (2, 10)
    assert outputs["Conv_0"]["__call__"][0].shape == (2, 32, 32, 64)  # a stem of stride 1, and no max-pool behind it
    sides = [outputs[f"BasicBlock_{i}"]["__call__"][0].shape[1:] for i in range(8)]
    assert sides == [(s, s, w) for s, w in [(32, 64), (16, 128), (8, 256), (4, 512)] for _ in range(2)]
    assert "kernel" in variables["params"]["Conv_0"]
    assert "bias" not in variables["params"]["Conv_0"]


@pytest.mark.parametrize(("classes", "change"), [(100, 90 * 513), (2, -8 * 513)])
def test_resnet18_head_follows_the_classes(classes, change):
    assert count(shapes(nets.resnet18(classes), (1, 32, 32, 3))[0]) == 11_173_962 + change


def test_mlp():
    net, x = nets.mlp(3, (6, 5)), image((4, 2, 2, 2))
    variables = randomised(net, x)
    assert count(variables) == 8 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3

    def by_hand(params, _, x):
        x = x.reshape(4, 8)
        for i in range(3):
            x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
            x = jnp.maximum(x, 0) if i < 2 else x
        return x

    same(net, by_hand, variables, x)


def head(params, x):
    return x.mean(axis=(1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


def test_cnn():
    net, x = nets.cnn(3, (4, 5)), image((2, 6, 6, 1))
    variables = randomised(net, x)
    assert count(variables) == 9 * 4 + 2 * 4 + 9 * 4 * 5 + 2 * 5 + 5 * 3 + 3

    def by_hand(params, stats, x):
        for i, stride in enumerate((1, 2)):
            x = conv(x, params[f"Conv_{i}"]["kernel"], stride, "SAME")
            x = jnp.maximum(norm(x, params[f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"]), 0)
        return head(params, x)

    same(net, by_hand, variables, x)


def test_resnet_forward_by_hand():
    net, x, pad = nets.ResNet(3, (1, 1), width=2), image((2, 6, 6, 1)), [(1, 1), (1, 1)]

    def layer(params, stats, i, x, stride, padding):
        return norm(conv(x, params[f"Conv_{i}"]["kernel"], stride, padding), params[f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"])

    def by_hand(params, stats, x):
        x = jnp.maximum(layer(params, stats, 0, x, 1, pad), 0)
        for i, stride in enumerate((1, 2)):
            block = params[f"BasicBlock_{i}"], stats[f"BasicBlock_{i}"]
            y = jnp.maximum(layer(*block, 0, x, stride, pad), 0)
            y = layer(*block, 1, y, 1, pad)
            x = jnp.maximum(y + (x if stride == 1 else layer(*block, 2, x, 2, "SAME")), 0)  # 1 x 1 where the shape changes
        return head(params, x)

    same(net, by_hand, randomised(net, x), x)
