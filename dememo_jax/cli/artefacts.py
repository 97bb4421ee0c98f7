"""The arrays that a finished run left, read back and checked: perturbations and forget masks."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax import files
from dememo_jax.cli import identity
from dememo_jax.errors import require
from dememo_jax.types import Perturbation


def save_perturbation(path: Path, perturbation: Perturbation) -> None:
    files.write_arrays(path, **perturbation._asdict())


def perturbation(folder: Path, done: dict, count: int) -> Perturbation:
    """The noise of a finished protect run, for so many training examples. Raises BadInput for what cannot be that."""
    path = identity.intact(folder, done, identity.NOISE)
    arrays = files.read_arrays(path, Perturbation._fields)
    delta, row, mask = (arrays[name] for name in ("delta", "row", "mask"))
    what = f"{path} is not the noise of {count:,} examples"
    require(row.shape == mask.shape == (count,), f"{what}: its rows are {list(row.shape)}, its mask is {list(mask.shape)}")
    require(np.issubdtype(row.dtype, np.integer) and mask.dtype == bool, f"{what}: rows of {row.dtype}, a mask of {mask.dtype}")
    inside = not len(row) or (row.min() >= 0 and row.max() < len(delta))
    require(inside, f"{what}: its rows lie in {row.min()}..{row.max()}, and there are {len(delta):,} tables of noise")
    real = np.issubdtype(delta.dtype, np.integer) or (np.issubdtype(delta.dtype, np.floating) and np.isfinite(delta).all())
    require(real, f"{what}: it holds values that are no finite numbers")
    return Perturbation(**{name: jnp.asarray(array) for name, array in arrays.items()})


def save_forget(folder: Path, forget: np.ndarray) -> None:
    files.write_array(folder / identity.FORGET, forget)


def forget(folder: Path, done: dict, count: int) -> np.ndarray:
    """Mask [N] of what a finished unlearn run forgot. Raises BadInput for another mask than it was run with."""
    path = identity.intact(folder, done, identity.FORGET)
    mask = files.read_array(path)
    require(mask.dtype == bool and mask.shape == (count,), f"{path} is no mask [{count}], but {mask.dtype} {list(mask.shape)}")
    identity.same(path, done["config"].get("forget_digest"), identity.digest(mask), f"{folder} was asked to forget")
    return sets.check_forget(mask, count)
