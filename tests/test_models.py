"""Adapters against networks written out in numpy; `freeze` against the count of its traces."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dememo_jax import certify, models, tree
from dememo_jax import data as sets
from dememo_jax.errors import BadInput
from dememo_jax.types import Weights

KEY, OTHER = jax.random.key(0), jax.random.key(1)
X = np.random.default_rng(0).normal(1.0, 2.0, size=(6, 4)).astype(np.float32)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class Full(nn.Module):
    """Batch norm, dropout, and a linear layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


class FullNnx(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(x)))


LINEN, NNX = models.from_linen(Full()), models.from_nnx(lambda rngs: FullNnx(rngs))
MEAN, VAR = np.float32([0.5, -1, 0, 2]), np.float32([1, 4, 0.25, 9])
SCALE, BIAS = np.float32([1, 2, 3, 4]), np.float32([0.1, 0.2, 0.3, 0.4])
HEAD = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def weights(model):
    """The same numbers in the form of each library; a jitted init keeps the rest, such as dropout keys."""
    fresh = jax.jit(model.init)(KEY, X)
    if model is LINEN:
        params = {"BatchNorm_0": {"scale": SCALE, "bias": BIAS}, "Dense_0": {"kernel": HEAD, "bias": np.zeros(3, np.float32)}}
        stats = {"batch_stats": {"BatchNorm_0": {"mean": MEAN, "var": VAR}}}
    else:
        params = {"norm": {"scale": SCALE, "bias": BIAS}, "head": {"kernel": HEAD, "bias": np.zeros(3, np.float32)}}
        stats = {**fresh.stats, "norm": {"mean": MEAN, "var": VAR}}
    assert jax.tree.structure(Weights(params, stats)) == jax.tree.structure(fresh)
    return jax.tree.map(jnp.asarray, Weights(params, stats))


def moments(w):
    return w.stats["batch_stats"]["BatchNorm_0"] if "batch_stats" in w.stats else w.stats["norm"]


def normed(x, mean, var):
    return (x - mean) / np.sqrt(var + 1e-5) * SCALE + BIAS


