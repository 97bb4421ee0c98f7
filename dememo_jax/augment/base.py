"""The two kinds of augmentation, how they compose, and the checks and draws that all of them share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dememo_jax.errors import require
from dememo_jax.types import Array, Key

Augment = Callable[[Key, Array], Array]
# (key, x) -> (mixed x, partner [B] int32, a permutation, weight [B] float32 of an example's own label)
Mix = Callable[[Key, Array], tuple[Array, Array, Array]]
Range = tuple[float, float]


def compose(*parts: Augment) -> Augment:
    """The parts in order, each with a key of its own."""

    def apply(key, x):
        for i, part in enumerate(parts):
            x = part(jax.random.fold_in(key, i), x)
        return x

    return apply


def check(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """BadInput unless `low <= value <= high`; a traced value is not known and passes."""
    text = f"between {low:g} and {high:g}" if high < float("inf") else f"at least {low:g}"
    require(isinstance(value, jax.core.Tracer) or low <= value <= high, f"{name} must be {text}, got {value}")


def check_range(name: str, values: Range, low: float, high: float = float("inf")) -> None:
    """BadInput unless `values` is a pair (from, to) inside [low, high] with from <= to."""
    require(len(values) == 2, f"{name} must be a pair (from, to), got {values}")
    for value in values:
        check(name, value, low, high)
    require(values[0] <= values[1], f"{name} must go from low to high, got {values}")


def check_channels(x: Array) -> None:
    """BadInput unless images [B, H, W, C] are grey (C = 1) or RGB (C = 3)."""
    require(x.ndim == 4 and x.shape[-1] in (1, 3), f"expected grey or RGB images [B, H, W, 1 or 3], got {x.shape}")


def uniform(key: Key, x: Array, low: float | Array, high: float | Array) -> Array:
    """One uniform number for every image, [B, 1, 1, 1], in the dtype of x."""
    return jax.random.uniform(key, (len(x), 1, 1, 1), x.dtype, low, high)


def sometimes(key: Key, probability: float | Array, changed: Array, x: Array) -> Array:
    """For every image `changed` with the given probability, else `x` to the bit."""
    return jnp.where(jax.random.bernoulli(key, probability, (len(x), 1, 1, 1)), changed, x)
