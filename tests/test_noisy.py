"""Certified noisy descent: its noise, its clips, what it must not depend on, and what it promises."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from dememo_jax import bounds, loop, models, unlearn
from dememo_jax import data as sets
from dememo_jax.errors import BadInput
from dememo_jax.types import Weights

N, K, SIDE = 24, 3, 180
RNG = np.random.default_rng(3)
CENTRE = {"b": RNG.normal(size=K).astype(np.float32), "w": RNG.normal(size=(4, K)).astype(np.float32)}
TRAINED = {name: leaf + RNG.normal(size=leaf.shape).astype(np.float32) for name, leaf in CENTRE.items()}
COMPARATORS = list(unlearn.COMPARATORS)


def linear(params, x):
    return x.reshape(len(x), -1) @ params["w"] + params["b"]


MODEL = models.from_apply(lambda key, x: jax.tree.map(jnp.zeros_like, CENTRE), linear)
scan = jax.jit(loop.scan, static_argnames=("method", "steps"))
step_of = functools.cache(lambda method: jax.jit(method.step))


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    return sets.make(rng.uniform(size=(N, 2, 2, 1)).astype(np.float32), rng.integers(0, K, N))


@pytest.fixture(scope="module")
def forget():
    return np.arange(N) % 4 == 0  # the first example among them


@functools.cache
def descent(**how):
    settings = {"lr": 0.3, "clip_init": 0.8, "clip_grad": 0.5, "sigma": 0.0, "batch": 18}
    return unlearn.noisy_descent(MODEL, **(settings | how))


def begin(method, data, forget, *, params=TRAINED, centre=None, key=0):
    return method.init(jax.random.key(key), Weights(jax.tree.map(jnp.asarray, params), ()), data, forget, centre)


def walk(method, state, data, *, steps, key=1):
    """States after each of `steps` steps, and what each reported."""
    states, said = [], []
    for t in range(steps):
        state, info = step_of(method)(jax.random.fold_in(jax.random.key(key), t), state, data)
        states.append(state)
        said.append(info)
    return states, said


def flat(params):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(params)])


def same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def gradient(x, images, labels):
    """Of the mean cross-entropy of the linear network at x, biases first, in float64; and the loss."""
    images = np.asarray(images, np.float64).reshape(len(labels), -1)
    z = images @ x[K:].reshape(4, K) + x[:K]
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    error = (p - np.eye(K)[labels]) / len(labels)
    return np.concatenate([error.sum(axis=0), (images.T @ error).ravel()]), -np.log(p[range(len(labels)), labels]).mean()


def cut(vector, ceiling):
    return vector * min(1.0, ceiling / np.linalg.norm(vector))


# --- the move ----------------------------------------------------------------------------------------------------


def rate(step):
    return 0.6 / (1.0 + step)


def ceiling(step):
    return 0.6 + 0.2 * step


@pytest.mark.parametrize(
    ("lr", "clip_grad", "decay", "centred"),
    [(0.3, 0.2, 0.0, False), (rate, ceiling, 0.5, True)],
)
def test_steps_by_hand(toy, forget, lr, clip_grad, decay, centred):
    centre = CENTRE if centred else None
    method = descent(lr=lr, clip_grad=clip_grad, weight_decay=decay)
    begun = begin(method, toy, forget, centre=centre)
    states, said = walk(method, begun, toy, steps=6)
    c = flat(CENTRE) if centred else np.zeros(K + 4 * K)
    x = c + cut(flat(TRAINED) - c, 0.8)
    np.testing.assert_allclose(flat(begun.weights.params), x, atol=1e-6)
    images, labels = np.asarray(toy.x)[~forget], np.asarray(toy.y)[~forget]
    for t in range(6):
        g, value = gradient(x, images, labels)
        r, most = (s(t) if callable(s) else s for s in (lr, clip_grad))
        assert float(said[t]["retain_loss"]) == pytest.approx(value, rel=1e-4)
        assert float(said[t]["gradient_norm"]) == pytest.approx(np.linalg.norm(g), rel=1e-4)
        assert float(said[t]["clipped"]) == (np.linalg.norm(g) > most)
        x = x - r * (cut(g, most) + decay * (x - c))
        np.testing.assert_allclose(flat(states[t].weights.params), x, atol=1e-5)
        assert int(states[t].step) == t + 1
    assert not centred or len({float(info["clipped"]) for info in said}) == 2  # the rising ceiling cuts some, not others
    assert set(begun._fields) == {"weights", "centre", "forget", "order", "step"}  # no room for momentum


def test_one_clip_for_all_leaves():
    # Gradients of 3 and 4 on two leaves: neither is above 4.5, together they are 5.
    model = models.from_apply(lambda key, x: None, lambda p, x: jnp.stack([3 * p["a"] + 4 * p["b"]] * len(x)))
    method = unlearn.noisy_descent(
        model, lr=0.1, clip_init=9.0, clip_grad=4.5, sigma=0.0, batch=4, loss=lambda logits, labels: logits
    )
    data, forget = sets.make(np.zeros((4, 1), np.float32), np.zeros(4)), np.arange(4) == 0
    start = Weights({"a": jnp.asarray(1.0), "b": jnp.asarray(2.0)}, ())
    # model.init is asked for statistics only; it has none
    (state,), (info,) = walk(method, method.init(jax.random.key(0), start, data, forget), data, steps=1)
    assert float(info["gradient_norm"]) == pytest.approx(5.0)
    assert flat(state.weights.params) == pytest.approx([1 - 0.1 * 3 * 0.9, 2 - 0.1 * 4 * 0.9], rel=1e-6)


def test_the_start_is_clipped_around_the_centre(toy, forget):
    method = descent(clip_init=0.25)
    around = flat(begin(method, toy, forget, centre=CENTRE).weights.params) - flat(CENTRE)
    apart = flat(TRAINED) - flat(CENTRE)
    assert np.linalg.norm(around) == pytest.approx(0.25, rel=1e-4)
    np.testing.assert_allclose(around, apart * 0.25 / np.linalg.norm(apart), atol=1e-6)
    zero = flat(begin(method, toy, forget).weights.params)
    np.testing.assert_allclose(zero, cut(flat(TRAINED), 0.25), atol=1e-6)
    same(begin(descent(clip_init=50.0), toy, forget).weights.params, TRAINED)  # inside: as it is
    same(begin(descent(clip_init=0.0), toy, forget, centre=CENTRE).weights.params, CENTRE)


def test_no_step_is_longer_than_its_clip(toy, forget):
    method = descent(lr=0.5, clip_grad=0.1, weight_decay=1.0, batch=5)
    state = begin(method, toy, forget, centre=CENTRE)
    for _ in range(4):
        before, ((state,), _) = flat(state.weights.params), walk(method, state, toy, steps=1)
        moved = flat(state.weights.params) - before + 0.5 * (before - flat(CENTRE))
        assert np.linalg.norm(moved) == pytest.approx(0.5 * 0.1, rel=1e-4)  # these gradients are longer


def test_a_gradient_that_is_not_finite_moves_nothing(toy, forget):
    method = descent(lr=0.5, clip_grad=0.1, weight_decay=1.0, batch=5)
    begun = begin(method, toy, forget)
    for bad in (np.nan, np.inf):
        broken = toy._replace(x=jnp.full_like(toy.x, bad))
        (state,), (info,) = walk(method, begun, broken, steps=1)
        np.testing.assert_allclose(flat(state.weights.params), flat(begun.weights.params) / 2, rtol=1e-6)  # decay alone
        assert not np.isfinite(info["gradient_norm"])


# --- the noise ---------------------------------------------------------------------------------------------------


WIDE = TRAINED | {"idle": np.zeros((SIDE, SIDE), np.float32)}  # beside the network, many parameters without gradient


def test_the_law_of_the_noise(toy, forget):
    method = descent(clip_init=50.0, sigma=lambda step: 0.1 * (1.0 + step))
    begun = begin(method, toy, forget, params=WIDE)
    states = [begun, *walk(method, begun, toy, steps=3)[0]]
    noise = np.diff([np.asarray(state.weights.params["idle"], np.float64).ravel() for state in states], axis=0)
    for drawn, sigma in zip(noise, (0.1, 0.2, 0.3), strict=True):
        assert drawn.std() == pytest.approx(sigma, rel=4 / math.sqrt(2) / SIDE)
        assert abs(drawn.mean()) < 4 * sigma / SIDE
        assert stats.kstest(drawn / sigma, "norm").pvalue > 0.01
        for wrong in (0.94, 1.06):
            assert stats.kstest(drawn / sigma * wrong, "norm").pvalue < 1e-3  # the test would see another scale
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 5 / SIDE  # anew in every step
    other = np.asarray(walk(method, begun, toy, steps=1, key=2)[0][0].weights.params["idle"]).ravel()
    assert abs(np.corrcoef(other, noise[0])[0, 1]) < 5 / SIDE


@pytest.mark.slow
def test_noise_on_every_leaf_and_none_shared(toy, forget):
    method = descent(clip_init=50.0, sigma=0.2)
    begun = begin(method, toy, forget)
    moved, _ = jax.jit(jax.vmap(method.step, (0, None, None)))(jax.random.split(jax.random.key(2), 4000), begun, toy)
    found = np.concatenate(
        [np.asarray(leaf, np.float64).reshape(4000, -1) for leaf in jax.tree.leaves(moved.weights.params)], 1
    )
    g, _ = gradient(flat(TRAINED), np.asarray(toy.x)[~forget], np.asarray(toy.y)[~forget])
    noise = found - (flat(TRAINED) - 0.3 * cut(g, 0.5))
    np.testing.assert_allclose(noise.std(axis=0), 0.2, rtol=5 / math.sqrt(8000))  # each of the 15 coordinates
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=5 * 0.2 / math.sqrt(4000))
    assert np.abs(np.corrcoef(noise.T) - np.eye(5 * K)).max() < 5 / math.sqrt(4000)


def test_output_perturbation_is_one_step_of_noise(toy, forget):
    sigma = unlearn.calibrate(2.0, 1e-5, steps=1, lr=0.0, clip_init=0.5, clip_grad=0.0)
    assert sigma == pytest.approx(2 * 0.5 / bounds.gdp_mu(2.0, 1e-5), rel=1e-6)
    method = unlearn.output_perturbation(MODEL, clip_init=0.5, sigma=sigma)
    begun = begin(method, toy, forget, params=WIDE)
    assert np.linalg.norm(flat(begun.weights.params)) == pytest.approx(0.5, rel=1e-5)
    (state,), (info,) = walk(method, begun, toy, steps=1)
    noise = flat(state.weights.params) - flat(begun.weights.params)
    assert noise.std() == pytest.approx(sigma, rel=4 / math.sqrt(2 * noise.size))
    assert stats.kstest(noise / sigma, "norm").pvalue > 0.01
    assert float(info["distance"]) == pytest.approx(0.5, rel=1e-5)
    promise = method.guarantee(1)
    assert (promise.mu, promise.epsilon) == pytest.approx((1.0 / sigma, 2.0), rel=1e-6)
    for steps in (0, 2):
        with pytest.raises(BadInput, match="step"):
            method.guarantee(steps)


# --- model clipping ----------------------------------------------------------------------------------------------


def test_model_clipping_by_hand(toy, forget):
    how = {"lr": lambda step: 0.3 + 0.3 * step, "clip_init": 0.8, "clip_model": 0.7, "weight_decay": 1.0, "batch": 18}
    method = unlearn.noisy_model_clipping(MODEL, sigma=1e-30, **how)  # nothing beside float32 numbers
    states, said = walk(method, begin(method, toy, forget, centre=CENTRE), toy, steps=4)
    c = flat(CENTRE)
    x = c + cut(flat(TRAINED) - c, 0.8)
    for t in range(4):
        g, _ = gradient(x, np.asarray(toy.x)[~forget], np.asarray(toy.y)[~forget])
        step = x - (0.3 + 0.3 * t) * (g + (x - c))
        assert float(said[t]["clipped"]) == (np.linalg.norm(step - c) > 0.7)
        x = c + cut(step - c, 0.7)
        np.testing.assert_allclose(flat(states[t].weights.params), x, atol=1e-5)
    assert {float(info["clipped"]) for info in said} == {0.0, 1.0}
    broken = toy._replace(x=toy.x.at[1].set(jnp.nan))
    (lost,), _ = walk(method, begin(method, toy, forget, centre=CENTRE), broken, steps=1)
    np.testing.assert_allclose(flat(lost.weights.params), c, atol=1e-6)  # some point of the ball


@pytest.mark.slow
def test_noise_of_model_clipping_comes_after_the_clip(toy, forget):
    how = {"lr": 0.1, "clip_init": 2.0, "clip_model": 0.5, "batch": 18}
    method = unlearn.noisy_model_clipping(MODEL, sigma=0.3, sigma_init=0.7, **how)
    silent = unlearn.noisy_model_clipping(MODEL, sigma=0.3, **how)
    noised, plain = (begin(one, toy, forget, params=WIDE) for one in (method, silent))
    first = flat(noised.weights.params) - flat(plain.weights.params)
    assert first.std() == pytest.approx(0.7, rel=0.02)
    (state,), _ = walk(method, noised, toy, steps=1)
    noise = flat(state.weights.params)  # of which at most 0.5 of length is not noise
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    assert stats.kstest(noise / 0.3, "norm").pvalue > 0.01
    assert abs(np.corrcoef(first, noise)[0, 1]) < 5 / SIDE
    for one, start in ((method, 4.0), (silent, 0.0)):
        expected = bounds.model_clipping_delta(
            1.0, steps=3, diameter=1.0, sigma=0.3, start=start, sigma_init=0.7 if start else 0.0
        )
        assert one.guarantee(3).delta == expected
    assert method.guarantee(3).delta <= silent.guarantee(3).delta
    near = unlearn.noisy_model_clipping(MODEL, sigma=0.3, sigma_init=0.7, comparator="from_centre", **how)
    assert near.guarantee(3).delta == bounds.model_clipping_delta(
        1.0, steps=3, diameter=1.0, sigma=0.3, start=2.0, sigma_init=0.7
    )


# --- what a run must not depend on -------------------------------------------------------------------------------


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(K)(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.reshape(len(x), -1)))


NORMED = models.from_linen(Normed())


@functools.cache
def every_method(name):
    how = {"lr": 0.3, "clip_init": 0.8, "batch": 7}
    return {
        "descent": lambda: unlearn.noisy_descent(NORMED, clip_grad=0.2, sigma=0.1, **how),
        "model clipping": lambda: unlearn.noisy_model_clipping(NORMED, clip_model=0.5, sigma=0.1, **how),
    }[name]()


@pytest.fixture(scope="module")
def normed(toy):
    return jax.jit(NORMED.init)(jax.random.key(0), toy.x)


begin_of = functools.cache(lambda method: jax.jit(method.init))


def run(method, weights, data, forget, *, steps=4):
    states, said = walk(method, begin_of(method)(jax.random.key(0), weights, data, forget), data, steps=steps)
    return states[-1], said


METHODS = ["descent", "model clipping"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_forgotten_examples_are_never_looked_at(toy, forget, normed, name):
    clean, info = run(every_method(name), normed, toy, forget)
    mask = forget[:, None, None, None]
    poisoned = sets.Dataset(jnp.where(mask, jnp.nan, toy.x), jnp.where(forget, -7, toy.y), toy.index)
    state, seen = run(every_method(name), normed, poisoned, forget)
    same(state, clean)
    same(seen, info)
    _, shown = run(every_method(name), normed, poisoned._replace(x=jnp.where(mask, toy.x, jnp.nan)), forget)
    assert all(np.isnan(info["retain_loss"]) for info in shown)  # the poison does show where it is looked at


@pytest.mark.parametrize("name", METHODS)
def test_given_statistics_do_not_leak(toy, forget, normed, name):
    other = normed._replace(stats=jax.tree.map(lambda leaf: 7 * leaf + 100, normed.stats))
    one, two = (run(every_method(name), weights, toy, forget)[0] for weights in (normed, other))
    same(one, two)
    same(one.weights.stats, normed.stats)  # those of an initialisation


def test_only_the_clipped_start_is_left_of_the_weights(toy, forget, normed):
    # With a ball of no size the given weights are gone: nothing else of them is kept.
    method = unlearn.noisy_descent(NORMED, lr=0.3, clip_init=0.0, clip_grad=0.2, sigma=0.1, batch=7)
    other = Weights(jax.tree.map(lambda leaf: leaf * 3 - 1, normed.params), normed.stats)
    same(*(begin_of(method)(jax.random.key(0), weights, toy, forget) for weights in (normed, other)))


def falling(step):
    return 0.3 * 0.9**step


def test_resume_is_bit_for_bit(toy, forget):
    method = descent(lr=falling, clip_grad=ceiling, sigma=falling, weight_decay=0.1, batch=5)
    promise = method.guarantee(12)
    begun = begin(method, toy, forget, centre=CENTRE)
    whole, _ = scan(method, jax.random.key(1), begun, toy, steps=12, start=0)
    half, _ = scan(method, jax.random.key(1), begun, toy, steps=6, start=0)
    again, _ = scan(method, jax.random.key(1), half, toy, steps=6, start=6)
    same(whole, again)
    assert int(again.step) == 12
    assert not np.array_equal(flat(half.weights.params), flat(whole.weights.params))
    assert method.guarantee(int(again.step)) == promise
    assert method.guarantee(int(half.step)) != promise


# --- what is released --------------------------------------------------------------------------------------------


def test_released_statistics_are_those_of_the_retain_set(toy, forget, normed):
    poisoned = toy._replace(x=jnp.where(forget[:, None, None, None], jnp.nan, toy.x))
    leaked = normed._replace(stats=jax.tree.map(lambda leaf: 7 * leaf + 100, normed.stats))
    one, two = (unlearn.released(NORMED, w, x, forget, images=7) for w, x in ((normed, toy), (leaked, poisoned)))
    same(one, two)
    same(one.params, normed.params)
    kept, found = np.asarray(toy.x, np.float64)[~forget].reshape(-1, 4)[:7], one.stats["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], kept.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["var"], kept.var(axis=0), rtol=1e-3)
    plain = Weights(jax.tree.map(jnp.asarray, TRAINED), ())
    same(unlearn.released(MODEL, plain, toy, forget), plain)


class Kept(nn.Module):
    """A variable beside the parameters: constant, or an average of the kernel, brought up to date in training or not."""

    follows: bool

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(len(x), -1)
        kernel = self.param("kernel", nn.initializers.normal(), (4, K))
        average = self.variable("ema", "kernel", jnp.ones, (4, K))
        if train and self.follows:
            average.value = 0.99 * average.value + 0.01 * kernel
        return x @ (kernel + average.value)


def test_statistics_that_cannot_be_recomputed_are_refused(toy, forget):
    model = models.from_linen(Kept(follows=False))
    method = unlearn.noisy_descent(model, lr=0.1, clip_init=1.0, clip_grad=1.0, sigma=0.1)
    fresh = model.init(jax.random.key(7), toy.x[:1])
    learned = fresh._replace(stats={"ema": {"kernel": jnp.ones((4, K)).at[1, 2].add(1e-3)}})
    for ask in (
        lambda: method.init(jax.random.key(0), learned, toy, forget),
        lambda: unlearn.released(model, learned, toy, forget),
        lambda: unlearn.check_network(model, learned, toy.x[:1]),
        lambda: unlearn.check_network(model, fresh._replace(stats={"ema": {"kernel": jnp.ones((5, K))}}), toy.x[:1]),
    ):
        with pytest.raises((BadInput, TypeError), match=r"ema/kernel|shape"):
            ask()
    assert models.not_averaged(model, learned, toy.x[:2]) == ["ema/kernel"]
    state = method.init(jax.random.key(0), fresh, toy, forget)  # a constant is no harm
    same(unlearn.released(model, state.weights, toy, forget), state.weights)


def test_an_average_of_the_weights_is_made_anew(toy, forget):
    model = models.from_linen(Kept(follows=True))
    fresh = model.init(jax.random.key(7), toy.x[:1])
    learned = fresh._replace(stats={"ema": {"kernel": jnp.full((4, K), 5.0)}})
    assert models.not_averaged(model, learned, toy.x[:2]) == []
    found = unlearn.released(model, learned, toy, forget).stats["ema"]["kernel"]
    np.testing.assert_allclose(found, fresh.params["kernel"], rtol=1e-3, atol=1e-4)


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.drop = nnx.BatchNorm(4, momentum=0.9, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, K, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(x.reshape(len(x), -1))))


def test_keys_of_dropout_are_no_obstacle(toy, forget):
    model = models.from_nnx(Dropped)
    weights = model.init(jax.random.key(3), toy.x[:1])
    assert models.not_averaged(model, weights, toy.x[:2]) == []
    method = unlearn.noisy_descent(model, lr=0.1, clip_init=1.0, clip_grad=1.0, sigma=0.1, batch=7)
    begun = method.init(jax.random.key(0), weights, toy, forget)
    after, _ = jax.eval_shape(method.step, jax.random.key(0), begun, toy)
    assert jax.tree.structure(after) == jax.tree.structure(begun)
    found = unlearn.released(model, begun.weights, toy, forget).stats["norm"]["mean"]
    np.testing.assert_allclose(found, np.asarray(toy.x)[~forget].reshape(-1, 4).mean(axis=0), rtol=1e-4)


class Featured(nn.Module):
    """Random features, drawn at initialisation and never trained."""

    @nn.compact
    def __call__(self, x, train=False):
        drawn = self.variable("constants", "drawn", lambda: jax.random.normal(self.make_rng("params"), (4, 5)))
        return nn.Dense(K)(x.reshape(len(x), -1) @ drawn.value)


def test_what_may_begin_may_be_released(toy, forget):
    model = models.from_linen(Featured())
    method = unlearn.noisy_descent(model, lr=0.1, clip_init=1.0, clip_grad=1.0, sigma=0.1)
    try:
        state = method.init(jax.random.key(1), model.init(jax.random.key(0), toy.x[:1]), toy, forget)
    except BadInput:
        return  # refused before the work
    unlearn.released(model, state.weights, toy, forget)


HALF_AN_ULP = {"bfloat16": (0.03125, 0.01578), "float16": (0.003906, 0.001973)}  # lengths: as rounded, as accounted


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("where", ["weights", "centre"])
def test_half_precision_is_refused_since_its_rounding_breaks_the_sensitivity(toy, forget, dtype, where):
    # Starts half an ulp and a little on either side of 0.05: rounding brings them twice as far apart as was counted.
    low = jnp.full(4096, 0.05, dtype)
    ulp = float(jnp.nextafter(low[0], jnp.asarray(1.0, dtype)) - low[0])
    real = 2 * 0.505 * ulp * 64
    up, down = (np.asarray((low.astype(jnp.float32) + way * 0.505 * ulp).astype(dtype), np.float64) for way in (1, -1))
    stored = up - down
    assert (np.linalg.norm(stored), real) == pytest.approx(HALF_AN_ULP[jnp.dtype(dtype).name], rel=1e-3)
    half = {name: jnp.asarray(leaf, dtype) for name, leaf in TRAINED.items()}
    given = {"params": half} if where == "weights" else {"centre": half}
    methods = (
        descent(sigma=0.1),
        unlearn.noisy_model_clipping(MODEL, lr=0.1, clip_init=1.0, clip_model=1.0, sigma=1.0),
        unlearn.output_perturbation(MODEL, clip_init=1.0, sigma=1.0),
    )
    for method in methods:
        with pytest.raises(BadInput, match=f"float32 at least, got {jnp.dtype(dtype).name}"):
            begin(method, toy, forget, **given)


# --- promises ----------------------------------------------------------------------------------------------------

COSINE = optax.cosine_decay_schedule(0.3, 30, alpha=0.1)


@pytest.mark.parametrize("comparator", COMPARATORS)
@pytest.mark.parametrize(
    ("lr", "clip_grad", "decay"), [(0.2, 0.7, 0.0), (0.2, 0.7, 1.5), (COSINE, 0.7, 1.5), (falling, ceiling, 0.0)]
)
def test_calibration_and_guarantee_are_inverse(comparator, lr, clip_grad, decay):
    how = {"lr": lr, "clip_init": 0.6, "clip_grad": clip_grad, "weight_decay": decay, "comparator": comparator}
    for epsilon, delta, steps in ((1.0, 1e-5, 12), (6.0, 1e-3, 1)):
        sigma = unlearn.calibrate(epsilon, delta, steps=steps, **how)
        promise = unlearn.noisy_descent(MODEL, sigma=sigma, delta=delta, **how).guarantee(steps)
        assert promise.epsilon == pytest.approx(epsilon, rel=1e-5)
        assert promise.mu == pytest.approx(bounds.gdp_mu(epsilon, delta), rel=1e-6)
        assert (promise.delta, promise.comparator) == (delta, comparator)
        assert unlearn.MEANING[comparator] in unlearn.in_words(promise)
        assert len(promise.assumptions) >= 4
        assert unlearn.INDEPENDENT in promise.assumptions
        assert f"{promise.mu:.4g}" in unlearn.in_words(promise)
        if lr == 0.2:
            apart, each = {"same_procedure": (2, 2), "from_centre": (1, 2), "data_independent": (1, 1)}[comparator]
            c = 1 - 0.2 * decay
            powers = c ** np.arange(steps)
            z = apart * 0.6 * c**steps + each * 0.2 * 0.7 * powers.sum()
            assert promise.mu == pytest.approx(z / (sigma * math.sqrt((powers**2).sum())), rel=1e-6)


def test_noise_by_a_schedule_is_accounted_step_by_step():
    how = {"lr": COSINE, "clip_init": 0.6, "clip_grad": 0.5, "weight_decay": 0.4}

    def promise(scale):
        return unlearn.noisy_descent(MODEL, sigma=lambda step: scale * (2.0 - step / 20), **how).guarantee(20)

    rates = np.array([float(COSINE(t)) for t in range(20)])
    mu = bounds.noisy_iteration_mu(1.2, 1 - 0.4 * rates, rates, 2.0 - np.arange(20) / 20)
    assert promise(1.0).mu == pytest.approx(mu, rel=1e-6)
    assert promise(mu / bounds.gdp_mu(1.0, 1e-5)).epsilon == pytest.approx(1.0, rel=1e-5)
    assert promise(0.5).mu == pytest.approx(2 * mu, rel=1e-6)


def test_composition_of_promises():
    def promise(sigma, comparator="same_procedure", delta=1e-5):
        return descent(sigma=sigma, comparator=comparator, delta=delta).guarantee(5)

    three, four = promise(30.0), promise(40.0, delta=1e-6)
    both = unlearn.compose([three, four])
    assert both.mu == pytest.approx(math.hypot(three.mu, four.mu))
    assert (both.delta, both.comparator) == (1e-5, "same_procedure")
    assert both.epsilon == pytest.approx(bounds.gdp_epsilon(both.mu, 1e-5))
    assert set(both.assumptions) == set(three.assumptions)
    assert len(both.assumptions) == len(three.assumptions)
    assert unlearn.compose((three,), delta=1e-7).epsilon > three.epsilon
    clipping = unlearn.noisy_model_clipping(MODEL, lr=0.1, clip_init=1.0, clip_model=0.5, sigma=1.0, epsilon=1.5)
    weak = clipping.guarantee(2)
    mixed = unlearn.compose([three, weak, weak])
    assert mixed.mu is None
    assert (mixed.epsilon, mixed.delta) == pytest.approx((three.epsilon + 3.0, three.delta + 2 * weak.delta))
    for bad, match in (
        (lambda: unlearn.compose([]), "at least one"),
        (lambda: unlearn.compose([three, promise(30.0, "from_centre")]), "comparators"),
        (lambda: unlearn.compose([three, weak], delta=1e-5), "delta"),
        (lambda: unlearn.compose([clipping.guarantee(1)] * 40), "nothing is promised"),
        (lambda: unlearn.compose([three], delta=1.5), "delta"),
    ):
        with pytest.raises(BadInput, match=match):
            bad()


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"comparator": "retrained"}, "comparator"),
        ({"weight_decay": 4.0}, "below 1"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_grad": -1.0}, "clip_grad"),
        ({"clip_grad": math.inf}, "clip_grad"),
        ({"clip_init": -1.0}, "clip_init"),
        ({"clip_init": math.inf}, "clip_init"),
        ({"lr": -0.1}, "lr"),
        ({"lr": math.nan}, "lr"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, match):
    how = {"lr": 0.25, "clip_init": 1.0, "clip_grad": 1.0} | wrong
    with pytest.raises(BadInput, match=match):
        unlearn.noisy_descent(MODEL, sigma=1.0, **how)
    with pytest.raises(BadInput, match=match):
        unlearn.calibrate(1.0, 1e-5, steps=3, **how)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"comparator": "?"}, "comparator"),
        ({"clip_model": 0.0}, "clip_model"),
        ({"clip_model": math.inf}, "clip_model"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma_init": -1.0}, "sigma_init"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"clip_init": -1.0}, "clip_init"),
    ],
)
def test_model_clipping_refuses_as_well(wrong, match):
    how = {"lr": 0.25, "clip_init": 1.0, "clip_model": 1.0, "sigma": 1.0} | wrong
    with pytest.raises(BadInput, match=match):
        unlearn.noisy_model_clipping(MODEL, **how)


def test_promises_that_cannot_be_made():
    calibrate, clipping = unlearn.calibrate, unlearn.calibrate_model_clipping
    how = {"lr": 0.1, "clip_init": 1.0, "clip_grad": 1.0}
    model_clipping = unlearn.noisy_model_clipping(MODEL, lr=0.1, clip_init=1.0, clip_model=1.0, sigma=1.0)
    ends_silent = descent(sigma=lambda step: max(0.0, 2.0 - step))
    for ask, match in (
        (lambda: calibrate(1.0, 1e-5, steps=0, **how), "steps"),
        (lambda: calibrate(1.0, 1e-5, steps=4, lr=0.1, clip_init=0.0, clip_grad=0.0), "nothing to calibrate"),
        (lambda: calibrate(1.0, 1e-5, steps=4, lr=0.0, clip_init=0.0, clip_grad=1.0), "nothing to calibrate"),
        (
            lambda: calibrate(1.0, 1e-5, steps=4, lr=lambda t: 0.1 * t, clip_init=1.0, clip_grad=1.0, weight_decay=4.0),
            "below 1",
        ),
        (lambda: clipping(1.0, 1e-5, steps=0, clip_model=1.0), "steps"),
        (lambda: clipping(1.0, 1e-5, steps=1, clip_model=0.0), "clip_model"),
        (lambda: clipping(1.0, 1e-5, steps=1, clip_model=1.0, comparator="?"), "comparator"),
        (lambda: ends_silent.guarantee(3), "end of the run"),
        (lambda: descent(sigma=0.0).guarantee(3), "end of the run"),
        (lambda: descent(sigma=0.1).guarantee(0), "steps"),
        (lambda: descent(sigma=0.1).guarantee(-1), "steps"),
        (lambda: model_clipping.guarantee(0), "steps"),
        (lambda: unlearn.output_perturbation(MODEL, clip_init=-1.0, sigma=1.0), "clip_init"),
        (lambda: unlearn.output_perturbation(MODEL, clip_init=1.0, sigma=-1.0), "sigma"),
        (lambda: unlearn.output_perturbation(MODEL, clip_init=1.0, sigma=1.0, comparator="?"), "comparator"),
    ):
        with pytest.raises(BadInput, match=match):
            ask()
    assert ends_silent.guarantee(2).epsilon > 0


def test_starts_that_cannot_be_used(toy, forget):
    method = descent(sigma=0.1)
    for ask, match in (
        (lambda: begin(method, toy, forget, centre={"w": CENTRE["w"].T, "b": CENTRE["b"]}), r"shape \[3, 4\]"),
        (lambda: begin(method, toy, forget, centre={"w": CENTRE["w"]}), "structure"),
        (lambda: begin(method, toy, forget, params={"w": np.zeros((4, K), int), "b": CENTRE["b"]}), "floating"),
        (lambda: begin(method, toy, forget, params={"w": CENTRE["w"], "b": np.full(K, np.nan, np.float32)}), "finite"),
        (lambda: begin(method, toy, forget[:5]), "forget"),
        (lambda: begin(method, toy, ~np.zeros(N, bool)), "covers all"),
        (lambda: begin(method, toy, np.zeros(N, bool)), "empty"),
    ):
        with pytest.raises(BadInput, match=match):
            ask()
