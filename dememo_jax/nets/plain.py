"""Small networks."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dememo_jax.nets.parts import Conv, pixel_mean
from dememo_jax.types import Array


class MLP(nn.Module):
    classes: int
    hidden: Sequence[int] = (128,)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return _head(x, self.classes, self.dtype)


class CNN(nn.Module):
    classes: int
    widths: Sequence[int] = (16, 32)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i, width in enumerate(self.widths):
            x = Conv(width, (3, 3), strides=1 if i == 0 else 2, dtype=self.dtype)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x))
        return _head(pixel_mean(x), self.classes, self.dtype)


def _head(x: Array, classes: int, dtype: Any) -> Array:
    # In float32 where a type was set; else in that of parameters and images, which certificates may choose.
    return nn.Dense(classes)(x if dtype is None else x.astype(jnp.float32))


def mlp(classes: int, hidden: Sequence[int] = (128,), *, dtype: Any = None) -> nn.Module:
    """Dense layers with ReLU on the flattened input."""
    return MLP(classes, tuple(hidden), dtype)


def cnn(classes: int, widths: Sequence[int] = (16, 32), *, dtype: Any = None) -> nn.Module:
    """3 x 3 convolutions with batch norm, stride 2 after the first, global average, linear head."""
    return CNN(classes, tuple(widths), dtype)
