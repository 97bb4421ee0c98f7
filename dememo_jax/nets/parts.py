"""What the convolutional networks are made of.

`dtype` is of the arithmetic, such as jnp.bfloat16; parameters, running statistics and logits stay float32.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dememo_jax import convolution
from dememo_jax.errors import require
from dememo_jax.types import Array

Conv = partial(nn.Conv, use_bias=False, conv_general_dilated=convolution.conv)
STEMS = ("small", "large")


def he(dtype: Any) -> Any:
    """A convolution without bias, initialised after He et al. 2015."""
    return partial(Conv, kernel_init=nn.initializers.he_normal(), dtype=dtype)


def norm(train: bool, dtype: Any) -> Any:
    return partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype)


def max_pool(x: Array) -> Array:
    """3 x 3, stride 2."""
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def pixel_mean(x: Array) -> Array:
    """Mean [B, C] over the pixels of [B, H, W, C].

    In bfloat16 behind a barrier: jax 0.12 on CPU fuses the mean with the block before it into a program that answers NaN.
    """
    x = jax.lax.optimization_barrier(x) if x.dtype == jnp.bfloat16 else x
    return jnp.mean(x, axis=(1, 2))


def head(x: Array, classes: int) -> Array:
    """Global average and a linear layer, in float32."""
    return nn.Dense(classes)(pixel_mean(x).astype(jnp.float32))


def check_stem(stem: str) -> None:
    require(stem in STEMS, f"stem must be 'small' (32 x 32 images) or 'large' (224 x 224), got {stem!r}")
