"""Perturbations without gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Perturbation

OBJECTIVES = ("code", "paper", "art")


def one_pixel(
    data: Dataset, mask=None, *, classes: int | None = None, pixels: int = 1, objective: str = "code", distinct: bool = True
) -> Perturbation:
    """One-pixel shortcut (OPS): Wu et al. 2023, with any number of pixels of a class.

    For each class in turn, the positions p and colours v in {0, 1}^C with the best score over the class's masked
    images, skipping pairs that an earlier class took. Of d_c = |x_c(p) - v_c|, three scores are in use:
    "code" mean d / std d over images and channels (the published code), "paper" mean / variance over images of the
    sum of d over channels (Eq. 2), "art" mean minus variance over images of the mean of d over channels (the
    Adversarial Robustness Toolbox). Those pixels are overwritten: amplitude 1 is added or taken away and
    saturates, so the noise is one row a class.

    distinct=True gives a class `pixels` positions. distinct=False is the published behaviour: its best pairs may share a
    position, where the later, worse colour is written over the better, so that fewer pixels change than were asked for.

    data.x [N, H, W, C] in [0, 1]; mask [N] -> delta [K, H, W, C]. Classes without masked examples get a row of zeros.
    Raises BadInput for labels beyond `classes`, an unknown objective, a mask that `data.check_mask` refuses, or when
    there are too few (position, colour) pairs for all classes.
    """
    classes = sets.count_classes(data, classes)
    require(objective in OBJECTIVES, f"objective must be one of {OBJECTIVES}, got {objective!r}")
    height, width, channels = data.x.shape[1:]
    require(1 <= pixels <= height * width, f"pixels must be between 1 and {height * width}, got {pixels}")
    closed = (classes - 1) * pixels // 2**channels  # positions whose every colour earlier classes may have taken
    enough = height * width - closed >= pixels if distinct else classes * pixels <= height * width * 2**channels
    require(enough, f"{height} x {width} images have too few pixels for {classes} classes with {pixels} of their own")
    sets.check_whole(data, classes)
    mask = sets.check_mask(mask, len(data.y))
    delta = _shortcuts(data.x, data.y, mask, classes=classes, pixels=pixels, objective=objective, distinct=distinct)
    return Perturbation(delta, data.y, mask)


@partial(jax.jit, static_argnames=("classes", "pixels", "objective", "distinct"))
def _shortcuts(x: Array, y: Array, mask: Array, *, classes: int, pixels: int, objective: str, distinct: bool) -> Array:
    height, width, channels = x.shape[1:]
    flat = x.reshape(len(x), height * width, channels)
    colours = jnp.asarray(np.indices([2] * channels).reshape(channels, -1).T, x.dtype)  # [V, C], {0, 1}^C

    means, covariances, present = _moments(flat, y, mask, classes)

    def pick(taken, of_class):
        mean, covariance, present = of_class
        score = _score(mean, covariance, colours, objective)

        def next_pixel(carry, _):
            taken, closed, row = carry
            place, colour = jnp.divmod(jnp.argmax(jnp.where(taken | closed, -jnp.inf, score)), len(colours))
            closed = closed.at[place].set(distinct)
            row = row.at[place].set(2.0 * colours[colour] - 1.0)
            return (taken.at[place, colour].set(True), closed, row), None

        start = taken, jnp.zeros((height * width, 1), bool), jnp.zeros_like(flat[0])
        (later, _, row), _ = jax.lax.scan(next_pixel, start, length=pixels)
        return jnp.where(present, later, taken), jnp.where(present, row, 0.0)

    taken = jnp.zeros((height * width, len(colours)), bool)
    rows = jax.lax.scan(pick, taken, (means, covariances, present))[1]
    return rows.reshape(classes, height, width, channels)


def _moments(flat: Array, y: Array, mask: Array, classes: int) -> tuple[Array, Array, Array]:
    """Of every class's masked images: mean [K, P, C], covariance of the channels [K, P, C, C], and whether it has any."""
    members = (y == jnp.arange(classes)[:, None]) & mask  # [K, N]
    weight = members / jnp.maximum(members.sum(axis=1, keepdims=True), 1)

    def average(values):
        return jnp.einsum("kn,npc->kpc", weight, values, precision="highest")

    means = average(flat)
    apart = flat - means[y]
    products = [average(apart * apart[..., c, None]) for c in range(flat.shape[-1])]
    return means, jnp.stack(products, axis=-1), members.any(axis=1)


def _score(mean: Array, covariance: Array, colours: Array, objective: str) -> Array:
    """The score of every position and colour, [P, V], from [P, C], [P, C, C]; a constant pixel is best, not 0 / 0."""
    gap = jnp.where(colours[None] > 0.5, 1.0 - mean[:, None], mean[:, None])  # mean |x - v|, [P, V, C]
    if objective == "code":
        within = jnp.trace(covariance, axis1=1, axis2=2) / mean.shape[-1]  # |x - v| is x or 1 - x: one variance for both
        return gap.mean(axis=-1) / jnp.sqrt(within[:, None] + gap.var(axis=-1) + 1e-12)
    signs = 1.0 - 2.0 * colours  # |x - v| is v + sign * x
    variance = jnp.einsum("vc,pcd,vd->pv", signs, covariance, signs, precision="highest")  # of the sum over channels
    variance = jnp.maximum(variance, 0.0)  # channels that cancel leave rounding errors of either sign
    if objective == "paper":
        return gap.sum(axis=-1) / (variance + 1e-12)
    return gap.mean(axis=-1) - variance / mean.shape[-1] ** 2
