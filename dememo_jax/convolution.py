"""A convolution whose gradient is fast inside loops on CPU, for `nn.Conv(conv_general_dilated=conv)`.

XLA's CPU backend brings convolutions into the form of its fast kernel at the top level of a program only. The
transposed convolutions of a gradient miss that form, so inside `lax.scan` they run as naive loops, ten to twenty times
slower (jax issue 12868). Here the derivative is a matrix product with patches instead, which has no such form to miss.
Forward and reverse mode, and derivatives of any order, work as ever. On other backends this is `lax` convolution.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dememo_jax.errors import require
from dememo_jax.types import Array

Padding = Sequence[tuple[int, int]]


def conv(x: Array, kernel: Array, window_strides: Sequence[int], padding: str | Padding, **how: Any) -> Array:
    """Images [B, H, W, C], kernel [h, w, C, D] -> [B, H', W', D]; channels last, no dilation, no groups.

    Takes the arguments that Flax passes to `lax.conv_general_dilated`. Raises BadInput for dilation or groups.
    """
    dilated = any(d != 1 for name in ("lhs_dilation", "rhs_dilation") for d in how.get(name) or (1, 1))
    require(x.ndim == 4, f"expected images [B, H, W, C], got {x.shape}")
    grouped = any(how.get(name, 1) != 1 for name in ("feature_group_count", "batch_group_count"))
    require(not dilated and not grouped, "conv takes neither dilation nor groups; use lax")
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return (_conv if jax.default_backend() == "cpu" else _lax)(x, kernel, strides, pads, how.get("precision"))


def _lax(x: Array, kernel: Array, strides: tuple[int, ...], pads: tuple[tuple[int, int], ...], precision: Any) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=layout, precision=precision)


def patches(x: Array, window: tuple[int, int], strides: tuple[int, ...], pads: tuple[tuple[int, int], ...]) -> Array:
    """Every window of the padded images as a row: [B, H', W', h * w * C]."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = ((size - side) // stride for size, side, stride in zip(x.shape[1:3], window, strides))
    return jnp.concatenate(
        [
            x[:, i : i + height * strides[0] + 1 : strides[0], j : j + width * strides[1] + 1 : strides[1]]
            for i in range(window[0])
            for j in range(window[1])
        ],
        axis=-1,
    )


_conv = jax.custom_jvp(_lax, nondiff_argnums=(2, 3, 4))


@_conv.defjvp
def _jvp(strides, pads, precision, primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents

    def product(images, weights):
        rows = patches(images, weights.shape[:2], strides, pads)
        return jnp.matmul(rows, weights.reshape(-1, weights.shape[-1]), precision=precision)

    return _conv(x, kernel, strides, pads, precision), product(dx, kernel) + product(x, dkernel)
