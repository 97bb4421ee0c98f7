"""SAL from derivatives at the point itself: the solvers "one_step", "hvp" and "diagonal"."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dememo_jax import curvature, tree
from dememo_jax.types import Array


class Local(NamedTuple):
    """[L] or, of "diagonal", a list of arrays shaped like the tensors."""

    value: Array | list[Array]
    error: Array | list[Array] | None
    change: Array | None  # [2, L], rise and fall
    still: Array  # [L], whose gradient is zero


def _slopes(apply, params, data, chosen, loss, batch) -> tuple[list[Array], Array]:
    """Unit gradients of the chosen tensors, zero where there is none, and their lengths [L]."""
    gradient = curvature.mean_gradient(apply, params, data, loss=loss, batch=batch)
    kept = [leaf for leaf, keep in zip(jax.tree.leaves(gradient), chosen) if keep]
    lengths = jnp.stack([tree.norm(leaf) for leaf in kept])
    return [tree.unit(leaf) for leaf in kept], lengths


@partial(jax.jit, static_argnames=("chosen", "loss", "batch", "width"))
def one_step(apply, params, data, radii, baseline, *, chosen, loss, batch, width) -> Local:
    """max over s of |L(theta + s r_l g_l / |g_l|) - L(theta)|: one gradient, then two forward passes a layer."""
    units, lengths = _slopes(apply, params, data, chosen, loss, batch)
    leaves, treedef = jax.tree.flatten(params)
    numbers = [i for i, keep in enumerate(chosen) if keep]

    def at(job):
        number, sign = job
        moved = list(leaves)
        for place, (i, unit) in enumerate(zip(numbers, units)):
            moved[i] = leaves[i] + jnp.where(number == place, sign * radii[place], 0.0).astype(unit.dtype) * unit
        return curvature.mean_loss(apply, jax.tree.unflatten(treedef, moved), data, loss=loss, batch=batch)

    layers = len(numbers)
    jobs = (jnp.tile(jnp.arange(layers), 2), jnp.repeat(jnp.array([1.0, -1.0]), layers))
    losses = jax.lax.map(at, jobs, batch_size=width).reshape(2, layers)
    still = lengths == 0
    change = jnp.where(still, 0.0, (losses - baseline) * jnp.array([[1.0], [-1.0]]))
    return Local(jnp.abs(change).max(axis=0), None, jnp.maximum(change, 0.0), still)


@partial(jax.jit, static_argnames=("chosen", "loss", "batch", "probes", "width", "of"))
def quadratic(apply, params, data, radii, key, *, chosen, loss, batch, probes, width, of) -> Local:
    """r_l |g_l| + r_l^2 |v^T H_ll v| / 2 with v = g_l / |g_l|, exactly by one product a layer, or from sign probes."""
    units, lengths = _slopes(apply, params, data, chosen, loss, batch)
    whole = curvature.operator(apply, params, data, of=of, loss=loss, batch=batch)
    block, _ = curvature.restricted(whole, params, list(chosen))
    if probes is None:
        bend, error = jnp.stack(curvature.exact_layer_blocks(block, units, width=width)), None
    else:
        found = curvature.layer_blocks(block, units, key, probes=probes, width=width)
        bend, error = jnp.stack(found.value), 0.5 * radii**2 * jnp.stack(found.error)
    return Local(radii * lengths + 0.5 * radii**2 * jnp.abs(bend), error, None, lengths == 0)


@partial(jax.jit, static_argnames=("chosen", "loss", "batch", "probes", "width", "of"))
def of_parameters(apply, params, data, radius, key, *, chosen, loss, batch, probes, width, of) -> Local:
    """rho_i |g_i| + rho_i^2 |H_ii| / 2 of every scalar, with rho_i = radius |theta_i|."""
    gradient = curvature.mean_gradient(apply, params, data, loss=loss, batch=batch)
    slopes = [leaf for leaf, keep in zip(jax.tree.leaves(gradient), chosen) if keep]
    whole = curvature.operator(apply, params, data, of=of, loss=loss, batch=batch)
    block, leaves = curvature.restricted(whole, params, list(chosen))
    if probes is None:
        bends, errors = curvature.exact_diagonal(block, leaves), None
    else:
        bends, errors = curvature.diagonal(block, leaves, key, probes=probes, width=width)
    reach = [radius * jnp.abs(leaf) for leaf in leaves]
    value = [r * jnp.abs(g) + 0.5 * r**2 * jnp.abs(h) for r, g, h in zip(reach, slopes, bends)]
    spread = None if errors is None else [0.5 * r**2 * e for r, e in zip(reach, errors)]
    return Local(value, spread, None, jnp.stack([jnp.all(g == 0) for g in slopes]))
