"""Small networks."""

from collections.abc import Sequence

import flax.linen as nn

from dememo_jax.nets.parts import Conv
from dememo_jax.types import Array


class MLP(nn.Module):
    classes: int
    hidden: Sequence[int] = (128,)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    classes: int
    widths: Sequence[int] = (16, 32)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i, width in enumerate(self.widths):
            x = Conv(width, (3, 3), strides=1 if i == 0 else 2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


def mlp(classes: int, hidden: Sequence[int] = (128,)) -> nn.Module:
    """Dense layers with ReLU on the flattened input."""
    return MLP(classes, tuple(hidden))


def cnn(classes: int, widths: Sequence[int] = (16, 32)) -> nn.Module:
    """3 x 3 convolutions with batch norm, stride 2 after the first, global average, linear head."""
    return CNN(classes, tuple(widths))
