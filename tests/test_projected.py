"""Projected search and training inside a ball of weights, against loops in numpy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import data as sets
from dememo_jax import projected, tree
from dememo_jax.errors import BadInput
from dememo_jax.types import Array, Method, Weights

KEY = jax.random.key(2)
POINT = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
TARGET = np.float32([1.0, -2.0, 0.5])


def noise(key, point):
    return jax.random.normal(key, point.shape)


@pytest.mark.parametrize("signed", [True, False])
def test_search_is_the_loop(signed):
    how = {} if signed else {"direction": lambda gradient: gradient}

    def gradient(key, t, point):
        return (1 + 0.1 * t) * point - TARGET + 0.3 * noise(key, point)

    def find(point):
        return projected.search(KEY, point, gradient, stride=0.17, steps=6, project=projected.linf(0.8).project, **how)

    point = POINT.astype(np.float64)
    for t in range(6):
        slope = (1 + 0.1 * t) * point - TARGET + 0.3 * np.asarray(noise(jax.random.fold_in(KEY, t), POINT))
        point = np.clip(point - 0.17 * (np.sign(slope) if signed else slope), -0.8, 0.8)
    np.testing.assert_allclose(jax.jit(find)(POINT), point, atol=1e-5)


def test_search_of_no_steps_stays():
    found = projected.search(KEY, POINT, lambda key, t, x: x, stride=1.0, steps=0, project=projected.linf(0.1).project)
    np.testing.assert_array_equal(found, POINT)


def test_linf_clips_both_ends():
    np.testing.assert_array_equal(
        projected.linf(0.5).project(np.float32([-2, -0.5, 0.1, 3])), np.float32([-0.5, -0.5, 0.1, 0.5])
    )


def test_l2_against_numpy():
    ball, wide = projected.l2(0.7), np.random.default_rng(1).normal(size=(50, 2, 3, 1)).astype(np.float32)
    length = np.sqrt((wide.astype(np.float64) ** 2).sum(axis=(1, 2, 3), keepdims=True))
    np.testing.assert_allclose(ball.project(wide), wide * np.minimum(1, 0.7 / length), rtol=1e-5)
    inside = (0.1 * wide / length).astype(np.float32)
    np.testing.assert_array_equal(ball.project(inside), inside)
    np.testing.assert_allclose(ball.direction(wide), wide / length, rtol=1e-5)
    np.testing.assert_array_equal(ball.direction(0 * wide), 0 * wide)
    drawn = np.asarray(ball.draw(KEY, (4000, 2, 1, 1))).reshape(-1, 2)
    share = (np.linalg.norm(drawn, axis=1) / 0.7) ** 2  # uniform in a disc: the squared length is uniform
    assert share.max() <= 1 + 1e-5
    np.testing.assert_allclose(np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.04)
    assert abs(drawn.mean(axis=0)).max() < 0.03


def test_l0_keeps_the_largest_pixels():
    noise = np.random.default_rng(2).normal(size=(9, 3, 4, 2)).astype(np.float32)
    kept = np.asarray(projected.l0(2).project(noise))
    for before, after in zip(noise, kept):
        size = (before**2).sum(axis=-1)
        largest = size >= np.sort(size.ravel())[-2]
        np.testing.assert_array_equal(after, np.where(largest[..., None], before, 0))
    with pytest.raises(BadInput, match="12"):
        projected.l0(13).project(noise)


@pytest.mark.parametrize(
    "wrong", [lambda: projected.linf(0.0), lambda: projected.linf(1.1), lambda: projected.l2(-1), lambda: projected.l0(0)]
)
def test_impossible_balls_are_refused(wrong):
    with pytest.raises(BadInput):
        wrong()


class Walk(NamedTuple):
    weights: Weights
    momentum: Array


MASS = 0.5


def walk():
    """Heavy-ball descent on |w - target|^2 / 2, with one parameter in each of two leaves."""

    def init(start):
        return Walk(Weights(start, {"seen": jnp.zeros(())}), jnp.zeros(3))

    def step(key, state, batch):
        w = jnp.append(state.weights.params["a"], state.weights.params["b"])
        momentum = MASS * state.momentum + (w - TARGET)
        w = w - 0.4 * momentum
        weights = Weights({"a": w[:2], "b": w[2]}, {"seen": state.weights.stats["seen"] + len(batch.y)})
        return Walk(weights, momentum), {"loss": jnp.sum((w - TARGET) ** 2)}

    return Method(init, step)


START = {"a": jnp.array([0.3, 0.1]), "b": jnp.array(-0.2)}
BATCH = sets.make(np.zeros((5, 1)), np.zeros(5))


@pytest.mark.parametrize("shape", ["ball", "sphere"])
def test_within_projects_after_every_step(shape):
    project = {"ball": tree.project_ball, "sphere": tree.project_sphere}[shape]
    method = projected.within(walk(), project)
    radii = np.float32([0.05, 0.4, 1.0, 9.0])

    def steps(radius):
        def body(state, _):
            state, info = method.step(KEY, state, BATCH)
            return state, (state.inner.weights, info)

        return jax.lax.scan(body, method.init(walk().init(START), radius), None, length=8)[1]

    weights, info = jax.jit(jax.vmap(steps))(radii)  # the radius is data: one program for the sweep
    found = np.concatenate([weights.params["a"], weights.params["b"][..., None]], axis=-1)
    anchor = np.array([0.3, 0.1, -0.2])
    for radius, path in zip(radii.astype(np.float64), found):
        w, momentum = anchor.copy(), np.zeros(3)
        for t in range(8):
            momentum = MASS * momentum + (w - TARGET)  # the momentum is not projected
            w = w - 0.4 * momentum
            length = np.linalg.norm(w - anchor)
            scale = min(1.0, radius / length) if shape == "ball" else radius / length
            w = anchor + (w - anchor) * scale
            np.testing.assert_allclose(path[t], w, rtol=1e-4, atol=1e-5)
    away = np.linalg.norm(found - anchor, axis=-1)
    np.testing.assert_allclose(info["distance"], away, rtol=1e-4)
    if shape == "ball":
        assert (away <= radii[:, None] * (1 + 1e-5)).all()
        assert (away[-1] < 8).all()  # a wide ball is not felt
    else:
        np.testing.assert_allclose(away, np.tile(radii[:, None], 8), rtol=1e-5)
    assert set(info) == {"loss", "distance"}
    np.testing.assert_array_equal(weights.stats["seen"][:, -1], 40.0)  # statistics pass through
