"""Gaussian noise as whole multiples of a grid, on the host: what a release needs that must not name what is under the noise."""

import math

import numpy as np
from scipy import special

COARSE, FINE = 10, 22  # what is released lies on a grid of about sigma / 2^10; weights and noise on one 2^22 times as fine


def fine_grid(sigma: float) -> float:
    """The grid that weights are rounded to before the noise: a power of two in (sigma / 2^33, sigma / 2^32]."""
    return 2.0 ** (math.frexp(sigma)[1] - 1 - COARSE - FINE)


def normal_multiples(magnitude: np.ndarray, sigma: float) -> np.ndarray:
    """|Z| for Z ~ N(0, sigma^2), in whole multiples of `fine_grid(sigma)`, from 63 random bits a number.

    Args:
        magnitude: uint64 below 2^63, uniform. They count from the tail, which is so resolved to 2^-64, beyond 9 sigma.
        sigma: standard deviation.

    Returns:
        int64 in the shape of `magnitude`; rounded to the released grid, within 1e-12 in total variation of a rounded Gaussian.

    Example:
        normal_multiples(np.array([2**62], np.uint64), 1.0) * fine_grid(1.0)  # the upper quartile, 0.6745
    """
    tail = (magnitude.astype(np.float64) + 0.5) * 2.0**-64
    return np.rint(-special.ndtri(tail) * (sigma / fine_grid(sigma))).astype(np.int64)
