"""The recovery attack against hand-written projected descent."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import audit, keys, loop, models, sources, tree
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Weights

KEY = jax.random.key(0)
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


@pytest.mark.slow
def test_published_rate_falls_by_a_cosine_after_every_epoch(digits, forgetful):
    epochs, steps = 5, 3
    rates = [0.01 * (1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs) for _ in range(steps)]
    tx, w = audit.recovery.default_tx(schedule="cosine", epochs=epochs, per_epoch=steps), {"w": jnp.asarray([3.0])}
    state, velocity = tx.init(w), 0.0
    for rate in rates:
        updates, state = tx.update({"w": jnp.asarray([2.0])}, state, w)
        velocity = 0.9 * velocity + 2.0 + 5e-4 * 3.0
        np.testing.assert_allclose(updates["w"], -rate * velocity, rtol=1e-5)
    hints = np.arange(len(digits[0].y)) < 128  # two batches an epoch
    table = jnp.asarray([0.01 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3) for _ in range(2)])
    by_hand = optax.chain(optax.clip_by_global_norm(5.0), optax.add_decayed_weights(5e-4), optax.sgd(lambda t: table[t], 0.9))
    named, given, constant = (
        recovered(digits, forgetful, hints=hints, **how)
        for how in ({"tx": None, "schedule": "cosine"}, {"tx": by_hand}, {"tx": None})
    )
    assert named.accuracy == given.accuracy
    np.testing.assert_allclose(named.distance, given.distance, rtol=1e-5)
    assert constant.distance[-1] > 1.2 * named.distance[-1]
    for wrong in ({"tx": by_hand, "schedule": "cosine"}, {"tx": None, "schedule": "step"}):
        with pytest.raises(BadInput, match="schedule"):
            recovered(digits, forgetful, hints=hints, **wrong)


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- several models and radii ------------------------------------------------------------------------------------

# Decay and momentum pull on every leaf. One object, so that the sweeps share compiled programs.
TX = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, momentum=0.9))
RADII = (0.5, 4.0)


@functools.cache
def deep():
    return models.from_apply(
        lambda key, x: {"body": None, "head": None}, lambda p, x: jnp.tanh(x.reshape(len(x), -1) @ p["body"]) @ p["head"]
    )


@pytest.fixture(scope="module")
def attacked():
    random = np.random.default_rng(3)
    shapes = {"body": (64, 8), "head": (8, 10)}
    return [Weights({k: random.normal(0, 0.3, size).astype(np.float32) for k, size in shapes.items()}, ()) for _ in range(2)]


@pytest.fixture(scope="module")
def few(digits):
    return sets.take(digits[0], np.arange(150)), sets.take(digits[1], np.arange(100))


HOW = {"hints": np.arange(150) % 3 > 0, "epochs": 3, "batch": 30, "tx": TX}


def swept(few, attacked, radii=RADII, **how):
    return audit.sweep(deep(), attacked, *few, KEY, radii=radii, **{**HOW, **how})


@pytest.fixture(scope="module")
def usual(few, attacked):
    return swept(few, attacked)


def apart(end, start):
    """The distance of two networks in float64."""
    pairs = zip(jax.tree.leaves(end.params), jax.tree.leaves(start.params))
    return np.sqrt(sum(((np.float64(a) - np.float64(b)) ** 2).sum() for a, b in pairs))


def plain(found):
    """The fields that are no curves."""
    return {name: value for name, value in dataclasses.asdict(found).items() if name not in ("accuracy", "distance")}


@pytest.mark.slow
def test_a_sweep_is_the_recovery_of_each(few, attacked, usual):
    told = []
    one_by_one, ends = swept(few, attacked, width=1, after=lambda epoch, found: told.append((epoch, found.tolist())))
    for m, weights in enumerate(attacked):
        for r, radius in enumerate(RADII):
            alone = audit.recover(deep(), weights, *few, KEY, radius=radius, **HOW)
            for found in (usual[0][m][r], one_by_one[m][r]):
                assert plain(found) == plain(alone)
                np.testing.assert_allclose(found.distance, alone.distance, rtol=1e-4)
                np.testing.assert_allclose(found.accuracy, alone.accuracy, atol=0.011)  # one image on the edge may flip
            for a, b in zip(jax.tree.leaves(usual[1][m][r]), jax.tree.leaves(ends[m][r])):
                np.testing.assert_allclose(a, b, atol=1e-4)
    curves = np.array([found.accuracy for row in one_by_one for found in row])
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    np.testing.assert_array_equal([found for _, found in told], curves[:, 1:].T)
    assert len({tuple(curve) for curve in curves}) == 4


def held(found, ends, attacked, epochs):
    """Every attack ends in its ball, where its curve says, up to what float32 can say of such weights."""
    for row, last, start in zip(found, ends, attacked):
        slack = 1e-7 * apart(start, jax.tree.map(np.zeros_like, start))
        for one, end in zip(row, last):
            gone = apart(end, start)
            assert len(one.distance) == epochs + 1
            assert gone <= one.radius * (1 + 1e-6) + slack
            assert gone == pytest.approx(one.distance[epochs], rel=1e-5)
            assert max(one.distance) <= one.radius * (1 + 1e-6) + slack


def test_no_lane_leaves_its_ball_in_any_epoch(few, attacked, usual):
    held(*usual, attacked, 3)
    for epochs in (1, 2):
        found, ends = swept(few, attacked, epochs=epochs)
        held(found, ends, attacked, epochs)
        for row, before in zip(found, usual[0]):
            for one, longer in zip(row, before):  # a longer attack begins as a shorter one
                assert (one.accuracy, one.distance) == (longer.accuracy[: epochs + 1], longer.distance[: epochs + 1])
    for small, large in usual[0]:
        assert small.distance[-1] == pytest.approx(RADII[0], rel=1e-5)  # this ball binds
        assert 2 * RADII[0] < large.distance[1] < 0.99 * RADII[1]  # and this does not, at first


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["ball", "sphere"])
def test_only_some_leaves_move(few, attacked, shape):
    found, ends = swept(few, attacked, only="^head$", shape=shape)
    held(found, ends, attacked, 3)
    for row, last, start in zip(found, ends, attacked):
        for one, end in zip(row, last):
            assert one.only == "^head$"
            np.testing.assert_array_equal(end.params["body"], start.params["body"])  # to the bit
            assert np.abs(end.params["head"] - start.params["head"]).max() > 1e-3
            if shape == "sphere":
                np.testing.assert_allclose(one.distance[1:], one.radius, rtol=1e-5)


def test_relative_radii_are_shares_of_a_length(few, attacked):
    found, _ = swept(few, attacked, (0.05, 0.2), relative=True)
    for row, start in zip(found, attacked):
        length = apart(start, jax.tree.map(np.zeros_like, start))
        for one, share in zip(row, (0.05, 0.2)):
            assert one.relative == share
            assert one.radius == pytest.approx(share * length, rel=1e-6)
            assert max(one.distance) == pytest.approx(one.radius, rel=1e-5)  # all of these bind
    assert found[0][0].radius != found[1][0].radius


def test_a_broken_attack_is_named(few, attacked):
    broken = attacked[1]._replace(params={**attacked[1].params, "head": np.full((8, 10), np.nan, np.float32)})
    with pytest.raises(NonFinite, match=r"model 1 at radius 0\.5 became nan in epoch 0"):
        swept(few, [attacked[0], broken])


@pytest.mark.slow
def test_sphere_is_the_published_attack():
    rng = np.random.default_rng(4)
    data = sets.make(rng.uniform(size=(12, 2, 2, 1)).astype(np.float32), rng.integers(0, 3, 12))
    model, net, radius = models.from_linen(Normed()), Normed(), 0.3
    start = jax.jit(model.init)(KEY, data.x)
    (((found,),), ((end,),)) = audit.sweep(
        model, [start], data, data, KEY, radii=[radius], epochs=2, batch=5, tx=optax.sgd(0.1, momentum=0.9), shape="sphere",
        statistics="fit",
    )  # fmt: skip

    @jax.jit
    def gradient(params, stats, batch):
        def loss(params):
            logits, new = net.apply({"params": params, **stats}, batch.x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean(), new

        return jax.grad(loss, has_aux=True)(params)

    leaves, treedef = jax.tree.flatten(start.params)
    origin = [np.float64(leaf) for leaf in leaves]
    theta, momentum, stats = origin, [0.0] * len(origin), start.stats
    for t in range(6):  # 3 batches an epoch
        batch = sets.shuffled(keys.named(keys.named(KEY, "recovery"), "draw"), t, data, 5)
        params = jax.tree.unflatten(treedef, [np.float32(leaf) for leaf in theta])
        slope, stats = gradient(params, stats, batch)
        momentum = [0.9 * m + np.float64(g) for m, g in zip(momentum, jax.tree.leaves(slope))]
        theta = [a - 0.1 * m for a, m in zip(theta, momentum)]
        length = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(theta, origin)))
        theta = [b + (a - b) * radius / length for a, b in zip(theta, origin)]
    for got, expected in zip(jax.tree.leaves(end.params), theta):
        np.testing.assert_allclose(got, expected, atol=2e-5)
    for got, expected, old in zip(*map(jax.tree.leaves, (end.stats, stats, start.stats))):
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        assert np.abs(got - old).max() > 0.01
    np.testing.assert_allclose(found.distance, [0, radius, radius], rtol=1e-5)
    logits = net.apply({"params": end.params, **end.stats}, data.x, train=False)
    assert found.accuracy[-1] == float((logits.argmax(axis=1) == data.y).sum()) / 12


def test_absolute_radius(attacked):
    params = attacked[0].params
    both = np.sqrt((np.float64(params["body"]) ** 2).sum() + (np.float64(params["head"]) ** 2).sum())
    assert audit.absolute_radius(params, 0.1) == pytest.approx(0.1 * both, rel=1e-6)
    head = np.linalg.norm(np.float64(params["head"]))
    assert audit.absolute_radius(params, 0.1, "head") == pytest.approx(0.1 * head, rel=1e-6)
    assert tree.matching(params, "head") == [False, True]
    for share, only in ((0.0, None), (-0.1, None), (float("nan"), None), (0.1, "tail")):
        with pytest.raises(BadInput):
            audit.absolute_radius(params, share, only)
    empty = {**params, "head": np.zeros((8, 10), np.float32)}
    with pytest.raises(BadInput, match="all zero"):
        audit.absolute_radius(empty, 0.1, "head")
    assert audit.absolute_radius(empty, 0.1) > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"radii": ()},
        {"radii": (0.5, float("inf"))},
        {"attacked": []},
        {"epochs": 0},
        {"batch": 0},
        {"hints": np.ones(149, bool)},
        {"only": "tail"},
        {"only": "tail", "relative": True},
    ],
)
def test_sweep_refuses(few, attacked, wrong):
    with pytest.raises(BadInput):
        swept(few, **{"attacked": attacked, **wrong})
