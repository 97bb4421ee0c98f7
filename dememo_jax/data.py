"""Pure operations on `Dataset`: make, take, draw batches, join a perturbation, name the sets of the paper.

Masks `[N]` say which examples take part. They are arrays, so one compiled program serves every mask of one length.
"""

import hashlib
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import values
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Key, Perturbation
from dememo_jax.values import UNIT, Box


def make(x, y, *, box: Box | None = UNIT) -> Dataset:
    """A full set of images, or of rows of features, [N, ...] with integer labels [N].

    Values live in [0, 1] in the whole library: budgets are in that unit, and noise is clipped to it. So bytes are divided by
    255, and floats must lie in [0, 1] already.

    Args:
        x: [N, ...], uint8, or float in `box`.
        y: [N], whole numbers 0..K-1.
        box: (low, high), numbers or arrays that fit an example, such as the least and largest value of each feature: x is
            brought from there to [0, 1], (x - low) / (high - low). None leaves floats as they are, standardised features
            say: they can be trained on, unlearned, audited and certified; noise, releases and whatever else clips to
            [0, 1] refuse them.
    Returns:
        Float32 images, int32 labels, and the examples' numbers 0..N-1.
    Raises:
        BadInput for values that are not finite or not in the box, bytes of 0 and 1 or floats divided by 255 twice, and labels
            that are no whole numbers from 0 on, one an example. Under jit values are not known and nothing is checked.

    Example:
        >>> make([[-1.0, 3.0], [1.0, 5.0]], [0, 1], box=([-1.0, 3.0], [1.0, 5.0])).x.tolist()
        [[0.0, 0.0], [1.0, 1.0]]
    """
    if not isinstance(x, jax.core.Tracer):
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        require(x.ndim >= 1, "expected examples [N, ...], got a single number")
        values.check(x, "x", box=box)
    made = floats(x)
    if box is not None and not values.is_unit(box):
        low, high = (jnp.asarray(edge, jnp.float32) for edge in box)
        made = jnp.clip((made - low) / (high - low), 0.0, 1.0)
    return Dataset(made, _labels(y, len(x)), jnp.arange(len(x), dtype=jnp.int32))


def rows(x, y) -> Dataset:
    """A full set from rows of tokens [N, L], whole numbers from 0 on, and integer labels [N]."""
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    require(x.ndim == 2 and np.issubdtype(x.dtype, np.integer), f"expected tokens [N, L], got {x.dtype} {list(x.shape)}")
    if x.size and not isinstance(x, jax.core.Tracer):
        least, largest = values.span(x)
        require(least >= 0 and largest < 2**31, f"tokens must lie in 0..2^31 - 1, got {least:.0f}..{largest:.0f}")
    return Dataset(jnp.asarray(x, jnp.int32), _labels(y, len(x)), jnp.arange(len(x), dtype=jnp.int32))


def floats(x) -> Array:
    """Images, uint8 or float in [0, 1], as float32 in [0, 1]."""
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
    kind = x.dtype
    require(kind == np.uint8 or jnp.issubdtype(kind, jnp.floating), f"images must be uint8 or float, got {kind}")
    # NumPy casts on the host: JAX takes neither big-endian nor extended types.
    x = jnp.asarray(x if isinstance(x, jax.Array) else x.astype(np.uint8 if kind == np.uint8 else np.float32))
    return x.astype(jnp.float32) / 255 if kind == np.uint8 else x.astype(jnp.float32)


def take(data: Dataset, at: Array | np.ndarray) -> Dataset:
    """The examples at positions `at` [B]. Outside jit, raises BadInput for positions that `data` does not have."""
    if not isinstance(at, jax.core.Tracer):
        place = np.asarray(at)
        whole = np.issubdtype(place.dtype, np.integer)
        require(whole or not place.size, f"positions must be whole numbers, got {place.dtype}; for a mask use data.select")
        outside = place[(place < 0) | (place >= len(data.x))]
        require(not outside.size, f"there is no position {outside[:1]}: the examples are at 0..{len(data.x) - 1}")
        at = jnp.asarray(place, jnp.int32)
    return Dataset(*(jnp.take(part, at, axis=0) for part in data))


