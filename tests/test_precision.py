"""Precision as arithmetic: every network in every precision, and what states a distance or a law in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import (
    adapters,
    audit,
    certify,
    curvature,
    keys,
    likelihood,
    loop,
    models,
    montecarlo,
    nets,
    projected,
    sharpness,
    train,
    tree,
)
from dememo_jax import data as sets
from dememo_jax.cli import networks
from dememo_jax.errors import BadInput
from dememo_jax.nets.densenet import DenseNet
from dememo_jax.nets.resnet import Bottleneck, SqueezeBlock
from dememo_jax.types import Weights

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
IMAGES = sets.make(RANDOM.random((2, 8, 8, 3), np.float32), np.arange(2))
TOKENS = sets.rows(RANDOM.integers(1, 9, (2, 6)), np.arange(2))
NETS = {
    "mlp": nets.mlp,
    "cnn": nets.cnn,
    "resnet18": lambda k, **how: nets.ResNet(k, (1, 1), 2, **how),
    "resnet50": lambda k, **how: nets.ResNet(k, (1,), 2, Bottleneck, **how),
    "senet18": lambda k, **how: nets.ResNet(k, (1,), 16, SqueezeBlock, **how),
    "densenet121": lambda k, **how: DenseNet(k, (1, 1), 2, **how),
    "vit_tiny": lambda k, **how: nets.vit_tiny(k, width=8, depth=1, heads=2, **how),
    "decoder": lambda k, **how: nets.Decoder(9, 8, 1, 2, 1, 8, **how),
    "decoder, tied": lambda k, **how: nets.Decoder(9, 8, 1, 2, 2, 8, tied=True, **how),
}


def frozen(net, x, text=False):
    """A network whose weights are all zero: for what is decided by types, which need no initialisation."""
    model = models.from_linen(net)
    if text:
        model = likelihood.of_labels(model, ((1,), (2,), (3,)), pad=0)
    shapes = jax.eval_shape(model.init, KEY, x)
    return models.freeze(model, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def of(name):
    return (sets.make(IMAGES.x, IMAGES.y), False) if "decoder" not in name else (TOKENS, True)


@pytest.mark.parametrize("name", NETS)
def test_every_network_in_every_precision(name):
    data, text = of(name)
    apply, params = frozen(NETS[name](3), data.x, text)
    for precision in ("float32", "bfloat16", "as given"):
        source = certify.cloud(apply, params, data, KEY, sigma=0.1, precision=precision)
        assert source.blank.precision.startswith(precision)
        jax.eval_shape(source.metric, source.params, source.data)
        low_head = name in ("mlp", "cnn", "decoder", "decoder, tied") or precision != "bfloat16"
        assert ("of the multiplications in float32" in source.blank.precision) == (not low_head)


@pytest.mark.parametrize("name", NETS)
def test_a_network_of_bfloat16_is_not_called_float32(name):
    data, text = of(name)
    low = frozen(NETS[name](3, dtype=jnp.bfloat16), data.x, text)
    with pytest.raises(BadInput, match="multiplications in bfloat16"):
        certify.cloud(*low, data, KEY, sigma=0.1)
    assert certify.cloud(*low, data, KEY, sigma=0.1, precision="bfloat16").blank.precision.startswith("bfloat16")


def test_a_network_of_float32_is_not_called_bfloat16():
    full = frozen(NETS["resnet18"](3, dtype=jnp.float32), IMAGES.x)
    with pytest.raises(BadInput, match=r"multiplications in float32.*dtype=None"):
        certify.cloud(*full, IMAGES, KEY, sigma=0.1, precision="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in networks.MAKERS if name != networks.DECODER])
def test_every_network_of_the_command_in_bfloat16(name):
    model = networks.model(name, 10, (32, 32))
    x = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, KEY, x)
    weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    source = certify.cloud(*models.freeze(model, weights), sets.make(x, np.zeros(1, int)), KEY, sigma=0.1, precision="bfloat16")
    assert source.blank.precision.startswith("bfloat16")


def test_products_that_the_network_lets_be_rounded_are_not_called_float32():
    apply, params = frozen(nn.Dense(3, precision="default"), np.zeros((1, 6), np.float32))
    data = sets.make(np.zeros((2, 6), np.float32), np.zeros(2, int))
    with pytest.raises(BadInput, match="may be rounded"):
        certify.cloud(apply, params, data, KEY, sigma=0.1)


# --- weights stored in half precision ------------------------------------------------------------------------------

ROWS = sets.make(RANDOM.random((24, 4), np.float32), np.arange(24) % 3)
BASE = {"w": 256.0 + RANDOM.choice([-2.0, 0.0, 2.0], (4, 3))}  # numbers of bfloat16, whose steps are two
MODEL = models.from_apply(lambda key, x: BASE, lambda p, x: (x @ p["w"].astype(jnp.float32) - 512) / 4)
LOW, HIGH = ({"w": jnp.asarray(BASE["w"], dtype)} for dtype in (jnp.bfloat16, jnp.float32))


def both(work):
    """What comes out for weights stored in bfloat16, and for the same numbers in float32."""
    return work(LOW), work(HIGH)


def test_noise_reaches_the_metric_whole():
    def drawn(params):
        return montecarlo.scores(lambda p, _: p["w"].reshape(-1), params, None, KEY, sigma=0.3, stop=4)

    low, high = both(drawn)
    np.testing.assert_array_equal(low, high)


@pytest.mark.slow
def test_recovery_and_random_search_act_in_float32():
    def recovered(params):
        return audit.recover(MODEL, Weights(params, ()), ROWS, ROWS, KEY, radius=0.5, epochs=2, batch=8)

    def searched(params):
        return audit.random_search(MODEL, Weights(params, ()), ROWS, ROWS, KEY, radius=0.5, draws=8)

    def relearned(params):
        return audit.relearn(MODEL, Weights(params, ()), ROWS, ROWS, KEY, goal=1.0, most=4, every=2, batch=8)

    for work in (recovered, searched, relearned):
        low, high = both(work)
        assert low == high
    assert 0 < both(recovered)[0].distance[-1] <= 0.5 * (1 + 1e-4)  # in bfloat16 it would not have moved at all


def test_a_ball_around_half_precision_is_refused():
    method = projected.within(train.sgd(MODEL, optax.sgd(0.1)))
    with pytest.raises(BadInput, match=r"bfloat16.*tree\.widened"):
        method.init(train.start(optax.sgd(0.1), Weights(LOW, ())), 0.5)


def test_sharpness_and_landscapes_act_in_float32():
    def sal(params):
        return sharpness.sal(apply_model, params, ROWS, solver="one_step", batch=24).value

    def surface(params):
        ways = sharpness.random_directions(KEY, params, count=1, normalise="layer")
        return sharpness.line(sharpness.loss_and_accuracy(apply_model), params, ROWS, ways, (-0.001, 0.001)).values

    low, high = both(sal)
    assert low == high
    np.testing.assert_array_equal(*both(surface))


def apply_model(params, x):
    return MODEL.apply(Weights(params, ()), x)


@pytest.mark.slow
def test_curvature_of_half_precision():
    def measured(params):
        product = curvature.operator(apply_model, params, ROWS, batch=24)
        return (
            curvature.trace(product, params, KEY, probes=2),
            curvature.diagonal(product, params, KEY, probes=2),
            curvature.layer_blocks(product, params, KEY, probes=2),
            curvature.exact_diagonal(product, params),
            curvature.top_eigenpairs(product, params, KEY, steps=4),
            curvature.mean_gradient(apply_model, params, ROWS),
            curvature.hessian_product(apply_model, params, ROWS, params),
            curvature.ggn_product(apply_model, params, ROWS, params),
            curvature.fisher_diagonal(apply_model, params, ROWS),
            curvature.slopes(apply_model, params, ROWS, params),
        )

    low, high = both(measured)
    jax.tree.map(np.testing.assert_array_equal, low, high)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.float32)}


def test_training_under_weight_noise_keeps_the_stored_type():
    method = train.weight_noise(MODEL, optax.sgd(0.1, momentum=0.9), sigmas=(0.0, 0.3), draws=2)
    state = train.start(optax.sgd(0.1, momentum=0.9), Weights(LOW, ()))
    after, _ = jax.eval_shape(method.step, KEY, state, ROWS)
    assert after.weights.params["w"].dtype == jnp.bfloat16
    loop.scan(method, KEY, state, ROWS, steps=1, batch=8)


def test_small_adapters_on_half_precision_are_not_lost():
    base = models.from_linen(nn.Dense(3))
    stored = Weights({"kernel": LOW["w"], "bias": jnp.zeros(3, jnp.bfloat16)}, {})
    model = adapters.lora(base, stored, rank=1)
    weights = model.init(KEY, ROWS.x[:1])
    weights = weights._replace(
        params=tree.add(weights.params, tree.gaussian_like(keys.named(KEY, "noise"), weights.params, 0.05))
    )
    moved = adapters.merged(weights).params["kernel"]
    assert 0 < float(tree.distance(moved, stored.params["kernel"])) < 0.5  # half of the step of bfloat16 is one
