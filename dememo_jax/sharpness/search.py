"""The worst and best loss inside a ball around one weight tensor, by two searches: the solvers "ball" and "normalized".

A `join` makes a network's params of a displacement. Either the displacement is one tensor, and each layer has a program
of its own that differentiates no other; or it is a whole tree under a mask, and layers share one program, in a vmap.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dememo_jax import curvature, keys, projected, tree
from dememo_jax import data as sets
from dememo_jax.types import Apply, Array, Dataset, Key, Loss, Params


class Found(NamedTuple):
    """Entry 0 by ascent, entry 1 by descent."""

    change: Array  # [2], the largest rise and the largest fall over the rounds; >= 0
    fraction: Array  # [2], how much of the radius was used in the end


class How(NamedTuple):
    """Settings, hashable: part of the compiled program."""

    solver: str
    rounds: int  # passes over the data ("ball") or steps ("normalized"); the loss is looked at after each
    lr: float  # of plain SGD ("ball")
    stride: float  # of a step, as a share of the radius ("normalized")
    batch: int
    loss: Loss


@partial(jax.jit, static_argnames=("at", "how"))
def one_layer(apply: Apply, params: Params, data: Dataset, key: Key, radius, baseline, *, at: int, how: How) -> Found:
    """Tensor number `at` of the params, alone."""
    leaves, treedef = jax.tree.flatten(params)

    def join(moved):
        return jax.tree.unflatten(treedef, [leaf + moved if i == at else leaf for i, leaf in enumerate(leaves)])

    return _both(apply, join, jnp.zeros_like(leaves[at]), data, key, radius, baseline, how)


@partial(jax.jit, static_argnames=("how", "width"))
def many_layers(
    apply: Apply, params: Params, data: Dataset, key: Key, radii, baseline, at: Array, *, how: How, width: int
) -> Found:
    """Tensors number `at` [L], `width` of them in one vmap; every network in it has all its weights."""
    leaves, treedef = jax.tree.flatten(params)

    def one(job):
        place, radius = job

        def join(moved):
            pairs = zip(leaves, jax.tree.leaves(moved))
            return jax.tree.unflatten(treedef, [leaf + jnp.where(place == i, d, 0) for i, (leaf, d) in enumerate(pairs)])

        return _both(apply, join, jax.tree.map(jnp.zeros_like, params), data, key, radius, baseline, how)

    return jax.lax.map(one, (at, radii), batch_size=width)


def _both(apply, join, zero, data, key, radius, baseline, how: How) -> Found:
    """The same batches for ascent and descent, one after the other."""
    found = jax.lax.map(lambda sign: _search(apply, join, zero, data, key, radius, baseline, sign, how), jnp.array([1.0, -1.0]))
    return Found(*found)


def _search(apply: Apply, join: Callable[[Any], Params], zero, data: Dataset, key, radius, baseline, sign, how: How):
    count = len(data.y)

    def held(moved):
        return tree.project_ball(moved, zero, radius)

    def of_pass(key, moved):
        """Plain SGD over whole shuffled batches, free until the pass ends, then projected once."""
        order = sets.pass_order(keys.named(key, "draw"), 0, jnp.ones(count, bool))

        def slope(_, place, moved):
            batch = sets.part_of_pass(order, place, data, how.batch, count)

            def objective(d):
                return -sign * how.loss(apply(join(d), batch.x), batch.y).mean()

            return jax.grad(objective)(moved)

        free = {"project": lambda moved: moved, "direction": lambda slope: slope}
        return held(projected.search(key, moved, slope, stride=how.lr, steps=count // how.batch, **free))

    def of_step(key, moved):
        """One step of fixed length along the gradient of the whole mean."""

        def slope(_, t, moved):
            return curvature.mean_gradient(lambda d, x: apply(join(d), x), moved, data, loss=how.loss, batch=how.batch)

        stride = -sign * how.stride * radius
        return projected.search(key, moved, slope, stride=stride, steps=1, project=held, direction=tree.unit)

    def once(carry, number):
        moved, best = carry
        moved = (of_pass if how.solver == "ball" else of_step)(keys.at(key, number), moved)
        value = curvature.mean_loss(apply, join(moved), data, loss=how.loss, batch=how.batch)
        return (moved, jnp.maximum(best, sign * (value - baseline))), None

    (moved, best), _ = jax.lax.scan(once, (zero, jnp.zeros(())), jnp.arange(how.rounds))
    return best, tree.norm(moved) / radius
