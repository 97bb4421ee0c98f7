"""Training steps against gradients worked out in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from dememo_jax import augment, evaluate, loop, models, nets, sources, train
from dememo_jax import data as sets
from dememo_jax.errors import BadInput
from dememo_jax.types import Weights

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
B, D, K = 6, 4, 3
BATCH = sets.make(RANDOM.random((B, D)), RANDOM.integers(0, K, B))
X, ONE_HOT = np.asarray(BATCH.x, np.float64), np.eye(K)[np.asarray(BATCH.y)]
KERNEL = RANDOM.normal(size=(D, K)).astype(np.float32)


def affine(params, x):
    return x @ params["kernel"] + params["bias"]


LINEAR = models.from_apply(lambda key, x: {"kernel": jnp.asarray(KERNEL), "bias": jnp.zeros(K)}, affine)


def slope(kernel, bias, x=X):
    """Mean cross-entropy, accuracy, and the gradient in kernel and bias."""
    logits = x @ kernel + bias
    residual = (softmax(logits, axis=1) - ONE_HOT) / B
    loss = -(log_softmax(logits, axis=1) * ONE_HOT).sum(axis=1).mean()
    return loss, (logits.argmax(axis=1) == np.asarray(BATCH.y)).mean(), x.T @ residual, residual.sum(axis=0)


def test_two_steps_with_momentum():
    method = train.sgd(LINEAR, optax.sgd(0.5, momentum=0.9))
    state, step = method.init(KEY, BATCH.x), jax.jit(method.step)
    kernel, bias = KERNEL.astype(np.float64), np.zeros(K)
    pull, push = np.zeros_like(kernel), np.zeros_like(bias)
    for t in range(2):
        loss, accuracy, to_kernel, to_bias = slope(kernel, bias)
        pull, push = 0.9 * pull + to_kernel, 0.9 * push + to_bias
        kernel, bias = kernel - 0.5 * pull, bias - 0.5 * push
        state, info = step(KEY, state, BATCH)
        np.testing.assert_allclose(state.weights.params["kernel"], kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.weights.params["bias"], bias, rtol=1e-4, atol=1e-6)
        assert state.step == t + 1
        assert info["loss"] == pytest.approx(loss, rel=1e-5)  # of the batch before the step
        assert info["accuracy"] == pytest.approx(accuracy, rel=1e-6)


def test_start_continues_from_given_weights_with_a_fresh_optimiser():
    tx = optax.sgd(0.5, momentum=0.9)
    weights = Weights({"kernel": jnp.asarray(2 * KERNEL), "bias": jnp.ones(K)}, ())
    state = train.start(tx, weights)
    assert state.step == 0
    state, _ = jax.jit(train.sgd(LINEAR, tx).step)(KEY, state, BATCH)
    expected = 2 * KERNEL - 0.5 * slope(2 * KERNEL, np.ones(K))[2]
    np.testing.assert_allclose(state.weights.params["kernel"], expected, rtol=1e-4, atol=1e-6)


def test_loss_and_augmentation_are_those_given():
    def squared(logits, labels):
        return jnp.sum(logits**2, axis=-1)

    keys = []

    def doubled(key, x):
        keys.append(key)
        return 2 * x + jax.random.normal(key, x.shape)

    method = train.sgd(LINEAR, optax.sgd(0.1), loss=squared, augment=doubled)
    state, _ = method.step(KEY, method.init(KEY, BATCH.x), BATCH)
    x = 2 * X + np.asarray(jax.random.normal(keys[0], X.shape))
    expected = KERNEL - 0.1 * x.T @ (2 * x @ KERNEL) / B
    np.testing.assert_allclose(state.weights.params["kernel"], expected, rtol=1e-4, atol=1e-5)
    method.step(jax.random.key(1), state, BATCH)
    assert not np.array_equal(*[jax.random.key_data(key) for key in keys])


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_scale=False, use_bias=False)(x)
        return nn.Dense(K)(x)


@pytest.mark.parametrize("mode", ["fit", "frozen"])
def test_mode_says_which_statistics_are_used_and_whether_they_move(mode):
    mean, var = np.float32([0.1, 0.2, 0.3, 0.4]), np.float32([1, 2, 3, 4])
    stats = {"batch_stats": {"BatchNorm_0": {"mean": mean, "var": var}}}
    weights = Weights({"Dense_0": {"kernel": KERNEL, "bias": np.zeros(K, np.float32)}}, stats)
    tx = optax.sgd(0.5)
    state, info = jax.jit(train.sgd(models.from_linen(Normed()), tx, mode=mode).step)(KEY, train.start(tx, weights), BATCH)
    centre, spread = (mean, var) if mode == "frozen" else (X.mean(axis=0), X.var(axis=0))
    x = (X - centre) / np.sqrt(spread + 1e-5)
    loss, _, to_kernel, _ = slope(KERNEL, np.zeros(K), x)
    assert info["loss"] == pytest.approx(loss, rel=1e-4)
    np.testing.assert_allclose(state.weights.params["Dense_0"]["kernel"], KERNEL - 0.5 * to_kernel, rtol=1e-3, atol=1e-5)
    found = state.weights.stats["batch_stats"]["BatchNorm_0"]
    if mode == "frozen":
        np.testing.assert_array_equal(found["mean"], mean)
        np.testing.assert_array_equal(found["var"], var)
    else:
        np.testing.assert_allclose(found["mean"], 0.9 * mean + 0.1 * X.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found["var"], 0.9 * var + 0.1 * X.var(axis=0), rtol=1e-5)


def test_unknown_mode():
    method = train.sgd(LINEAR, optax.sgd(0.1), mode="eval")
    with pytest.raises(BadInput, match="'fit' or 'frozen'"):
        method.step(KEY, method.init(KEY, BATCH.x), BATCH)


# --- optimisers --------------------------------------------------------------------------------------------------


def test_rates_of_a_run():
    at = np.array([0, 1, 9, 10, 14, 15, 19])
    cosine, step = (train.falling(0.4, schedule, 20) for schedule in ("cosine", "step"))
    np.testing.assert_allclose([cosine(t) for t in at], 0.2 * (1 + np.cos(np.pi * at / 20)), rtol=1e-5)
    np.testing.assert_allclose([step(t) for t in at], [0.4] * 3 + [0.04] * 2 + [0.004] * 2, rtol=1e-5)
    others = train.falling(0.4, "step", 20, (0.05, 0.5, 0.75))
    np.testing.assert_allclose([others(t) for t in at], [0.4] + [0.04] * 2 + [0.004] * 2 + [0.0004] * 2, rtol=1e-5)
    assert train.falling(0.4, "constant", 20) == 0.4
    with pytest.raises(BadInput, match="constant, cosine or step, got 'linear'"):
        train.falling(0.4, "linear", 20)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_adamw_by_hand(schedule):
    """Biases decay as kernels do; the gradient, far beyond norm 5, is not clipped."""
    steps, decay = 8, 0.3
    tx = train.usual("adamw", schedule, 0.1, 0.8, decay, steps)
    values, grads = np.float64([3.0, -2.0, 0.5]), RANDOM.normal(size=(steps, 3)) * 50
    params = {"kernel": jnp.asarray(values[:2, None], jnp.float32), "bias": jnp.asarray(values[2:], jnp.float32)}
    opt, mean, square = tx.init(params), 0.0, 0.0
    for t, g in enumerate(grads):
        mean, square = 0.8 * mean + 0.2 * g, 0.999 * square + 0.001 * g**2
        fall = {"constant": 1.0, "cosine": (1 + np.cos(np.pi * t / steps)) / 2, "step": 0.1 ** ((t >= 4) + (t >= 6))}[schedule]
        move = mean / (1 - 0.8 ** (t + 1)) / (np.sqrt(square / (1 - 0.999 ** (t + 1))) + 1e-8)
        values = values * (1 - 0.1 * fall * decay) - 0.1 * fall * move
        updates, opt = tx.update({"kernel": np.float32(g[:2, None]), "bias": np.float32(g[2:])}, opt, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(np.concatenate([params["kernel"][:, 0], params["bias"]]), values, rtol=1e-4)


def test_equal_optimisers_are_one_object():
    assert train.clipped_sgd(0.1, 0.9, 5e-4, 30) is train.usual("sgd", "cosine", 0.1, 0.9, 5e-4, 30)
    assert train.usual("adamw", "step", 3e-4, 0.9, 0.05, 30) is train.usual("adamw", "step", 3e-4, 0.9, 0.05, 30)
    with pytest.raises(BadInput, match="sgd or adamw, got 'adam'"):
        train.usual("adam", "cosine", 0.1, 0.9, 0.0)


# --- half precision, large images --------------------------------------------------------------------------------


def test_bfloat16_trains_as_float32_does():
    digits, test = sources.load("digits")
    found = []
    for dtype in (None, jnp.bfloat16):
        model = models.from_linen(nets.cnn(10, dtype=dtype))
        method = train.sgd(model, train.clipped_sgd(0.3, 0.9, 1e-3, 132))
        run = jax.jit(lambda state, method=method: loop.scan(method, KEY, state, digits, steps=132, batch=64))
        state, _ = run(method.init(KEY, digits.x[:1]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
        assert model.apply(state.weights, digits.x[:1]).dtype == jnp.float32
        found.append(float(evaluate.accuracy(*models.freeze(model, state.weights), test)))
    assert min(found) > 0.95
    assert abs(found[0] - found[1]) < 0.01


@pytest.mark.slow
def test_large_images_train():
    """The stem for 224 x 224, the augmentation of ImageNet and AdamW in half precision, on images told apart by brightness."""
    shade = np.linspace(0.2, 0.8, 2)[np.arange(8) % 2]
    images = sets.make(shade[:, None, None, None] + 0.1 * RANDOM.random((8, 96, 96, 3)), np.arange(8) % 2)
    net = nets.ResNet(2, (1,), 4, stem="large", dtype=jnp.bfloat16)
    look = augment.compose(augment.resized_crop(), augment.flip(), augment.jitter(0.1, 0.1, 0.1))
    method = train.sgd(models.from_linen(net), train.usual("adamw", "cosine", 0.02, 0.9, 0.05, 12), augment=look)
    run = jax.jit(lambda state: loop.scan(method, KEY, state, images, steps=12, batch=8))
    _, info = run(method.init(KEY, images.x[:1]))
    assert info["loss"][-1] < 0.5 * info["loss"][0]


# --- optimizers that look at the loss, and those that keep the params to use ------------------------------------------


@pytest.mark.parametrize("tx", [optax.lbfgs(), optax.chain(optax.clip(1.0), optax.polyak_sgd(1.0))], ids=["lbfgs", "polyak"])
def test_optimizers_that_look_at_the_loss_get_it(tx):
    """Against the loop that optax documents, written for the bare function."""

    def objective(params):
        return (jax.nn.logsumexp(affine(params, BATCH.x), axis=1) - affine(params, BATCH.x)[jnp.arange(B), BATCH.y]).mean()

    params = LINEAR.init(KEY, BATCH.x).params
    opt = tx.init(params)
    method = train.sgd(LINEAR, tx)
    state, step = method.init(KEY, BATCH.x), jax.jit(method.step)
    for _ in range(3):
        value, grads = jax.value_and_grad(objective)(params)
        updates, opt = tx.update(grads, opt, params, value=value, grad=grads, value_fn=objective)
        params = optax.apply_updates(params, updates)
        state, _ = step(KEY, state, BATCH)
        np.testing.assert_allclose(state.weights.params["kernel"], params["kernel"], rtol=1e-3, atol=1e-4)


def test_an_optimizer_that_looks_at_the_loss_is_refused_where_there_is_none():
    method = train.weight_noise(LINEAR, optax.lbfgs(), sigmas=(0.1,), draws=1)
    with pytest.raises(BadInput, match=r"value.*optax\.adamw"):
        method.step(KEY, method.init(KEY, BATCH.x), BATCH)


def test_the_weights_to_use_of_a_schedule_free_optimizer():
    """y = (1 - b1) z + b1 x: what is trained is y, what is to be used is x (Defazio et al. 2024)."""
    tx = optax.contrib.schedule_free_sgd(0.5, b1=0.8)
    method = train.sgd(LINEAR, tx, eval_params=optax.contrib.schedule_free_eval_params)
    state = jax.jit(method.init)(KEY, BATCH.x)
    for _ in range(3):
        state, _ = jax.jit(method.step)(KEY, state, BATCH)
    y, z = (np.asarray(params["kernel"], np.float64) for params in (state.weights.params, state.opt.z))
    np.testing.assert_allclose(method.finish(state).params["kernel"], (y - 0.2 * z) / 0.8, rtol=1e-5, atol=1e-6)
    assert not np.allclose(method.finish(state).params["kernel"], y, atol=1e-4)
    assert method.finish(state).stats == ()
    with pytest.warns(UserWarning, match="eval_params"):
        train.start(optax.chain(optax.clip(1.0), tx), LINEAR.init(KEY, BATCH.x))


def test_labels_beyond_the_outputs_are_refused_before_any_step():
    method = train.sgd(LINEAR, optax.sgd(0.1))
    state, many = method.init(KEY, BATCH.x), BATCH._replace(y=BATCH.y.at[2].set(K + 4))
    silent = {"every": 2, "after": lambda *_: pytest.fail("took a step")}
    for drive, how in ((loop.scan, {}), (loop.run, silent)):
        with pytest.raises(BadInput, match=f"labels run to {K + 4}.*{K} outputs"):
            drive(method, KEY, state, many, steps=2, batch=2, **how)
        with pytest.raises(BadInput, match="a label is -1"):
            drive(method, KEY, state, BATCH._replace(y=BATCH.y.at[2].set(-1)), steps=2, batch=2, **how)
    with pytest.raises(BadInput, match="labels run to"):
        loop.stream(method, KEY, state, lambda start: iter([BATCH, many]), steps=2, every=2, after=lambda *_: None)
