"""A convolution whose gradient is fast inside loops on CPU, for `nn.Conv(conv_general_dilated=conv)`.

XLA's CPU backend brings convolutions into the form of its fast kernel at the top level of a program only. The
transposed convolutions of a gradient miss that form, so inside `lax.scan` they run as naive loops, ten to twenty times
slower (jax issue 12868). Here the derivative is a matrix product with patches instead, which has no such form to miss.
Forward and reverse mode, and derivatives of any order, work as ever. On other backends this is `lax` convolution.

Its fast kernel is slow all the same where output channels are few, half as fast as at 128 (on two AVX-512 cores). There,
3 x 3 convolutions of stride 1 go through Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2016), which multiplies 2.25 times less.
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


BLOCK = 8192  # pixels of output that Winograd handles at once: its sums then stay in the cache


def _winograd_pays(x: Array, kernel: Array, strides: tuple[int, ...], pads: tuple[tuple[int, int], ...]) -> bool:
    """Where Winograd was measured to be faster than the fast kernel: many even-sized images, few channels but not three."""
    _, height, width, channels = x.shape
    fits = kernel.shape[:2] == (3, 3) and strides == (1, 1) and pads == ((1, 1), (1, 1)) and height % 2 == width % 2 == 0
    return fits and len(x) * height * width >= BLOCK and 32 <= channels <= 64 and 32 <= kernel.shape[-1] <= 64


def winograd(x: Array, kernel: Array, precision: Any = None) -> Array:
    """3 x 3 convolution of stride 1, padded by one, of images with even sides; errors grow to about 1e-6 of the largest."""
    count, height, width, channels = x.shape
    block = max(1, BLOCK // (height * width))
    whole = count // block * block
    spread = jnp.asarray(_SPREAD, kernel.dtype)
    weights = jnp.einsum("ai,ijcd,bj->abcd", spread, kernel, spread).reshape(16, channels, -1)
    parts = jax.lax.map(lambda part: _tiles(part, weights, precision), x[:whole].reshape(-1, block, *x.shape[1:]))
    parts = parts.reshape(whole, height, width, kernel.shape[-1])
    return parts if whole == count else jnp.concatenate([parts, _tiles(x[whole:], weights, precision)])


_SPREAD = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def _tiles(x: Array, weights: Array, precision: Any) -> Array:
    """Tiles of 4 x 4 pixels, two apart, become sums and differences, meet the weights, and come back as 2 x 2."""
    count, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _forth(*(x[:, i : i + height - 1 : 2] for i in range(4)))
    tiles = [tile for row in rows for tile in _forth(*(row[:, :, j : j + width - 1 : 2] for j in range(4)))]
    products = jnp.matmul(jnp.stack(tiles).reshape(16, -1, channels), weights, precision=precision)
    products = products.reshape(4, 4, count, height // 2, width // 2, -1)
    rows = _back(*products)
    return jnp.stack([jnp.stack(_back(*row), axis=3) for row in rows], axis=2).reshape(count, height, width, weights.shape[-1])


def _forth(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    return a - c, b + c, c - b, b - d


def _back(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    return a + b + c, b - c - d


def _forward(x: Array, kernel: Array, strides: tuple[int, ...], pads: tuple[tuple[int, int], ...], precision: Any) -> Array:
    if _winograd_pays(x, kernel, strides, pads):
        return winograd(x, kernel, precision)
    return _lax(x, kernel, strides, pads, precision)


_conv = jax.custom_jvp(_forward, nondiff_argnums=(2, 3, 4))


@_conv.defjvp
def _jvp(strides, pads, precision, primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents

    def product(images, weights):
        rows = patches(images, weights.shape[:2], strides, pads)
        return jnp.matmul(rows, weights.reshape(-1, weights.shape[-1]), precision=precision)

    return _conv(x, kernel, strides, pads, precision), product(dx, kernel) + product(x, dkernel)
