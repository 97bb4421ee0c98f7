"""Vision transformers (Dosovitskiy et al. 2021)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dememo_jax.errors import require
from dememo_jax.types import Array


class EncoderBlock(nn.Module):
    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, y)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(y), approximate=False)
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class ViT(nn.Module):
    """Patches, a class token, learned positions, pre-norm blocks, and a linear head on the token; no dropout."""

    classes: int
    patch: int
    width: int = 192
    depth: int = 12
    heads: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        side = x.shape[1], x.shape[2]
        require(
            all(s % self.patch == 0 for s in side), f"images of {side[0]} x {side[1]} do not cut into patches of {self.patch}"
        )
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, padding="VALID", dtype=self.dtype)(x).reshape(len(x), -1, self.width)
        small = nn.initializers.truncated_normal(0.02)
        token = self.param("token", small, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)).astype(x.dtype), x], axis=1)
        x = x + self.param("position", small, (1, x.shape[1], self.width)).astype(x.dtype)
        for _ in range(self.depth):
            x = EncoderBlock(self.heads, self.dtype)(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x[:, 0])
        return nn.Dense(self.classes)(x.astype(jnp.float32))


def vit_tiny(
    classes: int, patch: int = 4, *, width: int = 192, depth: int = 12, heads: int = 3, dtype: Any = None
) -> nn.Module:
    """5,362,762 parameters at ten classes of 32 x 32 images in patches of 4; 5,717,416 at a thousand, 224 x 224 and 16."""
    return ViT(classes, patch, width, depth, heads, dtype)
