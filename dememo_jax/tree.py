"""Arithmetic on parameter trees beyond `optax.tree`: norms, balls, spheres, Gaussian noise.

Norms and distances are global l2 over every leaf. Everything here works in float32 at least: trees stored in half precision
are raised to it (`widened`), and sums and projections come back in float32, so that noise and small moves are not rounded away.
"""

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax.errors import BadInput, require
from dememo_jax.types import Array, Key, Params

HALF = (jnp.dtype("bfloat16"), jnp.dtype("float16"))


def size(tree: Params) -> int:
    """How many scalars stand in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def widened(tree: Params) -> Params:
    """The tree with every floating leaf in float32 at least; leaves that are, and whole numbers, stay as they are."""

    def raised(leaf):
        return leaf.astype(jnp.float32) if jnp.result_type(leaf) in HALF else leaf

    return jax.tree.map(raised, tree)


def half(tree: Params) -> list[str]:
    """The types below float32 that leaves are stored in, sorted; empty for most trees."""
    return sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree) if jnp.result_type(leaf) in HALF})


def norm(tree: Params) -> Array:
    """Global l2 norm, a scalar; its gradient at zero is zero, not NaN."""
    leaves = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(tree)]
    square = sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), start=jnp.zeros((), jnp.float32))
    return jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square)))


def finite(tree: Any) -> bool:
    """Whether no leaf of concrete numbers has an infinite or NaN entry; leaves that are not floating cannot."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact))
    return all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)


def unit(tree: Params) -> Params:
    """The tree at length one; zero where it is zero."""
    length = norm(tree)
    return jax.tree.map(lambda leaf: jnp.where(length > 0, leaf / jnp.maximum(length, 1e-30), 0.0), tree)


def distance(a: Params, b: Params) -> Array:
    """Global l2 distance between two trees of one shape."""
    return norm(jax.tree.map(jnp.subtract, widened(a), widened(b)))


def project_ball(tree: Params, centre: Params, radius: float | Array) -> Params:
    """The nearest point of the l2 ball around `centre`; a tree inside is returned as it is."""
    return _towards(tree, centre, lambda length: jnp.minimum(1.0, radius / jnp.maximum(length, 1e-30)))


def project_sphere(tree: Params, centre: Params, radius: float | Array) -> Params:
    """The nearest point at exactly `radius` from `centre`; `centre` itself has none and is returned as it is."""
    return _towards(tree, centre, lambda length: jnp.where(length > 0, radius / jnp.maximum(length, 1e-30), 0.0))


def _towards(tree: Params, centre: Params, scale_of) -> Params:
    tree, centre = widened(tree), widened(centre)
    scale = scale_of(distance(tree, centre))

    def move(leaf, middle):
        moved = middle + (leaf - middle) * scale.astype(leaf.dtype)
        return jnp.where(scale == 1.0, leaf, moved)  # untouched inside, to the bit

    return jax.tree.map(move, tree, centre)


def gaussian_like(key: Key, tree: Params, scale: float | Array | Params = 1.0) -> Params:
    """Independent N(0, scale^2) in the shape of every leaf, float32 at least; `scale` is one number or a tree of them.

    One draw for the whole tree, cut into its leaves in tree order: many small draws cost more than one large.
    """
    leaves, treedef = jax.tree.flatten(tree)
    scales = leaf_scales(scale, tree)
    dtype = jnp.result_type(jnp.float32, *leaves)
    flat = jax.random.normal(key, (size(tree),), dtype)
    parts = jax.tree.leaves(cut(flat, tree))
    return jax.tree.unflatten(treedef, [part * jnp.asarray(s, dtype) for part, s in zip(parts, scales, strict=True)])


def cut(flat: Array, like: Params) -> Params:
    """Numbers [..., P] as a tree of the shapes of `like`, in tree order, behind the same leading axes."""
    leaves, treedef = jax.tree.flatten(like)
    parts = jnp.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1], axis=-1)
    return jax.tree.unflatten(treedef, [part.reshape(*flat.shape[:-1], *leaf.shape) for part, leaf in zip(parts, leaves)])


def check_scale(scale: float | Array | Params, tree: Params) -> None:
    """BadInput unless `scale` is one number, or has one for every leaf of `tree`."""
    fits = jax.tree.structure(scale) in (jax.tree.structure(0.0), jax.tree.structure(tree))
    require(fits, "the scale of noise (sigma) must be one number, or a tree of them with the structure of what it falls on")


