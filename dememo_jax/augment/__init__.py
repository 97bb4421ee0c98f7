"""Batched, keyed augmentations and countermeasures: `(key, x [B, H, W, C]) -> x`, every image with its own draw.

Images are floating, in [0, 1]. Mixing also returns the partners and the weights of the labels. All work under `jit` and
`vmap`, and have gradients in x. Arguments that make no sense raise BadInput when an augmentation is made.
"""

from dememo_jax.augment.base import Augment, Mix, compose
from dememo_jax.augment.colour import bit_depth, channel_shuffle, gaussian, grayscale, jitter
from dememo_jax.augment.compression import jpeg
from dememo_jax.augment.geometry import crop, cutout, flip, resized_crop, rotation, shift
from dememo_jax.augment.mixing import cutmix, mixup
from dememo_jax.augment.plasma import plasma_brightness, plasma_contrast
from dememo_jax.augment.projection import orthogonal
from dememo_jax.augment.recipes import strong, trivial, ueraser

__all__ = [
    "Augment",
    "Mix",
    "bit_depth",
    "channel_shuffle",
    "compose",
    "crop",
    "cutmix",
    "cutout",
    "flip",
    "gaussian",
    "grayscale",
    "jitter",
    "jpeg",
    "mixup",
    "orthogonal",
    "plasma_brightness",
    "plasma_contrast",
    "resized_crop",
    "rotation",
    "shift",
    "strong",
    "trivial",
    "ueraser",
]
