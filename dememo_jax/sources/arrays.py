"""Data sets that are plain arrays, scikit-learn's digits or an `.npz`, and the check of all arrays."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dememo_jax.errors import BadInput, require
from dememo_jax.sources.splits import Split, fingerprint

KEYS = ("x_train", "y_train", "x_test", "y_test")


def read(name: str) -> tuple[np.ndarray, ...]:
    """x_train, y_train, x_test, y_test of `"digits"` or of a path to an `.npz`."""
    return _digits() if name == "digits" else _npz(Path(name))


def split(name: str, x: np.ndarray, y: np.ndarray) -> Split:
    """Arrays in memory as one split, for a stream."""
    digest = fingerprint(*(np.ascontiguousarray(part).tobytes() for part in (x, y)))
    return Split(name, len(y), int(y.max()) + 1, x.shape[1:], lambda i: (x[i], int(y[i])), digest)


def check(x_train, y_train, x_test, y_test, *, where: str) -> None:
    """Raise BadInput unless the arrays are a classification set of images as `load` promises."""
    for x, y, part in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        name = f"{where}: x_{part}"
        require(x.ndim == 4, f"{name} must have rank 4, [N, H, W, C]; got shape {list(x.shape)}")
        require(len(x) > 0, f"{name} has no images")
        floats = np.issubdtype(x.dtype, np.floating)
        require(x.dtype == np.uint8 or floats, f"{name} must be uint8 or float in [0, 1], got {x.dtype}")
        if floats:
            require(not np.isnan(x).any(), f"{name} has NaN pixels; every pixel must be a number in [0, 1]")
            require(x.min() >= 0, f"{name} has negative pixels (least {x.min():g}); expected floats in [0, 1]")
            require(x.max() <= 1, f"{name} has floats above 1 (largest {x.max():g}); divide by 255 or store uint8")
        name = f"{where}: y_{part}"
        require(y.ndim == 1 and len(y) == len(x), f"{name} must be [{len(x)}], one label an image; got {list(y.shape)}")
        require(np.issubdtype(y.dtype, np.integer), f"{name} must be integers, got {y.dtype}")
        require(y.min() >= 0, f"{name} has labels out of range: {y.min()} is negative, expected 0..K-1")
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
    require(path.is_file(), f"{path}: no such file; --data takes digits, a TFDS name, an .npz or a folder of images")
    require(zipfile.is_zipfile(path), f"{path}: not a readable .npz of plain arrays (it is no zip archive, or a truncated one)")
    try:
        with np.load(path, allow_pickle=False) as file:
            found, arrays = list(file), {key: file[key] for key in KEYS if key in file}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: not a readable .npz of plain arrays ({error})") from error
    missing = [key for key in KEYS if key not in arrays]
    require(not missing, f"{path}: missing {', '.join(missing)}; expected {', '.join(KEYS)}, found {', '.join(found)}")
    plain = all(isinstance(array, np.ndarray) for array in arrays.values())
    require(plain, f"{path}: not a readable .npz of plain arrays (a member is no array)")
    return tuple(arrays[key] for key in KEYS)
