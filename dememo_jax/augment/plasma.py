"""Brightness and contrast that vary over the image like a cloud: the heart of UEraser (Qin et al., 2023).

The idea is that of kornia's plasma augmentations; the cloud is our own construction. Uniform noise on grids of 1, 2, 4,
... cells a side, up to the size of the image, is enlarged bilinearly, multiplied by roughness^octave and summed: like
the diamond-square fractal, but all octaves at once as small matrix products. Every channel has a cloud of its own,
stretched onto [0, 1].
"""

import jax
import jax.numpy as jnp

from dememo_jax.augment.base import Augment, Range, check, check_range, sometimes, uniform
from dememo_jax.augment.colour import stretch
from dememo_jax.augment.geometry import hat
from dememo_jax.types import Array, Key


def plasma_brightness(roughness: Range = (0.3, 0.7), intensity: Range = (0.5, 1.0), probability: float = 1.0) -> Augment:
    """Add intensity * (2 cloud - 1) and clip to [0, 1]; roughness and intensity are uniform in their ranges."""
    check_range("roughness", roughness, 0, 1)
    check_range("intensity", intensity, 0)
    check("probability", probability, 0, 1)

    def apply(key, x):
        to_cloud, to_scale, to_choose = jax.random.split(key, 3)
        change = uniform(to_scale, x, *intensity) * (2 * cloud(to_cloud, x, roughness) - 1)
        return sometimes(to_choose, probability, jnp.clip(x + change, 0, 1), x)

    return apply


def plasma_contrast(roughness: Range = (0.3, 0.7), probability: float = 1.0) -> Augment:
    """Multiply the distance from mid-grey, x - 0.5, by 4 cloud and clip to [0, 1]; roughness is uniform in its range."""
    check_range("roughness", roughness, 0, 1)
    check("probability", probability, 0, 1)

    def apply(key, x):
        to_cloud, to_choose = jax.random.split(key)
        changed = jnp.clip(0.5 + (x - 0.5) * 4 * cloud(to_cloud, x, roughness), 0, 1)
        return sometimes(to_choose, probability, changed, x)

    return apply


def cloud(key: Key, x: Array, roughness: Range) -> Array:
    """A random field in the shape of x, every channel of every image from 0 to 1; higher roughness, finer grain."""
    count, height, width, channels = x.shape
    to_fade, to_noise = jax.random.split(key)
    fade = uniform(to_fade, x, *roughness)
    grids = [2**octave for octave in range((max(height, width) - 1).bit_length() + 1)]  # cells a side
    sizes = [(cells + 1) ** 2 for cells in grids]
    noise = jax.random.uniform(to_noise, (count, sum(sizes), channels), x.dtype)  # one draw compiles faster than many
    field = jnp.zeros(x.shape, x.dtype)
    for octave, cells in enumerate(grids):
        start = sum(sizes[:octave])
        grid = noise[:, start : start + sizes[octave]].reshape(count, cells + 1, cells + 1, channels)
        down, across = (hat(jnp.linspace(0, cells, n), cells + 1).astype(x.dtype) for n in (height, width))
        field += fade**octave * jnp.einsum("hi,bijc,wj->bhwc", down, grid, across)
    return stretch(field)
