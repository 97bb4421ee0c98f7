"""Perturbations without gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Perturbation


def one_pixel(data: Dataset, mask=None, *, classes: int, pixels: int = 1) -> Perturbation:
    """One-pixel shortcut (OPS): Wu et al. 2023, with any number of pixels at distinct positions of a class.

    For each class in turn, the positions p and colours v in {0, 1}^C that maximise
    `mean |x_c(p) - v_c| / std |x_c(p) - v_c|` over the class's masked images and channels (the published code's
    objective; the paper divides by the variance), skipping pairs that an earlier class took. Those pixels are
    overwritten: amplitude 1 is added or taken away and saturates, so the noise is one row a class.

    data.x [N, H, W, C]; mask [N]. Classes without masked examples get a row of zeros.
    Raises BadInput for labels beyond `classes`, or when there are too few (position, colour) pairs for all of them.
    """
    height, width, channels = data.x.shape[1:]
    require(1 <= pixels <= height * width, f"pixels must be between 1 and {height * width}, got {pixels}")
    closed = (classes - 1) * pixels // 2**channels  # positions whose every colour earlier classes may have taken
    enough = height * width - closed >= pixels
    require(enough, f"{height} x {width} images have too few pixels for {classes} classes with {pixels} of their own")
    sets.check_whole(data, classes)
    mask = jnp.ones(len(data.y), bool) if mask is None else jnp.asarray(mask, bool)
    delta = _shortcuts(data.x, data.y, mask, classes=classes, pixels=pixels)
    return Perturbation(delta, data.y, mask)


@partial(jax.jit, static_argnames=("classes", "pixels"))
def _shortcuts(x: Array, y: Array, mask: Array, *, classes: int, pixels: int) -> Array:
    height, width, channels = x.shape[1:]
    flat = x.reshape(len(x), height * width, channels)
    colours = jnp.asarray(np.indices([2] * channels).reshape(channels, -1).T, x.dtype)  # [V, C], {0, 1}^C

    def pick(used, label):
        members = mask & (y == label)
        score = _score(flat, members, colours)

        def next_pixel(carry, _):
            used, free = carry
            open_score = jnp.where(~used & free[:, None], score, -1.0)
            best = jnp.argmax(open_score)
            place, colour = jnp.divmod(best, len(colours))
            return (used.at[place, colour].set(used[place, colour] | members.any()), free.at[place].set(False)), (place, colour)

        (used, _), (places, chosen) = jax.lax.scan(next_pixel, (used, jnp.ones(height * width, bool)), length=pixels)
        row = jnp.zeros_like(flat[0]).at[places].set(2.0 * colours[chosen] - 1.0)
        return used, jnp.where(members.any(), row, 0.0)

    used = jnp.zeros((height * width, len(colours)), bool)
    rows = jax.lax.scan(pick, used, jnp.arange(classes))[1]
    return rows.reshape(classes, height, width, channels)


def _score(flat: Array, members: Array, colours: Array) -> Array:
    """Mean over std of |x_c(p) - v_c| over the members and channels, [positions, V]."""
    weight = members[:, None, None] / jnp.maximum(members.sum(), 1)
    mean = (flat * weight).sum(axis=0)  # [P, C]
    spread = (jnp.square(flat - mean) * weight).sum(axis=0)  # |x - v| is x or 1 - x: one variance for both
    gap = jnp.where(colours[None] > 0.5, 1.0 - mean[:, None], mean[:, None])  # [P, V, C]
    variance = spread.mean(axis=-1)[:, None] + gap.var(axis=-1)
    return gap.mean(axis=-1) / jnp.sqrt(variance + 1e-12)  # a constant pixel is the best place, not a division by zero
