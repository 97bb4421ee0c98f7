"""What the rows, labels and requests of linear heads must look like; everything is checked before any work."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Array


class Removal(NamedTuple):
    """A request to remove, compared with what had been removed before."""

    forget: np.ndarray  # [N] bool, newly removed
    removed: np.ndarray  # [N] bool, removed after the request
    already: int  # asked for, and removed before
    note: str


class Correction(NamedTuple):
    """Old and new rows, and where they differ among the rows that are left."""

    x: Array
    y: Array
    x_new: Array
    y_new: Array
    changed: np.ndarray  # [N] bool


def removal(forget: Any, gone: np.ndarray) -> Removal:
    """Compare a mask [N] or indices with the rows that are gone; BadInput where nothing would be left."""
    asked = marked(forget, len(gone))
    removed, already = asked | gone, int((asked & gone).sum())
    require(not removed.all(), "every example would be removed: nothing would be left to fit")
    if not (asked & ~gone).any():
        note = f"nothing to do: all {already} were removed before" if already else "nothing to do: no example was named"
    else:
        note = f"{already} of {int(asked.sum())} had been removed before" if already else ""
    return Removal(asked & ~gone, removed, already, note)


def correction(shape: tuple[int, int], classes: int, gone: np.ndarray, x: Any, y: Any, x_new: Any, y_new: Any) -> Correction:
    """Check the old and the new rows [N, F] and find where they differ; BadInput where they do not."""
    x, y, x_new, y_new = (jnp.asarray(part) for part in (x, y, x_new, y_new))
    for rows, labels in ((x, y), (x_new, y_new)):
        check_shape(rows, labels, shape)
        check_data(rows, labels, ~gone, classes)
    changed = ~gone & (np.asarray(y != y_new) | np.asarray((x != x_new).any(axis=1)))
    require(changed.any(), "no example that is left differs between the old and the new rows: there is nothing to correct")
    return Correction(x, y, x_new, y_new, changed)


def marked(forget: Any, count: int) -> np.ndarray:
    """A mask [count] of a mask or of indices."""
    asked = np.asarray(forget)
    if asked.dtype == bool:
        require(asked.shape == (count,), f"a mask must have one entry an example, [{count}]; got {list(asked.shape)}")
        return asked
    whole = np.issubdtype(asked.dtype, np.integer) or asked.size == 0
    require(whole and asked.ndim <= 1, f"name examples by a boolean mask [{count}] or whole numbers, got {asked.dtype}")
    at = np.atleast_1d(asked).astype(np.int64)
    bad = at[(at < 0) | (at >= count)]
    require(not bad.size, f"example {bad[0] if bad.size else ''} does not exist: there are {count}, numbered from 0")
    twice = len(np.unique(at)) < len(at)
    require(not twice, "an example is named twice: give each index once, and zeros and ones as a mask, by .astype(bool)")
    mask = np.zeros(count, bool)
    mask[at] = True
    return mask


def check_shape(x: Array, y: Array, shape: tuple[int, int]) -> None:
    """BadInput unless features are [N, F] and labels [N] as in the fit."""
    require(
        x.shape == shape, f"features must be [N, F] = {list(shape)} as in the fit, removed rows included; got {list(x.shape)}"
    )
    require(y.shape == shape[:1], f"labels must be [{shape[0]}] as in the fit, got {list(y.shape)}")


def check_data(x: Array, y: Array, keep: np.ndarray, classes: int) -> None:
    """BadInput for unusable rows among those in `keep`; the others may hold anything."""
    require(x.ndim == 2 and x.shape[1] >= 1, f"features must be [N, F], got {list(x.shape)}")
    require(jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4, f"features must be float32 or more, got {x.dtype}")
    require(y.shape == (len(x),), f"labels must be one an example, [{len(x)}]; got {list(y.shape)}")
    require(jnp.issubdtype(y.dtype, jnp.integer), f"labels must be whole numbers, got {y.dtype}")
    require(keep.any(), "every example is removed: nothing is left to fit")
    labels = np.asarray(y)[keep]
    within = labels.min() >= 0 and labels.max() < classes
    require(within, f"labels must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    finite = np.asarray(jnp.isfinite(x).all(axis=1))[keep]
    require(finite.all(), f"features must be finite: row {int(np.flatnonzero(keep)[np.argmin(finite)])} holds NaN or infinity")


def check_same(found: float, recorded: float, rounding: float) -> None:
    """BadInput where the gradient at a state's weights is larger than the state says: the data are not its own."""
    require(
        found <= recorded * (1 + 1e-6) + 2 * rounding,
        f"these are not the data that the state was made with: the gradient there is {found:.4g}, and can be {recorded:.4g} at "
        "most. Pass rows and labels as they were after the last request",
    )


def check_finite(params: Any) -> None:
    """NonFinite unless the weights are finite."""
    if not bool(np.isfinite(np.asarray(params)).all()):
        raise NonFinite("a Hessian could not be inverted in this precision: raise lam, scale the features, or use float64")
