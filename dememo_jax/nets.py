"""Reference networks as Linen modules; `models.from_linen` makes a Model of each."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from dememo_jax import convolution
from dememo_jax.types import Array

Conv = partial(nn.Conv, use_bias=False, conv_general_dilated=convolution.conv)


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


class BasicBlock(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        conv = partial(Conv, kernel_init=nn.initializers.he_normal())
        y = nn.relu(norm()(conv(self.width, (3, 3), self.stride, padding=1)(x)))
        y = norm()(conv(self.width, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = norm()(conv(self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """He et al. 2016 for 32 x 32 images: a 3 x 3 stem of stride 1 and no max-pool."""

    classes: int
    depths: Sequence[int]
    width: int = 64

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = Conv(self.width, (3, 3), padding=1, kernel_init=nn.initializers.he_normal())(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x))
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                x = BasicBlock(self.width * 2**stage, 2 if stage > 0 and block == 0 else 1)(x, train)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


def mlp(classes: int, hidden: Sequence[int] = (128,)) -> nn.Module:
    """Dense layers with ReLU on the flattened input."""
    return MLP(classes, tuple(hidden))


def cnn(classes: int, widths: Sequence[int] = (16, 32)) -> nn.Module:
    """3 x 3 convolutions with batch norm, stride 2 after the first, global average, linear head."""
    return CNN(classes, tuple(widths))


def resnet18(classes: int, width: int = 64) -> nn.Module:
    """The CIFAR ResNet-18: 11,173,962 parameters at ten classes and three channels."""
    return ResNet(classes, (2, 2, 2, 2), width)
