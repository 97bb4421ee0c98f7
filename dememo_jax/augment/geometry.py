"""Where pixels stand: crop, flip, cutout, shift, rotation, resized crop.

Positions count pixels from the centre of the first one. Bilinear reading is linear in the image, so gradients flow.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dememo_jax.augment.base import Augment, Range, check, check_range
from dememo_jax.errors import require
from dememo_jax.types import Array, Key


def crop(pad: int = 4) -> Augment:
    """Zero-pad by `pad` pixels and cut a window of the old size at a uniform place."""
    check("pad", pad, 0)

    def each(key, image):
        wide = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(wide, (top, left, 0), image.shape)

    return _per_image(each)


def flip(probability: float = 0.5) -> Augment:
    """Mirror left and right."""
    check("probability", probability, 0, 1)
    return _per_image(lambda key, image: jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image))


def cutout(side: int) -> Augment:
    """Zero a `side` x `side` square whose centre is uniform over the image (it may hang over the edge)."""
    check("side", side, 0)

    def each(key, image):
        height, width = image.shape[:2]
        row, column = (jax.random.randint(k, (), 0, n) for k, n in zip(jax.random.split(key), (height, width)))
        rows, columns = jnp.arange(height) - row + side // 2, jnp.arange(width) - column + side // 2
        hole = ((rows >= 0) & (rows < side))[:, None] & ((columns >= 0) & (columns < side))[None, :]
        return jnp.where(hole[..., None], 0.0, image)

    return _per_image(each)


def shift(pixels: float) -> Augment:
    """Translate by a real number of pixels, uniform in +-`pixels` along each axis; bilinear, zeros outside.

    With `flip` it is the differentiable augmentation of targeted adversarial poisoning (Fowl et al., NeurIPS 2021).
    """
    check("pixels", pixels, 0)

    def apply(key, x):
        move = jax.random.uniform(key, (2, len(x), 1), x.dtype, -pixels, pixels)
        return _read(x, jnp.arange(x.shape[1]) + move[0], jnp.arange(x.shape[2]) + move[1])

    return apply


def resized_crop(scale: Range = (0.08, 1.0), ratio: Range = (3 / 4, 4 / 3)) -> Augment:
    """Cut a window inside the image, bilinearly enlarged to the old size (Szegedy et al., CVPR 2015).

    scale: share of the image's area, uniform. ratio: width over height in pixels, uniform in its logarithm; where such
    a window would not fit, the nearest ratio that does, so the area is always the one drawn. The place is uniform and
    real, not a whole number of pixels.
    """
    check_range("scale", scale, 0, 1)
    check_range("ratio", ratio, 0)
    require(scale[0] > 0 and ratio[0] > 0, f"scale and ratio must be positive, got {scale} and {ratio}")

    def apply(key, x):
        height, width = x.shape[1:3]
        draws = jax.random.uniform(key, (4, len(x), 1), x.dtype)
        share = scale[0] + (scale[1] - scale[0]) * draws[0]
        shape = ratio[0] * (ratio[1] / ratio[0]) ** draws[1]
        shape = jnp.clip(shape, share * (width / height), width / height / share)
        rows, columns = jnp.sqrt(share * height * width / shape), jnp.sqrt(share * height * width * shape)
        return _read(x, _window(height, rows, draws[2]), _window(width, columns, draws[3]))

    return apply


def rotation(degrees: float) -> Augment:
    """Turn about the centre by an angle uniform in +-`degrees`; bilinear, zeros outside."""
    check("degrees", degrees, 0)

    def apply(key, x):
        angle = jnp.deg2rad(jax.random.uniform(key, (len(x),), x.dtype, -degrees, degrees))
        return affine(x, *turn(angle))

    return apply


def turn(angle: Array) -> tuple[Array, Array]:
    """The matrix [B, 2, 2] and offset [B, 2] with which `affine` turns images counter-clockwise by `angle` [B] radians."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)
    return matrix, jnp.zeros((*angle.shape, 2), angle.dtype)


def affine(x: Array, matrix: Array, offset: Array) -> Array:
    """Images whose pixel p = (row, column), from the centre, is read bilinearly at `matrix` p + `offset`; zeros outside.

    x [B, H, W, C], matrix [B, 2, 2], offset [B, 2] in pixels -> [B, H, W, C].
    """
    count, height, width, channels = x.shape
    down, right = jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2
    grid = jnp.stack(jnp.meshgrid(down, right, indexing="ij")).astype(x.dtype)
    grid = sum(matrix[:, :, i, None, None] * grid[i] for i in range(2)) + offset[..., None, None]

    # beyond the border of zeros every place reads the same; the border is one pixel, and one more for the far neighbour
    rows = jnp.clip(grid[:, 0] + (height - 1) / 2, -1, height)
    columns = jnp.clip(grid[:, 1] + (width - 1) / 2, -1, width)
    top, left = jnp.floor(rows), jnp.floor(columns)
    wide = jnp.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))

    # the four neighbours side by side as channels: one look-up instead of four
    corners = [wide[:, i : i + height + 2, j : j + width + 2] for i in range(2) for j in range(2)]
    table = jnp.concatenate(corners, -1).reshape(count, -1, 4 * channels)
    place = ((top + 1) * (width + 2) + left + 1).astype(jnp.int32).reshape(count, -1, 1)
    found = jnp.take_along_axis(table, place, axis=1).reshape(count, height, width, 4, channels)
    lower, further = rows - top, columns - left
    weights = jnp.stack([(1 - lower) * (1 - further), (1 - lower) * further, lower * (1 - further), lower * further], -1)
    return jnp.sum(found * weights[..., None], axis=3)


def hat(places: Array, count: int) -> Array:
    """Weights [..., n, count] with which bilinear reading at `places` [..., n] takes `count` pixels; none outside."""
    return jnp.maximum(0, 1 - jnp.abs(places[..., None] - jnp.arange(count)))


def _read(x: Array, rows: Array, columns: Array) -> Array:
    """x [B, H, W, C] at rows [B, H] and columns [B, W]: two small matrix products, fast forward and in the gradient."""
    down, across = hat(rows, x.shape[1]).astype(x.dtype), hat(columns, x.shape[2]).astype(x.dtype)
    return jnp.einsum("bhi,bijc,bwj->bhwc", down, x, across, precision="highest")


def _window(count: int, size: Array, place: Array) -> Array:
    """Where `count` pixels [B, count] read a window of `size` pixels [B, 1]; `place` in [0, 1] is between the borders."""
    start = place * (count - size)
    return jnp.clip(start + (jnp.arange(count) + 0.5) * size / count - 0.5, 0, count - 1)


def _per_image(each: Callable[[Key, Array], Array]) -> Augment:
    return lambda key, x: jax.vmap(each)(jax.random.split(key, len(x)), x)
