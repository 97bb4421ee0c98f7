"""Training and evaluation mode: switches by their usual names, and networks whose modes do not differ refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dememo_jax import models, train, tree
from dememo_jax.errors import BadInput
from dememo_jax.types import Weights

KEY, OTHER = jax.random.key(0), jax.random.key(1)
X = np.random.default_rng(0).normal(1.0, 2.0, size=(6, 4)).astype(np.float32)


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return layers(x, train)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return layers(x, training)


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, is_training):
        return layers(x, is_training)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return layers(x, not deterministic)


class UseRunningAverage(nn.Module):
    @nn.compact
    def __call__(self, x, *, use_running_average):
        return layers(x, not use_running_average)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic, use_running_average=True):
        x = nn.Dropout(0.5, deterministic=deterministic)(x)
        return nn.BatchNorm(use_running_average=use_running_average, momentum=0.9)(x)


def layers(x, training):
    x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(nn.Dropout(0.5, deterministic=not training)(x))
    return nn.Dense(3)(x)


@pytest.mark.parametrize("kind", [Train, Training, IsTraining, Deterministic, UseRunningAverage, Two])
def test_the_usual_switches_are_found_and_set(kind):
    model = models.from_linen(kind())
    weights = model.init(KEY, X)
    fit = jax.jit(model.fit)
    (one, new), (other, _) = fit(weights, X, KEY), fit(weights, X, OTHER)
    assert not np.array_equal(one, other)  # dropout acts
    assert all((a != b).all() for a, b in zip(jax.tree.leaves(new.stats), jax.tree.leaves(weights.stats)))
    np.testing.assert_array_equal(model.apply(weights, X), jax.jit(model.apply)(weights, X))


def test_a_linen_network_with_training_learns_its_moments():
    """Twenty steps of training see the moments of the batch: what stayed at 0 and 1 when `train` was the only switch."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, training=False):
            return nn.BatchNorm(use_running_average=not training, momentum=0.5)(x)

    model = models.from_linen(Net())
    weights, fit = model.init(KEY, X), jax.jit(model.fit)
    for _ in range(20):
        weights = fit(weights, X, KEY)[1]
    found = weights.stats["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], X.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["var"], X.var(axis=0), rtol=1e-4)


class StillNorm(nn.Module):
    @nn.compact
    def __call__(self, x, phase="evaluate"):
        return nn.BatchNorm(use_running_average=phase == "evaluate")(x)


class StillDropout(nn.Module):
    @nn.compact
    def __call__(self, x, phase="evaluate"):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=phase == "evaluate")(x))


class StillAttention(nn.Module):
    @nn.compact
    def __call__(self, x, phase="evaluate"):
        return nn.MultiHeadDotProductAttention(2, dropout_rate=0.5)(x[None], deterministic=phase == "evaluate")[0]


class OwnNorm(nn.Module):
    """Statistics kept by hand, and a switch that nothing follows."""

    @nn.compact
    def __call__(self, x, train=False):
        return x - self.variable("batch_stats", "mean", lambda: jnp.zeros(4)).value


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (StillNorm, "batch statistics"),
        (StillDropout, "Dropout_0"),
        (StillAttention, "Attention_0"),
        (OwnNorm, "batch statistics"),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_part_that_training_does_not_move_is_refused(kind, what, compiled):
    model = models.from_linen(kind())
    fit = jax.jit(model.fit) if compiled else model.fit
    with pytest.raises(BadInput, match=rf"{what}.*training=.*evaluation="):
        fit(model.init(KEY, X), X, KEY)


@pytest.mark.parametrize("layer", [nn.BatchNorm(use_running_average=False), nn.Dropout(0.5, deterministic=False)])
def test_a_part_that_trains_while_it_is_evaluated_is_refused(layer):
    with pytest.raises(BadInput, match="while the network is evaluated"):
        models.from_linen(nn.Sequential([layer])).init(KEY, X)


def test_modes_that_are_given_are_meant():
    model = models.from_linen(StillNorm(), training={}, evaluation={})  # frozen, and said so
    weights = model.init(KEY, X)
    np.testing.assert_array_equal(model.fit(weights, X, KEY)[0], model.apply(weights, X))
    model = models.from_linen(StillDropout(), training={"phase": "fit"})
    weights = model.init(KEY, X)
    assert not np.array_equal(model.fit(weights, X, KEY)[0], model.fit(weights, X, OTHER)[0])


def test_networks_without_such_parts_and_dropout_of_nothing_pass():
    for net in (nn.Dense(3), nn.Sequential([nn.Dense(3), nn.Dropout(0.0, deterministic=True)])):
        model = models.from_linen(net)
        model.fit(model.init(KEY, X), X, KEY)


def test_arguments_that_are_no_switch_are_refused_at_once():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train):
            return nn.Dense(3)(x * mask)

    with pytest.raises(BadInput, match=r"mask.*training="):
        models.from_linen(Masked())
    model = models.from_linen(Masked(), training={"mask": 1.0, "train": True}, evaluation={"mask": 1.0, "train": False})
    assert model.apply(model.init(KEY, X), X).shape == (6, 3)


@pytest.mark.parametrize("wrong", [Train, nnx.Linear(4, 3, rngs=nnx.Rngs(0)), lambda x: x])
def test_linen_takes_instances_of_linen_modules(wrong):
    with pytest.raises(BadInput, match="instance"):
        models.from_linen(wrong)


