"""A convolution whose gradient is fast inside loops on CPU, for `nn.Conv(conv_general_dilated=conv)`.

XLA's CPU backend brings convolutions into the form of its fast kernel at the top level of a program only. The
transposed convolutions of a gradient miss that form, so inside `lax.scan` they run as naive loops, ten to twenty times
slower (jax issue 12868). Here convolution is a bilinear primitive of its own, whose transposes avoid this: towards the
images a plain convolution where the stride is 1; else, and towards the kernel, a matrix product with patches. Forward and
reverse mode, derivatives of any order and vmap work as ever. On other backends this is `lax` convolution.

Its fast kernel is slow all the same where output channels are few, half as fast as at 128 (on two AVX-512 cores). There,
3 x 3 convolutions of stride 1 go through Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2016), which multiplies 2.25 times less.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dememo_jax.errors import require
from dememo_jax.types import Array

Padding = Sequence[tuple[int, int]]
Pads = tuple[tuple[int, int], ...]


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


def _lax(x: Array, kernel: Array, strides: tuple[int, ...], pads: Pads, precision: Any) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=layout, precision=precision)


def patches(x: Array, window: tuple[int, ...], strides: tuple[int, ...], pads: Pads) -> Array:
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


def _winograd_pays(x: Array, kernel: Array, strides: tuple[int, ...], pads: Pads) -> bool:
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


# --- the primitive ------------------------------------------------------------------------------------------------


def _forward(x: Array, kernel: Array, *, strides: tuple[int, ...], pads: Pads, precision: Any) -> Array:
    if _winograd_pays(x, kernel, strides, pads):
        return winograd(x, kernel, precision)
    return _lax(x, kernel, strides, pads, precision)


def _product(x: Array, kernel: Array, strides: tuple[int, ...], pads: Pads, precision: Any) -> Array:
    """The same as a matrix product with patches."""
    rows = patches(x, kernel.shape[:2], strides, pads)
    return jnp.matmul(rows, kernel.reshape(-1, kernel.shape[-1]), precision=precision)


def _image_gradient(ct: Array, x: Any, kernel: Array, *, strides: tuple[int, ...], pads: Pads, precision: Any) -> Array:
    """At stride 1 a convolution again, with the kernel turned round."""
    back = tuple((side - 1 - low, side - 1 - high) for side, (low, high) in zip(kernel.shape, pads))
    if strides == (1, 1) and min(min(pair) for pair in back) >= 0:
        return _conv(ct, kernel[::-1, ::-1].swapaxes(2, 3), strides, back, precision)
    like = jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
    (found,) = jax.linear_transpose(lambda images: _product(images, kernel, strides, pads, precision), like)(ct)
    return found


def _kernel_gradient(ct: Array, x: Array, kernel: Any, *, strides: tuple[int, ...], pads: Pads, precision: Any) -> Array:
    rows = patches(x, kernel.aval.shape[:2], strides, pads)
    rows, ct = rows.reshape(-1, rows.shape[-1]), ct.reshape(-1, ct.shape[-1])
    return jnp.matmul(rows.T, ct, precision=precision).reshape(kernel.aval.shape)


def _batched(arguments: Sequence[Array], axes: Sequence[Any], **how: Any) -> tuple[Array, int]:
    """Images of all lanes are one batch; kernels are taken one after another, for many at once are slow here."""
    (x, kernel), (of_x, of_kernel) = arguments, axes
    if of_kernel is None:
        x = jnp.moveaxis(x, of_x, 0)
        found = _primitive.bind(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), kernel, **how)
        return found.reshape(*x.shape[:2], *found.shape[1:]), 0
    kernels = jnp.moveaxis(kernel, of_kernel, 0)
    if of_x is None:
        return jax.lax.map(lambda kernel: _primitive.bind(x, kernel, **how), kernels), 0
    return jax.lax.map(lambda pair: _primitive.bind(*pair, **how), (jnp.moveaxis(x, of_x, 0), kernels)), 0


def _shape(x: Any, kernel: Any, **how: Any) -> Any:
    found = jax.eval_shape(functools.partial(_lax, **how), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel)))
    return jax.core.ShapedArray(found.shape, found.dtype)


_primitive = Primitive("image_convolution")
_primitive.def_impl(jax.jit(_forward, static_argnames=("strides", "pads", "precision")))
_primitive.def_abstract_eval(_shape)
mlir.register_lowering(_primitive, mlir.lower_fun(_forward, multiple_results=False))
ad.defbilinear(_primitive, _image_gradient, _kernel_gradient)
batching.primitive_batchers[_primitive] = _batched


def _conv(x: Array, kernel: Array, strides: tuple[int, ...], pads: Pads, precision: Any) -> Array:
    return _primitive.bind(x, kernel, strides=strides, pads=pads, precision=precision)
