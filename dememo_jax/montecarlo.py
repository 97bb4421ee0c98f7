"""Evaluate a metric of a noisy parameter tree for draws start..stop, in chunks and over devices.

Draw i uses `fold_in(key, i)`: its score is the same whatever the chunk, the device count or the interruptions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import keys, models, tree
from dememo_jax import mesh as meshes
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Array, Key, Params

Metric = Callable[[Params, Any], Array]  # params, data -> [G]


def scores(
    metric: Metric,
    params: Params,
    data: Any,
    key: Key,
    *,
    sigma: float | Params,
    stop: int,
    start: int = 0,
    width: int = 1,
    every: int | None = None,
    over: jax.sharding.Mesh | None = None,
    after: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Scores [stop - start, G] of `metric(params + kappa_i, data)`, kappa_i ~ N(0, sigma^2 I), on the host.

    sigma: one number, or a tree of them shaped like params (a scale for each leaf; 0 leaves one untouched).
    width: how many networks a device evaluates in one vmap. 1 goes through them one by one, which is faster for
        convolutions on CPU (a vmap over weights makes grouped convolutions); tens suit MLPs.
    every: draws between calls of `after(draws_done, their_scores [every, G])`; by default all of them at once.
    over: a mesh of devices to spread the draws over; by default one device.
    Raises BadInput for sigma not positive or no draws, NonFinite when the metric returns NaN or infinity.
    """
    tree.check_scale(sigma, params)
    leaves = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(sigma)])
    require(np.isfinite(leaves).all() and (leaves >= 0).all() and leaves.any(), f"sigma must be positive, got {sigma}")
    require(stop > start >= 0, f"draws {start}..{stop} are none: ask for at least one")
    require(width >= 1 and (every is None or every >= 1), "width and every must be at least 1")
    every = min(stop - start, stop - start if every is None else every)
    devices = 1 if over is None else over.size
    parts = []
    for begin in range(start, stop, every):
        wanted = min(every, stop - begin)
        indices = meshes.padded(np.arange(begin, begin + every), devices)  # always as many: one compiled program
        part = np.asarray(_draw(models.as_apply(metric), params, data, key, sigma, indices, width=width, over=over))[:wanted]
        bad = ~np.isfinite(part).all(axis=tuple(range(1, part.ndim)))
        if bad.any():
            raise NonFinite(f"the metric of draw {begin + int(np.argmax(bad))} is not finite; a score must be a number")
        parts.append(part)
        if after is not None:
            after(begin + wanted, part)
    return np.concatenate(parts)


@partial(jax.jit, static_argnames=("width", "over"))
def _draw(metric, params, data, key, sigma, indices, *, width, over):
    def one(shared, index):
        metric, params, data, key, sigma = shared
        noise = tree.gaussian_like(keys.at(key, index), params, sigma)
        return metric(tree.add(params, noise), data)

    def rows(shared, indices):
        return jax.lax.map(partial(one, shared), indices, batch_size=None if width == 1 else width)

    shared = (metric, params, data, key, sigma)
    return rows(shared, indices) if over is None else meshes.spread(rows, over)(shared, jnp.asarray(indices))
