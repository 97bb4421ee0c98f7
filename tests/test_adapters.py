"""LoRA as a Model: what it begins as, what it may reach, and that nothing else of the network moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kinds import some

from dememo_jax import adapters, audit, certify, data, loop, models, nets, sources, train, tree, unlearn
from dememo_jax.errors import BadInput

KEY = jax.random.key(0)
NETS = {"mlp": nets.mlp(10, (16,)), "cnn": nets.cnn(10, (4, 8)), "vit": nets.ViT(10, 4, 12, 1, 3)}
scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))


@pytest.fixture(scope="module")
def digits():
    training, test = sources.load("digits")
    return data.take(training, jnp.arange(200)), data.take(test, jnp.arange(100))


def adapted(name, digits, **how):
    model = models.from_linen(NETS[name])
    base = model.init(KEY, digits[0].x[:1])
    return model, base, adapters.lora(model, base, **{"rank": 2} | how)


@pytest.mark.slow
@pytest.mark.parametrize("name", some(NETS, ("mlp", "cnn")))
def test_begins_as_the_base(digits, name):
    model, base, adapter = adapted(name, digits)
    x, weights = digits[0].x[:5], adapter.init(jax.random.key(1), digits[0].x[:1])
    np.testing.assert_array_equal(adapter.apply(weights, x), model.apply(base, x))
    np.testing.assert_allclose(adapter.fit(weights, x, KEY)[0], model.fit(base, x, KEY)[0], rtol=1e-6)
    leaves = zip(tree.names(base.params), jax.tree.leaves(base.params))
    names = {name for name, leaf in leaves if leaf.ndim >= 2 and min(leaf.size // leaf.shape[-1], leaf.shape[-1]) >= 2}
    assert weights.params.keys() == names
    assert all(not np.any(part["up"]) and np.any(part["down"]) for part in weights.params.values())


def test_merged_by_hand(digits):
    model, base, adapter = adapted("mlp", digits, alpha=6.0, only="Dense_0/kernel")
    weights = adapter.init(KEY, digits[0].x[:1])
    up = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    weights.params["Dense_0/kernel"]["up"] = jnp.asarray(up)
    found = adapters.merged(weights)
    expected = base.params["Dense_0"]["kernel"] + 3 * np.asarray(weights.params["Dense_0/kernel"]["down"]) @ up
    np.testing.assert_allclose(found.params["Dense_0"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.params["Dense_1"]["kernel"], base.params["Dense_1"]["kernel"])
    np.testing.assert_allclose(adapter.apply(weights, digits[0].x[:3]), model.apply(found, digits[0].x[:3]), rtol=1e-5)


def test_down_has_the_law_of_a_dense_layer(digits):
    limit = 1 / 8  # of 64 pixels
    down = adapted("mlp", digits, rank=10)[2].init(KEY, digits[0].x[:1]).params["Dense_0/kernel"]["down"]
    assert down.shape == (64, 10)
    assert np.abs(down).max() <= limit
    assert abs(np.std(down) * np.sqrt(3) / limit - 1) < 0.1


@pytest.mark.slow  # the contract goes through an adapter as well
def test_training_unlearning_recovery_and_certificates_act_on_the_adapter_alone(digits):
    training, test = digits
    _, base, adapter = adapted("mlp", digits, rank=4)
    learner = train.sgd(adapter, optax.adam(0.02))
    state, info = scan(learner, KEY, learner.init(KEY, training.x[:1]), training, steps=150, batch=32)
    assert info["accuracy"][-20:].mean() > info["accuracy"][:20].mean() + 0.2
    victim = state.weights
    assert sum(leaf.size for leaf in jax.tree.leaves(victim.params)) == 4 * (64 + 16 + 16 + 10)
    forget = np.asarray(training.y) == 3
    descent = unlearn.finetune(adapter, optax.sgd(0.1), batch=32)
    forgot = scan(descent, KEY, descent.init(KEY, victim, training, forget), training, steps=5)[0].weights
    noisy = unlearn.noisy_descent(adapter, lr=0.01, clip_init=1.0, clip_grad=1.0, sigma=0.1, batch=32)
    certified = scan(noisy, KEY, noisy.init(KEY, victim, training, forget), training, steps=2)[0].weights
    released = unlearn.released(adapter, certified, training, forget)
    _, [[attacked]] = audit.sweep(adapter, [forgot], training, test, KEY, radii=(0.5,), epochs=1, batch=64)
    for weights in (victim, forgot, certified, released, attacked):
        jax.tree.map(np.testing.assert_array_equal, weights.stats["base"], base)
        assert tree.names(weights.params) == tree.names(victim.params)
    moved = jax.tree.map(lambda a, b: a - b, attacked.params, forgot.params)
    assert 0 < float(tree.norm(moved)) <= 0.5 + 1e-5
    found = certify.depth(*models.freeze(adapter, forgot), test, KEY, sigma=0.1, eta=(0.01,), draws=100)
    assert 0 < found.noise_norm < 0.2 * np.sqrt(424)


@pytest.mark.parametrize(
    ("how", "says"),
    [({"rank": 0}, "rank must"), ({"alpha": 0.0}, "alpha must"), ({"only": "nothing"}, "no leaf matches"),
     ({"only": "bias"}, "no matrix that matches 'bias'"), ({"rank": 99}, "lower the rank")],
)  # fmt: skip
def test_refused(digits, how, says):
    with pytest.raises(BadInput, match=says):
        adapted("mlp", digits, **how)
