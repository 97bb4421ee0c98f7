"""Gaussian noise on released weights whose floating-point form does not name the weights under it.

A sum of float32 weights and float32 normals tells which weights it was made of: the normals take few values, and their
last bits survive in the sum (Mironov 2012). Here weights and noise are whole multiples of a fine grid, their sum is exact,
and what is released is rounded to a coarse grid. Both grids depend on the noise's scale alone. Since the weights lie on
the fine grid, rounding the noise to it is the same as rounding the sum of the weights and a real Gaussian to it; all that is
released is a function of that sum, and nothing of the guarantee is lost.
"""

import jax
import numpy as np

from dememo_jax import bounds
from dememo_jax.errors import require
from dememo_jax.types import Key


def perturbed(key: Key, params: np.ndarray, sigma: float) -> np.ndarray:
    """`params` + N(0, sigma^2) on the coarse grid, in float64.

    Args:
        key: a secret key, used once.
        params: weights of any shape; rounding to `bounds.fine_grid(sigma)` comes first and moves each by half of it at most.
        sigma: standard deviation of the noise.

    Returns:
        Weights that are whole multiples of `2^22 bounds.fine_grid(sigma)`.

    Raises:
        BadInput: where weights are so much larger than sigma that the sum is not exact in 64 bits.
    """
    fine = bounds.fine_grid(sigma)
    whole = np.rint(np.asarray(params, np.float64) / fine)
    require(
        bool((np.abs(whole) < 2.0**61).all()),
        f"sigma = {sigma:g} is below 2^-29 of the largest weight: such noise cannot be added exactly. Use a larger sigma",
    )
    words = np.asarray(jax.random.bits(key, (2, *np.shape(params)), np.uint32), np.uint64)
    bits = (words[0] << np.uint64(32)) | words[1]
    noise = bounds.normal_multiples(bits & np.uint64(2**63 - 1), sigma)
    signed = np.where(bits >> np.uint64(63), -noise, noise)
    coarse = (whole.astype(np.int64) + signed + 2 ** (bounds.grid.FINE - 1)) >> bounds.grid.FINE
    return coarse * (fine * 2.0**bounds.grid.FINE)