# --- NNX ------------------------------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(x)))


class Switched(Net):
    def __call__(self, x, training):
        return self.head(self.drop(self.norm(x, use_running_average=not training), deterministic=not training))


class FixedNorm(Net):
    def __call__(self, x):
        return self.head(self.drop(self.norm(x, use_running_average=True)))


class FixedDropout(Net):
    def __call__(self, x):
        return self.head(self.drop(self.norm(x), deterministic=True))


def test_a_trained_nnx_module_gives_model_and_weights():
    module = Net(nnx.Rngs(3))
    module.train()
    for _ in range(3):
        module(X)  # its statistics have moved
    model, weights = models.from_nnx(module)
    module.eval()
    np.testing.assert_allclose(jax.jit(model.apply)(weights, X), module(X), rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(weights.stats["norm"]["mean"]).min()) > 0
    logits, new = jax.jit(model.fit)(weights, X, KEY)
    assert jax.tree.structure(new) == jax.tree.structure(weights)
    assert not np.array_equal(logits, model.fit(weights, X, OTHER)[0])
    built = models.from_nnx(lambda rngs: Net(rngs))  # the weights fit the Model of the function that builds such modules
    np.testing.assert_array_equal(built.apply(weights, X), model.apply(weights, X))
    with pytest.raises(BadInput, match="from_nnx"):
        model.init(KEY, X)


def test_nnx_calls_with_a_switch():
    model = models.from_nnx(Switched)
    weights = model.init(KEY, X)
    logits, new = model.fit(weights, X, KEY)
    assert not np.array_equal(logits, model.fit(weights, X, OTHER)[0])
    assert not np.array_equal(new.stats["norm"]["mean"], weights.stats["norm"]["mean"])
    np.testing.assert_array_equal(model.apply(weights, X), model.apply(weights, X))


@pytest.mark.parametrize(("kind", "what"), [(FixedNorm, "batch statistics"), (FixedDropout, "dropout")])
def test_nnx_parts_that_training_does_not_move_are_refused(kind, what):
    model = models.from_nnx(kind)
    with pytest.raises(BadInput, match=what):
        jax.jit(model.fit)(model.init(KEY, X), X, KEY)


@pytest.mark.parametrize("wrong", [Train(), 5, lambda rngs: None])
def test_nnx_refuses_other_things(wrong):
    with pytest.raises(BadInput, match=r"nnx\.Module"):
        models.from_nnx(wrong)


# --- bare functions -------------------------------------------------------------------------------------------------


def test_bare_functions_with_two_modes_and_statistics():
    """A mean that is kept by hand, and noise for dropout."""
    model = models.from_apply(
        lambda key, x: {"w": jnp.ones(4)},
        lambda params, mean, x: (x - mean) * params["w"],
        fit=lambda params, mean, x, key: (x * params["w"] + jax.random.normal(key, x.shape), 0.5 * mean + 0.5 * x.mean(axis=0)),
        stats=lambda key, x: jnp.zeros(4),
    )
    weights = jax.jit(model.init)(KEY, X)
    logits, new = model.fit(weights, X, KEY)
    np.testing.assert_allclose(new.stats, X.mean(axis=0) / 2, rtol=1e-6)
    np.testing.assert_allclose(model.apply(new, X), X - X.mean(axis=0) / 2, rtol=1e-5)
    assert not np.array_equal(logits, model.fit(weights, X, OTHER)[0])
    assert new.params is weights.params


def test_bare_functions_with_dropout_alone():
    model = models.from_apply(
        lambda key, x: {"w": jnp.ones(4)},
        lambda params, x: x * params["w"],
        fit=lambda params, x, key: x * params["w"] * jax.random.bernoulli(key, 0.5, x.shape),
    )
    weights = model.init(KEY, X)
    logits, new = model.fit(weights, X, KEY)
    assert set(np.unique(np.asarray(logits) / X)) == {0.0, 1.0}
    assert new is weights
    with pytest.raises(BadInput, match="fit="):
        models.from_apply(model.init, model.apply, stats=lambda key, x: jnp.zeros(4))


@pytest.mark.parametrize("leaf", [jax.nn.relu, "relu", None.__class__, object()])
def test_params_hold_arrays_alone(leaf):
    """The leaves of `eqx.nn.MLP` are weights and an activation; deep in a compiled loop that is jax's TypeError."""
    model = models.from_apply(lambda key, x: {"w": jnp.ones(4), "activation": leaf}, lambda params, x: x * params["w"])
    for init in (model.init, jax.jit(model.init)):
        with pytest.raises(BadInput, match="activation"):
            init(KEY, X)
    with pytest.raises(BadInput, match="params/activation"):
        train.start(optax.sgd(0.1), Weights({"w": jnp.ones(4), "activation": leaf}, ()))
    with pytest.raises(BadInput, match="activation"):
        tree.check_floating({"activation": leaf}, "params")


def test_params_are_floating():
    model = models.from_apply(lambda key, x: {"w": jnp.ones(4), "count": jnp.arange(3)}, lambda params, x: x)
    with pytest.raises(BadInput, match="count is int32"):
        model.init(KEY, X)
