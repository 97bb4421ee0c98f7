"""Devices, of one process or of many: the only place that knows `shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dememo_jax.types import Array


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
