"""JPEG as array code: what is left of an image after the codec, on any device and inside any transformation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax.augment.base import Augment, check, check_channels
from dememo_jax.errors import require
from dememo_jax.types import Array

Snap = Callable[[Array, Array], Array]  # (value, the whole number it becomes) -> that number, with a gradient or without

# ITU-T T.81, tables K.1 (luminance) and K.2 (chrominance)
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
FROM_RGB = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))  # JFIF
TO_RGB = ((1, 0, 1.402), (1, -0.344136286, -0.714136286), (1, 1.772, 0))


def jpeg(quality: int | tuple[int, int], differentiable: bool = False) -> Augment:
    """To baseline JPEG and back to 8 bits, as libjpeg does it: the countermeasure of ISS (Liu et al., ICML 2023).

    quality: 1 to 100, or a pair (low, high) from which every image draws uniformly, ends included. Colour is kept at
    half the resolution (4:2:0, the default of PIL) and enlarged smoothly. Entropy coding loses nothing and is left out.
    differentiable: rounding passes gradients straight through; otherwise the gradient is zero.
    Images [B, H, W, 1 or 3] in [0, 1], else BadInput; grey images have no colour planes.
    """
    low, high = quality if isinstance(quality, tuple) else (quality, quality)
    for end in (low, high):
        check("quality", end, 1, 100)
        require(end == int(end), f"quality must be a whole number, got {end}")
    require(low <= high, f"quality must go from low to high, got {quality}")

    def snap(value, whole):
        return value + jax.lax.stop_gradient(whole - value) if differentiable else whole

    def apply(key, x):
        check_channels(x)
        drawn = jax.random.randint(key, (len(x), 1, 1), low, high + 1)
        pixels = _round(255 * x.astype(jnp.float32), snap)
        restored = _grey(pixels, drawn, snap) if x.shape[-1] == 1 else _colour(pixels, drawn, snap)
        return (jnp.clip(restored, 0, 255) / 255).astype(x.dtype)

    return apply


def quantizer(table: tuple[tuple[int, ...], ...], quality: Array) -> Array:
    """The steps [B, 8, 8] of libjpeg at a whole `quality` [B, 1, 1]; large steps lose much."""
    percent = jnp.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return jnp.clip((jnp.asarray(table) * percent + 50) // 100, 1, 255)


def _grey(pixels: Array, quality: Array, snap: Snap) -> Array:
    return _plane(pixels[..., 0], quantizer(LUMINANCE, quality), snap)[..., None]


def _colour(pixels: Array, quality: Array, snap: Snap) -> Array:
    """RGB [B, H, W, 3] from 0 to 255, there and back."""
    luma, *chroma = (_round(_mix(row, pixels), snap) for row in FROM_RGB)  # chroma around 0, not 128: the same loss
    steps = quantizer(CHROMINANCE, quality)
    luma = _plane(luma, quantizer(LUMINANCE, quality), snap)
    blue, red = (_enlarge(_plane(_halve(plane, snap) + 128, steps, snap) - 128, luma.shape, snap) for plane in chroma)
    decoded = jnp.stack([luma, blue, red], -1)
    return jnp.stack([_round(_mix(row, decoded), snap) for row in TO_RGB], -1)


def _mix(weights: tuple[float, ...], x: Array) -> Array:
    return sum((w * x[..., i] for i, w in enumerate(weights)), start=jnp.zeros(()))


def _plane(plane: Array, steps: Array, snap: Snap) -> Array:
    """One plane [B, h, w] from 0 to 255 through quantised cosines of 8 x 8 blocks, padded by the last row and column."""
    count, height, width = plane.shape
    padded = jnp.pad(plane, ((0, 0), (0, -height % 8), (0, -width % 8)), mode="edge")
    blocks = padded.reshape(count, padded.shape[1] // 8, 8, padded.shape[2] // 8, 8) - 128
    steps = steps[:, None, :, None, :].astype(plane.dtype)
    cosines = jnp.asarray(_cosines(), plane.dtype)
    waves = jnp.einsum("ui,bkilj,vj->bkulv", cosines, blocks, cosines, precision="highest")
    # libjpeg keeps eighths before it divides, so ties are common; they go away from zero
    ratio = _round(8 * waves, snap) / (8 * steps)
    waves = snap(ratio, jnp.sign(ratio) * jnp.floor(jnp.abs(ratio) + 0.5)) * steps
    blocks = jnp.einsum("ui,bkulv,vj->bkilj", cosines, waves, cosines, precision="highest")
    return jnp.clip(_round(blocks + 128, snap), 0, 255).reshape(padded.shape)[:, :height, :width]


def _cosines() -> np.ndarray:
    """The orthonormal cosine transform of 8 values, [frequency, place]."""
    frequency, place = np.arange(8)[:, None], np.arange(8)[None, :]
    return np.cos((2 * place + 1) * frequency * np.pi / 16) * np.where(frequency == 0, np.sqrt(1 / 8), 0.5)


def _halve(plane: Array, snap: Snap) -> Array:
    """Means of 2 x 2 pixels; halves go down and up in turn, so that they do not add up to a shift."""
    height, width = plane.shape[1:]
    # columns are padded to whole blocks before the mean and rows after it, as in libjpeg
    p = jnp.pad(plane, ((0, 0), (0, height % 2), (0, -width % 16)), mode="edge")
    mean = (p[:, ::2, ::2] + p[:, ::2, 1::2] + p[:, 1::2, ::2] + p[:, 1::2, 1::2]) / 4
    return snap(mean, jnp.floor(mean + (1 + jnp.arange(mean.shape[2]) % 2) / 4))


def _enlarge(half: Array, shape: tuple[int, ...], snap: Snap) -> Array:
    """Twice the size, every pixel 3/4 of the nearer and 1/4 of the further neighbour along each axis."""
    height, width = shape[1:]
    smooth = _double(_double(half[:, :, : (width + 1) // 2], 1), 2)[:, :height, :width]
    return snap(smooth, jnp.floor(smooth + 0.5 - (jnp.arange(width) % 2) / 16))  # ties in turn, as in `_halve`


def _double(x: Array, axis: int) -> Array:
    edges = [(1, 1) if i == axis else (0, 0) for i in range(3)]
    wide, count = jnp.pad(x, edges, mode="edge"), x.shape[axis]
    before, after = (jax.lax.slice_in_dim(wide, start, start + count, axis=axis) for start in (0, 2))
    pairs = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
    return pairs.reshape(*x.shape[:axis], 2 * count, *x.shape[axis + 1 :])


def _round(x: Array, snap: Snap) -> Array:
    return snap(x, jnp.floor(x + 0.5))
