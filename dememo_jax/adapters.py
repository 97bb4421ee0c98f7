"""LoRA: a few new parameters beside frozen weights, so that learning, forgetting, noise and certificates act on them alone.

An adapter is a Model like any other. Its params are the new parameters and nothing else; the frozen weights ride in its
stats, which are never noised, never clipped and never descended. So every method of the library works on the adapter's
subspace as it is, where the dimension is small enough for the radius of a ball to mean something.
"""

import math

import jax
import jax.numpy as jnp

from dememo_jax import keys, tree
from dememo_jax.errors import require
from dememo_jax.types import Array, Key, Model, Params, Weights


def lora(model: Model, base: Weights, *, rank: int, alpha: float | None = None, only: str | None = None) -> Model:
    """Low-rank adaptation (Hu et al., ICLR 2022): W + (alpha / rank) down up of every matrix W of `base`.

    base: the frozen weights of `model`, whose own stats (batch norm) stay frozen too. A leaf [..., D] counts as a matrix
    [n, D]; vectors have no adapter. `up` begins at zero, so that the adapter begins as `base` is; `down` is uniform in
    +-1 / sqrt(n), which is what a dense layer has there. alpha: default `rank`. only: a regular expression, adapters for the
    leaves whose names it matches; default all matrices.

    params: {name of the leaf: {"down": [n, rank], "up": [rank, D]}}, float32. stats: {"base": base, "scale": alpha / rank}.
    `init(key, x)` needs no x. `merged` gives weights of `model` back.
    Raises BadInput for a rank below one, an alpha that is not positive, or no matrix with at least `rank` rows and columns.
    """
    require(rank >= 1, f"rank must be at least 1, got {rank}")
    alpha = float(rank) if alpha is None else float(alpha)
    require(alpha > 0, f"alpha must be positive, got {alpha}")
    shapes = {
        name: (math.prod(leaf.shape[:-1]), leaf.shape[-1])
        for name, leaf, asked in zip(tree.names(base.params), jax.tree.leaves(base.params), tree.matching(base.params, only))
        if asked and leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    shapes = {name: shape for name, shape in shapes.items() if min(shape) >= rank}
    require(shapes, f"no matrix {'' if only is None else f'that matches {only!r} '}has {rank} rows and columns: lower the rank")

    def init(key: Key, x: Array) -> Weights:
        params = {name: _zero(keys.named(key, name), *shape, rank) for name, shape in shapes.items()}
        return Weights(params, {"base": base, "scale": jnp.float32(alpha / rank)})

    def apply(weights: Weights, x: Array) -> Array:
        return model.apply(merged(weights), x)

    def fit(weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
        return model.fit(merged(weights), x, key)[0], weights

    return Model(init, apply, fit)


def merged(weights: Weights) -> Weights:
    """Weights of the adapted model with the adapter added in: adapted matrices in float32 at least, however they are stored.

    Rounded to half precision, small adapters, and noise on them, would be lost.
    """
    base, scale = weights.stats["base"], weights.stats["scale"]
    leaves, structure = jax.tree.flatten(base.params)
    found = [_added(leaf, weights.params.get(name), scale) for name, leaf in zip(tree.names(base.params), leaves)]
    return base._replace(params=jax.tree.unflatten(structure, found))


def _added(leaf: Array, adapter: dict[str, Array] | None, scale: Array) -> Array:
    if adapter is None:
        return leaf
    return tree.add(leaf, scale * (adapter["down"] @ adapter["up"]).reshape(leaf.shape))


def _zero(key: Key, rows: int, columns: int, rank: int) -> Params:
    limit = 1 / math.sqrt(rows)
    return {"down": jax.random.uniform(key, (rows, rank), minval=-limit, maxval=limit), "up": jnp.zeros((rank, columns))}
