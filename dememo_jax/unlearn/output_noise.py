"""Gaussian noise on released weights whose floating-point form does not name the weights under it.

A sum of float32 weights and float32 normals tells which weights it was made of: the normals take few values, and their
last bits survive in the sum (Mironov 2012). Here weights and noise are whole multiples of a fine grid, their sum is exact,
and what is released is rounded to a coarse grid. Both grids depend on the noise's scale alone. Since the weights lie on
the fine grid, rounding the noise to it and then the sum to the coarse one is the same as rounding the sum of the weights
and a real Gaussian to the coarse one: post-processing, for which nothing is lost.
"""

import math

import jax
import numpy as np
from scipy import special

from dememo_jax.errors import require
from dememo_jax.types import Key

COARSE, FINE = 10, 22  # the released grid is about sigma / 2^10, the grid of weights and noise 2^22 times as fine


def fine_grid(sigma: float) -> float:
    """The grid that weights are rounded to before the noise: a power of two in (sigma / 2^33, sigma / 2^32]."""
    return 2.0 ** (math.frexp(sigma)[1] - 1 - COARSE - FINE)


def perturbed(key: Key, params: np.ndarray, sigma: float) -> np.ndarray:
    """`params` + N(0, sigma^2) on the coarse grid, in float64.

    Args:
        key: a secret key, used once.
        params: weights of any shape; they are rounded to `fine_grid(sigma)` first, which moves each by half of it at most.
        sigma: standard deviation of the noise.

    Returns:
        Weights that are whole multiples of `2^22 fine_grid(sigma)`.

    Raises:
        BadInput: where weights are so much larger than sigma that the sum is not exact in 64 bits.
    """
    fine = fine_grid(sigma)
    whole = np.rint(np.asarray(params, np.float64) / fine)
    require(
        bool((np.abs(whole) < 2.0**61).all()),
        f"sigma = {sigma:g} is below 2^-29 of the largest weight: such noise cannot be added exactly. Use a larger sigma",
    )
    words = np.asarray(jax.random.bits(key, (2, *np.shape(params)), np.uint32), np.uint64)
    bits = (words[0] << np.uint64(32)) | words[1]
    noise = multiples(bits & np.uint64(2**63 - 1), sigma)
    signed = np.where(bits >> np.uint64(63), -noise, noise)
    coarse = (whole.astype(np.int64) + signed + 2 ** (FINE - 1)) >> FINE
    return coarse * (fine * 2.0**FINE)


def multiples(magnitude: np.ndarray, sigma: float) -> np.ndarray:
    """|Z| in multiples of the fine grid, int64, for 63 random bits a number; by the inverse of the normal distribution.

    The bits count from the tail: it is resolved to 2^-64, which lies beyond 9 sigma.
    """
    tail = (magnitude.astype(np.float64) + 0.5) * 2.0**-64
    return np.rint(-special.ndtri(tail) * (sigma / fine_grid(sigma))).astype(np.int64)
