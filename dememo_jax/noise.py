"""Gaussian noise for what is released: numbers whose floating-point digits do not say what the noise was added to.

`jax.random.normal` in float32 takes 2^23 values, sparse in the tails. Whoever holds a released weight and a guess of the
weight before the noise can look whether their difference is one of those values: over a few coordinates only the true guess
passes (Mironov 2012, "On significance of the least significant bits for differential privacy", of Laplace noise). Here

1. the noise has fine tails: its distance from zero is the inverse of the Gaussian distribution function at a probability
   with a random exponent and a full mantissa, so that neighbouring values are about 2^-23 of their size apart everywhere,
   out to 9 standard deviations;
2. the sum is rounded to a grid of sigma / 256 to sigma / 128, a power of two that depends on sigma alone. A cell of it holds
   thousands of values of the noise wherever the noise comes from, so every start reaches every cell that it should.

The second step is post-processing: of exact Gaussian noise it would change no guarantee. What is left of floating point is
a relative error of the probability of a cell, some 1e-4 in the tails and 1e-5 in the body, which is not accounted for.
(`unlearn.heads` adds noise on the host, in exact whole numbers; networks are too large for that.)
Certificates do not use this: their draws (`tree.gaussian_like`) are published with their key.
"""

import jax
import jax.numpy as jnp

from dememo_jax import tree
from dememo_jax.types import Array, Key, Params

FINE = 7  # the grid is 2^-7 of the power of two at or below sigma


def standard(key: Key, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Standard Gaussian numbers with fine tails.

    Args:
        key: one typed key.
        shape: of the result.
        dtype: float32 or float64.

    Returns:
        An array of that shape; the largest size it can hold is 9.1.
    """
    first, second = jax.random.split(key)
    zeros = jax.lax.clz(jax.random.bits(first, (2, *shape), jnp.uint32)).astype(jnp.int32)
    exponent = jnp.where(zeros[0] < 32, zeros[0], 32 + zeros[1])  # leading zeros of 64 random bits: geometric
    width, digits = jnp.finfo(dtype).bits, jnp.finfo(dtype).nmant
    bits = jax.random.bits(second, shape, jnp.dtype(f"uint{width}"))
    mantissa = 1 + (bits >> (width - digits)).astype(dtype) * 2.0**-digits
    probability = jnp.ldexp(mantissa, -2 - exponent)  # uniform in (0, 1/2)
    return jnp.where(bits % 2 == 0, 1, -1).astype(dtype) * jax.scipy.special.ndtri(probability)


def add(key: Key, params: Params, sigma: float | Array) -> Params:
    """`params` plus independent N(0, sigma^2), rounded to a grid that depends on sigma alone: what may be released.

    Args:
        key: a secret, used once.
        params: a nest of floating arrays; those in half precision are raised to float32.
        sigma: the standard deviation, one number for all; 0 adds nothing and rounds nothing.

    Returns:
        A nest of the same shapes.

    Example:
        >>> released = noise.add(jax.random.wrap_key_data(secret), weights.params, sigma)
    """
    params = tree.widened(params)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    sigma = jnp.asarray(sigma, dtype)
    parts = tree.cut(sigma * standard(key, (tree.size(params),), dtype), params)
    step = grid(sigma)

    def rounded(leaf, part):
        moved, cell = leaf + part.astype(leaf.dtype), step.astype(leaf.dtype)
        near = (sigma > 0) & (jnp.abs(moved) < cell / jnp.finfo(leaf.dtype).eps)  # farther out all numbers lie on the grid
        return jnp.where(near, jnp.round(moved / cell) * cell, moved)

    return jax.tree.map(rounded, params, parts)


def grid(sigma: Array) -> Array:
    """The spacing of what `add` returns, a power of two between sigma / 256 and sigma / 128; 2^-7 where sigma is 0."""
    sigma = jnp.asarray(sigma)
    _, exponent = jnp.frexp(jnp.where(sigma > 0, sigma, 1.0))  # sigma is 2^(exponent - 1) at least
    return jnp.ldexp(jnp.ones((), sigma.dtype), exponent - 1 - FINE)