def select(data: Dataset, mask) -> Dataset:
    """The examples where `mask`, bool [N]; on concrete arrays only, since the length depends on the mask."""
    mask = np.asarray(mask)
    require(mask.dtype == bool and mask.shape == (len(data.x),), _not_a_mask("a mask", mask, len(data.x)))
    return take(data, np.flatnonzero(mask))


def perturb(data: Dataset, perturbation: Perturbation | None, join: Callable[[Array, Array], Array] = operator.add) -> Dataset:
    """Join data with the noise of its examples: clip(x + delta[row], 0, 1) where the mask says so.

    The sign of the noise is kept. (The published code drops all negative noise when it writes the images.) `join` is
    for tables that are not added, such as those of a learnability lock.
    Tokens are no shades of grey: where x [N, L] is of whole numbers, delta is the difference between the tokens of the
    changed text and of the given one, whole numbers of the same shape, and nothing is clipped.
    Outside jit, raises BadInput for noise of a smaller set and images beyond [0, 1] (see `make`); always for another shape, and
    for whole numbers and floats mixed.
    """
    if perturbation is None:
        return data
    check_covers(perturbation, data)
    check_unit(data)
    tokens = jnp.issubdtype(data.x.dtype, jnp.integer)
    alike = jnp.issubdtype(perturbation.delta.dtype, jnp.integer) == tokens
    require(
        alike,
        f"noise of type {perturbation.delta.dtype} does not fit data of type {data.x.dtype}: tokens are changed by whole "
        "numbers, images by floats",
    )
    shape, image = perturbation.delta.shape[1:], data.x.shape[1:]
    fits = shape[:-1] == image[:-1] and shape[-1:] in (image[-1:], *(() if tokens else ((1,),)))
    what = "tokens" if tokens else "images"
    require(join is not operator.add or fits, f"noise of shape {list(shape)} does not fit {what} of shape {list(image)}")
    delta = perturbation.delta[perturbation.row[data.index]].astype(data.x.dtype)
    mask = perturbation.mask[data.index].reshape(-1, *[1] * (data.x.ndim - 1))
    joined = join(data.x, delta)
    return data._replace(x=jnp.where(mask, joined if tokens else jnp.clip(joined, 0.0, 1.0), data.x))


def joined(*parts: Dataset) -> Dataset:
    """One full set of several, one after another, numbered anew."""
    x, y = (jnp.concatenate([getattr(part, name) for part in parts]) for name in ("x", "y"))
    return Dataset(x, y, jnp.arange(len(y), dtype=jnp.int32))


def repeated(train: Dataset, test: Dataset) -> np.ndarray:
    """Mask [N'] of the test examples that are training examples too, value for value, whatever their labels.

    They were seen in training, so no number on them is one on unseen data. A few values of every example are looked at
    first, so that this takes no time where there are none.
    """
    x, shown = (np.asarray(part.x).reshape(len(part.x), -1) for part in (train, test))
    if x.shape[1:] != shown.shape[1:] or x.dtype != shown.dtype:
        return np.zeros(len(shown), bool)
    at = np.unique(np.linspace(0, x.shape[1] - 1, 16).astype(int))
    probes, tested = ([row.tobytes() for row in np.ascontiguousarray(part[:, at])] for part in (x, shown))
    both = set(probes) & set(tested)
    known = {_hashed(x[i]) for i, probe in enumerate(probes) if probe in both}
    return np.array([probe in both and _hashed(shown[i]) in known for i, probe in enumerate(tested)], bool)


