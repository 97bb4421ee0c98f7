"""Arithmetic on parameter trees beyond `optax.tree`: norms, balls, spheres, Gaussian noise.

Norms and distances are global l2 over every leaf, accumulated in float32 at least.
"""

import jax
import jax.numpy as jnp

from dememo_jax.errors import require
from dememo_jax.types import Array, Key, Params


def size(tree: Params) -> int:
    """How many scalars stand in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def norm(tree: Params) -> Array:
    """Global l2 norm, a scalar; its gradient at zero is zero, not NaN."""
    leaves = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(tree)]
    square = sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), start=jnp.zeros(()))
    return jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square)))


def distance(a: Params, b: Params) -> Array:
    """Global l2 distance between two trees of one shape."""
    return norm(jax.tree.map(jnp.subtract, a, b))


def project_ball(tree: Params, centre: Params, radius: float | Array) -> Params:
    """The nearest point of the l2 ball around `centre`; a tree inside is returned as it is."""
    return _towards(tree, centre, lambda length: jnp.minimum(1.0, radius / jnp.maximum(length, 1e-30)))


def project_sphere(tree: Params, centre: Params, radius: float | Array) -> Params:
    """The nearest point at exactly `radius` from `centre`; `centre` itself has none and is returned as it is."""
    return _towards(tree, centre, lambda length: jnp.where(length > 0, radius / jnp.maximum(length, 1e-30), 0.0))


def _towards(tree: Params, centre: Params, scale_of) -> Params:
    scale = scale_of(distance(tree, centre))

    def move(leaf, middle):
        moved = middle + (leaf - middle) * scale.astype(leaf.dtype)
        return jnp.where(scale == 1.0, leaf, moved)  # untouched inside, to the bit

    return jax.tree.map(move, tree, centre)


def gaussian_like(key: Key, tree: Params, scale: float | Array | Params = 1.0) -> Params:
    """Independent N(0, scale^2) in the shape and dtype of every leaf; `scale` is one number or a tree of them.

    Leaf number j, in tree order, uses `fold_in(key, j)`.
    """
    check_scale(scale, tree)
    leaves, treedef = jax.tree.flatten(tree)
    scales = jax.tree.leaves(scale)
    scales = scales * len(leaves) if len(scales) == 1 else scales
    drawn = [
        jax.random.normal(jax.random.fold_in(key, j), leaf.shape, leaf.dtype) * jnp.asarray(s, leaf.dtype)
        for j, (leaf, s) in enumerate(zip(leaves, scales, strict=True))
    ]
    return jax.tree.unflatten(treedef, drawn)


def check_scale(scale: float | Array | Params, tree: Params) -> None:
    """BadInput unless `scale` is one number, or has one for every leaf of `tree`."""
    fits = jax.tree.structure(scale) in (jax.tree.structure(0.0), jax.tree.structure(tree))
    require(fits, "the scale of noise (sigma) must be one number, or a tree of them with the structure of what it falls on")


def add(a: Params, b: Params) -> Params:
    return jax.tree.map(jnp.add, a, b)
