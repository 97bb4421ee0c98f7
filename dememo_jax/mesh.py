"""Devices, of one process or of many: the only place that knows `shard_map`, and how weights too large for one are cut."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dememo_jax import tree as trees
from dememo_jax.errors import require
from dememo_jax.types import Array, Key, Model, Weights

DATA, MODEL = "data", "model"  # the axes of a grid
# What is cut over `model`: a regular expression of the leaf's name and the dimension; all other leaves are on every device.
Cuts: TypeAlias = Sequence[tuple[str, int]]


def mesh(axis: str = "rows", devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """One axis over all devices (those of every process, after `jax.distributed.initialize`), or over those given."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (axis,), axis_types=(AxisType.Auto,), devices=devices)


def spread(fn: Callable[[Any, Any], Any], over: jax.sharding.Mesh, *, gather: bool = True) -> Callable[[Any, Any], Any]:
    """Run `fn(shared, rows)` with `rows` cut over the devices and `shared` on each; every device gets the whole result.

    The leading axis of every array of the rows, and of the result, is one length, a multiple of the number of devices
    (`padded`). With `gather=False` the result stays cut over the devices, such as the networks of shadow models.
    """
    (axis,) = over.axis_names

    def part(shared, rows):
        done = fn(shared, rows)
        return jax.lax.all_gather(done, axis, tiled=True) if gather else done

    out = PartitionSpec() if gather else PartitionSpec(axis)
    return jax.shard_map(part, mesh=over, in_specs=(PartitionSpec(), PartitionSpec(axis)), out_specs=out, check_vma=False)


def copied(tree: Any, over: jax.sharding.Mesh) -> Any:
    """The arrays of a tree on every device of the mesh, sent once; each process must hold the same values."""
    return jax.tree.map(lambda leaf: _put(leaf, over, PartitionSpec()), tree)


def cut(rows: np.ndarray, over: jax.sharding.Mesh) -> Array:
    """Rows, the same in every process, laid over the devices."""
    return _put(rows, over, PartitionSpec(over.axis_names[0]))


def _put(leaf: Any, over: jax.sharding.Mesh, spec: PartitionSpec) -> Array:
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), over, spec), impl=jax.random.key_impl(leaf))
    sharding = NamedSharding(over, spec)
    if not over.is_multi_process:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def agreed(value: float, over: jax.sharding.Mesh | None) -> float:
    """The first process's value, in every process of the mesh: what a clock said must not send them different ways."""
    together = over is not None and over.is_multi_process
    return float(multihost_utils.broadcast_one_to_all(np.float64(value))) if together else value


def padded(rows: np.ndarray, multiple: int) -> np.ndarray:
    """`rows`, its last entry repeated until the length is a multiple of `multiple`."""
    return np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % multiple, axis=0)])


# --- models too large for one device -----------------------------------------------------------------------------


def grid(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Two axes over data x model devices, all there are or those given: the first cuts batches, the second weights.

    Devices that are next to each other in the list share the weights of one copy, which is where most is sent. BadInput for
    another number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    fits = min(data, model) >= 1 and data * model == len(devices)
    require(fits, f"{len(devices)} devices do not make a grid of {data} (data) x {model} (model)")
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def placed(name: str, leaf: Any, over: jax.sharding.Mesh, cuts: Cuts) -> Array:
    """One leaf on the devices of a grid: each is sent its part alone, which matters for a leaf on the host.

    The first rule of `cuts` whose regular expression is found in the name (`block_0/query/kernel`) says along which dimension
    it is cut. Raises BadInput for a mesh that is no grid, and for a dimension that is not there or does not divide.
    """
    return _put(leaf, over, _spec(name, jnp.shape(leaf), over, cuts))


def laid(tree: Any, over: jax.sharding.Mesh, cuts: Cuts) -> Any:
    """Every leaf of a tree `placed`: weights, an adapter's params, an optimiser's state. BadInput also when nothing is cut."""
    _check_cut(tree, over, cuts)
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [placed(name, leaf, over, cuts) for name, leaf in zip(trees.names(tree), leaves)])


def sharded(model: Model, over: jax.sharding.Mesh, cuts: Cuts) -> Model:
    """The same model for the devices of a grid: its weights stay cut by the rules and its batches are cut over `data`.

    Nothing else changes: whatever trains, unlearns, attacks or evaluates a Model does so on all devices, and the compiler puts
    in what they send each other (Xu et al. 2021, arXiv 2105.04663). Logits are those of one device up to rounding.
    `init` makes each part of the weights where it stays; weights from elsewhere come `laid`. For an adapter, wrap the
    network that it adapts: `adapters.lora(sharded(model, ...), base, ...)`.

    In evaluation mode a batch of any size is filled up with its last row. In training mode its size must be a multiple of
    the `data` axis: BadInput, as for weights that do not divide and where no leaf is cut.
    """
    _check_grid(over)
    width = over.shape[DATA]

    def held(weights: Weights) -> Weights:
        _check_cut(weights, over, cuts)
        leaves, structure = jax.tree.flatten(weights)
        specs = [_spec(name, jnp.shape(leaf), over, cuts) for name, leaf in zip(trees.names(weights), leaves)]
        return jax.tree.unflatten(structure, [_held(leaf, over, spec) for leaf, spec in zip(leaves, specs)])

    @jax.jit
    def init(key: Key, x: Array) -> Weights:
        return held(model.init(key, x))

    def apply(weights: Weights, x: Array) -> Array:
        filled = jnp.concatenate([x, jnp.repeat(x[-1:], -len(x) % width, axis=0)]) if len(x) % width else x
        return model.apply(held(weights), _held(filled, over, PartitionSpec(DATA)))[: len(x)]

    def fit(weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
        require(len(x) % width == 0, f"a batch of {len(x)} does not divide over the {width} devices of the axis {DATA!r}")
        return model.fit(held(weights), _held(x, over, PartitionSpec(DATA)), key)

    return Model(init, apply, fit)


def _held(leaf: Array, over: jax.sharding.Mesh, spec: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(over, spec))


def _spec(name: str, shape: tuple[int, ...], over: jax.sharding.Mesh, cuts: Cuts) -> PartitionSpec:
    _check_grid(over)
    dimension = next((dimension for pattern, dimension in cuts if re.search(pattern, name)), None)
    if dimension is None:
        return PartitionSpec()
    require(0 <= dimension < len(shape), f"{name} of shape {list(shape)} has no dimension {dimension} to be cut along")
    size, count = shape[dimension], over.shape[MODEL]
    require(
        size % count == 0,
        f"{name}: dimension {dimension} has {size}, which {count} devices of the axis {MODEL!r} do not share evenly",
    )
    return PartitionSpec(*[None] * dimension, MODEL)


def _check_grid(over: jax.sharding.Mesh) -> None:
    axes = over.axis_names
    require(axes == (DATA, MODEL), f"expected a mesh.grid with the axes ({DATA!r}, {MODEL!r}), got {axes}")


def _check_cut(tree: Any, over: jax.sharding.Mesh, cuts: Cuts) -> None:
    found = over.shape.get(MODEL) == 1 or any(re.search(pattern, name) for pattern, _ in cuts for name in trees.names(tree))
    require(found, f"no leaf is cut by {[pattern for pattern, _ in cuts]}; the leaves are {', '.join(trees.names(tree))}")