@pytest.mark.parametrize("model", [LINEN, NNX], ids=["linen", "nnx"])
def test_apply_uses_the_running_statistics_and_no_dropout(model):
    w = weights(model)
    for apply in (model.apply, jax.jit(model.apply)):
        np.testing.assert_allclose(apply(w, X), normed(X, MEAN, VAR) @ HEAD, rtol=1e-4, atol=1e-4)
    apply, params = models.freeze(model, w)
    np.testing.assert_allclose(jax.jit(apply)(params, X), normed(X, MEAN, VAR) @ HEAD, rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(params) == jax.tree.structure(w.params)  # no statistics among what noise moves


@pytest.mark.parametrize("model", [LINEN, NNX], ids=["linen", "nnx"])
def test_fit_uses_the_batch_and_updates_the_statistics_only(model):
    w = weights(model)
    fit = jax.jit(model.fit)
    logits, new = fit(w, X, KEY)
    jax.tree.map(np.testing.assert_array_equal, new.params, w.params)
    np.testing.assert_allclose(moments(new)["mean"], 0.9 * MEAN + 0.1 * X.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(moments(new)["var"], 0.9 * VAR + 0.1 * X.var(axis=0), rtol=1e-4)
    assert jax.tree.structure(new) == jax.tree.structure(w)
    # every hidden unit is 0 or twice itself: one of sixteen patterns explains each row of logits
    hidden = normed(X, X.mean(axis=0), X.var(axis=0))
    wanted = np.asarray([[2 * h * keep @ HEAD for keep in np.ndindex(2, 2, 2, 2)] for h in hidden])  # [6, 16, 3]
    assert (np.abs(wanted - np.asarray(logits)[:, None]).max(axis=-1).min(axis=1) < 1e-3).all()
    np.testing.assert_array_equal(fit(w, X, KEY)[0], logits)
    assert not np.array_equal(fit(w, X, OTHER)[0], logits)  # another key, another dropout


def test_nnx_dropout_depends_on_the_key_alone():
    w = weights(NNX)
    once = NNX.fit(w, X, OTHER)[1]  # its dropout counter has moved on
    np.testing.assert_array_equal(NNX.fit(once, X, KEY)[0], NNX.fit(w, X, KEY)[0])


def test_nnx_fit_trains_whatever_mode_the_module_was_built_in():
    model = models.from_nnx(lambda rngs: nnx.BatchNorm(4, momentum=0.9, use_running_average=True, rngs=rngs))
    _, new = jax.jit(model.fit)(model.init(KEY, X), X, KEY)
    np.testing.assert_allclose(new.stats["mean"], 0.1 * X.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("model", [LINEN, NNX], ids=["linen", "nnx"])
def test_fit_is_pure_on_weights_of_numpy(model):
    host = jax.tree.map(lambda leaf: np.array(leaf) if leaf.dtype == jnp.float32 else leaf, weights(model))
    model.fit(host, X, KEY)
    np.testing.assert_array_equal(moments(host)["mean"], MEAN)  # the caller's array, not overwritten in place


@pytest.mark.parametrize("model", [LINEN, NNX], ids=["linen", "nnx"])
def test_gradients_in_both_modes_under_vmap(model):
    w = weights(model)

    def kernel_of(params):
        return params["Dense_0" if model is LINEN else "head"]["kernel"]

    def evaluated(params, x):
        return model.apply(w._replace(params=params), x).sum()

    def fitted(params, key):
        logits, new = model.fit(w._replace(params=params), X, key)
        return logits.sum(), (logits, moments(new)["mean"])

    grads = jax.jit(jax.vmap(jax.grad(evaluated), in_axes=(None, 0)))(w.params, np.stack([X, -X]))
    for found, x in zip(kernel_of(grads), (X, -X)):
        np.testing.assert_allclose(found, normed(x, MEAN, VAR).sum(axis=0)[:, None] * np.ones(3), rtol=1e-3, atol=1e-3)
    keys = jax.random.split(KEY, 3)
    each = jax.jit(jax.vmap(jax.value_and_grad(fitted, has_aux=True), in_axes=(None, 0)))
    (_, (logits, means)), grads = each(w.params, keys)
    # the loss is linear in the head, so its gradient times the head gives the loss back
    np.testing.assert_allclose((kernel_of(grads) * HEAD).sum(axis=(1, 2)), logits.sum(axis=(1, 2)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(means, np.tile(0.9 * MEAN + 0.1 * X.mean(axis=0), (3, 1)), rtol=1e-4)
    assert len({np.asarray(row).tobytes() for row in logits}) == 3


# --- batch-norm statistics of the noisy network ---------------------------------------------------------------------


class Deep(nn.Module):
    """The second norm sees what the first layer makes of the images; the momenta differ."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(3, name="first")(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="inner")(x))
        return nn.Dense(2, name="head")(nn.BatchNorm(use_running_average=not train, momentum=0.5, name="outer")(x))


class DeepNnx(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.first = nnx.BatchNorm(4, momentum=0.9, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.outer, self.head = nnx.BatchNorm(3, momentum=0.5, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.outer(self.first(self.inner(x))))


MANY = np.random.default_rng(2).normal(-1.0, 3.0, size=(40, 4)).astype(np.float32)


def by_hand(params, fixed, x):
    """Logits of x in float64, when every norm uses the moments of the fixed images."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    moments = {}
    for norm, dense in (("inner", "first"), ("outer", "head")):
        mean, var = moments[norm] = fixed.mean(axis=0), fixed.var(axis=0)
        fixed, x = (
            ((each - mean) / np.sqrt(var + 1e-5) * params[norm]["scale"] + params[norm]["bias"]) @ params[dense]["kernel"]
            + params[dense]["bias"]
            for each in (fixed, x)
        )
    return x, moments


@pytest.mark.slow
@pytest.mark.parametrize("model", [models.from_linen(Deep()), models.from_nnx(DeepNnx)], ids=["linen", "nnx"])
def test_recalibrated_statistics_are_those_of_the_fixed_images_under_the_noise(model):
    w = jax.jit(model.init)(KEY, MANY)
    old = jax.tree.map(lambda leaf: leaf * 7 + 100 if leaf.dtype == jnp.float32 else leaf, w.stats)
    apply, params, prepare = models.recalibrated(model, w._replace(stats=old), MANY)
    again = models.recalibrated(model, w, MANY)[2]
    jax.tree.map(np.testing.assert_array_equal, params, w.params)
    run = jax.jit(lambda prepare, params, x: (apply(prepare(params), x), prepare(params)))
    for noisy in (params, tree.add(params, tree.gaussian_like(OTHER, params, 0.3))):
        logits, ready = run(prepare, noisy, X)
        expected, moments = by_hand(noisy, MANY.astype(np.float64), X)
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
        for norm, (mean, var) in moments.items():
            stats = ready.stats.get("batch_stats", ready.stats)[norm]
            np.testing.assert_allclose(stats["mean"], mean, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(stats["var"], var, rtol=1e-3)
        jax.tree.map(np.testing.assert_array_equal, ready.params, noisy)
        jax.tree.map(np.testing.assert_array_equal, run(again, noisy, X)[1].stats, ready.stats)  # the old ones are gone
    assert not np.allclose(run(prepare, params, X)[0], logits, atol=1e-2)


def test_recalibrated_leaves_a_network_without_statistics_alone():
    for model in (models.from_linen(Plain()), models.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))):
        w = model.init(KEY, X)
        apply, params, prepare = models.recalibrated(model, w, MANY)
        ready = prepare(params)
        assert jax.tree.structure(ready) == jax.tree.structure(w)
        np.testing.assert_array_equal(apply(ready, X), model.apply(w, X))


def test_recalibrated_nnx_keeps_its_dropout():
    w = weights(NNX)
    apply, params, prepare = models.recalibrated(NNX, w, MANY)
    ready = jax.jit(prepare)(params)
    expected = normed(X, MANY.mean(axis=0), MANY.var(axis=0)) @ HEAD
    np.testing.assert_allclose(jax.jit(apply)(ready, X), expected, rtol=1e-3, atol=1e-3)  # evaluation: nothing dropped
    assert jax.tree.structure(ready) == jax.tree.structure(w)
    for found, kept in zip(jax.tree.leaves(ready.stats), jax.tree.leaves(w.stats)):
        if not jnp.issubdtype(kept.dtype, jnp.floating):
            plain = [jax.random.key_data(k) if jnp.issubdtype(k.dtype, jax.dtypes.prng_key) else k for k in (found, kept)]
            np.testing.assert_array_equal(*plain)
    np.testing.assert_array_equal(NNX.fit(ready, X, KEY)[0], NNX.fit(w, X, KEY)[0])  # training goes on as before


def test_recalibrated_in_a_certificate():
    model = models.from_linen(Deep())
    w = model.init(KEY, MANY)
    data = sets.make(X, np.arange(6) % 2, box=None)
    apply, params, prepare = models.recalibrated(model, w, MANY)
    found = certify.draw(certify.cloud(apply, params, data, OTHER, sigma=0.5, prepare=prepare), draws=6)
    for i, score in enumerate(found.scores[:, 0]):
        noisy = tree.add(params, tree.gaussian_like(jax.random.fold_in(OTHER, i), params, 0.5))
        assert score == pytest.approx((by_hand(noisy, MANY.astype(np.float64), X)[0].argmax(axis=1) == data.y).mean())
    held = certify.cloud(*models.freeze(model, w), data, OTHER, sigma=0.5)
    assert held.blank.fingerprint["weights"] != found.fingerprint["weights"]


def test_linen_without_modes_or_statistics():
    model = models.from_linen(Plain())
    w = model.init(KEY, X)
    logits, new = model.fit(w, X, KEY)
    expected = X @ w.params["Dense_0"]["kernel"] + w.params["Dense_0"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.apply(w, X), expected, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(new) == jax.tree.structure(w)


def test_linen_modes_may_have_other_names():
    class Reversed(nn.Module):
        @nn.compact
        def __call__(self, x, still):
            return nn.Dropout(0.5, deterministic=still)(x) + self.param("zero", nn.initializers.zeros, ())

    model = models.from_linen(Reversed(), training={"still": False}, evaluation={"still": True})
    w = model.init(KEY, X)
    np.testing.assert_array_equal(model.apply(w, X), X)
    ratio = np.asarray(model.fit(w, X, KEY)[0]) / X
    assert set(np.unique(np.round(ratio, 5))) == {0.0, 2.0}


def test_bare_functions():
    model = models.from_apply(lambda key, x: {"w": jnp.ones(x.shape[1])}, lambda params, x: x * params["w"])
    w = model.init(KEY, X)
    assert w == Weights(w.params, ())
    for found in (model.apply(w, X), model.fit(w, X, KEY)[0]):
        np.testing.assert_array_equal(found, X)
    assert model.fit(w, X, KEY)[1] is w


def test_two_frozen_networks_share_one_program():
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            traces.append(train)
            return nn.BatchNorm(use_running_average=not train)(x)

    model = models.from_linen(Counted())
    w = model.init(KEY, X)
    shifted = w._replace(stats=jax.tree.map(lambda leaf: leaf + 1, w.stats))
    traces.clear()
    run = jax.jit(lambda apply, params, x: apply(params, x))
    first, second = (run(*models.freeze(model, each), X) for each in (w, shifted))
    assert traces == [False]
    np.testing.assert_allclose(first, X / np.sqrt(1 + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(second, (X - 1) / np.sqrt(2 + 1e-5), rtol=1e-4, atol=1e-5)  # and the statistics are not baked in


def test_as_apply_wraps_once_and_refuses_what_is_no_function():
    wrapped = models.as_apply(lambda params, x: params * x)
    assert models.as_apply(wrapped) is wrapped
    assert jax.jit(lambda f, p, x: f(p, x))(wrapped, 3.0, 2.0) == 6.0
    with pytest.raises(BadInput, match="function"):
        models.as_apply({"params": 1})
