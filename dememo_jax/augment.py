"""Batched, keyed augmentations: `(key, x [B, H, W, C]) -> x`, every image with its own draw."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dememo_jax.types import Array, Key

Augment = Callable[[Key, Array], Array]


def crop(pad: int = 4) -> Augment:
    """Zero-pad by `pad` pixels and cut a window of the old size at a uniform place."""

    def each(key, image):
        wide = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(wide, (top, left, 0), image.shape)

    return _per_image(each)


def flip(probability: float = 0.5) -> Augment:
    """Mirror left and right."""
    return _per_image(lambda key, image: jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image))


def cutout(side: int) -> Augment:
    """Zero a `side` x `side` square whose centre is uniform over the image (it may hang over the edge)."""

    def each(key, image):
        height, width = image.shape[:2]
        row, column = (jax.random.randint(k, (), 0, n) for k, n in zip(jax.random.split(key), (height, width)))
        rows, columns = jnp.arange(height) - row + side // 2, jnp.arange(width) - column + side // 2
        hole = ((rows >= 0) & (rows < side))[:, None] & ((columns >= 0) & (columns < side))[None, :]
        return jnp.where(hole[..., None], 0.0, image)

    return _per_image(each)


def compose(*parts: Augment) -> Augment:
    """The parts in order, each with a key of its own."""

    def apply(key, x):
        for i, part in enumerate(parts):
            x = part(jax.random.fold_in(key, i), x)
        return x

    return apply


def _per_image(each: Callable[[Key, Array], Array]) -> Augment:
    return lambda key, x: jax.vmap(each)(jax.random.split(key, len(x)), x)
