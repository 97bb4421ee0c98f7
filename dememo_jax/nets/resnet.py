"""Residual networks: ResNet-18 and -50 (He et al. 2016), SENet-18 (Hu et al. 2018)."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from dememo_jax.nets.parts import check_stem, he, head, max_pool, norm, pixel_mean
from dememo_jax.types import Array


class BasicBlock(nn.Module):
    width: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv, bn = he(self.dtype), norm(train, self.dtype)
        y = nn.relu(bn()(conv(self.width, (3, 3), self.stride, padding=1)(x)))
        y = bn()(conv(self.width, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = bn()(conv(self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """Ends four times as wide; the stride stands in its 3 x 3 convolution."""

    width: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv, bn = he(self.dtype), norm(train, self.dtype)
        y = nn.relu(bn()(conv(self.width, (1, 1))(x)))
        y = nn.relu(bn()(conv(self.width, (3, 3), self.stride, padding=1)(y)))
        y = bn()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = bn()(conv(4 * self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class SqueezeBlock(nn.Module):
    """Pre-activation, with channels weighted by what a small network says of their means (reduction 16)."""

    width: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv, bn = he(self.dtype), norm(train, self.dtype)
        y = nn.relu(bn()(x))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = conv(self.width, (1, 1), self.stride)(y)
        y = conv(self.width, (3, 3), self.stride, padding=1)(y)
        y = conv(self.width, (3, 3), padding=1)(nn.relu(bn()(y)))
        gate = nn.relu(nn.Dense(self.width // 16, dtype=self.dtype)(pixel_mean(y)))
        gate = nn.sigmoid(nn.Dense(self.width, dtype=self.dtype)(gate))
        return x + y * gate[:, None, None]


class ResNet(nn.Module):
    """stem "small", for 32 x 32 images: a 3 x 3 convolution of stride 1, no max-pool; "large": 7 x 7 of stride 2, and one."""

    classes: int
    depths: Sequence[int]
    width: int = 64
    block: Callable[..., nn.Module] = BasicBlock
    stem: str = "small"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        check_stem(self.stem)
        size, stride, padding = (3, 1, 1) if self.stem == "small" else (7, 2, 3)
        x = he(self.dtype)(self.width, (size, size), stride, padding=padding)(x)
        x = nn.relu(norm(train, self.dtype)()(x))
        x = x if self.stem == "small" else max_pool(x)
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                x = self.block(self.width * 2**stage, 2 if stage > 0 and block == 0 else 1, self.dtype)(x, train)
        return head(x, self.classes)


def resnet18(classes: int, width: int = 64, *, stem: str = "small", dtype: Any = None) -> nn.Module:
    """11,173,962 parameters at ten classes of 32 x 32 images, 11,689,512 at a thousand with the large stem."""
    return ResNet(classes, (2, 2, 2, 2), width, stem=stem, dtype=dtype)


def resnet50(classes: int, width: int = 64, *, stem: str = "small", dtype: Any = None) -> nn.Module:
    """23,520,842 parameters at ten classes of 32 x 32 images, 25,557,032 at a thousand with the large stem."""
    return ResNet(classes, (3, 4, 6, 3), width, Bottleneck, stem, dtype)


def senet18(classes: int, width: int = 64, *, stem: str = "small", dtype: Any = None) -> nn.Module:
    """11,260,354 parameters at ten classes of 32 x 32 images."""
    return ResNet(classes, (2, 2, 2, 2), width, SqueezeBlock, stem, dtype)
