"""Diagonal, trace and layer blocks of a symmetric matrix from random sign probes, with their standard errors.

The matrix is an `Operator`, such as `curvature.operator` makes; `like` is a tree shaped like one vector. Probe k comes from
`fold_in(key, k)`, whatever the width: how many probes share a pass over the data, and stand in memory, at a time.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dememo_jax import keys, tree
from dememo_jax.curvature.products import Operator
from dememo_jax.errors import require
from dememo_jax.types import Key, Params


class Estimate(NamedTuple):
    """A mean over probes. The error is infinite with one probe, which cannot tell."""

    value: Any
    error: Any  # standard error of the mean, shaped like the value


def signs(key: Key, like: Params) -> Params:
    """Independent +1 and -1 in the shape of `like` (Rademacher)."""
    flat = jax.random.rademacher(key, (tree.size(like),), jnp.float32)
    return jax.tree.map(lambda part, leaf: part.astype(leaf.dtype), tree.cut(flat, like), like)


def diagonal(product: Operator, like: Params, key: Key, *, probes: int = 16, width: int = 4) -> Estimate:
    """The diagonal, shaped like `like`: mean of z * (H z), Bekas, Kokiopoulou and Saad 2007.

    Unbiased with variance sum_{j != i} H_ij^2 / probes: exact from one probe where H is diagonal. An absolute value of it
    is biased upwards by the noise.
    """
    like = tree.widened(like)
    return _mean(lambda one: signs(one, like), lambda z, hz: jax.tree.map(jnp.multiply, z, hz), product, key, probes, width)


def trace(product: Operator, like: Params, key: Key, *, probes: int = 16, width: int = 4) -> Estimate:
    """The trace, a scalar: mean of z^T H z, Hutchinson 1990; its variance is 2 sum_{i != j} H_ij^2 / probes."""
    like = tree.widened(like)
    return _mean(lambda one: signs(one, like), optax.tree.vdot, product, key, probes, width)


def layer_blocks(product: Operator, vectors: Params, key: Key, *, probes: int = 8, width: int = 4) -> Estimate:
    """v_l^T H_ll v_l for every leaf v_l of `vectors`, a tree of scalars, all from the same probes.

    One sign s_l a leaf: with u = sum_l s_l v_l the mean of s_l v_l^T (H u)_l is unbiased, with variance
    sum_{m != l} (v_l^T H_lm v_m)^2 / probes. As many products as probes, instead of as leaves (`exact_layer_blocks`).
    """
    vectors = tree.widened(vectors)

    def draw(one: Key) -> Params:
        leaves, treedef = jax.tree.flatten(vectors)
        turned = jax.random.rademacher(one, (len(leaves),), jnp.float32)
        return jax.tree.unflatten(treedef, [leaf * sign.astype(leaf.dtype) for leaf, sign in zip(leaves, turned)])

    def each(u: Params, hu: Params) -> Params:
        return jax.tree.map(lambda a, b: jnp.vdot(a, b, precision="highest"), u, hu)

    return _mean(draw, each, product, key, probes, width)


def _mean(draw: Callable, statistic: Callable, product: Operator, key: Key, probes: int, width: int) -> Estimate:
    """Mean and standard error of statistic(z, H z) over the probes z, by Welford's recurrence."""
    require(probes >= 1 and width >= 1, f"need at least one probe and a width of one, got {probes} and {width}")
    width = math.gcd(probes, width)

    def group(carry, begin):
        vectors = jax.vmap(draw)(jax.vmap(lambda i: keys.at(key, i))(begin + jnp.arange(width)))
        found = jax.vmap(statistic)(vectors, product(vectors))

        def one(carry, item):
            count, mean, spread = carry
            gap = jax.tree.map(jnp.subtract, item, mean)
            mean = jax.tree.map(lambda m, g: m + g / (count + 1), mean, gap)
            spread = jax.tree.map(lambda s, g, x, m: s + g * (x - m), spread, gap, item, mean)
            return (count + 1, mean, spread), None

        return jax.lax.scan(one, carry, found)[0], None

    def shape(key):
        z = draw(key)
        stacked = jax.tree.map(lambda leaf: leaf[None], z)
        return statistic(z, jax.tree.map(lambda leaf: leaf[0], product(stacked)))

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(shape, key))
    (_, mean, spread), _ = jax.lax.scan(group, (jnp.zeros((), jnp.float32), zero, zero), jnp.arange(0, probes, width))

    def error(leaf):
        return jnp.sqrt(leaf / (probes * (probes - 1))) if probes > 1 else jnp.full_like(leaf, jnp.inf)

    return Estimate(mean, jax.tree.map(error, spread))
