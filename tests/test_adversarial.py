"""Training against an adversary, on mixtures, on worst copies and under weight noise, each against loops in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from dememo_jax import augment, keys, models, nets, projected, train, tree
from dememo_jax import data as sets
from dememo_jax.errors import BadInput
from dememo_jax.types import Model, Weights

KEY, OTHER = (jax.random.key(seed, impl="rbg") for seed in (3, 4))  # compile faster than the default
RANDOM = np.random.default_rng(0)
B, SHAPE, D, K, RATE = 8, (4, 3, 1), 12, 3, 0.5
IMAGES = RANDOM.random((B, *SHAPE)).astype(np.float32)
IMAGES[:3] = np.round(IMAGES[:3])  # pixels at 0 and 1, where the box is tight
LABELS = RANDOM.integers(0, K, B)
BATCH = sets.make(IMAGES, LABELS)
X = IMAGES.reshape(B, D).astype(np.float64)
KERNEL, BIAS = RANDOM.normal(size=(D, K)).astype(np.float32), RANDOM.normal(size=K).astype(np.float32)
PARAMS = {"bias": jnp.asarray(BIAS), "kernel": jnp.asarray(KERNEL)}
WEIGHTS = Weights(PARAMS, ())


def affine(params, x):
    return x.reshape(len(x), -1) @ params["kernel"] + params["bias"]


LINEAR = models.from_apply(lambda key, x: PARAMS, affine)


def flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def losses_of(x, y=LABELS, kernel=KERNEL, bias=BIAS):
    """Cross-entropy [B] and its slope in the logits [B, K]."""
    logits = flat(x) @ kernel + bias
    return -log_softmax(logits, axis=1)[np.arange(len(x)), y], softmax(logits, axis=1) - np.eye(K)[y]


def accuracy(x, kernel=KERNEL, bias=BIAS):
    return ((flat(x) @ kernel + bias).argmax(axis=1) == LABELS).mean()


def stepped(key=KEY, jit=True, **how):
    """Params and info after a step of plain descent on the linear softmax."""
    tx = optax.sgd(RATE)
    step = train.sgd(LINEAR, tx, **how).step
    state, info = (jax.jit(step) if jit else step)(key, train.start(tx, WEIGHTS), BATCH)
    assert state.step == 1
    return state.weights.params, info


def check_step(result, x, residual, loss):
    """The step is that of the residuals [B, K] (slopes of the mean loss in the logits, times B) on images x."""
    params, info = result
    np.testing.assert_allclose(params["kernel"], KERNEL - RATE * flat(x).T @ residual / B, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(params["bias"], BIAS - RATE * residual.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert info["loss"] == pytest.approx(np.mean(loss), rel=1e-5)


# --- the adversary -----------------------------------------------------------------------------------------------


def onto(norm, noise, radius):
    if norm == "linf":
        return np.clip(noise, -radius, radius)
    size = np.linalg.norm(noise, axis=1, keepdims=True)
    return noise * np.minimum(1, radius / size)


def attacked(norm, start, x=X, y=LABELS, *, radius, stride, steps):
    """Ascent on the loss, in numpy, one image at a time; noise [B, D] that keeps the images in the box."""
    noise = np.clip(x + onto(norm, start, radius), 0, 1) - x
    for _ in range(steps):
        for i in range(len(x)):
            slope = KERNEL @ losses_of((x + noise)[i : i + 1], y[i : i + 1])[1][0]
            noise[i] += stride * (np.sign(slope) if norm == "linf" else slope / np.linalg.norm(slope))
        noise = np.clip(x + onto(norm, noise, radius), 0, 1) - x
    return noise


def no_fit(weights, x, key):
    raise AssertionError("the adversary left evaluation mode")


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.2), ("l2", 0.7)])
def test_adversary_equals_a_naive_loop(norm, radius):
    ball, how = getattr(projected, norm)(radius), {"stride": radius / 2.3, "steps": 4}
    model = LINEAR._replace(fit=no_fit)
    view = train.adversary(model, ball, **how)

    @jax.jit
    def run(key, params, x):
        met, back = jax.vjp(lambda params, x: view(key, Weights(params, ()), BATCH._replace(x=x)), params, x)
        return met, back(jnp.cos(jnp.arange(x.size)).reshape(x.shape))

    found, (to_params, to_images) = run(KEY, PARAMS, BATCH.x)
    start = flat(ball.draw(jax.random.split(KEY)[0], IMAGES.shape))
    noise = attacked(norm, start, radius=radius, **how)
    np.testing.assert_allclose(flat(found), X + noise, atol=2e-5)
    assert np.abs(noise - (np.clip(X + start, 0, 1) - X)).max() > 0.2 * radius  # the search goes somewhere
    added = flat(found) - X
    sizes = np.linalg.norm(added, ord={"linf": np.inf, "l2": 2}[norm], axis=1)
    assert sizes.max() <= radius * (1 + 1e-5)
    assert sizes.max() >= 0.99 * radius  # and uses its budget
    assert found.min() >= 0
    assert found.max() <= 1
    assert (losses_of(found)[0] > losses_of(np.clip(X + start, 0, 1))[0]).all()
    # what is added is a constant: in the images the identity, in the weights nothing
    np.testing.assert_allclose(np.ravel(to_images), np.cos(np.arange(X.size)), atol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_params))
    assert np.abs(run(OTHER, PARAMS, BATCH.x)[0] - found).max() > 1e-3  # the start is random


def test_no_steps_leave_the_random_start():
    for ball in (projected.linf(0.3), projected.l2(1.0)):
        found = train.adversary(LINEAR, ball, stride=1.0, steps=0)(KEY, WEIGHTS, BATCH)
        start = flat(ball.draw(jax.random.split(KEY)[0], IMAGES.shape))
        assert np.abs(start).max() > 0.05
        np.testing.assert_allclose(flat(found), np.clip(X + start, 0, 1), atol=1e-6)


def test_gradient_through_the_adversary_is_taken_at_the_attacked_images():
    view = train.adversary(LINEAR, projected.linf(0.1), stride=0.05, steps=2)
    found = view(KEY, WEIGHTS, BATCH)

    def total(x):
        images = view(KEY, WEIGHTS, BATCH._replace(x=x))
        return jax.nn.logsumexp(affine(PARAMS, images), axis=-1).sum()

    expected = softmax(flat(found) @ KERNEL + BIAS, axis=1) @ KERNEL.T
    np.testing.assert_allclose(flat(jax.grad(total)(BATCH.x)), expected, rtol=1e-4, atol=1e-5)


def test_adversary_climbs_the_loss_given():
    view = train.adversary(LINEAR, projected.linf(0.01), stride=1.0, steps=1, loss=lambda logits, labels: -logits[:, 0])
    inside = BATCH._replace(x=0.2 + 0.6 * BATCH.x)
    expected = inside.x.reshape(B, D) - 0.01 * np.sign(KERNEL[:, 0])
    np.testing.assert_allclose(flat(view(KEY, WEIGHTS, inside)), expected, atol=1e-6)


# --- sgd ---------------------------------------------------------------------------------------------------------


def fgsm(key, weights, batch):
    """A view without chance that looks at weights, images and labels."""
    logits = affine(weights.params, batch.x)
    slope = (jax.nn.softmax(logits) - jax.nn.one_hot(batch.y, K)) @ weights.params["kernel"].T
    return batch.x + 0.1 * jnp.sign(slope).reshape(batch.x.shape)


def fgsm_numpy(x):
    return flat(x) + 0.1 * np.sign(losses_of(x)[1] @ KERNEL.T)


OWN = np.linspace(0.0, 1.0, B).astype(np.float32)
PARTNER = np.roll(np.arange(B), 3)


def blend(key, x):
    own = jnp.asarray(OWN)[:, None, None, None]
    return own * x + (1 - own) * x[PARTNER], jnp.asarray(PARTNER), jnp.asarray(OWN)


def blended(x):
    x = flat(x)
    mixed = OWN[:, None] * x + (1 - OWN[:, None]) * x[PARTNER]
    (own, own_slope), (other, other_slope) = losses_of(mixed), losses_of(mixed, LABELS[PARTNER])
    return mixed, OWN * own + (1 - OWN) * other, OWN[:, None] * own_slope + (1 - OWN[:, None]) * other_slope


def test_step_without_any_of_them():
    loss, residual = losses_of(X)
    result = stepped()
    check_step(result, X, residual, loss)
    assert result[1]["accuracy"] == pytest.approx(accuracy(X))
    assert set(result[1]) == {"loss", "accuracy"}
    seen = []
    stepped(jit=False, augment=lambda key, x: (seen.append(key), x)[1])
    assert seen[0] == jax.random.split(KEY)[0]  # the first half of the step's key, as ever


def test_mix_weighs_the_losses_of_both_labels():
    assert (LABELS[PARTNER] != LABELS).any()
    mixed, loss, residual = blended(X)
    result = stepped(mix=blend)
    check_step(result, mixed, residual, loss)
    assert result[1]["accuracy"] == pytest.approx(accuracy(mixed))  # on the examples' own labels


@pytest.mark.slow
@pytest.mark.parametrize("make", [augment.mixup, augment.cutmix])
def test_mixup_and_cutmix_train(make):
    mix, calls = jax.jit(make()), []

    def recorded(key, x):
        calls.append(key)
        return mix(key, x)

    params, info = stepped(mix=recorded, jit=False)
    mixed, partner, own = map(np.asarray, mix(calls[0], BATCH.x))
    first, second = losses_of(mixed), losses_of(mixed, LABELS[partner])
    residual = own[:, None] * first[1] + (1 - own[:, None]) * second[1]
    check_step((params, info), mixed, residual, own * first[0] + (1 - own) * second[0])
    assert np.abs(flat(mixed) - X).max() > 0.1
    assert calls[0] != jax.random.split(KEY)[0]  # not the key of the augmentation


def noisy(key, x):
    return x + 0.7 * jax.random.normal(key, x.shape)


def copies_of(count):
    to_meet = jax.random.split(KEY)[0]
    return [np.asarray(noisy(keys.at(to_meet, c), BATCH.x)) for c in range(count)]


def worst_of(images, losses, residuals):
    worst = np.argmax(losses, axis=0)
    assert len(set(worst)) > 1  # not one copy for all
    pick = worst, np.arange(B)
    return np.stack([flat(x) for x in images])[pick], np.stack(losses)[pick], np.stack(residuals)[pick]


def test_copies_count_with_the_worst():
    images = copies_of(3)
    losses, residuals = zip(*[losses_of(x) for x in images])
    x, loss, residual = worst_of(images, losses, residuals)
    assert loss.mean() > np.mean(losses) + 0.1
    result = stepped(augment=noisy, copies=3)
    check_step(result, x, residual, loss)
    assert result[1]["accuracy"] == pytest.approx(np.mean([accuracy(x) for x in images]))
    check_step(stepped(copies=3), X, losses_of(X)[1], losses_of(X)[0])  # equal copies are one


def test_adversary_is_met_before_the_step():
    x = fgsm_numpy(X)
    loss, residual = losses_of(x)
    check_step(stepped(adversary=fgsm), x, residual, loss)
    # the real one: the step is that on the images of one of its draws, whose key is not that of the augmentation
    seen, view = [], train.adversary(LINEAR, projected.linf(0.2), stride=0.05, steps=3)

    def recorded(key, weights, batch):
        seen.append(key)
        return view(key, weights, batch)

    result = stepped(adversary=recorded, jit=False)
    found = view(seen[0], WEIGHTS, BATCH)
    loss, residual = losses_of(found)
    check_step(result, found, residual, loss)
    assert seen[0] != jax.random.split(KEY)[0]


def test_all_three_together():
    """Augmented, then attacked where the augmentation led, then mixed; of two such draws the worse one counts."""
    images, losses, residuals = zip(*[blended(fgsm_numpy(x)) for x in copies_of(2)])
    x, loss, residual = worst_of(images, losses, residuals)
    result = stepped(augment=noisy, adversary=fgsm, mix=blend, copies=2)
    check_step(result, x, residual, loss)
    assert result[1]["accuracy"] == pytest.approx(np.mean([accuracy(x) for x in images]))


def test_copies_carry_the_statistics():
    def fit(weights, x, key):
        return affine(weights.params, x), weights._replace(stats=0.5 * weights.stats + x.mean())

    tx = optax.sgd(RATE)
    method = train.sgd(Model(None, None, fit), tx, augment=noisy, copies=3)
    state, _ = jax.jit(method.step)(KEY, train.start(tx, Weights(PARAMS, jnp.float32(4.0))), BATCH)
    expected = 4.0
    for x in copies_of(3):
        expected = 0.5 * expected + x.mean()
    assert float(state.weights.stats) == pytest.approx(expected, rel=1e-5)


def test_bad_input():
    for copies in (0, -1):
        with pytest.raises(BadInput, match="copies"):
            train.sgd(LINEAR, optax.sgd(0.1), copies=copies)
    for wrong in ({"sigmas": ()}, {"draws": 0}, {"sigmas": (0.1, -0.1)}, {"sigmas": (float("nan"),)}):
        with pytest.raises(BadInput):
            train.weight_noise(LINEAR, optax.sgd(0.1), **wrong)


# --- weight noise ------------------------------------------------------------------------------------------------


def counting(weights, x, key):
    """A model whose statistics tell whose weights were seen, in which order."""
    return affine(weights.params, x), weights._replace(stats=0.5 * weights.stats + weights.params["bias"].sum())


def test_weight_noise_equals_a_naive_loop():
    sigmas, draws, tx = (0.0, 0.3, 0.6), 4, optax.sgd(RATE, momentum=0.9)
    method = train.weight_noise(Model(None, None, counting), tx, sigmas=sigmas, draws=draws)
    state, info = jax.jit(method.step)(KEY, train.start(tx, Weights(PARAMS, jnp.float32(2.0))), BATCH)
    kernel, bias, stats, seen, right = KERNEL.astype(np.float64), BIAS.astype(np.float64), 2.0, [], []
    pull, push = np.zeros_like(kernel), np.zeros_like(bias)
    for level, sigma in enumerate(sigmas):
        to_kernel, to_bias = np.zeros_like(kernel), np.zeros_like(bias)
        for s in range(draws):
            to_noise = jax.random.split(keys.at(keys.at(KEY, level), s))[0]
            noise = jax.device_get(tree.gaussian_like(to_noise, PARAMS, sigma))
            w, b = kernel + noise["kernel"], bias + noise["bias"]
            loss, residual = losses_of(X, kernel=w, bias=b)
            to_kernel += X.T @ residual / B / draws
            to_bias += residual.mean(axis=0) / draws
            stats = 0.5 * stats + b.sum()
            seen.append(loss.mean())
            right.append(accuracy(X, w, b))
        pull, push = 0.9 * pull + to_kernel / len(sigmas), 0.9 * push + to_bias / len(sigmas)
        kernel, bias = kernel - RATE * pull, bias - RATE * push
    np.testing.assert_allclose(state.weights.params["kernel"], kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.weights.params["bias"], bias, rtol=1e-4, atol=1e-5)
    assert float(state.weights.stats) == pytest.approx(float(stats), rel=1e-4)
    assert info["loss"] == pytest.approx(np.mean(seen), rel=1e-5)
    assert info["accuracy"] == pytest.approx(np.mean(right))
    assert state.step == 1


def test_weight_noise_of_scale_zero_is_descent_on_the_gradient_over_the_levels():
    levels, tx = 2, optax.sgd(RATE)
    method = train.weight_noise(LINEAR, tx, sigmas=(0.0,) * levels, draws=1)
    state, _ = jax.jit(method.step)(KEY, method.init(KEY, BATCH.x), BATCH)
    slower = optax.sgd(RATE / levels)
    plain = jax.jit(train.sgd(LINEAR, slower).step)
    expected = train.start(slower, WEIGHTS)
    for _ in range(levels):
        expected, _ = plain(KEY, expected, BATCH)
    for name in PARAMS:
        np.testing.assert_allclose(state.weights.params[name], expected.weights.params[name], rtol=1e-5, atol=1e-6)
    assert np.abs(state.weights.params["kernel"] - KERNEL).max() > 0.01


# --- optimisers --------------------------------------------------------------------------------------------------


def moves(tx, grads, value=0.0):
    """The values that a single weight takes under the given gradients."""
    params, found = jnp.float32([value]), []
    opt = tx.init(params)
    for g in grads:
        updates, opt = tx.update(jnp.float32([g]), opt, params)
        params = optax.apply_updates(params, updates)
        found.append(float(params[0]))
    return np.array(found)


def test_optimiser_is_made_when_the_steps_are_known():
    tx, asked = optax.sgd(0.1), []
    assert train.optimiser(tx, 7) is tx
    assert train.optimiser(lambda steps: (asked.append(steps), tx)[1], 7) is tx
    assert asked == [7]


def test_dropping_sgd_falls_tenfold_at_the_drops():
    found = moves(train.dropping_sgd(0.5, 0.0, 0.0, (0.5, 0.75), False, 8), [1.0] * 8)
    np.testing.assert_allclose(-np.diff(found, prepend=0), [0.5] * 4 + [0.05] * 2 + [0.005] * 2, rtol=1e-4)
    assert train.dropping_sgd(0.5, 0.9, 0.0, (0.5,), True, 8) is train.dropping_sgd(0.5, 0.9, 0.0, (0.5,), True, 8)


@pytest.mark.parametrize("nesterov", [False, True])
def test_dropping_sgd_has_momentum_and_decay(nesterov):
    w, velocity, expected = 2.0, 0.0, []
    for t, g in enumerate([1.0, -2.0, 0.5]):
        g = g + 0.1 * w
        velocity = 0.9 * velocity + g
        w -= (0.5 if t < 2 else 0.05) * (g + 0.9 * velocity if nesterov else velocity)
        expected.append(w)
    found = moves(train.dropping_sgd(0.5, 0.9, 0.1, (0.5,), nesterov, 4), [1.0, -2.0, 0.5], 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_clipped_sgd_clips_the_gradient_then_decays():
    for cosine in (None, 4):
        w, velocity, expected = 3.0, 0.0, []
        for t, g in enumerate([20.0, 2.0, -9.0]):
            velocity = 0.9 * velocity + (np.clip(g, -5, 5) + 0.1 * w)
            w -= 0.2 * (1.0 if cosine is None else (1 + np.cos(np.pi * t / 4)) / 2) * velocity
            expected.append(w)
        found = moves(train.clipped_sgd(0.2, 0.9, 0.1, cosine), [20.0, 2.0, -9.0], 3.0)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    norm = train.clipped_sgd(1.0, 0.0, 0.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}  # the norm is that of all weights together
    updates, _ = norm.update({"a": jnp.float32([6.0]), "b": jnp.float32([8.0])}, norm.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-3.0, -4.0], rtol=1e-5)


# --- features ----------------------------------------------------------------------------------------------------

NETS = {
    "mlp": (nets.mlp(5, (7, 6)), "Dense_2", 6),
    "cnn": (nets.cnn(5), "Dense_0", 32),
    "resnet": (nets.resnet18(5, 4), "Dense_0", 32),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_penultimate_is_what_the_head_is_given(name):
    module, head, width = NETS[name]
    model, features = models.from_linen(module), models.penultimate(module)

    rng, x = np.random.default_rng(0), RANDOM.random((4, 8, 8, 3)).astype(np.float32)
    params, stats = jax.eval_shape(model.init, KEY, x)  # to draw them here is faster than to compile init
    params = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), params)
    stats = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), stats)  # unlike the batch's
    layer = params[head]
    found, logits = jax.jit(lambda weights: (features(weights, x), model.apply(weights, x)))(Weights(params, stats))
    assert found.shape == (4, width)
    assert found.std(axis=0).max() > 0
    np.testing.assert_allclose(found @ layer["kernel"] + layer["bias"], logits, rtol=1e-4, atol=1e-5)


class Headless(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(3, (2, 2))(x).mean(axis=(1, 2))


def test_a_module_without_dense_has_no_features():
    x = jnp.zeros((2, 4, 4, 1))
    weights = models.from_linen(Headless()).init(KEY, x)
    with pytest.raises(BadInput, match=r"Headless has no nn\.Dense"):
        models.penultimate(Headless())(weights, x)


def test_images_outside_the_box_are_attacked_within_the_budget():
    """Orthogonal projection leaves such images; clipping them would be an attack of its own."""
    x = jnp.array([[-0.4, 0.5, 0.5, 1.6]])
    model = models.from_apply(lambda key, x: {"w": jnp.zeros((4, 3))}, lambda params, x: x @ params["w"])
    weights = Weights({"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)}, ())
    view = train.adversary(model, projected.linf(8 / 255), stride=4 / 255, steps=5)
    moved = np.asarray(view(jax.random.key(0), weights, sets.Dataset(x, jnp.array([1]), jnp.array([0]))) - x)
    assert 0.02 < np.abs(moved).max() <= 8 / 255 + 1e-6


def test_two_drops_at_one_step_are_both_made():
    transform = train.dropping_sgd(1.0, 0.0, 0.0, (0.5, 0.75), False, 3)
    state, rates = transform.init(jnp.ones(())), []
    for _ in range(4):
        update, state = transform.update(jnp.ones(()), state, jnp.ones(()))
        rates.append(-float(update))
    np.testing.assert_allclose(rates, [1.0, 1.0, 0.01, 0.01], rtol=1e-5)
