"""The recovery attack against hand-written projected descent."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import audit, loop, models, sources
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Weights

scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))


@functools.cache
def linear():
    return models.from_apply(lambda key, x: {"w": None}, lambda p, x: x.reshape(len(x), -1) @ p["w"])


def weights_of(w):
    return Weights({"w": jnp.asarray(w, jnp.float32)}, ())


def accuracy(w, data):
    return (np.argmax(np.asarray(data.x).reshape(len(data.y), -1) @ w, axis=1) == np.asarray(data.y)).mean()


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits")


@pytest.fixture(scope="module")
def forgetful():
    return np.random.default_rng(0).normal(size=(64, 10)) * 0.1


def recovered(digits, w, **how):
    train, test = digits
    how = {"radius": 0.5, "epochs": 3, "batch": 64, "tx": optax.sgd(0.5, momentum=0.9)} | how
    return audit.recover(linear(), weights_of(w), train, test, jax.random.key(0), **how)


@pytest.mark.parametrize("shape", ["ball", "sphere"])
def test_four_steps_by_hand(shape):
    rng = np.random.default_rng(1)
    data = sets.make(rng.uniform(size=(12, 2, 2, 1)).astype(np.float32), rng.integers(0, 3, 12))
    x, y = np.asarray(data.x, np.float64).reshape(12, 4), np.asarray(data.y)
    anchor, radius = rng.normal(size=(4, 3)), 0.15
    method = audit.attack(linear(), optax.sgd(0.2, momentum=0.9), shape=shape)
    state, info = scan(method, jax.random.key(0), method.init(weights_of(anchor), radius), data, steps=4, batch=12)
    w, momentum, distances = anchor, 0.0, []
    for _ in range(4):
        p = np.exp(x @ w) / np.exp(x @ w).sum(axis=1, keepdims=True)
        momentum = 0.9 * momentum + x.T @ (p - np.eye(3)[y]) / 12  # not touched by the projection
        w = w - 0.2 * momentum
        length = np.linalg.norm(w - anchor)
        if shape == "sphere" or length > radius:
            w = anchor + (w - anchor) * radius / length
        distances.append(np.linalg.norm(w - anchor))
    np.testing.assert_allclose(state.inner.weights.params["w"], w, atol=1e-5)
    np.testing.assert_allclose(info["distance"], distances, rtol=1e-4)
    assert (distances[0] < 0.9 * radius) == (shape == "ball")  # the first step alone stays inside the ball


def test_default_optimiser_clips_decays_and_has_momentum():
    tx, w = audit.recovery.default_tx(), {"w": jnp.asarray([3.0, -4.0])}
    state, velocity, position = tx.init(w), 0.0, np.array([3.0, -4.0])
    for gradient in (np.array([30.0, 40.0]), np.array([0.3, 0.0])):  # of norm 50, clipped to 5; then untouched
        updates, state = tx.update({"w": jnp.asarray(gradient)}, state, {"w": jnp.asarray(position)})
        clipped = gradient * min(1.0, 5.0 / np.linalg.norm(gradient))
        velocity = 0.9 * velocity + clipped + 5e-4 * position
        np.testing.assert_allclose(updates["w"], -0.01 * velocity, rtol=1e-5)
        position = position - 0.01 * velocity


def test_curves_of_the_ball_and_the_sphere(digits, forgetful):
    told = []
    small = recovered(digits, forgetful, radius=0.8, after=lambda epoch, value: told.append((epoch, value)))
    large = recovered(digits, forgetful, radius=3.0)
    sphere = recovered(digits, forgetful, radius=0.8, shape="sphere")
    for got, radius in ((small, 0.8), (large, 3.0), (sphere, 0.8)):
        assert got.accuracy[0] == pytest.approx(accuracy(forgetful, digits[1]), abs=2 / 450)  # before the attack
        assert got.distance[0] == 0.0
        assert len(got.accuracy) == len(got.distance) == 4
        assert max(got.distance) <= radius * (1 + 1e-5)
        assert got.radius == radius
        assert got.hints == 1347
    np.testing.assert_allclose(sphere.distance[1:], 0.8, rtol=1e-5)
    np.testing.assert_allclose(small.distance[-1], 0.8, rtol=1e-5)  # the ball binds
    assert large.accuracy[-1] > small.accuracy[-1] + 0.1
    assert small.accuracy[-1] > small.accuracy[0] + 0.1
    assert told == list(enumerate(small.accuracy))[1:]
    assert dataclasses.asdict(sphere)["shape"] == "sphere"
    assert small.statistics == "frozen"


def test_only_hints_are_attacked_with(digits, forgetful):
    train, test = digits
    hints = np.arange(len(train.y)) % 10 == 3
    poisoned = train._replace(x=jnp.where(hints[:, None, None, None], train.x, jnp.nan))
    got = recovered((poisoned, test), forgetful, hints=hints, epochs=2, radius=2.0)
    assert got.hints == hints.sum()
    assert np.isfinite(got.distance).all()
    assert got.accuracy[-1] > got.accuracy[0] + 0.1
    with pytest.raises(NonFinite):  # the poison does show where it is used
        recovered((poisoned, test), forgetful, hints=~hints, epochs=1)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.reshape(len(x), -1)))


def test_statistics_are_frozen_unless_asked():
    rng = np.random.default_rng(2)
    data = sets.make(rng.uniform(size=(12, 2, 2, 1)).astype(np.float32), rng.integers(0, 3, 12))
    model = models.from_linen(Normed())
    params = jax.jit(model.init)(jax.random.key(0), data.x).params
    old = {"mean": rng.uniform(size=4).astype(np.float32), "var": rng.uniform(1, 2, size=4).astype(np.float32)}
    weights = Weights(params, {"batch_stats": {"BatchNorm_0": old}})
    x, means = np.asarray(data.x).reshape(12, 4), {}
    for statistics, how in (("frozen", {}), ("fit", {"statistics": "fit"})):
        method = audit.attack(model, optax.sgd(0.1), **how)
        state, _ = scan(method, jax.random.key(0), method.init(weights, 0.1), data, steps=2, batch=12)
        means[statistics] = state.inner.weights.stats["batch_stats"]["BatchNorm_0"]
        assert np.abs(state.inner.weights.params["Dense_0"]["kernel"] - params["Dense_0"]["kernel"]).max() > 1e-4
    np.testing.assert_array_equal(means["frozen"]["mean"], old["mean"])
    np.testing.assert_array_equal(means["frozen"]["var"], old["var"])
    np.testing.assert_allclose(means["fit"]["mean"], 0.81 * old["mean"] + 0.19 * x.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"radius": 0.0},
        {"radius": -1.0},
        {"radius": float("nan")},
        {"hints": np.zeros(1347, bool)},
        {"shape": "cube"},
        {"statistics": "thawed"},
    ],
)
def test_recover_refuses(digits, forgetful, wrong):
    with pytest.raises(BadInput):
        recovered(digits, forgetful, **wrong)
