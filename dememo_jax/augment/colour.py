"""What pixels hold: colour jitter, grey, fewer bits, noise, shuffled channels. Images [B, H, W, C] in [0, 1]."""

import jax
import jax.numpy as jnp

from dememo_jax.augment.base import Augment, check, check_channels, sometimes, uniform
from dememo_jax.errors import require
from dememo_jax.types import Array


def jitter(
    brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0, probability: float = 1.0
) -> Augment:
    """Brightness, contrast, saturation and hue, always in this order, clipped to [0, 1] after each.

    The first three strengths s draw a factor uniform in [max(0, 1 - s), 1 + s]; hue turns the colour circle by a share
    uniform in +-hue of a full turn (at most 0.5). The ranges are torchvision's, whose order is random. Grey images know
    neither saturation nor hue. Takes 1 or 3 channels, else BadInput.
    """
    for name, strength in {"brightness": brightness, "contrast": contrast, "saturation": saturation}.items():
        check(name, strength, 0)
    check("hue", hue, 0, 0.5)
    check("probability", probability, 0, 1)

    def apply(key, x):
        check_channels(x)
        keys = jax.random.split(key, 5)
        changed = x
        for k, strength, change in zip(keys, (brightness, contrast, saturation), (brighten, spread, saturate)):
            if strength:
                changed = change(changed, uniform(k, x, max(0.0, 1 - strength), 1 + strength))
        if hue:
            changed = turn_hue(changed, uniform(keys[3], x, -hue, hue))
        return sometimes(keys[4], probability, changed, x)

    return apply


def grayscale(probability: float = 1.0) -> Augment:
    """The luma 0.299 R + 0.587 G + 0.114 B on all three channels; grey images stay. Takes 1 or 3 channels."""
    check("probability", probability, 0, 1)
    return lambda key, x: sometimes(key, probability, jnp.broadcast_to(luma(x), x.shape), x)


def bit_depth(bits: int) -> Augment:
    """Keep the highest `bits` (1 to 8) bits of the 8-bit value, as PIL's posterize; the gradient is zero."""
    check("bits", bits, 1, 8)
    require(bits == int(bits), f"bits must be a whole number, got {bits}")
    return lambda key, x: posterize(x, bits)


def gaussian(sigma: float) -> Augment:
    """Add N(0, sigma^2) to every value and clip to [0, 1]."""
    check("sigma", sigma, 0)
    return lambda key, x: jnp.clip(x + sigma * jax.random.normal(key, x.shape, x.dtype), 0, 1)


def channel_shuffle(probability: float = 0.5) -> Augment:
    """Put the channels in a uniform order (which may be the old one)."""
    check("probability", probability, 0, 1)

    def apply(key, x):
        to_order, to_choose = jax.random.split(key)
        order = jnp.argsort(jax.random.uniform(to_order, (len(x), 1, 1, x.shape[-1])))
        shuffled = x
        for c in range(x.shape[-1]):
            shuffled = jnp.where(order == c, x[..., c, None], shuffled)
        return sometimes(to_choose, probability, shuffled, x)

    return apply


# --- the operations with given strengths, one for each image: [B, 1, 1, 1] ---------------------------------------


def luma(x: Array) -> Array:
    """Grey values [B, H, W, 1] of grey or RGB images."""
    check_channels(x)
    return x if x.shape[-1] == 1 else 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]


def brighten(x: Array, factor: Array) -> Array:
    """Away from black by `factor`."""
    return jnp.clip(factor * x, 0, 1)


def spread(x: Array, factor: Array) -> Array:
    """Away from the mean luma of the image by `factor`."""
    return _away(x, luma(x).mean((1, 2, 3), keepdims=True), factor)


def saturate(x: Array, factor: Array) -> Array:
    """Away from each pixel's luma by `factor`; nothing for grey images."""
    return x if x.shape[-1] == 1 else _away(x, luma(x), factor)


def turn_hue(x: Array, share: Array) -> Array:
    """Turn the hue of HSV by `share` of a full turn; nothing for grey images."""
    check_channels(x)
    if x.shape[-1] == 1:
        return x
    # Never equality with a maximum: where XLA computes x twice, roundings differ and no channel need be equal to it. The
    # gradient of `max` divides by how many are.
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    high, low = _larger(red, _larger(green, blue)), -_larger(-red, _larger(-green, -blue))
    chroma = high - low
    safe = jnp.where(chroma == 0, 1, chroma)  # a grey pixel has no hue, and its gradient must not be NaN
    sixths = jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sixths = jnp.where((red >= green) & (red >= blue), (green - blue) / safe, sixths) + 6 * share[..., 0]
    around = [(offset + sixths) % 6 for offset in (5, 3, 1)]  # red, green and blue lie a third of a turn apart
    return jnp.stack([high - chroma * jnp.clip(jnp.minimum(a, 4 - a), 0, 1) for a in around], -1)


def posterize(x: Array, bits: int | Array) -> Array:
    """The highest `bits` bits of the nearest 8-bit value."""
    step = 2.0 ** (8 - bits)
    return (jnp.floor(jnp.floor(x * 255 + 0.5) / step) * step / 255).astype(x.dtype)


def sharpen(x: Array, factor: Array) -> Array:
    """Away from the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, as PIL does; the border stays."""
    x = jnp.asarray(x)
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = x[:, 1:-1, 1:-1]
    return jnp.clip(x.at[:, 1:-1, 1:-1].set(_away(inner, (box + 4 * inner) / 13, factor)), 0, 1)


def solarize(x: Array, threshold: Array) -> Array:
    """Invert the values at or above `threshold`."""
    return jnp.where(x >= threshold, 1 - x, x)


def stretch(x: Array) -> Array:
    """Every channel of every image from its own lowest to highest value onto [0, 1]; constant ones stay."""
    pixels = x.reshape(len(x), -1, x.shape[-1])
    places = jnp.argmin(pixels, 1, keepdims=True), jnp.argmax(pixels, 1, keepdims=True)  # for the reason of `turn_hue`
    low, high = (jnp.take_along_axis(pixels, at, 1)[:, None] for at in places)
    flat = high == low
    return jnp.where(flat, x, (x - low) / jnp.where(flat, 1, high - low))


def _larger(one: Array, other: Array) -> Array:
    return jnp.where(one >= other, one, other)


def _away(x: Array, middle: Array, factor: Array) -> Array:
    return jnp.clip(middle + factor * (x - middle), 0, 1)
