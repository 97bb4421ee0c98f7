"""Perturbations without gradients: patterns that are drawn, not optimised. A class is a law; an example is a draw from it.

The noise of example i depends on the key and on i alone. It is stored as float16: 50,000 CIFAR images take 307 MB.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax import keys, projected
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Array, Dataset, Key, Perturbation

SHRINK = 1 - 2**-11  # rounding to float16 may add this share: shrunk by it first, no row exceeds its budget
NORMS = {"l2": lambda image: jnp.sqrt(jnp.square(image).sum()), "linf": lambda image: jnp.abs(image).max()}


def _check(data: Dataset, mask, classes: int | None, chunk: int) -> tuple[Array, int]:
    """The mask, and the number of classes."""
    require(data.x.ndim == 4, f"expected images [N, H, W, C], got {data.x.shape}")
    require(chunk >= 1, f"chunk must be at least 1, got {chunk}")
    classes = sets.count_classes(data, classes)
    sets.check_whole(data, classes)
    return sets.check_mask(mask, len(data.y)), classes


def _each(draw, count: int, chunk: int) -> Array:
    """draw(i) -> [H, W, C] of examples 0..count-1, `chunk` at once: float16 [N, H, W, C]."""
    at, _ = sets.blocks(count, min(chunk, count))
    rows = jax.lax.map(lambda part: jax.vmap(draw)(part).astype(jnp.float16), jnp.asarray(at))
    return rows.reshape(-1, *rows.shape[2:])[:count]


def _rows(draw, key: Key, labels: Array, mask: Array, chunk: int) -> Array:
    """draw(key, label) -> [H, W, C] for every example, zero outside the mask: float16 [N, H, W, C]."""
    key = keys.named(key, "examples")
    return _each(lambda i: jnp.where(mask[i], draw(keys.at(key, i), labels[i]), 0.0), len(labels), chunk)


# --- linear patches ----------------------------------------------------------------------------------------------


def linear_patches(
    key: Key,
    data: Dataset,
    mask=None,
    *,
    classes: int | None = None,
    patch: int = 8,
    radius: float | None = None,
    class_sep: float = 10.0,
    chunk: int = 1024,
) -> Perturbation:
    """Linearly separable patches (LSP, also called synthetic perturbations): Yu et al. 2022.

    A class is a vertex of the hypercube {-class_sep, class_sep}^F and a linear map with entries U(-1, 1); an example is
    the vertex plus the map of N(0, 1)^F. Its F = ceil(H / patch) ceil(W / patch) C features become constant squares of
    `patch` pixels, cropped to H x W and scaled to l2 norm `radius` (default 6/255 sqrt(HWC), 1.304 on CIFAR; pixels
    run over [0, 1]). Published: patch 8 at 32 x 32, 32 at 224 x 224.

    data.x [N, H, W, C], mask [N] -> delta float16 [N, H, W, C], zero outside the mask. `chunk` bounds memory only.
    The law is that of scikit-learn's make_classification; its numbers differ. Published images were cut to uint8.
    Raises BadInput for a radius or class_sep that is not positive, a patch larger than the image, fewer vertices than
    classes, and what `data.check_whole` and `data.check_mask` refuse.
    """
    mask, classes = _check(data, mask, classes, chunk)
    height, width, channels = shape = data.x.shape[1:]
    require(1 <= patch <= min(height, width), f"patch must be between 1 and {min(height, width)}, got {patch}")
    require(class_sep > 0, f"class_sep must be positive, got {class_sep}")
    radius = 6 / 255 * math.sqrt(math.prod(shape)) if radius is None else radius
    require(radius > 0, f"the budget (radius) must be positive, got {radius}")
    projected.check_l2(radius, shape)
    grid = -(-height // patch), -(-width // patch), channels
    features = math.prod(grid)
    require(2**features >= classes, f"{features} features have too few vertices for {classes} classes: use a smaller patch")
    chunk = max(1, min(chunk, 2**25 // features**2))  # every example of a chunk holds its class's map
    delta = _patches(key, data.y, mask, radius, class_sep, shape=shape, grid=grid, patch=patch, classes=classes, chunk=chunk)
    return Perturbation(delta, jnp.arange(len(data.y), dtype=jnp.int32), mask)


@partial(jax.jit, static_argnames=("shape", "grid", "patch", "classes", "chunk"))
def _patches(key, labels, mask, radius, class_sep, *, shape, grid, patch, classes, chunk):
    features = math.prod(grid)
    to_vertices, to_maps = jax.random.split(keys.named(key, "classes"))
    centres = class_sep * _vertices(to_vertices, classes, features)
    maps = jax.random.uniform(to_maps, (classes, features, features), minval=-1.0, maxval=1.0)

    def draw(key, label):
        point = centres[label] + jax.random.normal(key, (features,)) @ maps[label]
        image = point.reshape(grid).repeat(patch, axis=0).repeat(patch, axis=1)[: shape[0], : shape[1]]
        return image * (SHRINK * radius / NORMS["l2"](image))

    return _rows(draw, key, labels, mask, chunk)


def _vertices(key: Key, classes: int, features: int) -> Array:
    """Distinct random vertices of {-1, 1}^features, one a class: distinct in their first few bits already."""
    to_near, to_far = jax.random.split(key)
    bits = min(features, classes.bit_length() + 8)
    codes = jax.random.permutation(to_near, 2**bits)[:classes]
    near = (codes[:, None] >> jnp.arange(bits)) & 1
    far = jax.random.randint(to_far, (classes, features - bits), 0, 2)
    return 2.0 * jnp.concatenate([near, far], axis=1) - 1.0


# --- autoregressive processes ------------------------------------------------------------------------------------

LARGEST = 50 / math.sqrt(32 * 32 * 3)  # rms beyond which a process counts as diverging: an l2 norm of 50 on CIFAR
RUNS = 3  # of a process, none of which may


def autoregressive(
    key: Key,
    data: Dataset,
    mask=None,
    *,
    classes: int | None = None,
    radius: float | None = None,
    norm: str = "l2",
    separation: float | None = None,
    processes: Array | None = None,
    chunk: int = 1024,
) -> Perturbation:
    """Autoregressive noise (AR): Sandoval-Segura et al. 2022.

    A class is a linear process for each channel: in raster order, a pixel is a weighted sum of the eight pixels before
    it in its 3 x 3 window. An example is a run of it from N(0, 1) on a field of (H + 4) x (W + 4), without the
    first four rows and columns, scaled to l2 norm `radius` (default sqrt(HWC / 3072), 1 on CIFAR), or with norm="linf"
    to a largest entry of `radius` (default 8/255, which protects less). Pixels run over [0, 1].

    data.x [N, H, W, C], mask [N] -> delta float16 [N, H, W, C], zero outside the mask. `chunk` bounds memory only.
    processes [K, 3, 3, C]: weights to use, such as a published table; by default `coefficients` finds them, which
    see for `separation`. (The first published table for CIFAR-100, still in APBench, diverges in class 9.)
    Raises BadInput for an unknown norm, a radius that is not positive, processes that do not fit, and what
    `coefficients`, `data.check_whole` and `data.check_mask` refuse.
    """
    mask, classes = _check(data, mask, classes, chunk)
    shape = data.x.shape[1:]
    require(norm in NORMS, f"norm must be 'l2' or 'linf', got {norm!r}")
    radius = {"l2": math.sqrt(math.prod(shape) / 3072), "linf": 8 / 255}[norm] if radius is None else radius
    require(radius > 0, f"the budget (radius) must be positive, got {radius}")
    if norm == "l2":
        projected.check_l2(radius, shape)
    if processes is None:
        to_classes = keys.named(key, "classes")
        processes = coefficients(to_classes, classes, shape[2], size=(shape[0], shape[1]), separation=separation)
    expected = (classes, 3, 3, shape[2])
    require(processes.shape == expected, f"processes must be {list(expected)}, got {list(processes.shape)}")
    chunk = max(1, min(chunk, 2**24 // math.prod(shape)))
    delta = _runs(key, data.y, mask, jnp.asarray(processes), radius, shape=shape, norm=norm, chunk=chunk)
    return Perturbation(delta, jnp.arange(len(data.y), dtype=jnp.int32), mask)


def coefficients(
    key: Key,
    classes: int,
    channels: int = 3,
    *,
    size: tuple[int, int] = (32, 32),
    separation: float | None = None,
    tries: int = 2**19,
) -> Array:
    """Weights [K, 3, 3, C] of autoregressive processes that neither diverge nor look alike; the last of nine is 0.

    Rejection search over weights N(0, 1) scaled to sum 1. The processes of a class's channels are dropped together
    when one of three runs (H x W x C, after the first four rows and columns) is not finite or its rms exceeds
    50 / sqrt(3072) = 0.902, an l2 norm of 50 on CIFAR; a class also when an earlier class's filter (its weights, -1 in
    the last place, summed over channels: zero on its own runs) responds to it by less than `separation`: the sum of
    positive responses to a run of l2 norm 1, times 30 / sqrt((H - 2)(W - 2)). Default, as published for CIFAR: 10 up to
    10 classes, 3 for more. About 1.3 % of the triples of weights pass the three runs at 32 x 32.

    At most about `tries` weights are drawn, then BadInput. The distribution is that of the published search; channels
    that alone exceed the norm are left out before they are put together, which only finds the others sooner, and runs
    have the size in use. (The table published for CIFAR-10 would hardly pass its own rule: three of three runs in about
    2 % of cases for class 2.) A host loop: not for use under jit.
    """
    separation = (10.0 if classes <= 10 else 3.0) if separation is None else separation
    require(min(size) >= 3, f"autoregressive noise needs images of at least 3 x 3, got {size[0]} x {size[1]}")
    require(min(classes, channels, tries) >= 1, "classes, channels and tries must be at least 1")
    batch = min(tries, max(512, 2**23 // (RUNS * (size[0] + 4) * (size[1] + 4))))
    accepted = np.zeros((0, 3, 3, channels), np.float32)
    for attempt in range(-(-tries // batch)):
        found = map(np.asarray, _candidates(keys.at(key, attempt), batch=batch, size=size))
        weights, runs = _stable(*found, channels=channels)
        for weight, run in zip(np.moveaxis(weights, 1, -1), np.moveaxis(runs, 1, -1)):
            if (_responses(run, accepted) >= separation).all():
                accepted = np.concatenate([accepted, weight[None]])
            if len(accepted) == classes:
                return jnp.asarray(accepted)
    raise BadInput(f"{tries} tries gave {len(accepted)} of {classes} processes at separation {separation}: lower it")


def _stable(weights: np.ndarray, runs: np.ndarray, squares: np.ndarray, *, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups of `channels` processes of which no run exceeds the norm: weights [G, C, 3, 3], runs [G, C, H, W].

    squares [n, RUNS]: the squared l2 norm of each run of each process. Whoever exceeds the norm alone exceeds it in any group.
    """
    most = LARGEST**2 * math.prod(runs.shape[1:]) * channels
    alone = np.flatnonzero((squares <= most).all(axis=1))  # not so for NaN
    groups = alone[: len(alone) // channels * channels].reshape(-1, channels)
    groups = groups[(squares[groups].sum(axis=1) <= most).all(axis=1)]
    return weights[groups], runs[groups]


def _responses(run: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    """How strongly the filters of accepted processes [A, 3, 3, C] respond to a run [H, W, C]: [A]."""
    filters = accepted.copy()
    filters[:, 2, 2] = -1.0
    windows = np.lib.stride_tricks.sliding_window_view(run / np.linalg.norm(run), (3, 3), axis=(0, 1))  # [h, w, C, 3, 3]
    found = np.tensordot(windows, filters, axes=((3, 4, 2), (1, 2, 3)))
    return np.maximum(found, 0.0).sum(axis=(0, 1)) * 30 / math.sqrt(math.prod(found.shape[:2]))


@partial(jax.jit, static_argnames=("batch", "size"))
def _candidates(key: Key, *, batch: int, size: tuple[int, int]) -> tuple[Array, Array, Array]:
    """Weights [batch, 3, 3], a run of each [batch, H, W], and the squared l2 norms of `RUNS` runs, [batch, RUNS]."""

    def candidate(key):
        to_weights, to_run = jax.random.split(key)
        weights = jax.random.normal(to_weights, (3, 3)).at[2, 2].set(0.0)
        weights = weights / weights.sum()
        fields = jax.vmap(lambda key: _raster(*_edges(key, size), weights)[4:, 4:])(jax.random.split(to_run, RUNS))
        return weights, fields[0], jnp.square(fields).sum(axis=(1, 2))

    return jax.vmap(candidate)(jax.random.split(key, batch))


@partial(jax.jit, static_argnames=("shape", "norm", "chunk"))
def _runs(key, labels, mask, processes, radius, *, shape, norm, chunk):
    def draw(key, label):
        run = _raster(*_edges(key, shape[:2], shape[2]), processes[label])[4:, 4:]
        return run * (SHRINK * radius / NORMS[norm](run))

    return _rows(draw, key, labels, mask, chunk)


def _edges(key: Key, size: tuple[int, int], *channels: int) -> tuple[Array, Array]:
    """N(0, 1) in the first two rows [2, W + 4, ...] and, below them, two columns [H + 2, 2, ...]: all a run reads."""
    to_top, to_left = jax.random.split(key)
    top = jax.random.normal(to_top, (2, size[1] + 4, *channels))
    return top, jax.random.normal(to_left, (size[0] + 2, 2, *channels))


def _raster(top: Array, left: Array, weights: Array) -> Array:
    """The field [H + 4, W + 4, ...] that grows from its edges by weights [3, 3, ...], row by row, pixel by pixel."""

    def row(above, edge):
        windows = [above[i][j : j + above[0].shape[0] - 2] * weights[i, j] for i in range(2) for j in range(3)]

        def pixel(before, push):
            value = push + weights[2, 0] * before[0] + weights[2, 1] * before[1]
            return (before[1], value), value

        rest = jax.lax.scan(pixel, (edge[0], edge[1]), sum(windows))[1]
        grown = jnp.concatenate([edge, rest])
        return (above[1], grown), grown

    return jnp.concatenate([top, jax.lax.scan(row, (top[0], top[1]), left)[1]])


# --- convolution -------------------------------------------------------------------------------------------------


def convolution_filters(
    key: Key, data: Dataset, mask=None, *, classes: int | None = None, side: int = 3, blur: float = 0.3, chunk: int = 1024
) -> Perturbation:
    """Class-wise blurring filters (CUDA): Sadasivan et al. 2023.

    A class is one filter of `side` x `side` weights U(0, blur) with a 1 at a random place; an image x becomes
    conv(x) / max conv(x), each channel filtered alike, zeros around it. A black image stays black. The change has no
    bound in any norm. Published: side 3, blur 0.3 on CIFAR; side 9, blur 0.06 at 224 x 224.

    data.x [N, H, W, C], mask [N] -> delta float16 [N, H, W, C], the new image less the old (within 2.5e-4: half
    precision), zero outside the mask. `chunk` bounds memory only.
    Raises BadInput for a side that is even or larger than the image, a blur outside (0, 1], and what
    `data.check_whole` and `data.check_mask` refuse.
    """
    mask, classes = _check(data, mask, classes, chunk)
    smallest = min(data.x.shape[1:3])
    require(side % 2 == 1 and 1 <= side <= smallest, f"side must be odd and between 1 and {smallest}, got {side}")
    require(0 < blur <= 1, f"blur must lie in (0, 1], got {blur}")
    filters = _filters(keys.named(key, "classes"), blur, classes=classes, side=side)
    chunk = max(1, min(chunk, 2**24 // math.prod(data.x.shape[1:])))
    delta = _filtered(data.x, data.y, mask, filters, chunk=chunk)
    return Perturbation(delta, jnp.arange(len(data.y), dtype=jnp.int32), mask)


@partial(jax.jit, static_argnames=("classes", "side"))
def _filters(key: Key, blur: float | Array, *, classes: int, side: int) -> Array:
    """[K, side, side]: U(0, blur), and 1 at one place."""
    to_weights, to_places = jax.random.split(key)
    weights = blur * jax.random.uniform(to_weights, (classes, side * side))
    places = jax.random.randint(to_places, (classes,), 0, side * side)
    return weights.at[jnp.arange(classes), places].set(1.0).reshape(classes, side, side)


@partial(jax.jit, static_argnames=("chunk",))
def _filtered(x: Array, labels: Array, mask: Array, filters: Array, *, chunk: int) -> Array:
    height, width = x.shape[1:3]
    side = filters.shape[1]

    def change(i):
        wide = jnp.pad(x[i], ((side // 2, side // 2), (side // 2, side // 2), (0, 0)))
        blurred = jnp.zeros_like(x[i])
        for j, k in np.ndindex(side, side):  # a sum of shifts: convolutions with a filter an image are slow
            blurred += filters[labels[i], j, k] * wide[j : j + height, k : k + width]
        peak = blurred.max()
        return jnp.where(mask[i], blurred / jnp.where(peak > 0, peak, 1.0) - x[i], 0.0)

    return _each(change, len(x), chunk)