def _hashed(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


# --- batches -----------------------------------------------------------------------------------------------------


def uniform(key: Key, step: int | Array, data: Dataset, batch: int, mask: Array | None = None) -> Dataset:
    """A batch of independent draws, with replacement, from the examples where `mask`."""
    key = jax.random.fold_in(key, step)
    if mask is None:
        return take(data, jax.random.randint(key, (batch,), 0, len(data.y)))
    members = jnp.argsort(~mask, stable=True)  # packed at the front
    return take(data, members[jax.random.randint(key, (batch,), 0, mask.sum())])


def shuffled(key: Key, step: int | Array, data: Dataset, batch: int, mask: Array | None = None) -> Dataset:
    """Batch number `step` of shuffled passes over the examples where `mask`.

    A pass has ceil(count / batch) batches, each pass has a shuffle of its own; the last batch is filled up from the
    start of its pass, and a set smaller than a batch repeats within it.
    """
    mask = jnp.ones(len(data.y), bool) if mask is None else mask
    count = mask.sum()
    per_pass = -(-count // batch)
    return part_of_pass(pass_order(key, step // per_pass, mask), step % per_pass, data, batch, count)


def pass_order(key: Key, number: int | Array, mask: Array) -> Array:
    """Positions [N] in the order of shuffled pass `number`: the examples where `mask` stand first."""
    noise = jax.random.uniform(jax.random.fold_in(key, number), mask.shape)
    return jnp.argsort(jnp.where(mask, noise, jnp.inf))


def part_of_pass(order: Array, place: int | Array, data: Dataset, batch: int, count: int | Array) -> Dataset:
    """Batch `place` of a pass over `count` examples in that order."""
    return take(data, order[(place * batch + jnp.arange(batch)) % count])


def steps(count: int, batch: int, epochs: int) -> int:
    """How many steps `epochs` shuffled passes over `count` examples take."""
    return math.ceil(count / batch) * epochs


def blocks(count: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions [n, batch] that go once over 0..count-1 in order, and a mask [n, batch] of those that are not padding."""
    at = np.arange(math.ceil(count / batch) * batch).reshape(-1, batch)
    return np.minimum(at, count - 1).astype(np.int32), at < count


# --- masks -------------------------------------------------------------------------------------------------------


def of_classes(labels, classes: Sequence[int]) -> np.ndarray:
    """Mask [N] of the examples of the given classes; BadInput names a class that no example has."""
    labels = np.asarray(labels)
    missing = sorted(set(classes) - set(np.unique(labels).tolist()))
    absent = ", ".join(map(str, missing))
    require(not missing, f"class {absent} does not exist: labels run from {labels.min()} to {labels.max()}")
    return np.isin(labels, list(classes))


def share_of(key: Key, mask, labels, share: float) -> np.ndarray:
    """A random `share` in (0, 1] of the masked examples of every class, rounded to the nearest count."""
    require(0.0 < share <= 1.0, f"share must lie in (0, 1], got {share}")
    labels, mask = np.asarray(labels), np.asarray(mask)
    order = np.asarray(jax.random.permutation(key, len(labels)))
    chosen = np.zeros_like(mask)
    for label in np.unique(labels[mask]):
        members = order[(mask & (labels == label))[order]]
        chosen[members[: round(share * len(members))]] = True
    return chosen


def count_classes(data: Dataset, classes: int | None = None) -> int:
    """K: `classes` where it is given, else one more than the largest label; BadInput under jit, where that is not known."""
    if classes is not None:
        return classes
    require(data.y is not None and not isinstance(data.y, jax.core.Tracer), "labels are not known here: pass classes=")
    return int(np.asarray(data.y).max(initial=-1)) + 1


def check_whole(data: Dataset, classes: int) -> None:
    """BadInput unless `data` is a whole set, numbered 0..N-1, with values in [0, 1] and labels 0..classes-1.

    Indexing clamps in silence, so noise would land on others. Under jit values are not known and nothing is checked.
    """
    require(data.y is not None, "labels are missing: this needs the class of every example, [N] integers in data.y")
    if isinstance(data.y, jax.core.Tracer):
        return
    check_unit(data)
    least = int(np.asarray(data.y).min())
    require(least >= 0, f"a label is {least}: labels are missing, or not numbered from 0; expected 0..{classes - 1}")
    largest, index = int(np.asarray(data.y).max()), np.asarray(data.index)
    require(largest < classes, f"labels run to {largest}, beyond the {classes} classes: pass classes={largest + 1}")
    whole = np.array_equal(index, np.arange(len(index)))
    require(
        whole, "noise is made for a whole set, numbered 0..N-1: protect part of it by a mask, or number it anew by data.make"
    )


def check_labels(labels: Array, outputs: int) -> None:
    """BadInput for labels beyond the outputs of a network, or negative ones [N] (in rows [N, T] those do not count).

    A loss of such a label is NaN, or the loss of another class.
    """
    found = np.asarray(labels)
    least, largest = (int(found.min()), int(found.max())) if found.size else (0, 0)
    values.check_outputs(largest, outputs)
    require(least >= 0 or found.ndim > 1, f"a label is {least}: labels are missing, or not numbered from 0")


def check_covers(perturbation: Perturbation | None, data: Dataset) -> None:
    """BadInput when the perturbation was made for a smaller set; nothing is checked under jit."""
    if perturbation is not None and not isinstance(data.index, jax.core.Tracer):
        largest, count = int(np.asarray(data.index).max(initial=-1)), len(perturbation.mask)
        require(largest < count, f"example {largest} has no noise: the perturbation is for a set of {count}")


def check_unit(data: Dataset) -> None:
    """BadInput for images that do not lie in [0, 1]; of tokens, and under jit, nothing is checked."""
    if isinstance(data.x, jax.core.Tracer) or not jnp.issubdtype(data.x.dtype, jnp.floating) or not data.x.size:
        return
    least, largest = values.span(data.x)
    require(
        least >= -1e-6 and largest <= 1 + 1e-6,
        f"the data runs from {least:.4g} to {largest:.4g}, and noise is made for, and clipped to, [0, 1]: "
        "bring it there by data.make(x, y, box=(low, high))",
    )


def check_mask(mask, count: int) -> Array:
    """`mask` as bool [count], all of it for None; BadInput when it is empty, not boolean or of another length.

    Under jit its values are not known, and an empty one passes.
    """
    if mask is None:
        return jnp.ones(count, bool)
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    require(mask.shape == (count,) and mask.dtype == bool, _not_a_mask("a mask", mask, count))
    require(isinstance(mask, jax.core.Tracer) or np.asarray(mask).any(), "the mask is empty: it protects no example")
    return jnp.asarray(mask)


def check_forget(mask, count: int) -> np.ndarray:
    """`mask` as bool [count], or BadInput when it is empty, covers everything, or has another length or type.

    Under jit its values are not known: only length and type are checked, and it comes back as it is.
    """
    mask = mask if isinstance(mask, jax.core.Tracer) else np.asarray(mask)
    require(mask.shape == (count,) and mask.dtype == bool, _not_a_mask("a forget mask", mask, count))
    if isinstance(mask, jax.core.Tracer):
        return mask  # type: ignore[return-value]
    require(mask.any(), "the forget set is empty: name at least one example to forget")
    require(not mask.all(), "the forget set covers all data: nothing would be left to retain")
    return mask


def _not_a_mask(what: str, mask, count: int) -> str:
    got = f"{what} must be boolean, one entry an example, [{count}]; got {mask.dtype} {list(mask.shape)}"
    if mask.dtype == bool:
        return got
    return f"{got}. Make positions a mask by np.isin(np.arange({count}), positions), and zeros and ones by .astype(bool)"


def _labels(y, count: int) -> Array:
    if not isinstance(y, jax.core.Tracer):
        y = y if isinstance(y, jax.Array) else np.asarray(y)
        values.check_labels(y, count)
    return jnp.asarray(y, jnp.int32)
