"""Loss, accuracy, or any metric, on lines and planes through a model's weights, and the way that training took.

Weights off the trained ones keep its batch-norm statistics, `apply` being frozen; a `models.recalibrated` network computes
them anew at every point.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import callbacks, curvature, keys, losses, models, tree
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Apply, Array, Dataset, Key, Loss, Params


@dataclass(frozen=True)
class Surface:
    """Values of a metric at params + x * first + y * second."""

    x: np.ndarray  # [X], in lengths of the first direction
    y: np.ndarray | None  # [Y]; None on a line
    values: np.ndarray  # [Y, X, G], or [X, G] on a line


@dataclass(frozen=True)
class Trajectory:
    """The plane through the last point in which a training run moved most."""

    directions: Params  # a tree of [2, ...], of unit l2 length, orthogonal
    points: np.ndarray  # [T, 2], every point of the run in that plane, the last at 0
    explained: tuple[float, float]  # share of the squared distances from the last point along each


def loss_and_accuracy(apply: Apply, *, loss: Loss = losses.cross_entropy, batch: int = 128) -> Callable[[Params, Any], Array]:
    """A metric: (params, data) -> [mean loss in nats, accuracy]."""
    return jax.tree_util.Partial(_both(loss, batch), models.as_apply(apply))


def random_directions(key: Key, params: Params, *, count: int = 2, normalise: str = "filter") -> Params:
    """Gaussian directions, a tree of [count, ...], scaled to the weights: Li et al. 2018.

    normalise: "filter" gives every output unit (the last axis of a kernel) the length of that unit's weights, "layer" every
    tensor that of the tensor, "none" leaves them. Where scaled, vectors (biases, batch norm) are not moved. One unit along such
    a direction is thus as long as the weights themselves.
    """
    require(normalise in ("filter", "layer", "none"), f"normalise must be 'filter', 'layer' or 'none', got {normalise!r}")
    require(count >= 1, f"count must be at least 1, got {count}")

    params = tree.widened(params)

    def scaled(noise: Array, leaf: Array) -> Array:
        if normalise == "none":
            return noise
        if leaf.ndim < 2:
            return jnp.zeros_like(noise)
        axes = tuple(range(leaf.ndim - 1)) if normalise == "filter" else None
        own, given = (jnp.sqrt(jnp.square(part).sum(axis=axes, keepdims=True)) for part in (leaf, noise))
        return noise * own / jnp.maximum(given, 1e-30)

    def one(i):
        return jax.tree.map(scaled, tree.gaussian_like(keys.at(key, i), params), params)

    return jax.vmap(one)(jnp.arange(count))


def trajectory(points: Sequence[Params]) -> Trajectory:
    """The plane by principal components of the points' differences to the last of them (as the paper's Figure 2).

    Raises BadInput for fewer than three points, points of different shapes, or points that all lie on one line.
    """
    require(len(points) >= 3, f"a plane needs at least three points of a training run, got {len(points)}")
    for point in points[:-1]:
        tree.check_like(point, points[-1], "every point of a trajectory")
    flat = np.stack([_flat(point) for point in points[:-1]]) - _flat(points[-1])
    gram = flat.astype(np.float64) @ flat.T.astype(np.float64)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    require(values[1] > 1e-9 * values[0], "the points of the run lie on one line: they span no plane")
    basis = (vectors.T @ flat) / np.sqrt(values)[:, None]
    directions = tree.cut(jnp.asarray(basis, jnp.float32), points[-1])
    where = np.concatenate([flat @ basis.T, np.zeros((1, 2))])
    total = float(np.trace(gram))
    return Trajectory(directions, where, (float(values[0] / total), float(values[1] / total)))


def line(metric: Callable, params: Params, data: Any, directions: Params, x, **how: Any) -> Surface:
    """The metric at params + x * direction, [X, G]; `directions` is a tree of [1, ...] (or more: the first). As `plane`."""
    first = jax.tree.map(lambda leaf: leaf[:1], directions)
    x = np.asarray(x, np.float64)
    return Surface(x, None, _values(metric, params, data, first, x[:, None], **how))


def plane(
    metric: Callable, params: Params, data: Any, directions: Params, x, y,
    *, width: int = 1, every: int | None = None, after: Callable[[int, int], None] | None = None,
) -> Surface:  # fmt: skip
    """The metric at params + x * first + y * second of the `directions` (a tree of [2, ...]), values [Y, X, G].

    metric: (params, data) -> a number or [G] numbers, such as `loss_and_accuracy` makes. `width` points are evaluated in one
    vmap, `every` of them before `after(done, points)` is told. Raises NonFinite, naming the point, for what is no number.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    at = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    found = _values(metric, params, data, directions, at, width=width, every=every, after=after)
    return Surface(x, y, found.reshape(len(y), len(x), -1))


def _values(metric, params, data, directions, at: np.ndarray, *, width=1, every=None, after=None) -> np.ndarray:
    require(len(at) >= 1 and at.size and np.isfinite(at).all(), "a landscape needs at least one finite coordinate on each axis")
    require(width >= 1 and (every is None or every >= 1), f"width and every must be at least 1, got {width} and {every}")
    tree.check_like(jax.tree.map(lambda leaf: leaf[0], directions), params, "a direction")
    count = jax.tree.leaves(directions)[0].shape[0]
    require(count == at.shape[1], f"expected {at.shape[1]} direction(s), got {count}")
    params = tree.widened(params)  # small moves of half precision would be rounded away
    metric, every = models.as_apply(metric), min(len(at), len(at) if every is None else every)
    parts: list[np.ndarray] = []
    for begin in range(0, len(at), every):
        rows = np.minimum(np.arange(begin, begin + every), len(at) - 1)  # always as many: one compiled program
        found = np.asarray(_evaluate(metric, params, data, directions, jnp.asarray(at[rows], jnp.float32), width=width))
        part = found[: len(at) - begin].reshape(-1, *(found.shape[1:] or (1,)))
        if not np.isfinite(part).all():
            bad = begin + int(np.argmax(~np.isfinite(part).all(axis=-1)))
            raise NonFinite(f"the metric at {tuple(np.round(at[bad], 6).tolist())} is not finite; choose nearer coordinates")
        parts.append(part)
        if after is not None:
            callbacks.reports(after(min(begin + every, len(at)), len(at)))
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames="width")
def _evaluate(metric, params, data, directions, at, *, width):
    def one(weights):
        def moved(leaf, ways):
            return leaf + jnp.tensordot(weights.astype(leaf.dtype), ways.astype(leaf.dtype), 1, precision="highest")

        return metric(jax.tree.map(moved, params, directions), data)

    return jax.lax.map(one, at, batch_size=None if width == 1 else width)


def _flat(point: Params) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(point)])


@functools.lru_cache(maxsize=256)
def _both(loss: Loss, batch: int) -> Callable:
    # One function object a setting, so that jit recognises it.
    def metric(apply: Apply, params: Params, data: Dataset) -> Array:
        def of_block(block, real):
            logits = apply(params, block.x)
            each = jnp.stack([loss(logits, block.y), losses.correct(logits, block.y)])
            return jnp.where(real, each, 0.0).sum(axis=1)

        return curvature.total(of_block, data, batch=batch) / len(data.y)

    return metric
