"""Two images in one: each is mixed with that of a partner, and so should be the labels.

The loss of a mixed example is `weight * loss(y) + (1 - weight) * loss(y[partner])`.
"""

import jax
import jax.numpy as jnp

from dememo_jax.augment.base import Mix, check
from dememo_jax.errors import require
from dememo_jax.types import Array, Key


def mixup(alpha: float = 1.0, probability: float = 1.0) -> Mix:
    """weight * x + (1 - weight) * x[partner], weight from Beta(alpha, alpha) (Zhang et al., ICLR 2018).

    Every image has a weight of its own (the paper draws one a batch). With 1 - probability an image stays, weight 1.
    """
    _check(alpha, probability)

    def apply(key, x):
        partner, share = _draw(key, x, alpha, probability)
        weight = share.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        return weight * x + (1 - weight) * x[partner], partner, share

    return apply


def cutmix(alpha: float = 1.0, probability: float = 1.0) -> Mix:
    """Paste a box of the partner's pixels (Yun et al., ICCV 2019).

    The box has the image's proportions, the area share 1 - lambda, lambda from Beta(alpha, alpha), and a uniform centre;
    it is cut off at the border, and the weight is the share of pixels that are left. Every image has a box of its own.
    With 1 - probability an image stays, weight 1.
    """
    _check(alpha, probability)

    def apply(key, x):
        to_draw, to_place = jax.random.split(key)
        partner, share = _draw(to_draw, x, alpha, probability)
        side = jnp.sqrt(1 - share)[:, None]
        keys = jax.random.split(to_place)
        rows, columns = (_interval(k, side, count) for k, count in zip(keys, x.shape[1:3]))
        box = rows[:, :, None] & columns[:, None, :]
        return jnp.where(box[..., None], x[partner], x), partner, 1 - box.mean((1, 2), dtype=jnp.float32)

    return apply


def _check(alpha: float, probability: float) -> None:
    check("probability", probability, 0, 1)
    require(isinstance(alpha, jax.core.Tracer) or 0 < alpha < float("inf"), f"alpha must be positive, got {alpha}")


def _draw(key: Key, x: Array, alpha: float, probability: float) -> tuple[Array, Array]:
    """A partner [B] and lambda [B] for every image; lambda is 1 where it stays."""
    to_pair, to_weigh, to_choose = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(to_choose, probability, (len(x),))
    share = jax.random.beta(to_weigh, alpha, alpha, (len(x),), jnp.float32)
    return jax.random.permutation(to_pair, jnp.arange(len(x), dtype=jnp.int32)), jnp.where(chosen, share, 1.0)


def _interval(key: Key, share: Array, count: int) -> Array:
    """Which of `count` pixels [B, count] a run of floor(share * count) with a uniform centre covers; share [B, 1]."""
    length = jnp.floor(share * count).astype(jnp.int32)
    start = jax.random.randint(key, share.shape, 0, count) - length // 2
    pixels = jnp.arange(count)
    return (pixels >= start) & (pixels < start + length)