def leaf_scales(scale: float | Array | Params, tree: Params) -> list:
    """The scale of every leaf in tree order, of one number or of a tree of them; BadInput as `check_scale`."""
    check_scale(scale, tree)
    found = jax.tree.leaves(scale)
    return found * len(jax.tree.leaves(tree)) if len(found) == 1 else found


def add(a: Params, b: Params) -> Params:
    """a + b in the dtypes of a, or float32 where those are lower: noise and small moves are not rounded to half precision."""
    return jax.tree.map(lambda left, right: (left + right).astype(left.dtype), widened(a), b)


# --- on the host: names, scales, fingerprints --------------------------------------------------------------------


def names(tree: Params) -> list[str]:
    """The path of every leaf in tree order, such as `Dense_0/kernel`."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def matching(tree: Params, only: str | None) -> list[bool]:
    """For every leaf in tree order whether its name matches the regular expression `only`; all do without one.

    Raises BadInput when none does, and for what is no regular expression.
    """
    try:
        found = [only is None or re.search(only, name) is not None for name in names(tree)]
    except re.error as error:
        raise BadInput(f"{only!r} is no regular expression: {error}") from None
    require(any(found), f"no leaf matches {only!r}; the leaves are {', '.join(names(tree))}")
    return found


def scales(tree: Params, sigma: float, *, only: str | None = None, relative: bool = False) -> Params:
    """A noise scale for every leaf: `sigma` where the leaf's name matches the regular expression `only`, else 0.

    relative: sigma times the root mean square of the leaf, so that large and small layers are shaken alike.
    Raises BadInput when no leaf matches, or when a matched leaf is all zero and has no scale of its own.
    """
    leaves, treedef = jax.tree.flatten(tree)
    found = matching(tree, only)
    rms = [float(np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64))))) if relative else 1.0 for leaf in leaves]
    zero = [name for name, wanted, size_ in zip(names(tree), found, rms) if wanted and size_ == 0]
    require(not zero, f"relative noise needs leaves that are not all zero; leave out {', '.join(zero)}")
    return jax.tree.unflatten(treedef, [sigma * size_ if wanted else 0.0 for wanted, size_ in zip(found, rms)])


def check_arrays(tree: Any, what: str) -> None:
    """BadInput naming the first leaf that is no array, such as the activation function of an Equinox module."""
    for name, leaf in zip(names(tree), jax.tree.leaves(tree)):
        require(
            isinstance(leaf, int | float | complex) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape")),
            f"{what} must hold arrays only; {name or 'it'} is a {type(leaf).__name__} ({leaf!r:.60}): keep what is no array "
            "outside (Equinox: eqx.partition(module, eqx.is_inexact_array))",
        )


def check_floating(tree: Params, what: str) -> None:
    """BadInput naming the first leaf that is no floating array, or not finite; finiteness is not checked under jit."""
    check_arrays(tree, what)
    for name, leaf in zip(names(tree), jax.tree.leaves(tree)):
        dtype = jnp.result_type(leaf)
        require(jnp.issubdtype(dtype, jnp.floating), f"{what} must be floating; {name} is {dtype}")
        known = not isinstance(leaf, jax.core.Tracer)
        require(not known or bool(np.isfinite(np.asarray(leaf)).all()), f"{what} must be finite; {name} holds NaN or infinity")


def check_like(tree: Params, like: Params, what: str) -> None:
    """BadInput unless `tree` has the structure and the shapes of `like`; `what` names it."""
    same = jax.tree.structure(tree) in (jax.tree.structure(like),)
    require(same, f"{what} must have the structure of the network's parameters: leaves {', '.join(names(like))}")
    for name, one, other in zip(names(like), jax.tree.leaves(tree), jax.tree.leaves(like)):
        require(one.shape == other.shape, f"{what}: {name} has shape {list(one.shape)}, expected {list(other.shape)}")


def digest(tree: Any) -> str:
    """A short fingerprint of the arrays in a tree, with their names, shapes and types; typed keys count as their data."""
    total = hashlib.blake2b(digest_size=8)
    for name, leaf in zip(names(tree), jax.tree.leaves(tree)):
        keyed = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if keyed else leaf)
        total.update(f"{name} {array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
