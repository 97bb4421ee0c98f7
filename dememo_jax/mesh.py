"""Devices: the only place that knows `shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from dememo_jax.types import Array


def mesh(axis: str = "rows", devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """One axis over all devices, or over those given."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (axis,), axis_types=(AxisType.Auto,), devices=devices)


def spread(fn: Callable[[Any, Array], Array], over: jax.sharding.Mesh) -> Callable[[Any, Array], Array]:
    """Run `fn(shared, rows)` with `rows` cut over the devices and `shared` copied to each.

    The result's leading axis is that of `rows`, which must be a multiple of the number of devices (`padded`).
    """
    (axis,) = over.axis_names
    cut = PartitionSpec(axis)
    return jax.shard_map(fn, mesh=over, in_specs=(PartitionSpec(), cut), out_specs=cut, check_vma=False)


def padded(rows: np.ndarray, multiple: int) -> np.ndarray:
    """`rows`, its last entry repeated until the length is a multiple of `multiple`."""
    return np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % multiple, axis=0)])
