"""Projected gradient search, on inputs and inside balls of weights: one core for perturbations, recovery and sharpness."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dememo_jax import keys, tree
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Key, Method, Params


def search(
    key: Key,
    point: Any,
    gradient: Callable[[Key, Array, Any], Any],
    *,
    stride: float | Array,
    steps: int,
    project: Callable[[Any], Any],
    direction: Callable[[Any], Any] = jnp.sign,
) -> Any:
    """`steps` times `point = project(point - stride * direction(gradient(key_t, t, point)))`; to climb, negate the gradient.

    A point is an array or a tree of them.
    """

    def body(current, t):
        way = direction(gradient(keys.at(key, t), t, current))
        return project(jax.tree.map(lambda old, move: (old - stride * move).astype(old.dtype), current, way)), None

    return jax.lax.scan(body, point, jnp.arange(steps))[0]


class Ball(NamedTuple):
    """What noise may be, example by example (axis 0): the ball of a norm."""

    project: Callable[[Array], Array]  # onto the ball
    direction: Callable[[Array], Array]  # of a gradient: the steepest ascent in that norm, of unit size
    draw: Callable[[Key, tuple[int, ...]], Array]  # a random start inside
    norm: str
    size: float  # radius in pixels of [0, 1]; for l0 the number of pixels


def linf(radius: float) -> Ball:
    """|noise| <= radius everywhere; steps go by the sign; starts are uniform."""
    require(0 < radius <= 1, f"the l-inf budget must lie in (0, 1], pixels being in [0, 1]; got {radius}")
    return Ball(
        project=lambda noise: jnp.clip(noise, -radius, radius),
        direction=jnp.sign,
        draw=lambda key, shape: jax.random.uniform(key, shape, minval=-radius, maxval=radius),
        norm="linf",
        size=radius,
    )


def l2(radius: float) -> Ball:
    """l2 norm <= radius; steps go along the normalised gradient; starts are uniform in the ball."""
    require(0 < radius < float("inf"), f"the l2 budget must be positive and finite, got {radius}")

    def draw(key, shape):
        to_way, to_length = jax.random.split(key)
        way = jax.random.normal(to_way, shape)
        length = jax.random.uniform(to_length, (shape[0], *[1] * (len(shape) - 1))) ** (1 / math.prod(shape[1:]))
        return radius * length * way / _norm(way)

    return Ball(
        project=lambda noise: noise * jnp.minimum(1.0, radius / jnp.maximum(_norm(noise), 1e-12)),
        direction=lambda gradient: gradient / jnp.maximum(_norm(gradient), 1e-12),
        draw=draw,
        norm="l2",
        size=radius,
    )


def check_l2(radius: float, shape: tuple[int, ...]) -> None:
    """BadInput for an l2 budget beyond the longest possible change of an example of this shape in [0, 1]: it bounds nothing."""
    longest = math.sqrt(math.prod(shape))
    require(radius <= longest, f"an l2 radius of {radius:g} bounds nothing: the longest possible change is {longest:.4g}")


def l0(pixels: int) -> Ball:
    """At most `pixels` pixels [H, W] of an image differ, those that differ most; steps are scaled to a largest entry of one.

    Between equals the first pixels in raster order stay.
    """
    require(pixels >= 1, f"at least one pixel must be allowed to change, got {pixels}")

    def project(noise):
        size = jnp.square(noise).sum(axis=-1).reshape(len(noise), -1)
        require(pixels <= size.shape[1], f"{pixels} pixels may change, but an image has {size.shape[1]}")
        kept = jax.lax.top_k(size, pixels)[1]
        chosen = jax.vmap(lambda places: jnp.zeros(size.shape[1], bool).at[places].set(True))(kept)
        return jnp.where(chosen.reshape(*noise.shape[:-1], 1), noise, 0.0)

    def direction(gradient):
        return gradient / jnp.maximum(jnp.abs(gradient).max(axis=tuple(range(1, gradient.ndim)), keepdims=True), 1e-12)

    return Ball(project, direction, lambda key, shape: project(jax.random.uniform(key, shape, minval=-1)), "l0", float(pixels))


def _norm(noise: Array) -> Array:
    return jnp.sqrt(jnp.square(noise).sum(axis=tuple(range(1, noise.ndim)), keepdims=True))


class WithinState(NamedTuple):
    inner: Any
    anchor: Params
    radius: Array


def within(
    method: Method,
    project: Callable[[Params, Params, Array], Params] = tree.project_ball,
    *,
    only: str | None = None,
) -> Method:
    """`method`, projected after every step onto the ball (or sphere) of weights around an anchor.

    The state of `method` must have `weights`. `init(inner_state, radius)` anchors at the weights as they are then.
    The radius is part of the state, so that one program serves a sweep of radii. Adds the distance to the info.
    Momentum is left as the inner optimiser keeps it. only: a regular expression; the leaves whose names it does not
    match stay at the anchor, whatever the optimiser wants. BadInput when none matches, and for weights stored in half
    precision, where a small step is rounded away and a projection leaves the ball: raise them by `tree.widened` first.
    """

    def init(inner: Any, radius: float | Array) -> WithinState:
        low = ", ".join(tree.half(inner.weights.params))
        require(not low, f"a ball of weights needs float32 weights, these are {low}: raise them by tree.widened first")
        return WithinState(inner, inner.weights.params, jnp.asarray(radius, jnp.float32))

    def step(key: Key, state: WithinState, data: Dataset):
        inner, info = method.step(key, state.inner, data)
        params = inner.weights.params
        if only is not None:
            leaves, treedef = jax.tree.flatten(params)
            trio = zip(tree.matching(params, only), leaves, jax.tree.leaves(state.anchor))
            params = jax.tree.unflatten(treedef, [leaf if free else fixed for free, leaf, fixed in trio])
        params = project(params, state.anchor, state.radius)
        inner = inner._replace(weights=inner.weights._replace(params=params))
        return state._replace(inner=inner), {**info, "distance": tree.distance(params, state.anchor)}

    def check(state: Any, data: Dataset) -> None:
        if method.check is not None:
            method.check(state.inner, data)

    return Method(init, step, check)
