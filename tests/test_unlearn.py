"""Unlearning by descent against hand-written gradient steps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import data as sets
from dememo_jax import loop, losses, models, unlearn
from dememo_jax.errors import BadInput
from dememo_jax.types import Weights

N, K, RATE = 24, 3, 0.3
RECIPES = {"retrain": unlearn.retrain, "finetune": unlearn.finetune, "gradient_ascent": unlearn.gradient_ascent}
FRESH = np.random.default_rng(2).normal(size=(4, K)).astype(np.float32)
TRAINED = np.random.default_rng(3).normal(size=(4, K)).astype(np.float32)


def linear():
    return models.from_apply(lambda key, x: {"w": jnp.asarray(FRESH)}, lambda p, x: x.reshape(len(x), -1) @ p["w"])


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    return sets.make(rng.uniform(size=(N, 2, 2, 1)).astype(np.float32), rng.integers(0, K, N))


@pytest.fixture(scope="module")
def forget():
    return np.arange(N) % 4 == 1  # 6 of 24


def trained():
    return Weights({"w": jnp.asarray(TRAINED)}, ())


@functools.cache
def method_of(name, batch=18, rate=RATE):
    return RECIPES[name](linear(), optax.sgd(rate, momentum=0.5), batch=batch)


scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))


def begin(method, weights, data, forget):
    return jax.jit(method.init)(jax.random.key(0), weights, data, jnp.asarray(forget))


def run(name, data, forget, *, steps=10, weights=None, start=0, state=None, **how):
    method = method_of(name, **how)
    state = begin(method, weights or trained(), data, forget) if state is None else state
    return scan(method, jax.random.key(1), state, data, steps=steps, start=start)


def by_hand(w, x, y):
    """Mean cross-entropy of a linear softmax and its gradient, in float64."""
    x = np.asarray(x, np.float64).reshape(len(y), -1)
    z = x @ w
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return -np.log(p[np.arange(len(y)), y]).mean(), x.T @ (p - np.eye(K)[y]) / len(y)


def poisoned(data, mask):
    return data._replace(x=jnp.where(mask[:, None, None, None], jnp.nan, data.x))


@pytest.mark.parametrize(
    ("name", "on_forgotten", "sign", "begin"),
    [("retrain", False, -1, FRESH), ("finetune", False, -1, TRAINED), ("gradient_ascent", True, 1, TRAINED)],
)
def test_ten_steps_by_hand(toy, forget, name, on_forgotten, sign, begin):
    # A batch is 18: all of the retain set, or three times the whole forget set, so its mean is the set's mean.
    mask = forget if on_forgotten else ~forget
    x, y = np.asarray(toy.x)[mask], np.asarray(toy.y)[mask]
    state, info = run(name, toy, forget)
    w, momentum, values = begin.astype(np.float64), 0.0, []
    for _ in range(10):
        value, gradient = by_hand(w, x, y)
        values.append(value)
        momentum = 0.5 * momentum + gradient
        w = w + sign * RATE * momentum
    np.testing.assert_allclose(state.weights.params["w"], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(info["forget_loss" if on_forgotten else "retain_loss"], values, rtol=1e-4)
    assert (np.diff(values) * sign > 0).all()  # the forget loss climbs, the retain loss falls


@pytest.mark.parametrize(("name", "never_seen"), [("retrain", "forget"), ("finetune", "forget"), ("gradient_ascent", "retain")])
def test_the_other_set_is_never_touched(toy, forget, name, never_seen):
    mask = forget if never_seen == "forget" else ~forget
    clean, _ = run(name, toy, forget)
    state, info = run(name, poisoned(toy, mask), forget)
    np.testing.assert_array_equal(state.weights.params["w"], clean.weights.params["w"])
    assert np.isfinite(state.weights.params["w"]).all()
    assert all(np.isfinite(values).all() for values in info.values())
    seen, _ = run(name, poisoned(toy, ~mask), forget)
    assert np.isnan(seen.weights.params["w"]).any()  # the poison does show where it is seen


def test_every_retained_example_is_seen_once_an_epoch(toy, forget):
    # At a rate of zero the losses of one epoch are those of disjoint batches: their mean is the mean over the set.
    _, info = run("finetune", toy, forget, steps=3, batch=6, rate=0.0)
    value, _ = by_hand(TRAINED.astype(np.float64), np.asarray(toy.x)[~forget], np.asarray(toy.y)[~forget])
    assert float(info["retain_loss"].mean()) == pytest.approx(value, rel=1e-5)


def test_retrain_forgets_the_given_weights(toy, forget):
    broken = Weights({"w": jnp.full((4, K), jnp.nan)}, ())
    state, _ = run("retrain", toy, forget, weights=broken)
    assert np.isfinite(state.weights.params["w"]).all()
    random = models.from_apply(lambda key, x: {"w": jax.random.normal(key, (4, K))}, linear().apply)
    method = unlearn.retrain(random, optax.sgd(RATE))
    one, two = (method.init(jax.random.key(seed), trained(), toy, forget).weights.params["w"] for seed in (0, 1))
    assert not np.allclose(one, two)


@pytest.mark.parametrize("name", ["finetune", "gradient_ascent"])
def test_resume_is_bit_for_bit(toy, forget, name):
    whole, _ = run(name, toy, forget, steps=20, batch=5)
    half, _ = run(name, toy, forget, steps=10, batch=5)
    again, _ = run(name, toy, forget, steps=10, batch=5, start=10, state=half)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
    assert int(whole.step) == 20
    assert not np.array_equal(half.weights.params["w"], whole.weights.params["w"])


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(K)(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.reshape(len(x), -1)))


def test_statistics_follow_the_mode(toy, forget):
    model = models.from_linen(Normed())
    weights = jax.jit(model.init)(jax.random.key(0), toy.x)

    def after(mode):
        method = unlearn.gradient_ascent(model, optax.sgd(0.1), batch=6, mode=mode)
        state = begin(method, weights, toy, forget)
        return scan(method, jax.random.key(1), state, toy, steps=1)[0].weights

    frozen, fitted = after("frozen"), after("fit")
    stats = frozen.stats["batch_stats"]["BatchNorm_0"]
    assert (np.asarray(stats["mean"]) == 0).all()
    assert (np.asarray(stats["var"]) == 1).all()
    # Momentum 0.9: the running mean goes a tenth of the way to the mean over the forgotten images alone.
    x = np.asarray(toy.x)[forget].reshape(6, -1)
    np.testing.assert_allclose(fitted.stats["batch_stats"]["BatchNorm_0"]["mean"], 0.1 * x.mean(axis=0), atol=1e-6)
    for moved in (frozen, fitted):
        assert np.abs(moved.params["Dense_0"]["kernel"] - weights.params["Dense_0"]["kernel"]).max() > 1e-3


def test_terms_add_up_and_each_is_reported(toy, forget):
    terms = (
        unlearn.Term("retain", 0.7),
        unlearn.Term("retain", 0.2, lambda logits, labels: losses.entropy(logits)),
        unlearn.Term("forget", -0.4),
    )
    method = unlearn.descent(linear(), optax.sgd(RATE), *terms[::2], batch=18)
    state = begin(method, trained(), toy, forget)
    state, info = scan(method, jax.random.key(1), state, toy, steps=1)
    w = TRAINED.astype(np.float64)
    (kept, down), (lost, up) = (by_hand(w, np.asarray(toy.x)[m], np.asarray(toy.y)[m]) for m in (~forget, forget))
    np.testing.assert_allclose(state.weights.params["w"], w - RATE * (0.7 * down - 0.4 * up), rtol=1e-5, atol=1e-6)
    assert float(info["retain_loss"][0]) == pytest.approx(kept, rel=1e-5)  # unweighted
    assert float(info["forget_loss"][0]) == pytest.approx(lost, rel=1e-5)

    both = unlearn.descent(linear(), optax.sgd(RATE), *terms, batch=18)
    _, info = jax.eval_shape(lambda: both.step(jax.random.key(1), both.init(jax.random.key(0), trained(), toy, forget), toy))
    assert set(info) == {"retain_loss_0", "retain_loss_1", "forget_loss"}  # numbered where several share a name


@pytest.mark.parametrize("terms", [(), (unlearn.Term("all", 1.0),)])
def test_descent_refuses(terms):
    with pytest.raises(BadInput):
        unlearn.descent(linear(), optax.sgd(0.1), *terms)


def test_a_batch_is_no_whole_set(toy, forget):
    method = method_of("finetune")
    state = method.init(jax.random.key(0), trained(), toy, jnp.asarray(forget))
    with pytest.raises(BadInput, match="whole set of 24 examples, got 4: drive this method without batch="):
        scan(method, jax.random.key(1), state, toy, steps=1, batch=4)


# --- a whole run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps"), [("finetune", 3), ("gradient_ascent", 3), ("retrain", 3)])
def test_run_counts_its_own_steps(toy, forget, name, steps):
    """Three epochs in batches of 18: the 18 retained examples are one batch, the 6 forgotten ones too."""
    method, seen = method_of(name), []
    found = unlearn.run(method, jax.random.key(5), trained(), toy, forget, epochs=3, after=lambda done, *_: seen.append(done))
    assert seen == [1, 2, 3]
    assert method.steps(int(forget.sum()), int((~forget).sum()), 3) == steps
    state = begin(method, trained(), toy, forget)  # a full batch: whatever the key, the same examples
    state, _ = scan(method, jax.random.key(1), state, toy, steps=steps)
    np.testing.assert_allclose(found.params["w"], method.finish(state).params["w"], rtol=1e-5, atol=1e-6)


def test_run_may_stop_and_refuses(toy, forget):
    method, seen = method_of("finetune", batch=6), []
    unlearn.run(method, jax.random.key(5), trained(), toy, forget, epochs=3, after=lambda n, *_: seen.append(n) or loop.STOP)
    assert seen == [3]
    for wrong, message in (
        ({"epochs": 0}, "epochs"),
        ({"forget": np.zeros(N, bool)}, "empty"),
        ({"forget": np.array([3])}, "forget mask"),
        ({"method": unlearn.output_perturbation(linear(), clip_init=1.0, sigma=0.1)}, "CertifiedMethod"),
        ({"data": toy._replace(y=toy.y + 1)}, "labels run to 3"),
    ):
        given = {"method": method, "weights": trained(), "data": toy, "forget": forget, "epochs": 1} | wrong
        with pytest.raises(BadInput, match=message):
            unlearn.run(given.pop("method"), jax.random.key(5), given.pop("weights"), given.pop("data"), **given)


def test_descent_takes_optimizers_that_look_at_the_loss_and_knows_the_weights_to_use(toy, forget):
    def objective(params):
        logits = linear().apply(Weights(params, ()), toy.x[~forget])
        return losses.cross_entropy(logits, toy.y[~forget]).mean()

    tx, params = optax.lbfgs(), trained().params
    opt = tx.init(params)
    for _ in range(2):
        value, grads = jax.value_and_grad(objective)(params)
        updates, opt = tx.update(grads, opt, params, value=value, grad=grads, value_fn=objective)
        params = optax.apply_updates(params, updates)
    found = unlearn.run(unlearn.finetune(linear(), tx, batch=18), jax.random.key(5), trained(), toy, forget, epochs=2)
    np.testing.assert_allclose(found.params["w"], params["w"], rtol=1e-3, atol=1e-4)

    averaged = unlearn.descent(
        linear(), optax.contrib.schedule_free_sgd(0.5, b1=0.8), unlearn.Term("retain"), batch=18,
        eval_params=optax.contrib.schedule_free_eval_params,
    )  # fmt: skip
    state, _ = scan(averaged, jax.random.key(1), begin(averaged, trained(), toy, forget), toy, steps=3)
    y, z = (np.asarray(one["w"], np.float64) for one in (state.weights.params, state.opt.z))
    np.testing.assert_allclose(averaged.finish(state).params["w"], (y - 0.2 * z) / 0.8, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="eval_params"):
        begin(unlearn.finetune(linear(), optax.contrib.schedule_free_sgd(0.5)), trained(), toy, forget)
