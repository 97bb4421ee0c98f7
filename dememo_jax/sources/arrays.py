"""Data sets that are plain arrays, scikit-learn's digits or an `.npz`, and the check of all arrays."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dememo_jax import files, values
from dememo_jax.errors import BadInput, require
from dememo_jax.sources import words
from dememo_jax.sources.splits import Split, fingerprint, memory

KEYS = ("x_train", "y_train", "x_test", "y_test")
ALIASES = {  # as other collections name them
    "x_train": ("X_train", "train_images", "train_x"), "y_train": ("Y_train", "train_labels", "train_y"),
    "x_test": ("X_test", "test_images", "test_x"), "y_test": ("Y_test", "test_labels", "test_y"),
}  # fmt: skip
NAMES = "class_names"
CHANNELS = (1, 3, 4)


def read(name: str) -> tuple[np.ndarray, ...]:
    """x_train, y_train, x_test, y_test of `"digits"` or of a path to an `.npz`.

    Greys [N, H, W] get a channel, and floats that only NumPy knows (big-endian, extended) become float32.
    """
    if name == "digits":
        return _digits()
    x, y, x_test, y_test = _npz(Path(name))
    if x.ndim == x_test.ndim == 3:
        x, x_test = x[..., None], x_test[..., None]
    return _native(x), y, _native(x_test), y_test


def names(name: str) -> list[str]:
    """The classes' names in the order of their numbers: the `class_names` of an `.npz`, where it has them."""
    if name == "digits":
        return []
    found = _members(Path(name), (NAMES,)).get(NAMES)
    if found is None:
        return []
    plain = found.ndim == 1 and found.dtype.kind == "U"
    require(plain, f"{name}: {NAMES} must be a list of strings, got {found.dtype} {list(found.shape)}")
    listed = [words.composed(str(one)) for one in found]
    require(len(set(listed)) == len(listed), f"{name}: {NAMES} has a name twice: {', '.join(listed)}")
    return listed


def _native(x: np.ndarray) -> np.ndarray:
    known = x.dtype.isnative and x.dtype.itemsize <= 8
    return x if known or not np.issubdtype(x.dtype, np.floating) else x.astype(np.float32)


def split(name: str, x: np.ndarray, y: np.ndarray) -> Split:
    """Arrays in memory as one split, for a stream."""
    digest = fingerprint(*(np.ascontiguousarray(part).tobytes() for part in (x, y)))
    return Split(name, len(y), int(y.max()) + 1, x.shape[1:], lambda i: (x[i], int(y[i])), digest)


def check(x_train, y_train, x_test, y_test, *, where: str) -> None:
    """Raise BadInput unless the arrays are a classification set of images as `load` promises."""
    for x, y, part in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        name = f"{where}: x_{part}"
        require(x.ndim == 4, f"{name} must have rank 4, [N, H, W, C], or all 3, [N, H, W] of greys; got shape {list(x.shape)}")
        require(len(x) > 0, f"{name} has no images")
        require(min(x.shape) > 0, f"{name} has images without pixels, shape {list(x.shape)}")
        first = x.shape[1] in CHANNELS and x.shape[3] not in CHANNELS and x.shape[3] > x.shape[1]
        require(not first, f"{name} looks like [N, C, H, W], {list(x.shape)}; store [N, H, W, C], x.transpose(0, 2, 3, 1)")
        values.check(x, name)
        name = f"{where}: y_{part}"
        values.check_labels(y, len(x), name)
        require(np.issubdtype(y.dtype, np.integer), f"{name} must be integers, got {y.dtype}")
    require(
        x_train.shape[1:] == x_test.shape[1:],
        f"{where}: train and test images differ in shape, {list(x_train.shape[1:])} and {list(x_test.shape[1:])}",
    )
    present = np.unique(y_train)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    require(len(present) > 1, f"{where}: y_train has a single class; at least two are needed")
    if len(gaps):
        raise BadInput(
            f"{where}: y_train has labels out of range: up to {present[-1]} but none is {gaps[0]}; renumber them 0..K-1"
        )
    require(y_test.max() <= present[-1], f"{where}: y_test has labels out of range: {y_test.max()}, expected 0..{present[-1]}")


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    images = (x / 16).reshape(-1, 8, 8, 1).astype(np.float32)  # sixteen grey levels
    x_train, x_test, y_train, y_test = train_test_split(images, y, test_size=0.25, stratify=y, random_state=0)
    return x_train, y_train, x_test, y_test


def _npz(path: Path):
    require(path.suffix == ".npz", f"{path}: data files must be .npz, got {path.suffix or 'no suffix'!r}")
    wanted = {key: (key, *ALIASES[key]) for key in KEYS}
    arrays = _members(path, [alias for aliases in wanted.values() for alias in aliases])
    found = {key: next((arrays[name] for name in aliases if name in arrays), None) for key, aliases in wanted.items()}
    missing = [key for key in KEYS if found[key] is None]
    if missing:
        have = ", ".join(_open(path, lambda file: list(file)))
        raise BadInput(f"{path}: missing {', '.join(missing)}; expected {', '.join(KEYS)}, found {have}")
    return tuple(found[key] for key in KEYS)


def _members(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the wanted arrays that the file has."""
    found = _open(path, lambda file: {key: file[key] for key in wanted if key in file})
    plain = all(isinstance(array, np.ndarray) for array in found.values())
    require(plain, f"{path}: not a readable .npz of plain arrays (a member is no array)")
    return found


def _open(path: Path, read: Callable[[Any], Any]) -> Any:
    """What `read` finds in the archive; BadInput when it cannot be read, is encrypted, damaged, or larger than the memory."""
    require(path.is_file(), f"{path}: no such file; --data takes digits, a TFDS name, an .npz or a folder of images")
    require(zipfile.is_zipfile(path), f"{path}: not a readable .npz of plain arrays (it is no zip archive, or a truncated one)")
    try:
        with zipfile.ZipFile(path) as archive:
            need, have = sum(member.file_size for member in archive.infolist()), memory()
        require(need < have, f"{path}: its arrays take {need / 1e9:,.1f} GB, this machine has {have / 1e9:,.1f} GB of memory")
        with np.load(path, allow_pickle=False) as file:
            return read(file)
    except BadInput:
        raise
    except files.DAMAGE as error:
        raise BadInput(f"{path}: not a readable .npz of plain arrays ({error or type(error).__name__})") from error
