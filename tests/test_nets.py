"""Reference networks: parameter counts in closed form, shapes of every stage, and forward passes written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import some

from dememo_jax import nets
from dememo_jax.errors import BadInput
from dememo_jax.nets import resnet

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


@pytest.mark.parametrize(
    ("make", "small", "large"),
    [
        (nets.resnet18, 11_173_962, 11_689_512),
        (nets.resnet50, 23_520_842, 25_557_032),
        pytest.param(nets.densenet121, 6_956_298, 7_978_856, marks=pytest.mark.slow),
        (nets.senet18, 11_260_354, None),
        (nets.vit_tiny, 5_362_762, None),
    ],
)
def test_parameter_counts_are_the_published_ones(make, small, large):
    variables, logits, _ = shapes(make(10), (2, 32, 32, 3))
    assert count(variables) == small
    assert logits.shape == (2, 10)
    if large is not None:
        variables, logits, _ = shapes(make(1000, stem="large"), (2, 224, 224, 3))
        assert count(variables) == large
        assert logits.shape == (2, 1000)


def test_vit_tiny_of_large_images():
    assert count(shapes(nets.vit_tiny(1000, 16), (1, 224, 224, 3))[0]) == 5_717_416
    with pytest.raises(BadInput, match="do not cut into patches of 4"):
        nets.vit_tiny(10).init(KEY, jnp.zeros((1, 30, 32, 3)))
    with pytest.raises(BadInput, match="'small'"):
        nets.resnet18(10, stem="tiny").init(KEY, jnp.zeros((1, 8, 8, 3)))


def bn(params, stats, i, x):
    return norm(x, params[f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"])


def relu(x):
    return jnp.maximum(x, 0)


ONE, ALL = [(0, 0), (0, 0)], [(1, 1), (1, 1)]


def test_bottleneck_by_hand():
    net, x = nets.ResNet(3, (1,), 2, nets.Bottleneck), image((2, 4, 4, 1))

    def by_hand(params, stats, x):
        x = relu(bn(params, stats, 0, conv(x, params["Conv_0"]["kernel"], 1, ALL)))
        p, s = params["Bottleneck_0"], stats["Bottleneck_0"]
        y = relu(bn(p, s, 0, conv(x, p["Conv_0"]["kernel"], 1, ONE)))
        y = relu(bn(p, s, 1, conv(y, p["Conv_1"]["kernel"], 1, ALL)))
        y = bn(p, s, 2, conv(y, p["Conv_2"]["kernel"], 1, ONE))
        return head(params, relu(y + bn(p, s, 3, conv(x, p["Conv_3"]["kernel"], 1, ONE))))

    same(net, by_hand, randomised(net, x), x)


def test_squeeze_block_by_hand():
    net, x = nets.ResNet(3, (1, 1), 16, nets.SqueezeBlock), image((2, 4, 4, 1))

    def by_hand(params, stats, x):
        x = relu(bn(params, stats, 0, conv(x, params["Conv_0"]["kernel"], 1, ALL)))
        for i, stride in enumerate((1, 2)):
            p, s = params[f"SqueezeBlock_{i}"], stats[f"SqueezeBlock_{i}"]
            y, first = relu(bn(p, s, 0, x)), int(stride == 2)
            x = conv(y, p["Conv_0"]["kernel"], 2, ONE) if first else x
            y = conv(y, p[f"Conv_{first}"]["kernel"], stride, ALL)
            y = conv(relu(bn(p, s, 1, y)), p[f"Conv_{first + 1}"]["kernel"], 1, ALL)
            gate = relu(y.mean(axis=(1, 2)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
            gate = 1 / (1 + jnp.exp(-(gate @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"])))
            x = x + y * gate[:, None, None]
        return head(params, x)

    same(net, by_hand, randomised(net, x), x)


def test_densenet_by_hand():
    net, x = nets.DenseNet(3, (1, 1), growth=2), image((2, 4, 4, 1))

    def layer(p, s, x):
        y = conv(relu(bn(p, s, 0, x)), p["Conv_0"]["kernel"], 1, ONE)
        return jnp.concatenate([x, conv(relu(bn(p, s, 1, y)), p["Conv_1"]["kernel"], 1, ALL)], axis=-1)

    def by_hand(params, stats, x):
        x = layer(params["DenseLayer_0"], stats["DenseLayer_0"], conv(x, params["Conv_0"]["kernel"], 1, ALL))
        x = conv(relu(bn(params, stats, 0, x)), params["Conv_1"]["kernel"], 1, ONE)
        x = x.reshape(2, 2, 2, 2, 2, -1).mean(axis=(2, 4))
        x = layer(params["DenseLayer_1"], stats["DenseLayer_1"], x)
        return head(params, relu(bn(params, stats, 1, x)))

    same(net, by_hand, randomised(net, x), x)


def test_vit_by_hand():
    net, x = nets.ViT(3, 2, width=4, depth=1, heads=2), image((2, 4, 4, 1))

    def layer_norm(p, x):
        gap = x - x.mean(axis=-1, keepdims=True)
        return gap / jnp.sqrt((gap**2).mean(axis=-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def by_hand(params, _, x):
        patches = x.reshape(2, 2, 2, 2, 2, 1).swapaxes(2, 3).reshape(2, 4, 4)
        x = patches @ params["Conv_0"]["kernel"].reshape(4, 4) + params["Conv_0"]["bias"]
        x = jnp.concatenate([jnp.tile(params["token"], (2, 1, 1)), x], axis=1) + params["position"]
        p = params["EncoderBlock_0"]
        a, y = p["MultiHeadDotProductAttention_0"], layer_norm(p["LayerNorm_0"], x)
        q, k, v = (jnp.einsum("btd,dhk->bhtk", y, a[n]["kernel"]) + a[n]["bias"][:, None] for n in ("query", "key", "value"))
        seen = jax.nn.softmax(q @ k.swapaxes(2, 3) / jnp.sqrt(2.0), axis=-1) @ v
        x = x + jnp.einsum("bhtk,hkd->btd", seen, a["out"]["kernel"]) + a["out"]["bias"]
        y = layer_norm(p["LayerNorm_1"], x) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
        y = y * 0.5 * (1 + jax.scipy.special.erf(y / jnp.sqrt(2.0)))
        x = x + y @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]
        return layer_norm(params["LayerNorm_0"], x[:, 0]) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]

    same(net, by_hand, randomised(net, x), x)


HALVES = {
    "resnet": lambda **how: nets.ResNet(5, (1, 1, 1), 8, **how),
    "bottleneck": lambda **how: nets.ResNet(5, (1, 1, 1), 8, resnet.Bottleneck, **how),
    "squeeze": lambda **how: nets.ResNet(5, (1, 1, 1), 16, resnet.SqueezeBlock, **how),
    "densenet": lambda **how: nets.DenseNet(5, (2, 2, 2), 4, **how),
    "vit": lambda **how: nets.vit_tiny(5, width=8, depth=1, heads=2, **how),
    "cnn": lambda **how: nets.cnn(5, (4, 5), **how),
    "mlp": lambda **how: nets.mlp(5, **how),
}


@pytest.mark.parametrize("name", some(HALVES, ("resnet", "cnn", "mlp")))
def test_bfloat16_arithmetic_with_float32_parameters(name):
    """On several stages and images: compilers have fused such programs into ones that answer NaN."""
    x, make = jnp.asarray(image((4, 32, 32, 3))), HALVES[name]
    full, half = make(), make(dtype=jnp.bfloat16)
    variables = jax.jit(half.init)(KEY, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    ours, theirs = (jax.jit(net.apply)(variables, x) for net in (half, full))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, atol=0.05 * float(jnp.abs(theirs).max()))
    assert float(jnp.abs(ours - theirs).max()) > 0
