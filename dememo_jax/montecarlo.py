"""Evaluate a metric of a noisy parameter tree for draws start..stop, in chunks and over devices.

Draw i uses `fold_in(key, i)`: its score is the same whatever the chunk, the number of devices or processes, the
strategy or the interruptions, so draws can be cut over machines, joined, and extended without repeating any.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import callbacks, keys, models, tree
from dememo_jax import mesh as meshes
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Array, Key, Params

Metric = Callable[[Params, Any], Array]  # params, data -> [G]
After = Callable[[int, np.ndarray], callbacks.Answer]  # draws done, their scores [n, G] -> None, or `loop.STOP`

WIDTHS = (4, 32, 128)  # networks in one vmap that `calibrate` tries
TRIAL = 5.0  # seconds that one of its trials may be expected to take
FEW = 32  # draws that are not worth a calibration
SCRATCH = 2 * 2**30  # bytes of scratch memory, where the device does not tell how much it has


class Speed(NamedTuple):
    """What a calibration found."""

    width: int  # networks in one vmap; 1: one after another
    seconds: float  # for one draw, all devices taken together
    tried: tuple[tuple[int, float], ...]  # (width, seconds for one draw)


def scores(
    metric: Metric,
    params: Params,
    data: Any,
    key: Key,
    *,
    sigma: float | Params,
    stop: int,
    start: int = 0,
    strategy: str = "auto",
    width: int | None = None,
    every: int | None = None,
    over: jax.sharding.Mesh | None = None,
    memory: int | None = None,
    after: After | None = None,
) -> np.ndarray:
    """Scores [stop - start, G] of `metric(params + kappa_i, data)`, kappa_i ~ N(0, sigma^2 I): a host driver.

    It times, compiles and collects on the host, and cannot stand in a program of the caller's (jit, vmap, grad). The pure
    part, which can, is `metric` at `noisy(params, key, i, sigma)`, draw i.

    The metric is given the sum in float32 at least, however params are stored.

    sigma: one number, or a tree of them shaped like params (a scale for each leaf; 0 leaves one untouched): `tree.scales`.
    strategy: "map" evaluates one network after another, "vmap" `width` of them at once (default 32), "auto" times both
        on the first draws and keeps the faster (`calibrate`). A vmap over weights suits small dense networks; it turns
        convolutions into grouped ones, which are several times slower on CPU.
    every: draws between calls of `after(draws_done, their_scores [every, G])`, which may return `loop.STOP`; by
        default all of them at once. A stopped run returns the scores so far.
    over: a mesh of devices, of one process or of many, to spread the draws over; by default one device.
    memory: bytes of scratch, as XLA reports them, that a vmap chosen by "auto" may use on a device; default half of the
        device's, 2 GiB where it does not say. A width that is asked for is used as it is.
    Raises BadInput for sigma not positive, params that are not floating or not finite, a key that is not a typed
    threefry key (draws of other kinds depend on how they are batched), or no draws; NonFinite, naming the draw, when
    the metric returns NaN or infinity: `after` has then seen every chunk before it.
    """
    check(params, key, sigma)
    require(stop > start >= 0, f"draws {start}..{stop} are none: ask for at least one")
    require(strategy in ("auto", "map", "vmap"), f"strategy must be 'auto', 'map' or 'vmap', got {strategy!r}")
    require((width is None or width >= 1) and (every is None or every >= 1), "width and every must be at least 1")
    if strategy == "auto" and stop - start > FEW:
        width = calibrate(metric, params, data, key, sigma=sigma, width=width, over=over, memory=memory).width
    else:
        width = (width or WIDTHS[1]) if strategy == "vmap" else 1
    every = min(stop - start, stop - start if every is None else every)
    shared = _shared(metric, params, data, key, sigma, over)
    parts = []
    for begin in range(start, stop, every):
        indices = np.arange(begin, begin + every)  # always as many: one compiled program
        part = _evaluate(shared, indices, width, over)[: stop - begin]
        bad = ~np.isfinite(part).all(axis=tuple(range(1, part.ndim)))
        if bad.any():
            raise NonFinite(f"the metric of draw {begin + int(np.argmax(bad))} is not finite; a score must be a number")
        parts.append(part)
        if after is not None and callbacks.stops(after(begin + len(part), part)):
            break
    return np.concatenate(parts)


def noisy(params: Params, key: Key, index: int | Array, sigma: float | Params) -> Params:
    """The params of draw `index`: pure, for programs of one's own; what `scores` evaluates its metric at."""
    return tree.add(params, tree.gaussian_like(keys.at(key, index), params, sigma))


