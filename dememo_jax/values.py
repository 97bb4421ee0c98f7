"""What examples and their labels may hold, looked at where arrays enter: one check for the library and for files."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax.errors import BadInput, require

Box = tuple[Any, Any]  # the lowest and the highest value: numbers, or arrays that fit an example
UNIT: Box = (0.0, 1.0)


def check(x, name: str, *, box: Box | None = UNIT) -> None:
    """BadInput, naming the array, unless examples are uint8, or finite floats in `box` (None: any).

    Bytes of 0 and 1 and floats up to 1/255 are refused as well: images of another scale, nearly black when taken as they are.
    """
    if x.dtype == np.uint8:
        require(box is None or is_unit(box), f"{name} has bytes, which are divided by 255: a box is for floats")
        dark = x.size > 0 and box is not None and span(x)[1] == 1
        require(not dark, f"{name} has no byte above 1, so its images are nearly black: multiply zeros and ones by 255")
        return
    hint = " (store bytes as uint8)" if jnp.issubdtype(x.dtype, jnp.integer) else ""
    require(jnp.issubdtype(x.dtype, jnp.floating), f"{name} must be uint8 or float in [0, 1], got {x.dtype}{hint}")
    if x.size:
        least, largest = span(x)
        require(not math.isnan(least), f"{name} has NaN pixels; every pixel must be a number in [0, 1]")
        _check_range(x, name, least, largest, box)


def span(x) -> tuple[float, float]:
    """The least and the largest value of an array that is not traced; NaN where one is NaN."""
    with jax.ensure_compile_time_eval():  # also while something else is traced
        return float(x.min()), float(x.max())


def is_unit(box: Box) -> bool:
    """Whether a box is [0, 1], given as two numbers."""
    return box is UNIT or (np.ndim(box[0]) == np.ndim(box[1]) == 0 and tuple(map(float, box)) == UNIT)


def _check_range(x, name: str, least: float, largest: float, box: Box | None) -> None:
    if box is None:
        require(math.isfinite(least) and math.isfinite(largest), f"{name} has infinite values, from {least:g} to {largest:g}")
    elif is_unit(box):
        cure = "of features, pass box=(low, high) or box=None to data.make"
        require(least >= 0, f"{name} has negative pixels (least {least:g}); expected floats in [0, 1]; {cure}")
        require(largest <= 1, f"{name} has floats above 1 (largest {largest:g}); divide by 255 or store uint8; {cure}")
        twice = 0 < largest <= (1 + 1e-5) / 255
        require(not twice, f"{name} has no value above 1/255 (largest {largest:g}), as if divided by 255 twice; {cure}")
    else:
        low, high = (np.asarray(edge, np.float64) for edge in box)
        sound = np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()
        require(sound, "a box is (low, high), finite, with low < high everywhere")
        given = np.asarray(x, np.float64)
        outside = int(((given < low) | (given > high)).sum())
        require(not outside, f"{name} runs from {least:g} to {largest:g}: {outside} values lie outside of its box")


def check_labels(y, count: int, name: str = "y", *, outputs: int | None = None) -> None:
    """BadInput, naming the array and the cure, unless labels are whole numbers from 0 on, one for each of `count` examples.

    outputs: of the network that is to tell the classes apart, which must have one for each.
    """
    y = np.asarray(y)
    if y.shape != (count,):
        raise BadInput(f"{name} must be [{count}], one label an image; got {list(y.shape)}{_cure(y, count, name)}")
    if y.dtype.kind in "USO":
        raise BadInput(f"{name} must be integers, got {y.dtype}: number them, names, y = np.unique(y, return_inverse=True)")
    fraction = jnp.issubdtype(y.dtype, jnp.floating)
    require(fraction or y.dtype == bool or jnp.issubdtype(y.dtype, jnp.integer), f"{name} must be integers, got {y.dtype}")
    if not count:
        return
    whole = not fraction or bool((np.asarray(y) == np.floor(y)).all())
    require(
        whole, f"{name} must be integers, got {y.dtype} with values such as {np.asarray(y)[np.asarray(y) != np.floor(y)][:1]}"
    )
    least, largest = int(y.min()), int(y.max())
    require(least >= 0, f"{name} has labels out of range: {least} is negative, expected 0..K-1")
    require(largest < 2**31, f"{name} has labels out of range: up to {largest}, expected 0..K-1")
    if outputs is not None:
        check_outputs(largest, outputs)


def check_outputs(largest: int, outputs: int) -> None:
    """BadInput unless a network has an output for each of the labels 0..largest."""
    sentence = f"labels run to {largest}, and the network has {outputs} outputs: it needs one for each class, {largest + 1}"
    require(largest < outputs, sentence)


def _cure(y, count: int, name: str) -> str:
    if y.shape == (count, 1):
        return f": pass {name}[:, 0]"
    one_hot = y.ndim == 2 and len(y) == count and y.dtype.kind in "biuf"
    one_hot = one_hot and bool(np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all())
    return f": one-hot rows, pass {name}.argmax(1)" if one_hot else ""
