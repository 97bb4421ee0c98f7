"""Decoder transformers of the Llama and Mistral family (Touvron et al. 2023, arXiv 2302.13971; Jiang et al. 2023, arXiv
2310.06825): RMS norm, rotary positions, grouped-query attention, SwiGLU, a sliding window."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dememo_jax.errors import require
from dememo_jax.types import Array


class Decoder(nn.Module):
    """Tokens [B, L], whole numbers below `vocab` -> logits [B, L, vocab] of the next token, float32.

    width: of a token's vector; hidden: of the gated layer; heads and key_heads: queries share keys and values in groups of
    heads / key_heads; head: width of one, default width / heads. window: a token attends to the last so many, itself
    included; None: to all before it. tied: the head is the transposed embedding. base: of the rotary frequencies.
    remat: recompute blocks in the backward pass instead of keeping their activations. dtype: of the arithmetic, with
    parameters in float32; norms, rotations and softmax are in float32.

    longest: tokens of a row at most, as a released model says; None: any number, which rotary positions allow.
    last: logits of the last so many positions only, [B, last, vocab]: where only what follows a text is asked for, the head,
    which is most of a small network, need not run over the text. None: all of them.

    pad: the token that fills rows up on the left or on the right, which makes the padding mask: it is never attended to, and
    positions count the other tokens only. Raises BadInput, while tracing, for widths that do not divide, tokens that are
    no whole numbers, and rows that are too long.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    key_heads: int
    hidden: int
    head: int | None = None
    window: int | None = None
    tied: bool = False
    base: float = 10_000.0
    epsilon: float = 1e-5
    pad: int = 0
    longest: int | None = None
    last: int | None = None
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        require(tokens.ndim == 2, f"expected tokens [B, L], got shape {list(tokens.shape)}")
        require(jnp.issubdtype(tokens.dtype, jnp.integer), f"tokens must be whole numbers, got {tokens.dtype}")
        fits = self.longest is None or tokens.shape[1] <= self.longest
        require(fits, f"rows of {tokens.shape[1]} tokens are longer than the {self.longest} that this model was made for")
        require(self.heads % self.key_heads == 0, f"{self.heads} heads do not share {self.key_heads} key heads evenly")
        head = self.width // self.heads if self.head is None else self.head
        require(head % 2 == 0, f"rotary positions need an even head width, got {head}")
        embed = nn.Embed(self.vocab, self.width, dtype=self.dtype, name="embed")
        real = tokens != self.pad
        where = jnp.cumsum(real, axis=1) - 1  # [B, L], positions
        seen = attended(real, where, self.window)
        turns = rotation(where, head, self.base)
        block = nn.remat(Block) if self.remat else Block
        x = embed(tokens)
        for i in range(self.depth):
            how = (self.heads, self.key_heads, head, self.hidden, self.epsilon, self.dtype)
            x = block(*how, name=f"block_{i}")(x, seen, turns)
        x = x if self.last is None else x[:, -self.last :]
        arithmetic = x.dtype  # `dtype`, or without one that of the parameters
        x = nn.RMSNorm(self.epsilon, dtype=jnp.float32, name="norm")(x)
        if self.tied:
            return embed.attend(x.astype(arithmetic)).astype(jnp.float32)
        return _dense(self.vocab, self.dtype, "head")(x.astype(arithmetic)).astype(jnp.float32)


def decoder_cuts(net: Decoder, parts: int) -> tuple[tuple[str, int], ...]:
    """How the weights of a decoder are cut over `parts` devices, by name and dimension, for `mesh.sharded` and `mesh.placed`.

    As Shoeybi et al. 2019 (Megatron, arXiv 1909.08053): queries, keys, values and the gated layer by columns, so that a device
    has whole heads; what follows them by rows, so that one sum over the devices ends each half of a block; embedding and head
    by tokens of the vocabulary. Norms are not named, so they are copied. An adapter's `up` and `down` (`adapters.lora`) are cut
    where they meet a cut matrix, so that what they add is made where it is added.
    Raises BadInput when the heads, or the key heads that they share, do not divide.
    """
    for count, what in ((net.heads, "heads"), (net.key_heads, "key heads")):
        require(parts >= 1 and count % parts == 0, f"{count} {what} do not divide over {parts} devices")
    columns, rows = r"(^|/)(query|key|value|gate|up|head)/kernel(/up)?$", r"(^|/)(out|down)/kernel(/down)?$"
    return (columns, 1), (rows, 0), (r"(^|/)embed/embedding(/down)?$", 0)


class Block(nn.Module):
    """Attention and the gated layer, each after a norm and added to what came in."""

    heads: int
    key_heads: int
    head: int
    hidden: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, seen: Array, turns: tuple[Array, Array]) -> Array:
        y = nn.RMSNorm(self.epsilon, dtype=jnp.float32, name="attention_norm")(x).astype(x.dtype)
        parts = {"query": self.heads, "key": self.key_heads, "value": self.key_heads}
        query, key, value = (
            _dense(count * self.head, self.dtype, name)(y).reshape(*y.shape[:2], count, self.head)
            for name, count in parts.items()
        )
        mixed = attend(turned(query, turns), turned(key, turns), value, seen)
        x = x + _dense(x.shape[-1], self.dtype, "out")(mixed.reshape(*y.shape[:2], -1))
        y = nn.RMSNorm(self.epsilon, dtype=jnp.float32, name="gated_norm")(x).astype(x.dtype)
        gate = nn.silu(_dense(self.hidden, self.dtype, "gate")(y))
        return x + _dense(x.shape[-1], self.dtype, "down")(gate * _dense(self.hidden, self.dtype, "up")(y))


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name)


def attended(real: Array, where: Array, window: int | None) -> Array:
    """[B, L, L]: whether token i attends to token j: none after it, no padding, the last `window` at most."""
    ahead = where[:, :, None] - where[:, None, :]
    order = jnp.arange(real.shape[1])
    seen = (order[:, None] >= order[None, :]) & real[:, None, :]
    return seen if window is None else seen & (ahead < window)


def rotation(where: Array, head: int, base: float) -> tuple[Array, Array]:
    """Cosines and sines [B, L, 1, head / 2] of RoPE (Su et al. 2021): frequency i is base^(-2 i / head)."""
    angles = where[..., None] * base ** (-jnp.arange(0, head, 2, dtype=jnp.float32) / head)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def turned(x: Array, turns: tuple[Array, Array]) -> Array:
    """[B, L, heads, head] with feature i of the first half turned against feature i of the second."""
    cos, sin = turns
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(query: Array, key: Array, value: Array, seen: Array) -> Array:
    """Scaled dot-product attention [B, L, H, D]; query heads h * G .. h * G + G - 1 share key head h of H / G."""
    batch, length, heads, head = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, head)
    scores = jnp.einsum("blhgd,bmhd->bhglm", query, key).astype(jnp.float32) / head**0.5
    # Finite, so that a row of padding, which attends to nothing, is no NaN.
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    mixed = jnp.einsum("bhglm,bmhd->blhgd", jax.nn.softmax(scores, axis=-1).astype(value.dtype), value)
    return mixed.reshape(batch, length, heads, head)