def check(params: Params, key: Key, sigma: float | Params) -> None:
    """BadInput unless noise of this scale can fall on these params with this key; cheap, for before the long work."""
    require(jax.tree.leaves(params), "params hold no arrays to put noise on")
    tree.check_floating(params, "params")
    check_sigma(params, sigma)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    threefry = typed and key.shape == () and str(jax.random.key_impl(key)) == "threefry2x32"
    require(threefry, "the key must be one jax.random.key(seed) of the default kind, threefry2x32")


def check_sigma(params: Params, sigma: float | Params) -> None:
    """BadInput unless sigma is a scale of noise on these params: numbers that are finite, not negative, and not all 0."""
    tree.check_scale(sigma, params)
    numeric = all(np.issubdtype(np.asarray(leaf).dtype, np.number) for leaf in jax.tree.leaves(sigma))
    require(numeric, f"sigma must be a number or a tree of numbers, got {sigma!r}")
    scales = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(sigma)])
    require(np.isfinite(scales).all() and (scales >= 0).all() and scales.any(), f"sigma must be positive, got {sigma}")


def calibrate(
    metric: Metric,
    params: Params,
    data: Any,
    key: Key,
    *,
    sigma: float | Params,
    width: int | None = None,
    over: jax.sharding.Mesh | None = None,
    memory: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time the first draws one network at a time, then in wider and wider vmaps for as long as that is faster.

    A width is not tried when its program would need more than `memory` bytes of scratch on a device (`width` caps it
    too), or when a trial could take much longer than the draws themselves: large networks fill a device one by one.
    """
    check(params, key, sigma)
    devices = 1 if over is None else over.size
    memory = int(meshes.agreed(scratch(), over)) if memory is None else memory
    shared = _shared(metric, params, data, key, sigma, over)

    def seconds(at_once: int, count: int) -> float:
        indices = np.arange(-(-count // (at_once * devices)) * at_once * devices)
        _needed(shared, indices, at_once, over)  # compiles outside the clock
        took = math.inf
        for _ in range(3 if count > 1 else 1):
            started = clock()
            _evaluate(shared, indices, at_once, over)
            took = min(took, clock() - started)
        return meshes.agreed(took, over) / len(indices)

    alone = seconds(1, 1)
    many = 1 if alone * WIDTHS[-1] > TRIAL else WIDTHS[-1]  # short draws are timed many at once
    tried = [(1, alone if many == 1 else seconds(1, many))]
    for wider in [w for w in WIDTHS if width is None or w <= width]:
        # Eight times slower than one by one is about the worst that a vmap was seen to be.
        if tried[0][1] * devices * wider * 8 > TRIAL or _needed(shared, np.arange(wider * devices), wider, over) > memory:
            break
        tried.append((wider, seconds(wider, many)))
        if tried[-1][1] > 0.95 * tried[-2][1]:
            break
    best = min(tried, key=lambda pair: pair[1])
    if best[0] > 1:  # a machine that was busy elsewhere may have slowed the first of them
        tried += [(1, seconds(1, many)), (best[0], seconds(best[0], many))]
        best = min(tried, key=lambda pair: pair[1])
    return Speed(*best, tuple(tried))


def _shared(metric, params, data, key, sigma, over):
    shared = (models.as_apply(metric), params, data, key, sigma)
    return shared if over is None else meshes.copied(shared, over)


def _evaluate(shared, indices: np.ndarray, width: int, over) -> np.ndarray:
    return np.asarray(_draw(*_arguments(shared, indices, over), width=width, over=over))[: len(indices)]


def _needed(shared, indices: np.ndarray, width: int, over) -> int:
    """Bytes of scratch of the compiled program on a device; compiles it, for later calls too."""
    analysis = _draw.lower(*_arguments(shared, indices, over), width=width, over=over).compile().memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def _arguments(shared, indices: np.ndarray, over):
    return shared, indices if over is None else meshes.cut(meshes.padded(indices, over.size), over)


def scratch() -> int:
    """Bytes of scratch memory that a program may use on a device when nobody says."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return SCRATCH if limit is None else limit // 2


@partial(jax.jit, static_argnames=("width", "over"))
def _draw(shared, indices, *, width, over):
    def one(shared, index):
        metric, params, data, key, sigma = shared
        return metric(noisy(params, key, index, sigma), data)

    def rows(shared, indices):
        return jax.lax.map(partial(one, shared), indices, batch_size=None if width == 1 else width)

    return rows(shared, indices) if over is None else meshes.spread(rows, over)(shared, indices)
