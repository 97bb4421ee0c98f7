"""Projected gradient search, on inputs and inside balls of weights: one core for perturbations and recovery."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dememo_jax import keys, tree
from dememo_jax.types import Array, Dataset, Key, Method, Params


def search(
    key: Key,
    point: Array,
    gradient: Callable[[Key, Array], Array],
    *,
    stride: float | Array,
    steps: int,
    project: Callable[[Array], Array],
    direction: Callable[[Array], Array] = jnp.sign,
) -> Array:
    """`steps` times `point = project(point - stride * direction(gradient(key_t, point)))`; descends, so negate to climb."""

    def body(current, t):
        move = stride * direction(gradient(keys.at(key, t), current))
        return project(current - move), None

    return jax.lax.scan(body, point, jnp.arange(steps))[0]


def linf(radius: float | Array) -> Callable[[Array], Array]:
    """Projection of noise onto the l-infinity ball."""
    return lambda delta: jnp.clip(delta, -radius, radius)


class WithinState(NamedTuple):
    inner: Any
    anchor: Params
    radius: Array


def within(method: Method, project: Callable[[Params, Params, Array], Params] = tree.project_ball) -> Method:
    """`method`, projected after every step onto the ball (or sphere) of weights around an anchor.

    The state of `method` must have `weights`. `init(inner_state, radius)` anchors at the weights as they are then.
    The radius is part of the state, so that one program serves a sweep of radii. Adds the distance to the info.
    Momentum is left as the inner optimiser keeps it.
    """

    def init(inner: Any, radius: float | Array) -> WithinState:
        return WithinState(inner, inner.weights.params, jnp.asarray(radius, jnp.float32))

    def step(key: Key, state: WithinState, data: Dataset):
        inner, info = method.step(key, state.inner, data)
        params = project(inner.weights.params, state.anchor, state.radius)
        inner = inner._replace(weights=inner.weights._replace(params=params))
        return state._replace(inner=inner), {**info, "distance": tree.distance(params, state.anchor)}

    return Method(init, step)
