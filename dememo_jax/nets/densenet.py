"""DenseNet-121 (Huang et al. 2017)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dememo_jax.nets.parts import check_stem, he, head, max_pool, norm
from dememo_jax.types import Array


class DenseLayer(nn.Module):
    """Adds `growth` channels to those that it is given."""

    growth: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv, bn = he(self.dtype), norm(train, self.dtype)
        y = conv(4 * self.growth, (1, 1))(nn.relu(bn()(x)))
        y = conv(self.growth, (3, 3), padding=1)(nn.relu(bn()(y)))
        return jnp.concatenate([x, y], axis=-1)


class DenseNet(nn.Module):
    """stem "small", for 32 x 32 images: one 3 x 3 convolution; "large": 7 x 7 of stride 2, batch norm and max-pool."""

    classes: int
    depths: Sequence[int]
    growth: int = 32
    stem: str = "small"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        check_stem(self.stem)
        conv, bn = he(self.dtype), norm(train, self.dtype)
        if self.stem == "small":
            x = conv(2 * self.growth, (3, 3), padding=1)(x)
        else:
            x = max_pool(nn.relu(bn()(conv(2 * self.growth, (7, 7), 2, padding=3)(x))))
        for stage, depth in enumerate(self.depths):
            for _ in range(depth):
                x = DenseLayer(self.growth, self.dtype)(x, train)
            if stage < len(self.depths) - 1:  # half of the channels, half of the side
                x = nn.avg_pool(conv(x.shape[-1] // 2, (1, 1))(nn.relu(bn()(x))), (2, 2), (2, 2))
        return head(nn.relu(bn()(x)), self.classes)


def densenet121(classes: int, growth: int = 32, *, stem: str = "small", dtype: Any = None) -> nn.Module:
    """6,956,298 parameters at ten classes of 32 x 32 images, 7,978,856 at a thousand with the large stem."""
    return DenseNet(classes, (6, 12, 24, 16), growth, stem, dtype)
