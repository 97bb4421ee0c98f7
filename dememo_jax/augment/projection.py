"""Orthogonal projection: take out of the images what a linear classifier learns from protected ones."""

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax.augment.base import Augment
from dememo_jax.errors import require
from dememo_jax.types import Array


def orthogonal(directions: Array) -> Augment:
    """x - Q Q^T x for flattened images and Q = `directions` [D, k] (Sandoval-Segura et al., NeurIPS 2023).

    Q has orthonormal columns that span the weights of a linear classifier of the protected images (`jnp.linalg.qr`).
    The result is not clipped, as in the published code, and may leave [0, 1]. Raises BadInput for columns that are not
    orthonormal (to 1e-3; not checked for traced arrays), and when images do not have D = H W C values.
    """
    require(jnp.ndim(directions) == 2, f"directions must be [D, k], got shape {jnp.shape(directions)}")
    if not isinstance(directions, jax.core.Tracer):
        q = np.asarray(directions, np.float64)
        error = np.abs(q.T @ q - np.eye(q.shape[1])).max(initial=0)
        require(error < 1e-3, "directions must have orthonormal columns; take Q of jnp.linalg.qr")

    def apply(key, x):
        flat, basis = x.reshape(len(x), -1), jnp.asarray(directions, x.dtype)
        require(
            flat.shape[1] == len(basis), f"directions have {len(basis)} rows, images {flat.shape[1]} values; they must agree"
        )
        seen = jnp.matmul(jnp.matmul(flat, basis, precision="highest"), basis.T, precision="highest")
        return (flat - seen).reshape(x.shape)

    return apply
