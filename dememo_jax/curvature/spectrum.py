"""Of a symmetric matrix that is an `Operator`: the exact diagonal, the matrix itself, exact layer blocks, top eigenpairs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from dememo_jax import tree
from dememo_jax.curvature.products import Operator
from dememo_jax.errors import require
from dememo_jax.types import Array, Key, Params

SMALL = 5000  # parameters whose exact diagonal or matrix is not refused


class Eigen(NamedTuple):
    values: Array  # [k], the wanted ones first
    vectors: Params  # a tree of [k, ...], of unit length
    residuals: Array  # [k], |H v - value v|: at most so far from `value` lies an eigenvalue


def exact_diagonal(product: Operator, like: Params, *, width: int = 64, most: int = SMALL) -> Params:
    """The diagonal by as many products as there are parameters; BadInput for more than `most`."""
    like = tree.widened(like)
    _, restore = ravel_pytree(like)
    rows = _columns(product, like, width, most, lambda found, start: jnp.diagonal(found, offset=0, axis1=0, axis2=1), True)
    return restore(rows.reshape(-1)[: tree.size(like)])


def dense(product: Operator, like: Params, *, width: int = 64, most: int = SMALL) -> Array:
    """The matrix [P, P], in the order of `ravel_pytree`; BadInput for more than `most` parameters."""
    count = tree.size(like)
    return _columns(product, like, width, most, lambda found, start: found, False).reshape(-1, count)[:count]


def _columns(product, like, width, most, keep, own) -> Array:
    """`keep` of the products with unit vectors, `width` at a time; `own` cuts out the square that belongs to them."""
    count = tree.size(like)
    require(count <= most, f"{count:,} parameters are too many for one product each (at most {most:,}): use curvature.diagonal")
    width = min(width, count)
    flat, restore = ravel_pytree(tree.widened(like))

    def group(start):
        at = start + jnp.arange(width)
        units = jax.vmap(lambda i: restore((jnp.arange(count) == i).astype(flat.dtype)))(at)
        found = jax.vmap(lambda one: ravel_pytree(one)[0])(product(units))
        if own:
            found = jnp.take(found, jnp.minimum(at, count - 1), axis=1)
        return keep(found, start)

    return jax.lax.map(group, jnp.arange(0, count, width))


def exact_layer_blocks(product: Operator, vectors: Params, *, width: int = 4) -> Params:
    """v_l^T H_ll v_l for every leaf v_l of `vectors`, a tree of scalars, by one product a leaf."""
    leaves, treedef = jax.tree.flatten(tree.widened(vectors))
    width = min(width, len(leaves))

    def group(start):
        here = (start + jnp.arange(width))[:, None] == jnp.arange(len(leaves))
        only = [here[:, i].reshape(-1, *[1] * leaf.ndim) * leaf for i, leaf in enumerate(leaves)]
        found = jax.tree.leaves(product(jax.tree.unflatten(treedef, only)))
        return sum(jax.vmap(functools.partial(jnp.vdot, precision="highest"))(a, b) for a, b in zip(only, found))

    rows = jax.lax.map(group, jnp.arange(0, len(leaves), width)).reshape(-1)[: len(leaves)]
    return jax.tree.unflatten(treedef, list(rows))


def top_eigenpairs(
    product: Operator, like: Params, key: Key, *, count: int = 1, steps: int | None = None, which: str = "largest"
) -> Eigen:
    """The `count` eigenpairs that are `which`: "largest", or largest in "magnitude"; Lanczos with full reorthogonalisation.

    steps: size of the Krylov space, by default 4 * count + 20; it is kept in memory, so many trees. Small residuals mean
    that they were enough. Found vectors are unique up to sign.
    """
    size = tree.size(like)
    require(which in ("largest", "magnitude"), f"which must be 'largest' or 'magnitude', got {which!r}")
    require(1 <= count <= size, f"a matrix of {size} rows has 1 to {size} eigenpairs, asked for {count}")
    steps = min(size, 4 * count + 20 if steps is None else steps)
    require(steps >= count, f"{count} eigenpairs need at least as many steps, got {steps}")
    flat, restore = ravel_pytree(tree.widened(like))
    dot = functools.partial(jnp.matmul, precision="highest")

    def multiply(vector):
        stacked = jax.tree.map(lambda leaf: leaf[None], restore(vector))
        return ravel_pytree(jax.tree.map(lambda leaf: leaf[0], product(stacked)))[0].astype(flat.dtype)

    def against(basis, vector):  # twice is enough (Kahan and Parlett)
        for _ in range(2):
            vector = vector - dot(dot(basis, vector), basis)
        return vector

    def unit(vector):
        return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-30)

    starts = jax.random.normal(key, (2, size), flat.dtype)

    def step(carry, i):
        basis, current = carry
        basis = basis.at[i].set(current)
        found = multiply(current)
        own = dot(found, current)
        rest = against(basis, found)
        length = jnp.linalg.norm(rest)
        # The space is used up: go on in a direction outside of it, not coupled to it.
        empty = length <= 1e-6 * jnp.linalg.norm(found) + 1e-30
        other = unit(against(basis, jnp.roll(starts[1], i)))
        return (basis, jnp.where(empty, other, rest / jnp.maximum(length, 1e-30))), (own, jnp.where(empty, 0.0, length))

    (basis, _), (own, beside) = jax.lax.scan(step, (jnp.zeros((steps, size), flat.dtype), unit(starts[0])), jnp.arange(steps))
    values, inner = jnp.linalg.eigh(jnp.diag(own) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1))
    order = jnp.argsort(-(jnp.abs(values) if which == "magnitude" else values))[:count]
    vectors = dot(inner[:, order].T, basis)
    return Eigen(values[order], jax.vmap(restore)(vectors), jnp.abs(beside[-1] * inner[-1, order]))
