"""Published compositions: TrivialAugment, UEraser, and the contrastive augmentation of AUE."""

import jax
import jax.numpy as jnp

from dememo_jax.augment import colour
from dememo_jax.augment.base import Augment, check, check_channels, compose, uniform
from dememo_jax.augment.compression import jpeg
from dememo_jax.augment.geometry import affine, flip, resized_crop, turn
from dememo_jax.augment.plasma import plasma_brightness, plasma_contrast
from dememo_jax.types import Array, Key

WARPS = 5  # rotation, two shears, two shifts
CHANGES = 7  # brightness, contrast, saturation, sharpness, bits, solarize, stretch


def trivial() -> Augment:
    """One operation for each image, all equally likely, of random strength (TrivialAugment, Müller and Hutter, ICCV 2021).

    The operations, with their strengths uniform in the paper's standard range: identity; rotation +-30 degrees; shear
    +-0.3 down or across; shift +-0.3 of the side down or across; brightness, contrast, saturation and sharpness by a
    factor in [0.1, 1.9]; 4 to 8 bits; solarize from a threshold in [0, 1]; every channel stretched onto [0, 1]. Outside
    is black, reading is bilinear. Equalization is left out. Takes 1 or 3 channels.
    """

    def apply(key, x):
        check_channels(x)
        to_choose, to_warp, to_change = jax.random.split(key, 3)
        choice = jax.random.randint(to_choose, (len(x),), 0, 1 + WARPS + CHANGES)
        warped = _warped(to_warp, x, choice)
        place = choice[:, None, None, None]
        for i, changed in enumerate(_changed(to_change, x)):
            warped = jnp.where(place == 1 + WARPS + i, changed, warped)
        return jnp.where(place == 0, x, warped)

    return apply


def _warped(key: Key, x: Array, choice: Array) -> Array:
    """Each image by warp 1 to 5 of its choice: all are affine, so one reading serves them."""
    strength = jax.random.uniform(key, (len(x),), x.dtype, -1, 1)
    amount = [jnp.where(choice == 1 + i, strength, 0) for i in range(WARPS)]
    matrix, offset = turn(amount[0] * jnp.deg2rad(30.0).astype(x.dtype))
    matrix = matrix.at[:, 0, 1].add(0.3 * amount[1]).at[:, 1, 0].add(0.3 * amount[2])
    offset = offset.at[:, 0].add(0.3 * x.shape[1] * amount[3]).at[:, 1].add(0.3 * x.shape[2] * amount[4])
    return affine(x, matrix, offset)


def _changed(key: Key, x: Array) -> list[Array]:
    """All images by each of the changes of colour, every image with one strength for all."""
    strength = uniform(key, x, 0, 1)
    factor = 0.1 + 1.8 * strength
    by_factor = [change(x, factor) for change in (colour.brighten, colour.spread, colour.saturate, colour.sharpen)]
    bits = 4 + jnp.minimum(jnp.floor(5 * strength), 4)
    return [*by_factor, colour.posterize(x, bits), colour.solarize(x, strength), colour.stretch(x)]


def ueraser(compressed: bool = False) -> Augment:
    """The error-maximising augmentation, one draw of it (UEraser; Qin et al., 2023, arXiv 2303.15127).

    Plasma brightness, plasma contrast, channels shuffled with probability 0.5, then `trivial`. compressed: first JPEG of
    a quality uniform in 10 to 100, with straight-through gradients, and plasma with probability 0.8, as the published
    code does against TAP and AR. Taking the worst of several draws is left to the training.
    """
    probability = 0.8 if compressed else 1.0
    plasma = (plasma_brightness(probability=probability), plasma_contrast(probability=probability))
    parts = (*plasma, colour.channel_shuffle(0.5), trivial())
    return compose(jpeg((10, 100), differentiable=True), *parts) if compressed else compose(*parts)


def strong(strength: float) -> Augment:
    """The contrastive augmentation of AUE and AAP (Wang et al., NeurIPS 2024), `strength` s in [0, 1].

    Resized crop of area share [max(1 - 0.9 s, 0.05), 1], flip, jitter (0.4 s, 0.4 s, 0.4 s, 0.1 s) with probability
    min(0.99, 0.8 s), grey with probability 0.2 s. AUE takes 0.6 on CIFAR-10 and 1.0 on CIFAR-100.
    """
    check("strength", strength, 0, 1)
    tint = 0.4 * strength
    return compose(
        resized_crop((max(1 - 0.9 * strength, 0.05), 1.0)),
        flip(),
        colour.jitter(tint, tint, tint, 0.1 * strength, probability=min(0.99, 0.8 * strength)),
        colour.grayscale(0.2 * strength),
    )
