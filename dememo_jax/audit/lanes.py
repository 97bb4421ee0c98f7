"""One function for many networks: one after another, or many in one vmap, over all devices."""

from functools import partial
from typing import Any

import jax
import numpy as np

from dememo_jax import mesh as meshes


def usual_lanes(params: Any, lanes: int, *, stacked: bool = False) -> int:
    """How many networks to put into one vmap: all of them, but convolutions on CPU one by one.

    A vmap over weights makes grouped convolutions, which XLA runs several times slower there. stacked: the leaves already
    have an axis of networks.
    """
    convolutional = any(len(leaf.shape) - stacked > 2 for leaf in jax.tree.leaves(params))
    return 1 if convolutional and jax.default_backend() == "cpu" else lanes


def each(fn: Any, shared: Any, lanes: Any, *, width: int, over: jax.sharding.Mesh | None = None, gather: bool = True) -> Any:
    """`fn(shared, lane)` for every lane (leading axis), `width` in one vmap on a device; results stacked in the same order.

    fn: a function, or a `functools.partial` of one with hashable keywords; equal ones share compiled programs. The number of
    lanes must be a multiple of the number of devices.
    """
    return _each(*_placed(fn, shared, lanes, over), width=width, over=over, gather=gather)


def lowered(fn: Any, shared: Any, lanes: Any, *, width: int, over: jax.sharding.Mesh | None = None, gather: bool = True) -> Any:
    """The program of `each`, not yet compiled."""
    return _each.lower(*_placed(fn, shared, lanes, over), width=width, over=over, gather=gather)


def _placed(fn, shared, lanes, over) -> tuple:
    bare, how = (fn.func, tuple(sorted(fn.keywords.items()))) if isinstance(fn, partial) else (fn, ())
    if over is not None:
        shared, lanes = meshes.copied(shared, over), jax.tree.map(lambda leaf: meshes.cut(np.asarray(leaf), over), lanes)
    return bare, how, shared, lanes


@partial(jax.jit, static_argnums=(0, 1), static_argnames=("width", "over", "gather"))
def _each(fn, how, shared, lanes, *, width, over, gather):
    def rows(shared, lanes):
        return jax.lax.map(partial(fn, shared, **dict(how)), lanes, batch_size=None if width == 1 else width)

    return rows(shared, lanes) if over is None else meshes.spread(rows, over, gather=gather)(shared, lanes)
